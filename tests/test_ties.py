"""One answer where several multipliers belong to one solution, whichever a solver returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import clarabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from fairopt import QP, DemographicParity, Solution, formulate, solve
from fairopt.backends import Backend, Numba
from fairopt.optimality.derivative import adjoint
from fairopt.optimality.minimum_norm import minimum_norm, support


def by_clarabel(N: np.ndarray, y: np.ndarray, upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """The shortest multiplier on rows of unit length, by an interior-point method."""
    length = np.linalg.norm(N, axis=1)
    M = N / length[:, None]
    m = len(y)
    signs = [-np.eye(m)[r] for r in range(m) if upper[r] and not lower[r]]
    signs += [np.eye(m)[r] for r in range(m) if lower[r] and not upper[r]]
    none = [np.eye(m)[r] for r in range(m) if not lower[r] and not upper[r]]
    equal = np.vstack([M.T, *none]) if none else M.T
    rows = np.vstack([equal, *signs]) if signs else equal
    right = np.r_[M.T @ (y * length), np.zeros(len(none) + len(signs))]
    options = clarabel.DefaultSettings()
    options.verbose = False
    options.tol_gap_abs = options.tol_gap_rel = options.tol_feas = 1e-12
    cones: list[Any] = [clarabel.ZeroConeT(len(equal))]
    if signs:
        cones.append(clarabel.NonnegativeConeT(len(signs)))
    found = clarabel.DefaultSolver(
        sparse.csc_matrix(np.eye(m)), np.zeros(m), sparse.csc_matrix(rows), right, cones, options
    ).solve()
    return np.array(found.x) / length


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 4))
def test_the_shortest_multiplier_of_drawn_rows(seed: int, m: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    N = rng.integers(-2, 3, (m, rank)) @ rng.normal(size=(rank, 5))
    N[np.linalg.norm(N, axis=1) < 1e-9] = rng.normal(size=5)
    N *= 10.0 ** rng.integers(-2, 3, (m, 1))
    upper, lower = rng.random(m) < 0.6, rng.random(m) < 0.3
    y = rng.random(m) * np.where(
        upper & lower, rng.choice([-1, 1], m), np.where(upper, 1, np.where(lower, -1, 0))
    )
    y[rng.random(m) < 0.3] = 0
    given_ = [torch.from_numpy(a).unsqueeze(0) for a in (N, y, upper, lower)]
    got = minimum_norm(*given_)[0].numpy()
    length = np.linalg.norm(N, axis=1)
    largest = (np.abs(y) * length).max() or 1.0
    np.testing.assert_allclose(
        got * length / largest, by_clarabel(N, y, upper, lower) * length / largest, atol=2e-6
    )
    # What Clarabel's precision cannot see: the same pull on every variable, and the signs.
    np.testing.assert_allclose(N.T @ got / largest, N.T @ y / largest, atol=1e-8)
    assert (got[~lower] >= 0).all()
    assert (got[~upper] <= 0).all()


def four_groups() -> tuple[Tensor, Tensor, Tensor]:
    """Means 0, 0, 1, 1: with tolerance 1/2 for all pairs, four tight rows of rank three."""
    groups = torch.arange(8) % 4
    noise = torch.tensor([0.1, -0.1, 0.2, -0.2, -0.1, 0.1, -0.2, 0.2], dtype=torch.float64)
    scores = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)[groups] + noise
    return scores, groups, torch.tensor([1, -2, 3, 0.5, -1, 2, 1, 1], dtype=torch.float64)


class Other(Numba):
    """The numba backend, returning another of the multipliers; the shared derivative."""

    name = "other"
    vjp = Backend.vjp

    def __init__(self, y: tuple[float, ...]) -> None:
        super().__init__()
        self.y = y

    def solve(self, problem: Any) -> Solution:
        y = torch.tensor([self.y], dtype=torch.float64)
        return replace(super().solve(problem), row_dual=y)


TIED = {
    0.5: [(0, -0.5, 0, 0, -0.5, 0), (0, 0, -0.5, -0.5, 0, 0), (0, -0.1, -0.4, -0.4, -0.1, 0)],
    0.0: [(0, -1, 0, 0, -1, 0), (0, 0, -1, -1, 0, 0), (1, -2, 0, 0.5, -0.5, -0.5)],
}


@pytest.mark.parametrize("tolerance", TIED)
def test_the_gradient_does_not_depend_on_the_multiplier(tolerance: float) -> None:
    found = []
    for backend in (Numba(), *map(Other, TIED[tolerance])):
        scores, groups, cotangent = four_groups()
        scores.requires_grad_()
        weights = torch.linspace(1, 1, 8, dtype=torch.float64, requires_grad=True)
        limit = torch.tensor(tolerance, dtype=torch.float64, requires_grad=True)
        problem = formulate(
            DemographicParity(tolerance=limit), scores, groups, bounds=None, weights=weights
        )
        solution = solve(problem, backend=backend)
        assert solution.residuals.worst < 1e-12  # each is a multiplier of this solution
        solution.x.backward(cotangent.unsqueeze(0))
        found.append((scores.grad, weights.grad, limit.grad))
    for other in found[1:]:
        for want, got in zip(found[0], other, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_a_tight_row_without_a_part_in_any_multiplier_stays_inactive() -> None:
    """Two independent rows, both tight, one without a multiplier: weakly active."""
    N = torch.eye(2, 3, dtype=torch.float64).unsqueeze(0)
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    upper, lower = torch.tensor([[True, True]]), torch.tensor([[False, False]])
    active = torch.tensor([[True, False]])
    assert support(N, y, active, upper, lower).tolist() == [[True, False]]
    assert minimum_norm(N, y, upper, lower).tolist() == [[1.0, 0.0]]


def test_problems_of_a_batch_do_not_mix() -> None:
    """One tied, one not: each as it would be alone."""
    scores, groups, cotangent = four_groups()
    other = torch.linspace(0, 1, 8, dtype=torch.float64)
    both = formulate(
        DemographicParity(tolerance=0.5), torch.stack([scores, other]), groups, bounds=None
    )
    g = torch.stack([cotangent, cotangent])
    solution = Numba().solve(both)
    together = adjoint(both, solution, g).v
    assert torch.allclose(Numba().vjp(both, solution, g).v, together, atol=1e-13)
    for b, one in enumerate((scores, other)):
        alone: QP = formulate(DemographicParity(tolerance=0.5), one, groups, bounds=None)
        v = adjoint(alone, Numba().solve(alone), g[b : b + 1]).v
        torch.testing.assert_close(together[b : b + 1], v, rtol=0, atol=1e-13)
