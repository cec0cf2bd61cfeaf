"""The projection's algorithm with any cell-sum oracle: the compiled driver's twin in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fairopt import QP, CellRows
from fairopt.backends.numba.backend import Numba
from fairopt.kernels.oracle import CellSums, OracleSolve, solve_by_oracle
from fairopt.kernels.state import CONVERGED, INFEASIBLE
from fairopt.programs.solution import Status

Array = NDArray[np.float64]

STATUS = {CONVERGED: Status.SOLVED, INFEASIBLE: Status.INFEASIBLE}


@dataclass
class Naive(CellSums):
    """The samples in plain NumPy, with nothing done about rounding or speed."""

    P: Array
    q: Array
    w: Array
    lb: Array
    ub: Array
    cell: NDArray[np.int64]
    K: int

    def per_cell(self, *values: Array) -> Array:
        return np.stack([np.bincount(self.cell, each, self.K) for each in values])

    def limits(self) -> Array:
        ends = self.w * self.lb, self.w * self.ub
        curvature = np.where(self.lb < self.ub, self.w**2 / self.P, 0.0)
        return self.per_cell(curvature, np.minimum(*ends), np.maximum(*ends), abs(self.w))

    def values(self, shifts: Array) -> tuple[Array, Array]:
        free = -(self.q + self.w * shifts[self.cell]) / self.P
        return free, free.clip(self.lb, self.ub)

    def sums(self, shift_hi: Array, shift_lo: Array) -> Array:
        free, x = self.values(shift_hi + shift_lo)
        inside = np.where((free == x) & (self.lb < self.ub), self.w**2 / self.P, 0.0)
        return self.per_cell(self.w * x, inside, abs(self.w * x))


def draw(kind: str, seed: int) -> tuple[Naive, Array, Array, Array]:
    """Samples, C, l and u of a problem; sides lie around the sums of a point that there is."""
    rng = np.random.default_rng([seed, len(kind)])
    n, K, m = (int(rng.integers(*ends)) for ends in ((20, 200), (1, 6), (1, 5)))
    m = min(m, K)  # independent rows have one multiplier
    cell, q, C = rng.integers(0, K, n), -rng.normal(size=n), rng.normal(size=(m, K))
    lb, ub = np.zeros(n), np.ones(n)
    if kind == "clipped":  # a whole cell beyond its bounds
        q[cell == 0] -= 5.0
    if kind == "degenerate":  # rows twice, one of them the other way round
        C = np.concatenate([C, -2.0 * C[:1], C[:1]])
    samples = Naive(rng.uniform(0.5, 2.0, n), q, rng.uniform(0.2, 1.0, n) / n, lb, ub, cell, K)
    value = C @ samples.per_cell(samples.w * rng.uniform(0.2, 0.8, n))[0]
    if kind == "infeasible":  # more than all samples at their bounds can give
        _, least, greatest, _ = samples.limits()
        value = np.where(C > 0, C * greatest, C * least).sum(1) + rng.uniform(0.01, 1.0, m)
    width = 0.0 if kind == "equality" else 0.02
    return samples, C, value - width, value + width


def both(kind: str, seed: int) -> tuple[OracleSolve, QP, Naive, Array]:
    samples, C, l, u = draw(kind, seed)
    solve = solve_by_oracle(C, l, u, samples, len(samples.q))
    P, q, w, lb, ub, cell, C_, l_, u_ = (
        torch.from_numpy(a).unsqueeze(0)
        for a in (*vars(samples).values(), C, l, u)
        if isinstance(a, np.ndarray)
    )
    return solve, QP(P, q, CellRows(C_, cell, w), l_, u_, lb, ub), samples, C


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kind", ["equality", "two-sided", "infeasible", "degenerate", "clipped"])
def test_naive_oracle_and_compiled_driver_agree(kind: str, seed: int) -> None:
    solve, problem, samples, C = both(kind, seed)
    compiled = Numba().solve(problem)
    assert STATUS[solve.status] == compiled.status[0]
    assert (solve.status == INFEASIBLE) or kind != "infeasible"
    want = compiled.row_dual[0].numpy()
    scale = abs(want).max(initial=1.0)
    np.testing.assert_allclose(C.T @ solve.multipliers, C.T @ want, rtol=0, atol=1e-8 * scale)
    if kind != "degenerate":
        np.testing.assert_allclose(solve.multipliers, want, rtol=0, atol=1e-8 * scale)
    if solve.status == CONVERGED:
        _, x = samples.values(solve.shifts.sum(0))
        np.testing.assert_allclose(x, compiled.x[0].numpy(), rtol=0, atol=1e-9)
        np.testing.assert_allclose(solve.shifts.sum(0), C.T @ solve.multipliers, atol=1e-9 * scale)


def test_the_oracle_is_asked_once_per_pass() -> None:
    samples, C, l, u = draw("two-sided", 0)
    asked = []

    class Counted(Naive):
        def sums(self, shift_hi: Array, shift_lo: Array) -> Array:
            asked.append(shift_hi.copy())
            return super().sums(shift_hi, shift_lo)

    solve = solve_by_oracle(C, l, u, Counted(**vars(samples)), len(samples.q))
    assert len(asked) == solve.passes > 1
    assert not asked[0].any()  # the first pass is at the scores themselves


def test_numbers_that_are_not_finite_end_the_solve() -> None:
    samples, C, l, u = draw("two-sided", 1)
    samples.q[3] = np.nan
    assert solve_by_oracle(C, l, u, samples, len(samples.q)).status not in STATUS
