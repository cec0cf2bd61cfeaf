"""feedback="hard": no batch leaves the pooled rows outside their sides, where that can be had.

With S the sums so far and the batch's masses known, the pooled value of row r after the batch is
base_r + (A x)_r, and so the batch is a projection whose sides are shifted by what was served:

    minimise  1/2 sum_i w_i (x_i - s_i)^2   subject to  l - base <= A x <= u - base,  lo <= x <= hi
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fairopt.errors import SolveError
from fairopt.online.layout import Arrays, Floats
from fairopt.online.reading import Samples
from fairopt.online.state import State, kernels
from fairopt.problem import QP, DenseRows
from fairopt.solve import solve

__all__ = ["Opened", "hard_batch", "open_batch"]

# What a unit of violation costs where no prediction can avoid one, in units of the mean square
# change of all samples so far: large enough that the violation is the least to nine digits.
PRICE = 1e9


class Opened:
    """The rows before a batch, in the letters of ``fairopt.online.kernels``."""

    def __init__(self, state: State, samples: Samples, arrays: Arrays) -> None:
        assert state.programme is not None
        n, K, m = len(samples.scores), state.programme.cells, len(state.rows)
        F = samples.v.shape[1]
        self.C, self.found, self.base = np.empty((m, 1 + F, K)), np.empty((m, 6)), np.empty(m)
        self.A = np.empty((m, n))
        compiled = kernels()
        compiled.open_batch(
            samples.cell, samples.chances, samples.weight, samples.y, samples.v, 0, n,
            samples.expected, state.sums, state.pending, state.totals, tuple(arrays),
            np.empty(state.sums.shape[1:]), np.empty(len(arrays.sets) + 1), self.C, self.found, self.base,
        )  # fmt: skip
        compiled.loadings(self.C, samples.cell, samples.chances, samples.v, 0, n, self.A)
        self.here = self.found[:, 0] > 0.0
        self.sides = self.found[:, 2:4]
        self.weight = np.broadcast_to(samples.weight, n).astype(np.float64)


def open_batch(state: State, samples: Samples, arrays: Arrays) -> Opened:
    """The rows of a batch, pooled with all before."""
    return Opened(state, samples, arrays)


def hard_batch(
    state: State, samples: Samples, arrays: Arrays, bounds: tuple[float, float]
) -> tuple[Floats, Floats]:
    """Predictions of a batch, and the multipliers of all rows.

    Where rows and bounds cannot all hold, the predictions of least violation (in the sum of squares
    of the rows), for the rows that are to hold must not be given up with the one that cannot.
    """
    opened = open_batch(state, samples, arrays)
    here, n = opened.here, len(samples.scores)
    lo, hi = bounds
    x = np.clip(samples.scores, lo, hi)
    dual = np.zeros(len(here))
    if not here.any():
        return x, dual
    A = opened.A[here] * opened.weight
    base = opened.base[here]
    l, u = opened.sides[here].T - base
    reached = A @ x
    if bool(((reached >= l) & (reached <= u)).all()):
        return x, dual
    moved = opened.weight > 0
    problem: Any = QP(
        P=torch.from_numpy(np.where(moved, opened.weight, 1.0)),
        q=torch.from_numpy(-np.where(moved, opened.weight, 1.0) * samples.scores),
        rows=DenseRows(torch.from_numpy(A)),
        l=torch.from_numpy(l),
        u=torch.from_numpy(u),
        lb=torch.full((n,), lo, dtype=torch.float64),
        ub=torch.full((n,), hi, dtype=torch.float64),
    )
    try:
        solution = solve(problem, backend="numba")
    except SolveError:
        size = opened.found[here, 5]
        price = PRICE * size / opened.found[here, 4]
        y = np.zeros(int(here.sum()))
        x = np.empty(n)
        kernels().project(
            samples.scores, opened.weight, np.zeros(0, np.int64), 0, n,
            np.ascontiguousarray(opened.A[here]), n, base,
            *np.ascontiguousarray(opened.sides[here].T), price, np.zeros_like(y), lo, hi, x, y,
            kernels().workspace(len(y), n),
        )  # fmt: skip
        dual[here] = y * opened.found[here, 4]
        return x, dual
    dual[here] = solution.row_dual[0].numpy() * opened.found[here, 4]
    return np.asarray(solution.x[0].detach().numpy(), np.float64), dual
