"""Rows and bounds that hold the same variables: one answer, whichever multiplier was returned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from agreeing import QUADRATIC, differentiated, inputs_agree, skip_without
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from fairopt import (
    QP,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    MeanResidual,
    Solution,
    formulate,
    solve,
)
from fairopt.backends import Backend, Numba, is_available
from fairopt.optimality.degenerate_bounds import nearest

NOTIONS = (DemographicParity, EqualOpportunity, EqualizedOdds, MeanResidual)


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(params=QUADRATIC)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    skip_without(name)
    return name


class Other(Numba):
    """The numba backend, returning another of the multipliers; the shared derivative."""

    name = "other"
    vjp = Backend.vjp

    def __init__(self, y: float) -> None:
        super().__init__()
        self.y = y

    def solve(self, problem: Any) -> Solution:
        return replace(super().solve(problem), row_dual=tensor([self.y]))


def gradients(backend: str | Backend, scores: Tensor, g: Tensor) -> list[Tensor]:
    """By scores, upper bounds and tolerance, of two groups that meet at the upper bound."""
    inputs = [scores.clone(), torch.ones_like(scores), torch.zeros((), dtype=torch.float64)]
    inputs = [t.requires_grad_() for t in inputs]
    groups = (torch.arange(len(scores)) > 0).long()
    problem = formulate(DemographicParity(inputs[2]), inputs[0], groups, bounds=(0.0, inputs[1]))
    solution = solve(problem, backend=backend)
    assert solution.residuals.worst < 1e-12
    torch.testing.assert_close(solution.x, torch.ones_like(solution.x), rtol=0, atol=1e-12)
    return list(torch.autograd.grad(solution.x, inputs, g.unsqueeze(0)))


def test_the_row_holds_what_the_bounds_cannot(backend: str) -> None:
    """Scores 3 and 1/2: every y from 1/2 to 2 is a multiplier; at 1/2 bound 2 holds nothing."""
    scores, upper, tolerance = gradients(backend, tensor(3, 0.5), tensor(1, 10))
    torch.testing.assert_close(scores, tensor(0, 0), rtol=0, atol=1e-12)
    torch.testing.assert_close(upper, tensor(11, 0), rtol=0, atol=1e-12)
    torch.testing.assert_close(tolerance, tensor(-10)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("y", [0.5, 0.7, 1.25, 2.0])
def test_the_multiplier_that_was_returned_does_not_matter(y: float) -> None:
    found = gradients(Other(y), tensor(3, 0.5), tensor(1, 10))
    for one, want in zip(found, (tensor(0, 0), tensor(11, 0), tensor(-10)[0]), strict=True):
        torch.testing.assert_close(one, want, rtol=0, atol=1e-12)


TIED = (
    tensor(3, 0.5, 0.5),
    tensor(1, 2, 5),
    (tensor(0, 0, 0), tensor(8, -1.5, 1.5), tensor(-7)[0]),
)


@pytest.mark.parametrize("y", [1.0, 1.5, 2.0])
def test_two_samples_whose_bounds_stop_pushing_together_do_not_move(y: float) -> None:
    """At y = 1 both bounds of group 1 have no multiplier, but they carry in others: x stays."""
    scores, g, expected = TIED
    for got, want in zip(gradients(Other(y), scores, g), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_tied_samples_of_a_clipped_group(backend: str) -> None:
    scores, g, expected = TIED
    found = gradients(backend, scores, g)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    # Scores: the map is constant. Bounds that stay compatible with the row: it is linear there.
    groups = torch.tensor([0, 1, 1])
    parity, h = DemographicParity(0.0), 1e-3
    for move in (tensor(1, 2, -1), tensor(-1, 3, 2)):
        for step in (h, -h):
            moved = formulate(parity, scores + step * move, groups, bounds=(0, 1))
            assert (solve(moved, backend=backend).x > 1 - 1e-12).all()
    for move in (tensor(1, 1, 1), tensor(1, 2, 0), tensor(0, 1, -1)):
        values = [
            (g * solve(
                formulate(parity, scores, groups, bounds=(0, 1 + step * move)), backend=backend
            ).x).sum() for step in (h, -h)
        ]  # fmt: skip
        slope = (values[0] - values[1]) / (2 * h)
        torch.testing.assert_close(slope, (found[1] * move).sum(), rtol=0, atol=1e-9)


def test_the_tolerance_lets_the_lower_group_fall(backend: str) -> None:
    """Against the one-sided difference, the only one that is feasible."""
    torch.manual_seed(0)
    groups = torch.arange(9) % 2
    scores = torch.where(groups == 0, 2.5, 0.6).double() + 0.3 * torch.rand(9).double()
    g = torch.randn(9, dtype=torch.float64)

    def value(tolerance: Tensor) -> Tensor:
        problem = formulate(DemographicParity(tolerance), scores, groups, bounds=(0, 1))
        return (g * solve(problem, backend=backend).x).sum()

    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(value(zero), zero)
    difference = (value(tensor(1e-4)[0]) - value(zero).detach()) / 1e-4
    torch.testing.assert_close(grad, difference, rtol=0, atol=1e-8)
    assert grad.abs() > 0.1


@pytest.mark.parametrize("form", ["diagonal", "dense"])
def test_a_batch_of_dense_rows_where_one_problem_is_clipped_out(form: str, backend: str) -> None:
    """Each problem as it would be alone. Rows that are no cells, P that is no diagonal."""
    P = torch.ones(2, 3, dtype=torch.float64)
    if form == "dense":
        if backend == "numba":
            pytest.skip("numba takes a diagonal P only")
        P = torch.diag_embed(P) + 0.1
    q = tensor([-3, -0.5, -0.2], [-0.4, -0.5, -0.2])
    rows = tensor([[1, -1, 0], [0.0, 0.5, 0.5]], [[1, -1, 0], [0.0, 0.5, 0.5]])
    none = torch.full((2, 2), torch.inf, dtype=torch.float64)
    none[:, 0] = 0
    lower = torch.stack([tensor(0, -torch.inf)] * 2)
    bound = torch.ones(2, 3, dtype=torch.float64)
    problem = QP(P, q, rows, lower, none, 0 * bound, bound)
    g = tensor([1, 10, 3], [2, -1, 1])
    whole = differentiated(problem, backend, g)
    for b in range(2):
        one = QP(*(t[b : b + 1] for t in (P, q, rows, lower, none, 0 * bound, bound)))
        for got, want in zip(whole[2], differentiated(one, backend, g[b : b + 1])[2], strict=True):
            torch.testing.assert_close(got[b : b + 1], want, rtol=0, atol=1e-10)


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1))
def test_scores_with_many_ties_around_the_bounds(seed: int) -> None:
    """Quarters, bounds 0 and 1, tolerances of quarters: nearly every draw is degenerate."""
    rng = np.random.default_rng(seed)
    batch, n, level = rng.integers(1, 3), rng.integers(2, 10), rng.choice([2, 4])
    groups = torch.from_numpy(rng.integers(0, rng.integers(2, 5), n))
    drawn = {
        "scores": rng.integers(0, 4 * level, (batch, n)) / level,
        "tolerance": rng.choice([0, 0, 0.25, 0.5]),
        "lower": 0.0,
        "upper": np.ones(n) if rng.random() < 0.5 else 1.0,
        "weights": rng.integers(1, 3, n),
        "targets": rng.integers(0, 2, n),
    }
    inputs = {
        name: torch.tensor(np.asarray(value, float), requires_grad=True)
        for name, value in drawn.items()
    }
    notion, compare = NOTIONS[rng.integers(4)], rng.choice(["pairwise", "overall"])

    def answer(name: str) -> Tensor:
        problem = formulate(
            notion(inputs["tolerance"], compare=compare), inputs["scores"], groups,
            inputs["targets"], bounds=(inputs["lower"], inputs["upper"]), weights=inputs["weights"],
        )  # fmt: skip
        return solve(problem, backend=name).x

    g = torch.from_numpy(rng.normal(size=(batch, n)))
    inputs_agree(answer, inputs, g, [name for name in QUADRATIC if is_available(name)])


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 12))
def test_nearest_by_nonnegative_least_squares(seed: int, k: int, rows: int) -> None:
    """min |e| with G e <= h is the residual of an NNLS problem (Lawson and Hanson)."""
    rng = np.random.default_rng(seed)
    G = rng.integers(-2, 3, (rows, k)).astype(float)
    G = G[np.abs(G).sum(1) > 0]
    G /= np.linalg.norm(G, axis=1)[:, None]
    h = G @ rng.integers(-2, 3, k) + rng.choice([0, 0, 1], len(G))  # feasible
    e = nearest(G, h, 1e-13)
    expected = np.zeros(k)
    if len(G):
        u, _ = nnls(np.vstack([-G.T, -h[None]]), np.r_[np.zeros(k), 1.0])
        residual = np.vstack([-G.T, -h[None]]) @ u - np.r_[np.zeros(k), 1.0]
        expected = -residual[:k] / residual[k]
    np.testing.assert_allclose(e, expected, atol=1e-9)
