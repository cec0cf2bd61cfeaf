"""Refinement and the reduced system compiled, for diagonal P and cell-structured rows on the CPU.

The same formulas as in ``optimality.refinement`` and ``optimality.linear_systems``, in three and
two passes over the samples in place of some sixty operations on tensors. Each is tested against
its twin on tensors.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.kernels import cell_systems as kernels
from fairopt.optimality.linear_systems import least_norm
from fairopt.optimality.refinement import Point, Refinement, finite
from fairopt.programs.problem import Problem
from fairopt.programs.rows.cells import cell_factor

Array = NDArray[np.float64]


def contiguous(tensor: Tensor, batch: int) -> Array:
    """A contiguous array, so that each kernel is compiled once; shared data are repeated.

    A kernel does not see where an array ends: none may be shorter than the batch.
    """
    if len(tensor) != batch:
        tensor = tensor.expand(batch, *tensor.shape[1:])
    return np.ascontiguousarray(tensor.numpy(), np.float64)


def cells_of(problem: Problem, batch: int) -> tuple[Array, NDArray[np.int64], Array]:
    """Weights, cells and coefficients as arrays."""
    data = problem.rows.cell_data
    assert data is not None
    weight, cell, coefficient = data
    index = np.ascontiguousarray(cell.expand(batch, -1).numpy(), np.int64)
    return contiguous(weight, batch), index, contiguous(coefficient, batch)


def solve_cells(
    problem: Problem,
    active: Tensor,
    free: Tensor,
    d: Tensor,
    right: Tensor,
    row_right: Tensor | None = None,
    /,
) -> tuple[Tensor, Tensor]:
    """As ``solve_reduced``, where ``fairopt.optimality.linear_systems.has_cells``."""
    batch = len(right)
    weight, cell, C = cells_of(problem, batch)
    W, F = (np.ascontiguousarray(each.expand(batch, -1).numpy()) for each in (active, free))
    sums = np.empty((2, batch, C.shape[-1]))
    low = np.zeros(W.shape)
    if row_right is not None:
        low = contiguous(torch.where(active, row_right, 0.0), batch)
    d_, g = contiguous(d, batch), contiguous(right, batch)
    kernels.add_cells(weight, cell, d_, F, g, sums)
    nu = multipliers(C, sums, W, low)
    v = np.empty(g.shape)
    kernels.spread(weight, cell, C, d_, F, g, nu, v)
    return torch.from_numpy(v), torch.from_numpy(nu)


def multipliers(C: Array, sums: Array, active: NDArray[np.bool_], row_right: Array) -> Array:
    """nu, ``(B, m)``, from the sums over the free of w^2 / d and of w right / d in each cell."""
    if active.shape[1] > 1:
        N, c = cell_factor(torch.from_numpy(C), *torch.from_numpy(sums))
        N = N * torch.from_numpy(active).unsqueeze(-1)
        return least_norm(N, -c, -torch.from_numpy(row_right)).numpy()
    nu = np.empty(active.shape)
    kernels.single_multiplier(C, sums, active, row_right, nu)
    return nu


class CellRefinement(Refinement):
    """As ``Refinement``, where ``fairopt.optimality.linear_systems.has_cells``."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        batch = len(self.linear)
        weight, cell, C = cells_of(problem, batch)
        d, q, lb, ub, l, u = (
            contiguous(each, batch)
            for each in (self.d, self.linear, self.lb, self.ub, self.l, self.u)
        )
        self.data = kernels.CellQP(d, q, lb, ub, weight, cell, C, l, u)

    def start(self, x: Tensor, y: Tensor) -> Point:
        batch = len(self.linear)
        inside = np.empty((batch, x.shape[-1]))
        kernels.clip_into(contiguous(x, batch), self.data.lb, self.data.ub, inside)
        return self.point(torch.from_numpy(inside), finite(y))

    def point(self, x: Tensor, y: Tensor) -> Point:
        batch = len(self.linear)
        found = kernels.Judgement(
            row_side=np.empty(y.shape, np.int8), bound_side=np.empty(x.shape, np.int8),
            weak=np.empty(y.shape, np.bool_),
            error=np.empty(batch), clear=np.empty(batch, np.bool_),
        )  # fmt: skip
        kernels.judge(self.data, contiguous(x, batch), contiguous(y, batch), found)
        return Point(x, y, *(torch.from_numpy(each) for each in found))

    def step(self, p: Point) -> tuple[Tensor, Tensor]:
        row_side, bound_side = p.row_side.numpy(), p.bound_side.numpy()
        x, right = np.empty(bound_side.shape), np.empty(bound_side.shape)
        y, miss = np.empty(row_side.shape), np.empty(row_side.shape)
        sums = np.empty((2, len(y), self.data.C.shape[-1]))
        kernels.reduce(
            self.data, contiguous(p.x, len(x)), contiguous(p.y, len(x)), bound_side, row_side,
            x, y, right, sums, miss,
        )  # fmt: skip
        dy = multipliers(self.data.C, sums, row_side != 0, miss)
        kernels.move(self.data, dy, bound_side, right, x)
        return torch.from_numpy(x), torch.from_numpy(y + dy)
