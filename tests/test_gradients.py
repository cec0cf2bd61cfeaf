"""Gradients: finite differences, the shared backward, and what theory says of the Jacobian."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from problems import Case, cases
from torch.autograd import gradcheck

from fairopt import (
    QP,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    InfeasibleError,
    MeanResidual,
    PredictiveEquality,
    Solution,
    formulate,
    project,
    solve,
)
from fairopt.backends import Numba
from fairopt.optimality.derivative import adjoint

NOTIONS = [DemographicParity, EqualOpportunity, PredictiveEquality, EqualizedOdds, MeanResidual]


def data(n: int = 30, batch: int | None = None, groups: int = 3) -> tuple[torch.Tensor, ...]:
    """Scores, groups, targets and weights in float64, far from the next active set."""
    generator = torch.Generator().manual_seed(n + groups)
    shape = (n,) if batch is None else (batch, n)
    codes = torch.arange(n) % groups
    scores = 0.1 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2 * codes
    targets = (torch.rand(n, generator=generator) < 0.5).double()
    weights = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    return scores, codes, targets, weights


@pytest.mark.parametrize("notion", NOTIONS)
@pytest.mark.parametrize("compare", ["pairwise", "overall"])
@pytest.mark.parametrize("batch", [None, 3])
def test_gradcheck_of_every_input(notion: Any, compare: Any, batch: int | None) -> None:
    scores, groups, targets, weights = data(batch=batch)
    targets = targets.expand_as(scores).clone()
    tolerance = torch.tensor(0.03, dtype=torch.float64)
    lower = torch.zeros_like(scores)
    upper = torch.full_like(scores, 0.9)
    real = notion is MeanResidual
    inputs = [scores, tolerance, lower, upper, weights, *([targets] if real else [])]
    for tensor in inputs:
        tensor.requires_grad_()

    def fair(scores, tolerance, lower, upper, weights, *real_targets):  # type: ignore[no-untyped-def]
        return project(
            scores, groups, notion(tolerance, compare=compare),
            real_targets[0] if real_targets else targets,
            bounds=(lower, upper), weights=weights,
        )  # fmt: skip

    before = fair(*inputs).detach()
    assert ((before == 0.9) | (before == 0.0)).any(), "some bound should be active"
    assert gradcheck(fair, inputs, atol=1e-6, rtol=1e-5)


def test_gradcheck_of_what_the_batch_shares() -> None:
    scores, groups, _, _ = data(batch=4)
    scores.requires_grad_()
    tolerance = torch.tensor(0.03, dtype=torch.float64, requires_grad=True)
    upper = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    weights = data()[3].requires_grad_()  # (n,), shared by four problems

    def fair(scores, tolerance, upper, weights):  # type: ignore[no-untyped-def]
        return project(
            scores, groups, DemographicParity(tolerance), bounds=(0.0, upper), weights=weights
        )

    assert gradcheck(fair, (scores, tolerance, upper, weights), atol=1e-6, rtol=1e-5)
    # The gradient of a shared input is the sum, not the mean, of those of the problems.
    fair(scores, tolerance, upper, weights).sum().backward()
    single = 0.0
    for one in scores.detach():
        t = tolerance.detach().clone().requires_grad_()
        fair(one, t, upper.detach(), weights.detach()).sum().backward()
        single += t.grad.item()
    assert tolerance.grad.item() == pytest.approx(single, rel=1e-9)


def strictly_complementary(problem: QP, solution: Solution) -> bool:
    """Whether no multiplier is zero but for rounding: then two roundings see one active set."""
    d = problem.diagonal()
    scale = float((problem.q / d).abs().max()) + 1e-300
    push = (solution.bound_dual / d).abs()
    held = (solution.x == problem.lb) | (solution.x == problem.ub)
    apart = problem.lb < problem.ub
    y = (solution.row_dual * problem.rows.norms(1 / d).square()).abs()
    unequal = problem.l < problem.u
    return bool((push > 1e-9 * scale)[held & apart].all()) and bool(
        ((y == 0) | (y > 1e-9 * scale))[unequal].all()
    )


@pytest.mark.slow
@settings(max_examples=600, suppress_health_check=list(HealthCheck), deadline=None)
@given(cases(largest=120), st.integers(0, 2**31))
def test_numba_backward_equals_the_shared_one(case: Case, seed: int) -> None:
    problem = formulate(
        case.constraints, case.scores, case.groups, case.targets, bounds=case.bounds,
        weights=case.weights,
    )  # fmt: skip
    backend = Numba()
    try:
        solution = backend.solve(problem)
    except InfeasibleError:
        assume(False)
    assume(strictly_complementary(problem, solution))
    g = torch.from_numpy(np.random.default_rng(seed).normal(size=solution.x.shape))
    native, shared = backend.vjp(problem, solution, g), adjoint(problem, solution, g)
    size = float(g.abs().max()) / float(problem.P.min())
    assert float((native.v - shared.v).abs().max()) <= 1e-9 * size
    # nu is the shortest one in both: compare what it does, row by row of the cells.
    tilt_native = problem.rows.transpose_apply(native.nu)
    tilt_shared = problem.rows.transpose_apply(shared.nu)
    free = shared.v != 0
    assert float(((tilt_native - tilt_shared) * free).abs().max()) <= 1e-7 * float(
        g.abs().max() * problem.P.max() / problem.P.min()
    )


def jacobian(scores: torch.Tensor, groups: torch.Tensor, tolerance: float) -> torch.Tensor:
    return torch.autograd.functional.jacobian(
        lambda s: project(s, groups, DemographicParity(tolerance), bounds=(0, 1)), scores
    )


@pytest.mark.parametrize("tolerance", [0.0, 0.02, 10.0])
@pytest.mark.parametrize("groups", [2, 5])
def test_jacobian_is_an_orthogonal_projection(groups: int, tolerance: float) -> None:
    scores, codes, _, _ = data(n=40, groups=groups)
    J = jacobian(scores, codes, tolerance)
    torch.testing.assert_close(J, J.T, rtol=0, atol=1e-12)  # symmetric
    torch.testing.assert_close(J @ J, J, rtol=0, atol=1e-12)  # idempotent
    assert torch.linalg.matrix_norm(J, 2) <= 1 + 1e-12


def test_normal_gradients_vanish_and_tangent_ones_pass() -> None:
    n, groups = 60, torch.arange(60) % 2
    scores = (0.3 + 0.01 * torch.arange(n, dtype=torch.float64) / n + 0.3 * groups).requires_grad_()
    fair = project(scores, groups, DemographicParity(0.05), bounds=None)
    normal = torch.where(groups == 0, 1.0, -1.0).double()  # the gradient of the gap
    fair.backward(normal, retain_graph=True)
    assert scores.grad.abs().max() <= 1e-14
    scores.grad = None
    tangent = torch.randn(n, dtype=torch.float64)
    for code in (0, 1):
        tangent[groups == code] -= tangent[groups == code].mean()
    fair.backward(tangent)
    torch.testing.assert_close(scores.grad, tangent, rtol=0, atol=1e-14)


def test_weighted_jacobian_is_a_projection_in_the_metric_of_the_weights() -> None:
    scores, codes, _, weights = data(n=40)
    J = torch.autograd.functional.jacobian(
        lambda s: project(s, codes, DemographicParity(0.02), bounds=(0, 1), weights=weights), scores
    )
    torch.testing.assert_close(J @ J, J, rtol=0, atol=1e-11)
    W = torch.diag(weights)
    torch.testing.assert_close(W @ J, (W @ J).T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("objective", ["l2", "l1", "linf"])
def test_weakly_active_bound_counts_as_inactive(objective: str) -> None:
    """At the bounds, s = 0 and s = 1, dx/ds is 1, and 0 by the bound, whatever torch.clamp does."""
    scores = torch.tensor([0.0, 1.0, 0.5, -0.1, 1.1], dtype=torch.float64, requires_grad=True)
    lower = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    upper = torch.ones(5, dtype=torch.float64, requires_grad=True)
    fair = project(
        scores, torch.tensor([0, 0, 1, 1, 0]), DemographicParity(5.0), bounds=(lower, upper),
        objective=objective, smoothing=0.0 if objective == "l2" else 0.1,
    )  # fmt: skip
    fair.sum().backward()
    assert fair.tolist() == [0.0, 1.0, 0.5, 0.0, 1.0]
    assert scores.grad.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert lower.grad.tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert upper.grad.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_weakly_active_row_counts_as_inactive() -> None:
    # The gap equals the tolerance exactly, with a zero multiplier.
    scores = torch.tensor([0.25, 0.25, 0.75, 0.75], dtype=torch.float64, requires_grad=True)
    tolerance = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 0, 1, 1])
    fair = project(scores, groups, DemographicParity(tolerance), bounds=None)
    fair.backward(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert scores.grad.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert tolerance.grad.item() == 0.0


def test_bounds_that_meet_hold_their_sample() -> None:
    scores = torch.tensor([0.5, 0.2, 0.9, 0.4], dtype=torch.float64, requires_grad=True)
    lower = torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    upper = torch.tensor([0.5, 1.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    fair = project(
        scores, torch.tensor([0, 0, 1, 1]), DemographicParity(9.0), bounds=(lower, upper)
    )
    fair.sum().backward()
    assert scores.grad.tolist() == [0.0, 1.0, 1.0, 1.0]
    assert lower.grad[0] + upper.grad[0] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_right_for_large_inputs_in_threads(dtype: torch.dtype) -> None:
    n = 200_000
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 5, (n,), generator=generator)
    scores = torch.rand(n, generator=generator, dtype=dtype) + 0.1 * groups
    problem = formulate(DemographicParity(0.01), scores, groups, bounds=(0, 1))
    g = torch.randn(1, n, generator=generator, dtype=dtype)
    one, two = Numba(threads=1), Numba(threads=2)
    a, b = one.solve(problem), two.solve(problem)
    exact = 1e-13 if dtype == torch.float64 else 1e-6
    assert (a.x - b.x).abs().max() <= exact
    for backend, solution in ((one, a), (two, b)):
        native, shared = backend.vjp(problem, solution, g), adjoint(problem, solution, g)
        assert (native.v.double() - shared.v).abs().max() <= exact * 10


def test_gradients_reach_tensors_of_a_solved_qp() -> None:
    problem = formulate(DemographicParity(0.01), *data()[:2], bounds=(0, 1))
    tensors = [t.detach().clone().requires_grad_() for t in problem.tensors]
    assert gradcheck(
        lambda *ts: solve(problem.with_tensors(*ts), backend="numba").x, tensors, atol=1e-6
    )
