# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Refinement and the reduced linear system over cells, compiled, for diagonal P on the CPU.

The passes over the samples of ``fairopt.optimality.compiled_cells``. Letters: b problem, i sample,
k cell, r row; a_ri = C_rk w_i with k the cell of i; d the diagonal of P.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fairopt.kernels.compilation import compiled
from fairopt.tolerances import CLEAR, TINY, WEAK

Array = NDArray[np.float64]


class CellQP(NamedTuple):
    """A batch of problems: minimise 1/2 x.(d x) + q.x, l <= A x <= u, lb <= x <= ub."""

    d: Array
    q: Array
    lb: Array
    ub: Array
    weight: Array
    cell: NDArray[np.int64]
    C: Array
    l: Array
    u: Array


class Judgement(NamedTuple):
    """What ``judge`` writes; as in ``fairopt.optimality.refinement.Point``."""

    row_side: NDArray[np.int8]
    bound_side: NDArray[np.int8]
    weak: NDArray[np.bool_]
    error: Array
    clear: NDArray[np.bool_]


@compiled()
def shift_of(C, y, out):
    """C^T y, and |C|^T |y| below it."""
    for k in range(C.shape[1]):
        total = size = 0.0
        for r in range(C.shape[0]):
            total += C[r, k] * y[r]
            size += abs(C[r, k] * y[r])
        out[0, k], out[1, k] = total, size


@compiled()
def clip_into(x, lb, ub, out):
    """x clipped into the bounds, where numbers that are not finite count as zero."""
    for b in range(len(x)):
        for i in range(x.shape[1]):
            z = x[b, i] if abs(x[b, i]) < np.inf else 0.0
            out[b, i] = min(max(z, lb[b, i]), ub[b, i])


@compiled()
def judge(p, x, y, found):
    """``Refinement.point``."""
    B, n = x.shape
    m, K = p.C.shape[1:]
    t, sums, to_bound = np.empty((2, K)), np.empty((3, K)), np.empty(n)
    for b in range(B):
        shift_of(p.C[b], y[b], t)
        sums[...] = 0.0
        worst = size = terms = largest = 0.0
        lost = False
        for i in range(n):
            k, w, z, d = p.cell[b, i], p.weight[b, i], x[b, i], p.d[b, i]
            Px, pull = d * z, w * t[0, k]
            goal = z - (Px + p.q[b, i] + pull) / d
            low, high = p.lb[b, i], p.ub[b, i]
            above = goal > high or low == high
            found.bound_side[b, i] = 1 if above else (-1 if goal < low else 0)
            miss = d * abs(z - min(max(goal, low), high))
            lost = lost or miss != miss
            worst = max(worst, miss)
            size = max(size, abs(Px) + abs(p.q[b, i]) + abs(pull))
            terms = max(terms, abs(Px) + abs(p.q[b, i]) + abs(w) * t[1, k])
            largest = max(largest, abs(z))
            sums[0, k] += w * z
            sums[1, k] += abs(w)
            sums[2, k] += w * w / d
            to_bound[i] = np.inf if low == high else min(abs(goal - high), abs(goal - low))
        worst /= size + TINY
        sure = True
        for i in range(n):
            sure &= to_bound[i] > CLEAR * (largest + terms / p.d[b, i])
        for r in range(m):
            value = total = metric = 0.0
            for k in range(K):
                c = p.C[b, r, k]
                value += c * sums[0, k]
                total += abs(c) * sums[1, k]
                metric += c * c * sums[2, k]
            low, high, pull = p.l[b, r], p.u[b, r], y[b, r] * metric
            scale = total * largest + abs(high if value - high > low - value else low)
            scale += TINY
            goal, limit, equality = value + pull, WEAK * scale, low == high
            upper = goal >= high if equality else goal > high + limit
            lower = not upper if equality else goal < low - limit
            found.row_side[b, r] = int(upper) - int(lower)
            found.weak[b, r] = not equality and abs(pull) <= limit
            gap = abs(value - high if upper else (value - low if lower else pull))
            lost = lost or gap != gap
            worst = max(worst, gap / scale)
            sure &= equality or min(abs(goal - high), abs(goal - low)) > CLEAR * scale
        found.error[b] = np.nan if lost else worst
        found.clear[b] = sure


@compiled()
def reduce(p, x, y, bound_side, row_side, start, active_y, right, sums, miss):
    """What the step needs: the last five are written.

    start is x with the variables at their bounds set to them, active_y is y without the rows that
    are not active, and right the negative gradient there. The sums are those of w^2 / d and of
    w right / d over the free of each cell. miss is by how much start misses the side of each
    active row.
    """
    B, n = x.shape
    m, K = p.C.shape[1:]
    t, total = np.empty((2, K)), np.empty(K)
    sums[...] = 0.0
    for b in range(B):
        for r in range(m):
            active_y[b, r] = y[b, r] if row_side[b, r] != 0 else 0.0
        shift_of(p.C[b], active_y[b], t)
        total[:] = 0.0
        for i in range(n):
            k, w, side = p.cell[b, i], p.weight[b, i], bound_side[b, i]
            z = x[b, i] if side == 0 else (p.ub[b, i] if side > 0 else p.lb[b, i])
            g = -((p.d[b, i] * z + p.q[b, i]) + w * t[0, k])
            start[b, i], right[b, i] = z, g
            total[k] += w * z
            if side == 0:
                sums[0, b, k] += w * w / p.d[b, i]
                sums[1, b, k] += w * g / p.d[b, i]
        for r in range(m):
            value, side = 0.0, row_side[b, r]
            for k in range(K):
                value += p.C[b, r, k] * total[k]
            miss[b, r] = (p.u[b, r] if side > 0 else p.l[b, r]) - value if side != 0 else 0.0


@compiled()
def move(p, dy, bound_side, right, start):
    """The step taken, clipped into the bounds; ``start`` is overwritten."""
    B, n = start.shape
    t = np.empty((2, p.C.shape[2]))
    for b in range(B):
        shift_of(p.C[b], dy[b], t)
        for i in range(n):
            z = start[b, i]
            if bound_side[b, i] == 0:
                z += (right[b, i] - p.weight[b, i] * t[0, p.cell[b, i]]) / p.d[b, i]
            start[b, i] = min(max(z, p.lb[b, i]), p.ub[b, i])


@compiled()
def single_multiplier(C, sums, active, row_right, nu):
    """The multiplier of a single row, from the sums over the free of each cell."""
    for b in range(len(C)):
        curvature = pull = 0.0
        for k in range(C.shape[2]):
            curvature += C[b, 0, k] ** 2 * sums[0, b, k]
            pull += C[b, 0, k] * sums[1, b, k]
        solvable = active[b, 0] and curvature > 0
        nu[b, 0] = (pull - row_right[b, 0]) / curvature if solvable else 0.0


@compiled()
def add_cells(weight, cell, d, free, right, sums):
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
        shift_of(C[b], nu[b], t)
        for i in range(n):
            pull = weight[b, i] * t[0, cell[b, i]]
            v[b, i] = (right[b, i] - pull) / d[b, i] if free[b, i] else 0.0
