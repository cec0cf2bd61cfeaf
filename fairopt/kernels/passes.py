"""Passes over the samples of a projection: sums per cell for given dual shifts, and the solution.

For the dual shift t_k of a cell (its letters are those of ``fairopt.kernels.newton``) a sample is

    x_i(t) = clip(-(q_i + w_i t_k) / P_i, lb_i, ub_i),

and one pass gives, per cell, the sum s_k(t) of w_i x_i, the curvature h_k(t) = -ds_k/dt_k = sum of
w_i^2 / P_i over the samples strictly between their bounds (a sample exactly at a bound with zero
multiplier counts as between), and the magnitude sum |w_i x_i|.

A shift is an unevaluated sum t_hi + t_lo. With scores of 1e8 between bounds of 0 and 1 the last
digit of t alone would move a prediction by 1e-8; -(q/P) - t_hi cancels exactly and t_lo carries the
rest, so that rows hold to the precision of x, not of the scores. Sums may be reassociated, so that
they vectorise; the function ``unclipped`` may not, for that would undo the compensated shift.

1/P, w, lb and ub are numbers, which all samples share, or arrays. A kernel takes whole arrays and
counts from zero: an index that Numba cannot prove to be non-negative gets a test for wrapping
around, and the loop no longer vectorises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from fairopt.kernels.compilation import compiled
from fairopt.kernels.state import (
    CELL_MASS,
    FREE,
    GREATEST_SUM,
    LEAST_SUM,
    MAGNITUDE,
    SUM,
    UNCLIPPED,
)


def at(a: Any, i: int) -> Any:
    """Element (or row) i of an array, or the value that all share."""
    return a[i] if isinstance(a, np.ndarray) else a


@overload(at, inline="always")
def compiled_at(a, i):
    if isinstance(a, types.Array):
        return lambda a, i: a[i]
    return lambda a, i: a


def part(a: Any, first: int, last: int) -> Any:
    """a[first:last], or the value that all share."""
    return a[first:last] if isinstance(a, np.ndarray) else a


@overload(part, inline="always")
def compiled_part(a, first, last):
    if isinstance(a, types.Array):
        return lambda a, first, last: a[first:last]
    return lambda a, first, last: a


def in_order(a, cell, start):
    """The elements of an array sorted by cell (stable), or the value that all share."""
    raise NotImplementedError


@overload(in_order)
def compiled_in_order(a, cell, start):
    if isinstance(a, types.Array):

        def sort(a, cell, start):
            out = np.empty_like(a)
            scatter(a, cell, start[:-1].copy(), out)
            return out

        return sort
    return lambda a, cell, start: a


@intrinsic
def fused(typingctx, a, b, c):
    """a b + c, rounded once: one instruction where the machine has it."""
    float64 = types.float64

    def generate(context, builder, signature, args):
        return builder.fma(*args)

    return float64(float64, float64, float64), generate


@compiled(fastmath=False)  # said aloud: left unsaid, it would inherit the flags of its caller
def unclipped(q: float, inverse: float, w: float, t_hi: float, t_lo: float) -> float:
    """-(q + w t) / P with the high part of the shift cancelled first.

    The product with the high part must not be rounded before it cancels: where -q/P is large (a
    linear program with little smoothing) the values would jump whenever that part moves by its last
    digit, and a row could hold on neither side of a jump.
    """
    step = w * inverse
    return fused(-step, t_hi, -(inverse * q)) - step * t_lo  # type: ignore[call-arg, no-any-return]


@compiled()
def count(cell, counts):
    """Number of samples per cell; four tables hide the store latency."""
    cells = counts.shape[0]
    table = np.zeros((4, cells), np.int64)
    for i in range(cell.shape[0]):
        table[i & 3, cell[i]] += 1
    for k in range(cells):
        counts[k] = table[0, k] + table[1, k] + table[2, k] + table[3, k]


@compiled()
def scatter(values, cell, position, out):
    """Copy values to the places of their cells; position[k] is the next free one."""
    for i in range(values.shape[0]):
        k = cell[i]
        out[position[k]] = values[i]
        position[k] += 1


@compiled()
def cell_limits(inverse, w, lb, ub, start, out):
    """The limits of each cell, samples in cell order."""
    for k in range(out.shape[1]):
        found = limits(inverse, w, lb, ub, start[k], start[k + 1])
        out[UNCLIPPED, k], out[LEAST_SUM, k], out[GREATEST_SUM, k], out[CELL_MASS, k] = found


def limits(inverse, w, lb, ub, a, b):
    """Curvature, least and greatest sum, and sum of |w|, of samples a <= i < b of one cell."""
    raise NotImplementedError


@overload(limits)
def compiled_limits(inverse, w, lb, ub, a, b):
    if isinstance(w, types.Array):

        def each(inverse, w, lb, ub, a, b):
            H = low = high = mass = 0.0
            for i in range(a, b):
                one = one_limit(inverse[i], w[i], lb[i], ub[i])
                H += one[0]
                low += one[1]
                high += one[2]
                mass += abs(w[i])
            return H, low, high, mass

        return each

    def alike(inverse, w, lb, ub, a, b):
        n = b - a
        H, low, high = one_limit(inverse, w, lb, ub)
        return (n * H, n * low, n * high, n * abs(w)) if n else (0.0, 0.0, 0.0, 0.0)

    return alike


@compiled()
def one_limit(inverse, w, lb, ub):
    """What one sample adds; a weight of zero times an infinite bound is zero, not NaN."""
    H = w * w * inverse if lb < ub else 0.0
    if w == 0.0:
        return H, 0.0, 0.0
    return H, min(w * lb, w * ub), max(w * lb, w * ub)


@compiled(fastmath={"reassoc", "nsz"})
def evaluate(q, inverse, w, lb, ub, start, t_hi, t_lo, single, out):
    """One pass, samples in cell order; see the top of the file.

    With ``single`` the values are rounded to float32 before they are summed: what an auditor of the
    returned tensor adds up.
    """
    for k in range(t_hi.shape[0]):
        a, b = start[k], start[k + 1]
        q_, p_, w_ = q[a:b], part(inverse, a, b), part(w, a, b)
        lb_, ub_ = part(lb, a, b), part(ub, a, b)
        if single:
            out[SUM, k], out[MAGNITUDE, k] = rounded_sums(q_, p_, w_, lb_, ub_, t_hi[k], t_lo[k])
        else:
            out[SUM, k], out[FREE, k], out[MAGNITUDE, k] = sums(
                q_, p_, w_, lb_, ub_, t_hi[k], t_lo[k]
            )


@compiled(fastmath={"reassoc", "nsz"})
def sums(q, inverse, w, lb, ub, t_hi, t_lo):
    """Sum of w x, curvature and sum of |w x| over the samples of one cell."""
    total = curvature = magnitude = 0.0
    for i in range(q.shape[0]):
        wi, p, lower, upper = at(w, i), at(inverse, i), at(lb, i), at(ub, i)
        v = unclipped(q[i], p, wi, t_hi, t_lo)
        x = min(max(v, lower), upper)
        total += wi * x
        magnitude += abs(wi * x)
        curvature += wi * wi * p if (v == x) & (lower < upper) else 0.0
    return total, curvature, magnitude


@compiled(fastmath={"reassoc", "nsz"})
def rounded_sums(q, inverse, w, lb, ub, t_hi, t_lo):
    """Sum of w x and of |w x| with x rounded to float32."""
    total = magnitude = 0.0
    for i in range(q.shape[0]):
        wi = at(w, i)
        v = unclipped(q[i], at(inverse, i), wi, t_hi, t_lo)
        x = np.float64(np.float32(min(max(v, at(lb, i)), at(ub, i))))
        total += wi * x
        magnitude += abs(wi * x)
    return total, magnitude


# With one or two cells (two groups, the commonest case) a pass over the samples as they come, with
# the cell chosen by comparison, vectorises as well and saves the sorted copy.


@compiled()
def pair_limits(inverse, w, lb, ub, cell, out):
    """``cell_limits`` for at most two cells, samples in any order."""
    n, K = cell.shape[0], out.shape[1]
    for k in range(K):
        out[UNCLIPPED, k] = out[LEAST_SUM, k] = out[GREATEST_SUM, k] = out[CELL_MASS, k] = 0.0
    if isinstance(w, float):
        ones = 0
        for i in range(n):
            ones += cell[i] != 0
        for k in range(K):
            found = limits(inverse, w, lb, ub, 0, ones if k == 1 else n - ones)
            out[UNCLIPPED, k], out[LEAST_SUM, k], out[GREATEST_SUM, k], out[CELL_MASS, k] = found
    else:
        for i in range(n):
            k = cell[i]
            a, b, c, d = limits(inverse, w, lb, ub, i, i + 1)
            out[UNCLIPPED, k] += a
            out[LEAST_SUM, k] += b
            out[GREATEST_SUM, k] += c
            out[CELL_MASS, k] += d


@compiled(fastmath={"reassoc", "nsz"})
def pair_evaluate(q, inverse, w, lb, ub, cell, t_hi, t_lo, out):
    """``evaluate`` for at most two cells, samples in any order."""
    end = t_hi.shape[0] - 1
    hi0, hi1, lo0, lo1 = t_hi[0], t_hi[end], t_lo[0], t_lo[end]
    s0 = s1 = h0 = h1 = size0 = size1 = 0.0
    for i in range(cell.shape[0]):
        wi, p, zero, lower, upper = at(w, i), at(inverse, i), cell[i] == 0, at(lb, i), at(ub, i)
        v = unclipped(q[i], p, wi, hi0 if zero else hi1, lo0 if zero else lo1)
        x = min(max(v, lower), upper)
        wx = wi * x
        free = wi * wi * p if (v == x) & (lower < upper) else 0.0
        s0 += wx if zero else 0.0
        s1 += 0.0 if zero else wx
        size0 += abs(wx) if zero else 0.0
        size1 += 0.0 if zero else abs(wx)
        h0 += free if zero else 0.0
        h1 += 0.0 if zero else free
    out[SUM, 0], out[FREE, 0], out[MAGNITUDE, 0] = s0, h0, size0
    if end == 1:
        out[SUM, 1], out[FREE, 1], out[MAGNITUDE, 1] = s1, h1, size1


@compiled(fastmath={"reassoc", "nsz"})
def pair_write(q, inverse, w, lb, ub, cell, t_hi, t_lo, x, out):
    """``write`` in float32 and the sums of what was written, for at most two cells."""
    end = t_hi.shape[0] - 1
    hi0, hi1, lo0, lo1 = t_hi[0], t_hi[end], t_lo[0], t_lo[end]
    s0 = s1 = size0 = size1 = 0.0
    for i in range(cell.shape[0]):
        wi, zero = at(w, i), cell[i] == 0
        v = unclipped(q[i], at(inverse, i), wi, hi0 if zero else hi1, lo0 if zero else lo1)
        rounded = np.float32(min(max(v, at(lb, i)), at(ub, i)))
        x[i] = rounded
        wx = wi * np.float64(rounded)
        s0 += wx if zero else 0.0
        s1 += 0.0 if zero else wx
        size0 += abs(wx) if zero else 0.0
        size1 += 0.0 if zero else abs(wx)
    out[SUM, 0], out[MAGNITUDE, 0] = s0, size0
    if end == 1:
        out[SUM, 1], out[MAGNITUDE, 1] = s1, size1


@compiled()
def write(q, inverse, w, lb, ub, cell, t_hi, t_lo, x):
    """The solution in the order of the samples."""
    K = t_hi.shape[0]
    if K > 2:
        for i in range(cell.shape[0]):
            k = cell[i]
            v = unclipped(q[i], at(inverse, i), at(w, i), t_hi[k], t_lo[k])
            x[i] = min(max(v, at(lb, i)), at(ub, i))
        return
    hi0, hi1, lo0, lo1 = t_hi[0], t_hi[K - 1], t_lo[0], t_lo[K - 1]
    for i in range(cell.shape[0]):
        zero = cell[i] == 0
        hi, lo = hi0 if zero else hi1, lo0 if zero else lo1
        v = unclipped(q[i], at(inverse, i), at(w, i), hi, lo)
        x[i] = min(max(v, at(lb, i)), at(ub, i))
