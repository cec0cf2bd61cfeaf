"""Elastic solutions: the least total violation, by HiGHS, and the nearest point that has it."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import clarabel
import numpy as np
import pytest
import torch
from agreeing import LINEAR, capable, inputs_agree
from conflicting import arrays, conflicting_cases, least_total
from hypothesis import assume, given, settings
from problems import Case
from scipy import sparse
from torch import Tensor
from torch.autograd import gradcheck

import fairopt.solving.cell_means
from fairopt import (
    LP,
    QP,
    Budget,
    Constraint,
    ConvergenceError,
    DemographicParity,
    EqualOpportunity,
    FairnessLayer,
    InfeasibleError,
    MinimumRate,
    ProblemError,
    Solution,
    SparseRows,
    Status,
    UnsupportedProblemError,
    formulate,
    project,
    solve,
)
from fairopt.backends import Numba, is_available
from fairopt.solving.elastic import solve_elastic

seen: Counter[str] = Counter()


def written(case: Case) -> QP:
    """The case as a problem; drawn again where one of its rows is refused at once."""
    try:
        problem = formulate(
            case.constraints, case.scores, case.groups, case.targets, bounds=case.bounds,
            weights=case.weights,
        )  # fmt: skip
    except ProblemError:
        assume(False)
    return problem


def is_nearest(solution: Any) -> None:
    """The optimality conditions of  objective + rho V  within the bounds, from our multipliers.

    Whoever minimises that, and V too, minimises the objective among the points that minimise V.
    """
    problem, x, y = solution.problem, solution.x, solution.row_dual
    found = solution.residuals
    assert float(found.stationarity.max()) <= 1e-9
    assert float(found.dual_sign.max()) == 0.0
    rho = y.abs().amax(-1, keepdim=True)
    value = problem.rows.apply(x)
    scale = problem.rows.absolute().apply(x.abs().amax(-1, keepdim=True).expand_as(x)) + 1e-300
    small = 1e-9 * rho
    above, below = value - problem.u, problem.l - value
    whole = (rho - small).expand_as(y)  # the price of what is exceeded
    assert (y >= whole)[above > 1e-9 * scale].all()
    assert (-y >= whole)[below > 1e-9 * scale].all()
    assert (above[y > small] >= -1e-9 * scale[y > small]).all()  # a price is paid at a side only
    assert (below[y < -small] >= -1e-9 * scale[y < -small]).all()


@settings(max_examples=400)
@given(conflicting_cases())
def test_the_least_total_violation_and_of_those_the_nearest(case: Case) -> None:
    problem = written(case)
    x, solution = solve_elastic(problem, "numba")
    seen[solution.status[0].name] += 1
    assert ((x >= problem.lb) & (x <= problem.ub)).all()
    total = float(solution.excess.sum())
    least = least_total(problem)
    assert abs(total - least) <= 1e-6 * least + 1e-9, (total, least)
    if solution.status[0] is Status.SOLVED:
        assert torch.equal(x, solve(problem, backend="numba").x)
        assert not solution.exceeded
        return
    with pytest.raises(InfeasibleError):
        solve(problem, backend="numba")
    assert solution.exceeded
    is_nearest(solution)


def test_the_draws_above_are_of_both_kinds() -> None:
    assert seen["ELASTIC"] >= 100 and seen["SOLVED"] >= 50, seen


# ---------------------------------------------------------------------------------------------
# A second oracle for the nearest point
# ---------------------------------------------------------------------------------------------


def clarabel_elastic(problem: QP, rho: float) -> Tensor:
    """argmin  objective + rho V  in variables (x, s+, s-), by Clarabel."""
    p = arrays(problem)
    A, (m, n) = p["A"], p["A"].shape
    P, q = (t[0].double().numpy() for t in (problem.P, problem.q))
    eye, some = np.eye(n + 2 * m), np.zeros((m, n))
    wide = np.hstack([A, -np.eye(m), np.eye(m)])
    blocks = [
        (wide, p["u"]), (-wide, -p["l"]), (eye[:n], p["ub"]), (-eye[:n], -p["lb"]),
        (np.hstack([some, -np.eye(m), 0 * np.eye(m)]), np.zeros(m)),
        (np.hstack([some, 0 * np.eye(m), -np.eye(m)]), np.zeros(m)),
    ]  # fmt: skip
    G = np.vstack([block[np.isfinite(side)] for block, side in blocks])
    h = np.concatenate([side[np.isfinite(side)] for _, side in blocks])
    options = clarabel.DefaultSettings()
    options.verbose = False
    options.tol_gap_abs = options.tol_gap_rel = options.tol_feas = 1e-12
    answer = clarabel.DefaultSolver(
        sparse.diags(np.r_[P, np.zeros(2 * m)]).tocsc(), np.r_[q, np.full(2 * m, rho)],
        sparse.csc_matrix(G), h, [clarabel.NonnegativeConeT(len(h))], options,
    ).solve()  # fmt: skip
    return torch.tensor(answer.x[:n], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(12))
def test_clarabel_finds_the_same_point_of_the_penalised_problem(seed: int) -> None:
    scores, groups, bounds, _ = inputs(seed)
    problem = formulate(notions(), scores, groups, bounds=bounds)
    x, solution = solve_elastic(problem, "numba")
    assert solution.status == (Status.ELASTIC,)
    rho = max(10.0 * float(solution.row_dual.abs().max()), 1.0)
    torch.testing.assert_close(x[0], clarabel_elastic(problem, rho), rtol=0, atol=2e-6)


# ---------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------


def inputs(
    seed: int, n: int = 18
) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Two groups whose bounds leave 0.2 between them, and three that overlap; g."""
    generator = torch.Generator().manual_seed(seed)
    sex, race = torch.arange(n) % 2, torch.arange(n) // 2 % 3
    low = 0.3 * torch.rand(n, generator=generator, dtype=torch.float64)
    lower = torch.where(sex == 0, 0.0, low.clamp(min=0.1) + 0.4)
    upper = torch.where(sex == 0, 0.4 - low, 1.0)
    scores = torch.rand(n, generator=generator, dtype=torch.float64)
    g = torch.randn(n, generator=generator, dtype=torch.float64)
    return scores, {"sex": sex, "race": race}, (lower, upper), g


