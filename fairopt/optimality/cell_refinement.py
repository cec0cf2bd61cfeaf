# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""``fairopt.optimality.refinement`` compiled, for diagonal P and cell-structured rows on the CPU.

The same formulas in three passes over the samples per step, in place of some sixty operations on
tensors; its twin is its test. Letters as in ``fairopt.optimality.cell_systems``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairopt.kernels.compilation import compiled
from fairopt.optimality.cell_systems import cells_of, multipliers, plain, tilt
from fairopt.optimality.refinement import CLEAR, WEAK, Point, Refinement, finite
from fairopt.programs.problem import Problem
from fairopt.tolerances import TINY

__all__ = ["CellRefinement"]


class CellRefinement(Refinement):
    """As ``Refinement``, where ``fairopt.optimality.derivative.has_cells``."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        batch = len(self.linear)
        cells = cells_of(problem, batch)
        self.coefficient = cells[2]
        vectors = (self.d, self.linear, self.lb, self.ub)
        self.data = (*(plain(each, batch) for each in vectors), *cells)
        self.sides = plain(self.l, batch), plain(self.u, batch)

    def start(self, x: Tensor, y: Tensor) -> Point:
        batch = len(self.linear)
        here = np.empty((batch, x.shape[-1]))
        inside(plain(x, batch), *self.data[2:4], here)
        return self.point(torch.from_numpy(here), finite(y))

    def point(self, x: Tensor, y: Tensor) -> Point:
        batch = len(self.linear)
        bound_side = np.empty(x.shape, np.int8)
        row_side, weak = np.empty(y.shape, np.int8), np.empty(y.shape, np.bool_)
        error, clear = np.empty(batch), np.empty(batch, np.bool_)
        judge(
            *self.data, *self.sides, plain(x, batch), plain(y, batch), bound_side, row_side, weak,
            error, clear,
        )  # fmt: skip
        found = (torch.from_numpy(each) for each in (row_side, bound_side, weak, error, clear))
        return Point(x, y, *found)

    def step(self, p: Point) -> tuple[Tensor, Tensor]:
        row_side, bound_side = p.row_side.numpy(), p.bound_side.numpy()
        x, right = np.empty(bound_side.shape), np.empty(bound_side.shape)
        y, miss = np.empty(row_side.shape), np.empty(row_side.shape)
        sums = np.empty((2, len(y), self.coefficient.shape[-1]))
        reduce(
            *self.data, *self.sides, plain(p.x, len(x)), plain(p.y, len(x)), bound_side, row_side,
            x, y, right, sums, miss,
        )  # fmt: skip
        dy = multipliers(self.coefficient, sums, row_side != 0, miss)
        move(*self.data, dy, bound_side, right, x)
        return torch.from_numpy(x), torch.from_numpy(y + dy)


@compiled()
def inside(x, lb, ub, out):
    """x clipped into the bounds, zero taken for what is not finite."""
    for b in range(len(x)):
        for i in range(x.shape[1]):
            z = x[b, i] if abs(x[b, i]) < np.inf else 0.0
            out[b, i] = min(max(z, lb[b, i]), ub[b, i])


@compiled()
def judge(
    d, q, lb, ub, weight, cell, C, l, u, x, y, bound_side, row_side, weak, error, clear
):  # fmt: skip
    """``Refinement.point``: the last five are written."""
    B, n = x.shape
    m, K = C.shape[1:]
    t, sums, tied = np.empty((2, K)), np.empty((3, K)), np.empty(n)
    for b in range(B):
        tilt(C[b], y[b], t)
        sums[...] = 0.0
        worst = size = terms = largest = 0.0
        lost = False
        for i in range(n):
            k, w, z, p = cell[b, i], weight[b, i], x[b, i], d[b, i]
            Px, pull = p * z, w * t[0, k]
            goal = z - (Px + q[b, i] + pull) / p
            low, high = lb[b, i], ub[b, i]
            above = goal > high or low == high
            bound_side[b, i] = 1 if above else (-1 if goal < low else 0)
            miss = p * abs(z - min(max(goal, low), high))
            lost = lost or miss != miss
            worst = max(worst, miss)
            size = max(size, abs(Px) + abs(q[b, i]) + abs(pull))
            terms = max(terms, abs(Px) + abs(q[b, i]) + abs(w) * t[1, k])
            largest = max(largest, abs(z))
            sums[0, k] += w * z
            sums[1, k] += abs(w)
            sums[2, k] += w * w / p
            tied[i] = np.inf if low == high else min(abs(goal - high), abs(goal - low))
        worst /= size + TINY
        sure = True
        for i in range(n):
            sure &= tied[i] > CLEAR * (largest + terms / d[b, i])
        for r in range(m):
            value = total = metric = 0.0
            for k in range(K):
                c = C[b, r, k]
                value += c * sums[0, k]
                total += abs(c) * sums[1, k]
                metric += c * c * sums[2, k]
            low, high, pull = l[b, r], u[b, r], y[b, r] * metric
            scale = total * largest + abs(high if value - high > low - value else low)
            scale += TINY
            goal, limit, meet = value + pull, WEAK * scale, low == high
            upper = goal >= high if meet else goal > high + limit
            lower = not upper if meet else goal < low - limit
            row_side[b, r] = int(upper) - int(lower)
            weak[b, r] = not meet and abs(pull) <= limit
            gap = abs(value - high if upper else (value - low if lower else pull))
            lost = lost or gap != gap
            worst = max(worst, gap / scale)
            sure &= meet or min(abs(goal - high), abs(goal - low)) > CLEAR * scale
        error[b] = np.nan if lost else worst
        clear[b] = sure


@compiled()
def reduce(
    d, q, lb, ub, weight, cell, C, l, u, x, y, bound_side, row_side, start, kept, right, sums,
    miss,
):  # fmt: skip
    """What the step needs: the last five are written.

    start is x with what is held at its bounds, kept is y without the rows that are not active, and
    right the negative gradient there. The sums are those of w^2 / d and of w right / d over the
    free of each cell. miss is by how much start misses the side of each active row.
    """
    B, n = x.shape
    m, K = C.shape[1:]
    t, total = np.empty((2, K)), np.empty(K)
    sums[...] = 0.0
    for b in range(B):
        for r in range(m):
            kept[b, r] = y[b, r] if row_side[b, r] != 0 else 0.0
        tilt(C[b], kept[b], t)
        total[:] = 0.0
        for i in range(n):
            k, w, side = cell[b, i], weight[b, i], bound_side[b, i]
            z = x[b, i] if side == 0 else (ub[b, i] if side > 0 else lb[b, i])
            g = -((d[b, i] * z + q[b, i]) + w * t[0, k])
            start[b, i], right[b, i] = z, g
            total[k] += w * z
            if side == 0:
                sums[0, b, k] += w * w / d[b, i]
                sums[1, b, k] += w * g / d[b, i]
        for r in range(m):
            value, side = 0.0, row_side[b, r]
            for k in range(K):
                value += C[b, r, k] * total[k]
            miss[b, r] = (u[b, r] if side > 0 else l[b, r]) - value if side != 0 else 0.0


@compiled()
def move(d, q, lb, ub, weight, cell, C, dy, bound_side, right, start):
    """The step taken, clipped into the bounds; ``start`` is overwritten."""
    B, n = start.shape
    t = np.empty((2, C.shape[2]))
    for b in range(B):
        tilt(C[b], dy[b], t)
        for i in range(n):
            z = start[b, i]
            if bound_side[b, i] == 0:
                z += (right[b, i] - weight[b, i] * t[0, cell[b, i]]) / d[b, i]
            start[b, i] = min(max(z, lb[b, i]), ub[b, i])
