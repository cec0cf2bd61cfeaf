# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""``solve_reduced`` compiled, for diagonal P and cell-structured rows on the CPU.

The same formulas in two passes over the samples; its twin is its test. Letters: b problem,
i sample, k cell, r row; a_ri = C_rk w_i with k the cell of i.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.kernels.compilation import compiled
from fairopt.optimality.least_squares import least_norm
from fairopt.programs.problem import CellRows, Problem, cell_factor

__all__ = ["cells_of", "multipliers", "plain", "solve_cells", "tilt"]

Array = NDArray[np.float64]


def plain(tensor: Tensor, batch: int) -> Array:
    """As a contiguous array, so that each kernel is compiled once; what the batch shares, repeated.

    A kernel does not see where an array ends: none may be shorter than the batch.
    """
    if len(tensor) != batch:
        tensor = tensor.expand(batch, *tensor.shape[1:])
    return np.ascontiguousarray(tensor.numpy(), np.float64)


def cells_of(problem: Problem, batch: int) -> tuple[Array, NDArray[np.int64], Array]:
    """Weights, cells and coefficients as arrays."""
    rows = problem.rows
    assert isinstance(rows, CellRows)
    cell = np.ascontiguousarray(rows.cell.expand(batch, -1).numpy(), np.int64)
    return plain(rows.weight, batch), cell, plain(rows.coefficient, batch)


def solve_cells(
    problem: Problem,
    active: Tensor,
    free: Tensor,
    d: Tensor,
    right: Tensor,
    row_right: Tensor | None = None,
    /,
) -> tuple[Tensor, Tensor]:
    """As ``solve_reduced``, where ``fairopt.optimality.derivative.has_cells``."""
    batch = len(right)
    cells = cells_of(problem, batch)
    W, F = (np.ascontiguousarray(each.expand(batch, -1).numpy()) for each in (active, free))
    sums = np.empty((2, batch, cells[2].shape[-1]))
    low = np.zeros(W.shape)
    if row_right is not None:
        low = plain(torch.where(active, row_right, 0.0), batch)
    d_, g = plain(d, batch), plain(right, batch)
    add(*cells, d_, F, g, sums)
    nu = multipliers(cells[2], sums, W, low)
    v = np.empty(g.shape)
    spread(*cells, d_, F, g, nu, v)
    return torch.from_numpy(v), torch.from_numpy(nu)


def multipliers(C: Array, sums: Array, active: NDArray[np.bool_], row_right: Array) -> Array:
    """nu, ``(B, m)``, from the sums over the free of w^2 / d and of w right / d in each cell."""
    if active.shape[1] > 1:
        N, c = cell_factor(torch.from_numpy(C), *torch.from_numpy(sums))
        N = N * torch.from_numpy(active).unsqueeze(-1)
        return least_norm(N, -c, -torch.from_numpy(row_right)).numpy()
    nu = np.empty(active.shape)
    single(C, sums, active, row_right, nu)
    return nu


@compiled()
def single(C, sums, active, row_right, nu):
    """``multipliers`` of a single row."""
    for b in range(len(C)):
        curvature = pull = 0.0
        for k in range(C.shape[2]):
            curvature += C[b, 0, k] ** 2 * sums[0, b, k]
            pull += C[b, 0, k] * sums[1, b, k]
        there = active[b, 0] and curvature > 0
        nu[b, 0] = (pull - row_right[b, 0]) / curvature if there else 0.0


@compiled()
def tilt(C, y, out):
    """C^T y, and |C|^T |y| below it."""
    for k in range(C.shape[1]):
        total = size = 0.0
        for r in range(C.shape[0]):
            total += C[r, k] * y[r]
            size += abs(C[r, k] * y[r])
        out[0, k], out[1, k] = total, size


@compiled()
def add(weight, cell, C, d, free, right, sums):
    """Over the free of each cell the sums of w^2 / d and of w right / d."""
    B, n = right.shape
    sums[...] = 0.0
    for b in range(B):
        for i in range(n):
            if free[b, i]:
                step = weight[b, i] / d[b, i]
                sums[0, b, cell[b, i]] += step * weight[b, i]
                sums[1, b, cell[b, i]] += step * right[b, i]


@compiled()
def spread(weight, cell, C, d, free, right, nu, v):
    """v = (right - A^T nu) / d on the free, else zero."""
    B, n = right.shape
    t = np.empty((2, C.shape[2]))
    for b in range(B):
        tilt(C[b], nu[b], t)
        for i in range(n):
            pull = weight[b, i] * t[0, cell[b, i]]
            v[b, i] = (right[b, i] - pull) / d[b, i] if free[b, i] else 0.0