def notions(tolerance: Any = 0.05) -> list[Constraint]:
    return [
        DemographicParity(tolerance, on="sex"),
        DemographicParity(0.02, on="race"),
        MinimumRate(0.45, on="race"),
    ]


def test_two_groups_end_at_the_bounds_that_keep_them_apart() -> None:
    """Group 0 below 0.4, group 1 above 0.5: both as near as they may, and nothing else moves."""
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    scores = torch.tensor([0.1, 0.3, 0.8, 0.9, 0.44, 0.47], dtype=torch.float64)
    lower = torch.tensor([0.0, 0, 0.5, 0.5, 0, 0], dtype=torch.float64)
    upper = torch.tensor([0.4, 0.4, 1, 1, 1, 1], dtype=torch.float64)
    layer = FairnessLayer(DemographicParity(0.06), bounds=(lower, upper), elastic=True)
    fair = layer(scores, groups)
    # 0 vs 1 is exceeded by 0.04 at least, whatever group 2 does; it stays where it costs nothing.
    expected = torch.tensor([0.4, 0.4, 0.5, 0.5, 0.44, 0.47], dtype=torch.float64)
    torch.testing.assert_close(fair, expected, rtol=0, atol=1e-15)
    assert layer.last is not None
    assert layer.last.status == (Status.ELASTIC,)
    assert layer.last.exceeded == {"group: 0 vs 1": pytest.approx(0.04, abs=1e-15)}
    assert layer.last.excess.dtype == torch.float64
    torch.testing.assert_close(
        layer.last.excess, torch.tensor([[0.04, 0, 0]], dtype=torch.float64), rtol=0, atol=1e-15
    )
    assert "elastic" in str(layer.last)
    assert "'group: 0 vs 1' exceeded by 0.04" in str(layer.last)
    assert "least total violation" in Status.ELASTIC.value


def test_a_budget_the_bounds_do_not_allow_is_missed_by_as_little_as_can_be() -> None:
    scores = torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64)
    fair = project(scores, torch.tensor([0, 1, 1]), Budget(total=5.0), bounds=(0, 1), elastic=True)
    assert torch.equal(fair, torch.ones(3, dtype=torch.float64))


def test_a_total_counts_n_times_as_much_as_a_mean() -> None:
    """Two budgets at odds: the one in totals is kept, the one in means gives way."""
    scores = torch.rand(10, dtype=torch.float64)
    layer = FairnessLayer([Budget(total=3.0), Budget(mean=0.6)], bounds=(0, 1), elastic=True)
    fair = layer(scores, torch.zeros(10, dtype=torch.int64))
    assert fair.sum().item() == pytest.approx(3.0, abs=1e-12)
    assert layer.last is not None
    assert layer.last.exceeded == {"budget: mean": pytest.approx(0.3, abs=1e-12)}


def test_of_equal_violations_the_nearest_is_taken() -> None:
    """mean = 0.2 and mean = 0.6 are missed by 0.4 together, wherever the mean is between."""
    scores = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    notion = [Budget(mean=0.2), Budget(mean=0.6)]
    groups = torch.zeros(3, dtype=torch.int64)
    fair = project(scores, groups, notion, bounds=None, elastic=True)
    torch.testing.assert_close(fair, scores, rtol=0, atol=1e-15)  # its mean is 0.5
    fair = project(scores + 0.4, groups, notion, bounds=None, elastic=True)
    torch.testing.assert_close(fair, scores + 0.1, rtol=0, atol=1e-14)  # down to a mean of 0.6


def test_parity_without_bounds_always_holds_and_is_what_the_plain_layer_returns() -> None:
    scores, groups, _, _ = inputs(0)
    plain = project(scores, groups, notions(0.0), bounds=None)
    layer = FairnessLayer(notions(0.0), bounds=None, elastic=True)
    assert torch.equal(layer(scores, groups), plain)
    assert layer.last is not None and layer.last.status == (Status.SOLVED,)
    assert layer.last.exceeded == {}
    assert float(layer.last.excess.max()) <= 1e-14


def test_groups_wholly_clipped_and_a_tolerance_of_zero() -> None:
    """Every sample is at a bound that the row pushes it to, and the gradient is zero."""
    scores = torch.full((6,), 0.45, dtype=torch.float64, requires_grad=True)
    groups = torch.arange(6) % 2
    lower = torch.where(groups == 0, 0.6, 0.0).double()
    upper = torch.where(groups == 0, 1.0, 0.3).double()
    fair = project(scores, groups, DemographicParity(0.0), bounds=(lower, upper), elastic=True)
    assert torch.equal(fair.detach(), torch.where(groups == 0, lower, upper))
    fair.sum().backward()
    assert torch.equal(scores.grad, torch.zeros(6, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------
# Batches, dtypes
# ---------------------------------------------------------------------------------------------


def batch() -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Five problems, of which the second and the fourth have no solution."""
    scores, groups, (lower, upper), _ = inputs(3)
    generator = torch.Generator().manual_seed(9)
    many = torch.rand(5, len(scores), generator=generator, dtype=torch.float64)
    low, high = torch.zeros_like(many), torch.ones_like(many)
    for b in (1, 3):
        low[b], high[b] = lower, upper
    return many, groups, (low, high), torch.randn(many.shape, generator=generator).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_problems_of_a_batch_get_what_they_would_get_alone(dtype: torch.dtype) -> None:
    scores, groups, (low, high), g = batch()
    scores, low, high, g = (t.to(dtype) for t in (scores, low, high, g))
    scores.requires_grad_()
    layer = FairnessLayer(notions(), bounds=(low, high), elastic=True)
    fair = layer(scores, groups)
    (grad,) = torch.autograd.grad((fair * g).sum(), scores)
    last = layer.last
    assert last is not None and fair.dtype == dtype
    elastic = [s is Status.ELASTIC for s in last.status]
    assert elastic == [False, True, False, True, False]
    assert torch.equal(last.x, fair.detach()) and not last.x.requires_grad
    for b in range(5):
        alone = scores[b].detach().clone().requires_grad_()
        single = FairnessLayer(notions(), bounds=(low[b], high[b]), elastic=elastic[b])
        x = single(alone, groups)
        assert torch.equal(x, fair[b])
        assert torch.equal(torch.autograd.grad((x * g[b]).sum(), alone)[0], grad[b])
        assert single.last is not None
        assert torch.equal(single.last.excess[0], last.excess[b])
        torch.testing.assert_close(single.last.row_dual[0], last.row_dual[b])
    assert len(last.iterations) == 5
    assert set(last.exceeded) == {
        last.problem.row_names[r] for r in range(last.problem.shape[1])
        if float(last.excess[:, r].max()) > 1e-5
    }  # fmt: skip


def test_bounds_shared_by_the_batch_get_the_sum_of_all_gradients() -> None:
    scores, groups, (low, high), g = batch()
    leaves = (low[1].clone().requires_grad_(), high[1].clone().requires_grad_())
    fair = project(scores, groups, notions(), bounds=leaves, elastic=True)
    whole = torch.autograd.grad((fair * g).sum(), leaves)
    parts = [torch.zeros_like(t) for t in leaves]
    for b in range(5):
        x = project(scores[b], groups, notions(), bounds=leaves, elastic=True)
        for part, one in zip(parts, torch.autograd.grad((x * g[b]).sum(), leaves), strict=True):
            part += one
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_other_dtypes(dtype: torch.dtype, limit: float) -> None:
    scores, groups, (lower, upper), _ = inputs(5, n=60)
    exact = FairnessLayer(notions(), bounds=(lower.to(dtype), upper.to(dtype)), elastic=True)
    exact(scores.to(dtype).double(), groups)
    layer = FairnessLayer(notions(), bounds=(lower.to(dtype), upper.to(dtype)), elastic=True)
    fair = layer(scores.to(dtype), groups)
    assert fair.dtype == dtype
    assert (fair >= lower.to(dtype)).all() and (fair <= upper.to(dtype)).all()
    assert layer.last is not None and exact.last is not None
    total, least = float(layer.last.excess.sum()), float(exact.last.excess.sum())
    assert abs(total - least) <= limit
    assert set(layer.last.exceeded) == set(exact.last.exceeded)


def test_column_scores_and_autocast() -> None:
    scores, groups, bounds, _ = inputs(1)
    flat = project(scores, groups, notions(), bounds=bounds, elastic=True)
    column = project(scores.unsqueeze(1), groups, notions(), bounds=bounds, elastic=True)
    assert column.shape == (len(scores), 1) and torch.equal(column[:, 0], flat)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(project(scores, groups, notions(), bounds=bounds, elastic=True), flat)


# ---------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_gradients_of_scores_tolerance_bounds_weights_and_targets(seed: int) -> None:
    """By finite differences, where a small change keeps the rows that are exceeded."""
    scores, groups, (lower, upper), _ = inputs(seed)
    targets = torch.rand(len(scores), dtype=torch.float64).mul(0.8).add(0.1)
    tolerance = torch.tensor(0.05, dtype=torch.float64)
    weights = torch.rand(len(scores), dtype=torch.float64) + 0.5
    leaves = tuple(
        t.clone().requires_grad_() for t in (scores, tolerance, lower, upper, weights, targets)
    )

    def fair(s: Tensor, t: Tensor, low: Tensor, high: Tensor, w: Tensor, y: Tensor) -> Tensor:
        rows = [*notions(t), EqualOpportunity(0.01, on="sex")]
        return project(s, groups, rows, y, bounds=(low, high), weights=w, elastic=True)

    layer = FairnessLayer([*notions(), EqualOpportunity(0.01, on="sex")], bounds=(lower, upper),
                          elastic=True)  # fmt: skip
    layer(scores, groups, targets, weights=weights)
    assert layer.last is not None and layer.last.status == (Status.ELASTIC,)
    assert gradcheck(fair, leaves, eps=1e-7, atol=1e-5, rtol=1e-4)


def test_a_second_derivative_is_refused_as_it_is_without_elastic() -> None:
    scores, groups, bounds, _ = inputs(2)
    scores.requires_grad_()
    fair = project(scores, groups, notions(), bounds=bounds, elastic=True)
    (grad,) = torch.autograd.grad(fair.square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_training_through_what_cannot_hold() -> None:
    """The loss falls although no batch is feasible."""
    scores, groups, bounds, _ = inputs(4)
    logits = torch.zeros_like(scores).requires_grad_()
    layer = FairnessLayer(notions(), bounds=bounds, elastic=True)
    optimizer = torch.optim.SGD([logits], lr=2.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(logits.sigmoid(), groups) - scores).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-4


# ---------------------------------------------------------------------------------------------
# Backends
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_all_backends_agree(seed: int) -> None:
    scores, groups, (lower, upper), g = inputs(seed)
    leaves = {
        "scores": scores.requires_grad_(),
        "tolerance": torch.tensor(0.05, dtype=torch.float64, requires_grad=True),
        "lower": lower.requires_grad_(),
        "upper": upper.requires_grad_(),
    }
    problem = formulate(notions(), scores, groups, bounds=(lower, upper))
    backends = capable(problem)
    assert "numba" in backends

    def fair(backend: str) -> Tensor:
        return project(
            leaves["scores"], groups, notions(leaves["tolerance"]),
            bounds=(leaves["lower"], leaves["upper"]), backend=backend, elastic=True,
        )  # fmt: skip

    inputs_agree(fair, leaves, g, backends)


@settings(max_examples=40)
@given(conflicting_cases(20))
def test_all_backends_agree_on_drawn_problems(case: Case) -> None:
    problem = written(case)
    _, solution = solve_elastic(problem, "numba")
    assume(solution.status[0] is Status.ELASTIC)
    found = {name: solve_elastic(problem, name)[1] for name in capable(problem)}
    size = max(1.0, float(solution.x.abs().max()))
    for name, other in found.items():
        assert other.status == (Status.ELASTIC,)
        assert float((other.x - solution.x).abs().max()) <= 1e-7 * size, name


def test_linear_programs_give_way_too() -> None:
    """x0 + x1 >= 3 within 0..1, at the least cost: both at 1, and what is missing is told."""
    names = capable(LP(torch.ones(2), torch.ones(1, 2), torch.ones(1), torch.ones(1)), LINEAR)
    if not names:
        pytest.skip("no backend for linear programs is installed")
    A = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    c = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    problem = LP(c, A, torch.tensor([3.0]).double(), torch.tensor([torch.inf]).double(), 0.0, 1.0)
    for name in names:
        x, solution = solve_elastic(problem, name)
        torch.testing.assert_close(x, torch.ones(1, 3).double(), rtol=0, atol=1e-12)
        assert solution.exceeded == {"row 0": pytest.approx(1.0)}
    smooth = LP(c.requires_grad_(), A, problem.l, problem.u, 0.0, 1.0)
    x, _ = solve_elastic(smooth, "auto", 0.1)
    x[0, 2].backward()
    assert c.grad is not None and torch.isfinite(c.grad).all()


def test_a_dense_quadratic_term() -> None:
    if not is_available("osqp"):
        pytest.skip("osqp is not installed")
    P = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    q = torch.tensor([-1.0, 0.3], dtype=torch.float64)
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    side = torch.tensor([0.2, 0.9], dtype=torch.float64)
    _, solution = solve_elastic(QP(P, q, A, side, side), "osqp")
    assert float(solution.excess.sum()) == pytest.approx(0.7, abs=1e-12)
    best = torch.linalg.solve(P, -q)  # its sum is 0.3, between the two
    inside = best.sum().clamp(0.2, 0.9)
    K = torch.tensor([[2.0, 0.5, 1.0], [0.5, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    expected = torch.linalg.solve(K, torch.cat([-q, inside[None]]))[:2]
    torch.testing.assert_close(solution.x[0], expected, rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------
# What is left as it is
# ---------------------------------------------------------------------------------------------


class Broken(Numba):
    """Solves nothing, and says so with one status per problem."""

    def __init__(self, *status: Status) -> None:
        super().__init__()
        self.status = status

    def solve(self, problem: Any) -> Solution:
        return replace(super().solve(problem), status=self.status)


def test_other_failures_are_told_as_without_elastic() -> None:
    scores, groups, (low, high), _ = batch()
    broken = Broken(*[Status.SOLVED, Status.INFEASIBLE, Status.STALLED, *[Status.SOLVED] * 2])
    with pytest.raises(ConvergenceError, match="problem 2 of the batch") as caught:
        project(scores, groups, notions(), bounds=(low, high), backend=broken, elastic=True)
    assert caught.value.batch == 2


def test_a_backend_that_stops_without_a_word_where_rows_cannot_hold() -> None:
    """The least violation tells that there is no point; then the elastic one is wanted."""
    scores, groups, bounds, _ = inputs(0)

    class Silent(Numba):
        def solve(self, problem: Any) -> Solution:
            found = super().solve(problem)
            told = tuple(Status.STALLED if s is Status.INFEASIBLE else s for s in found.status)
            return replace(found, status=told)

    expected = project(scores, groups, notions(), bounds=bounds, elastic=True)
    fair = project(scores, groups, notions(), bounds=bounds, elastic=True, backend=Silent())
    assert torch.equal(fair, expected)


def test_an_elastic_layer_is_saved_copied_and_shown() -> None:
    layer = FairnessLayer(notions(), bounds=(0, 1), elastic=True)
    assert "elastic=True" in repr(layer)
    assert "elastic" not in repr(FairnessLayer(notions(), bounds=(0, 1)))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.elastic is True


@pytest.mark.parametrize("value", [1, "yes", None, 0.5])
def test_elastic_is_a_flag(value: Any) -> None:
    match = f"elastic: expected True or False, got {value!r}"
    with pytest.raises(ProblemError, match=match):
        FairnessLayer(notions(), bounds=(0, 1), elastic=value)
    with pytest.raises(ProblemError, match=match):
        project(torch.rand(4), torch.arange(4) % 2, notions(), bounds=(0, 1), elastic=value)


def test_rows_too_many_to_look_into_are_refused() -> None:
    n = 40_000
    index = torch.arange(n)
    rows = SparseRows(index, index, torch.ones(1, n, dtype=torch.float64), n, n)
    side = torch.full((n,), 2.0, dtype=torch.float64)
    problem = QP(torch.ones(n).double(), torch.zeros(n).double(), rows, side, side, 0.0, 1.0)

    class Refusing(Numba):
        def solve(self, problem: Any) -> Solution:
            y = torch.ones(1, n, dtype=torch.float64)
            return Solution(problem, problem.q, y, (Status.INFEASIBLE,), "refusing")

    with pytest.raises(UnsupportedProblemError, match="elastic: expected rows in cell form"):
        solve_elastic(problem, Refusing())


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"objective": "l1"}, "elastic: expected False with objective='l1', got True"),
        ({"classes": 3}, "elastic: expected False with classes=3, got True"),
    ],
)
def test_where_rows_tell_what_a_prediction_is(other: dict[str, Any], match: str) -> None:
    with pytest.raises(ProblemError, match=match):
        FairnessLayer(DemographicParity(0.1), bounds=None, elastic=True, **other)
    with pytest.raises(ProblemError, match=match):
        project(
            torch.rand(4, 3), torch.arange(4), DemographicParity(0.1), bounds=None, elastic=True,
            **other,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Many rows: the linear program begins with few
# ---------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(conflicting_cases(20))
def test_beginning_with_few_rows_finds_the_same(case: Case) -> None:
    problem = written(case)
    x, solution = solve_elastic(problem, "numba")
    assume(solution.status[0] is Status.ELASTIC)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fairopt.solving.cell_means, "FEW_ROWS", 0)
        patched.setattr(fairopt.solving.cell_means, "FEW_ENTRIES", 0)
        grown, other = solve_elastic(problem, "numba")
    size = max(1.0, float(x.abs().max()))
    torch.testing.assert_close(grown, x, rtol=0, atol=1e-9 * size)
    torch.testing.assert_close(other.excess.sum(-1), solution.excess.sum(-1), rtol=1e-9, atol=1e-12)


def test_many_rows_and_cells() -> None:
    """93 rows over hundreds of cells; two problems whose rows in conflict differ."""
    n = 600
    generator = torch.Generator().manual_seed(0)
    groups = {f"a{i}": torch.randint(0, 6, (n,), generator=generator) for i in range(6)}
    scores = torch.rand(2, n, generator=generator, dtype=torch.float64)
    low, high = torch.zeros(2, n).double(), torch.ones(2, n).double()
    for b, name in enumerate(("a0", "a3")):
        low[b] = torch.where(groups[name] == 0, 0.5, 0.0)
        high[b] = torch.where(groups[name] == 0, 1.0, 0.4)
    parity = [DemographicParity(0.02, on=name) for name in groups]
    problem = formulate(parity, scores, groups, bounds=(low, high))
    _, solution = solve_elastic(problem, "numba")
    assert solution.status == (Status.ELASTIC, Status.ELASTIC)
    is_nearest(solution)
    for b in range(2):
        least = least_total(problem, b)
        assert float(solution.excess[b].sum()) == pytest.approx(least, rel=1e-7)


def test_a_mixed_batch_of_many_attributes_is_each_problem_alone() -> None:
    """Rows over partitions stay that when the problems of a batch part."""
    n = 300
    generator = torch.Generator().manual_seed(0)
    groups = {f"a{i}": torch.randint(0, 6, (n,), generator=generator) for i in range(6)}
    scores = torch.rand(2, n, generator=generator, dtype=torch.float64)
    low, high = torch.zeros(2, n).double(), torch.ones(2, n).double()
    low[0] = torch.where(groups["a0"] == 0, 0.5, 0.0)
    high[0] = torch.where(groups["a0"] == 0, 1.0, 0.4)
    parity = DemographicParity(0.05)
    layer = FairnessLayer(parity, bounds=(low, high), elastic=True)
    fair = layer(scores, groups)
    assert layer.last is not None
    assert layer.last.status == (Status.ELASTIC, Status.SOLVED)
    for b in range(2):
        alone = project(scores[b], groups, parity, bounds=(low[b], high[b]), elastic=True)
        torch.testing.assert_close(fair[b], alone, rtol=0, atol=1e-12)
