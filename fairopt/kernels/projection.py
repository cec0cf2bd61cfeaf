"""Compiled kernels of the closed-form projection: the dual of a diagonal QP with few rows.

The problem, for one element of the batch, with samples i, cells k and rows r::

    minimise  sum_i  P_i x_i^2 / 2 + q_i x_i
    subject to  l <= C s <= u,   s_k = sum_{i in cell k} w_i x_i,   lb_i <= x_i <= ub_i

(w_i is the weight with which sample i enters its cell; dense rows are the case of one sample per
cell, w = 1.) With row multipliers y and *tilts* t = C^T y, the primal is explicit,

    x_i(t) = clip(-(q_i + w_i t_k) / P_i, lb_i, ub_i),

and one pass over the samples gives, per cell, the sum s_k(t), the curvature
h_k(t) = -ds_k/dt_k = sum of w_i^2 / P_i over the samples strictly between their bounds (a sample
exactly at a bound with zero multiplier counts as between), and the magnitude
sum |w_i x_i|, to which every rounding-aware test below is relative.

The dual  minimise  Phi(y) = -min_x L(x, y) + u.y^+ - l.y^-  is convex and piecewise quadratic.
``advance`` is a proximal Newton method on it. Its model of the cell sums is linear,
s_k(t + dt) = s_k - D_k dt_k with D_k = max(h_k, mu H_k), where H_k is the curvature of the
whole cell when nothing is clipped and mu a Levenberg-Marquardt factor that keeps the model strictly
convex where a cell is wholly clipped. The model problem is a least-distance problem in as many
unknowns as there are cells; ``newton_step`` solves it by the dual active-set method of Goldfarb and
Idnani (Math. Programming 27, 1983), which never takes a dependent row into its active set, so that
redundant rows need no treatment. Steps are globalised by a line search on the slope of Phi, not on
its value: differences of values cancel near the solution, slopes do not.

The tilt is held as an unevaluated sum t_hi + t_lo. With scores of 1e8 between bounds of 0 and 1 the
last digit of t alone would move a prediction by 1e-8; -(q/P) - t_hi cancels exactly and t_lo
carries the rest, so that rows hold to the precision of x, not of the scores.

Everything runs without the GIL and touches no global state. Sums may be reassociated, so that they
vectorise; the function ``unclipped`` may not, for that would undo the compensated tilt.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from fairopt.kernels.compilation import compiled
from fairopt.tolerances import TINY, WEAK

CONTINUE, CONVERGED, STALLED, INFEASIBLE, NOT_FINITE = 0, 1, 2, 3, 4
DONE, SEVERAL, OPEN = 0, 1, 2  # what ``adjoint`` found

EPS = float(np.finfo(np.float64).eps)

# Slots of the float state of one solve.
MU, ALPHA, LOW, LOW_SLOPE, HIGH, HIGH_SLOPE, SLOPE0, BEST, STATE_SIZE = 0, 1, 2, 3, 4, 5, 6, 7, 8
# Slots of the integer state.
ITERATION, TRIES, STALLS, PENDING, EVALUATIONS, REGULAR, COUNTS_SIZE = 0, 1, 2, 3, 4, 5, 6

MAX_ITERATIONS = 2000
MAX_TRIES = 60


def at(a, i):  # type: ignore[no-untyped-def]
    """Element (or row) i of an array, or the value that all share."""
    return a[i] if isinstance(a, np.ndarray) else a


@overload(at, inline="always")
def _at(a, i):  # type: ignore[no-untyped-def]
    if isinstance(a, types.Array):
        return lambda a, i: a[i]
    return lambda a, i: a


def part(a, first, last):  # type: ignore[no-untyped-def]
    """a[first:last], or the value that all share.

    Every pass slices first and then counts from zero: an index that Numba cannot prove to be
    non-negative gets a test for wrapping around, and the loop no longer vectorises.
    """
    return a[first:last] if isinstance(a, np.ndarray) else a


@overload(part, inline="always")
def _part(a, first, last):  # type: ignore[no-untyped-def]
    if isinstance(a, types.Array):
        return lambda a, first, last: a[first:last]
    return lambda a, first, last: a


def in_order(a, cell, start):  # type: ignore[no-untyped-def]
    """The elements of an array sorted by cell (stable), or the value that all share."""
    raise NotImplementedError


@overload(in_order)
def _in_order(a, cell, start):  # type: ignore[no-untyped-def]
    if isinstance(a, types.Array):

        def sort(a, cell, start):  # type: ignore[no-untyped-def]
            out = np.empty_like(a)
            scatter(a, cell, 0, a.shape[0], start[:-1].copy(), out)
            return out

        return sort
    return lambda a, cell, start: a


@intrinsic
def fused(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """a b + c, rounded once: one instruction where the machine has it."""
    float64 = types.float64

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fma(*args)

    return float64(float64, float64, float64), generate


@compiled(fastmath=False)  # said aloud: left unsaid, it would inherit the flags of its caller
def unclipped(q: float, inverse: float, w: float, t_hi: float, t_lo: float) -> float:
    """-(q + w t) / P with the high part of the tilt cancelled first.

    The product with the high part must not be rounded before it cancels: where -q/P is large (a
    linear program with little smoothing) the values would jump whenever that part moves by its last
    digit, and a row could hold on neither side of a jump.
    """
    step = w * inverse
    return fused(-step, t_hi, -(inverse * q)) - step * t_lo  # type: ignore[call-arg, no-any-return]


# ---------------------------------------------------------------------------------------------
# Passes over the samples
# ---------------------------------------------------------------------------------------------


@compiled()
def count(cell, first, last, counts):  # type: ignore[no-untyped-def]
    """Number of samples per cell in first <= i < last; four tables hide the store latency."""
    cells = counts.shape[0]
    table = np.zeros((4, cells), np.int64)
    here = cell[first:last]
    for i in range(here.shape[0]):
        table[i & 3, here[i]] += 1
    for k in range(cells):
        counts[k] = table[0, k] + table[1, k] + table[2, k] + table[3, k]


@compiled()
def scatter(values, cell, first, last, position, out):  # type: ignore[no-untyped-def]
    """Copy values[first:last] to the places of their cells; position[k] is the next free one."""
    here, theirs = values[first:last], cell[first:last]
    for i in range(here.shape[0]):
        k = theirs[i]
        out[position[k]] = here[i]
        position[k] += 1


@compiled()
def cell_limits(inverse, w, lb, ub, start, first, last, H, low, high, mass):  # type: ignore[no-untyped-def]
    """Per cell: curvature with nothing clipped, least and greatest sum in the bounds, weight."""
    for k in range(H.shape[0]):
        a = max(start[k], first)
        b = max(a, min(start[k + 1], last))
        H[k], low[k], high[k], mass[k] = limits(inverse, w, lb, ub, a, b)


def limits(inverse, w, lb, ub, a, b):  # type: ignore[no-untyped-def]
    """Curvature, least and greatest sum, and sum of |w|, of samples a <= i < b of one cell."""
    raise NotImplementedError


@overload(limits)
def _limits(inverse, w, lb, ub, a, b):  # type: ignore[no-untyped-def]
    if isinstance(w, types.Array):

        def each(inverse, w, lb, ub, a, b):  # type: ignore[no-untyped-def]
            H = low = high = mass = 0.0
            for i in range(a, b):
                one = one_limit(inverse[i], w[i], lb[i], ub[i])
                H += one[0]
                low += one[1]
                high += one[2]
                mass += abs(w[i])
            return H, low, high, mass

        return each

    def alike(inverse, w, lb, ub, a, b):  # type: ignore[no-untyped-def]
        n = b - a
        H, low, high = one_limit(inverse, w, lb, ub)
        return (n * H, n * low, n * high, n * abs(w)) if n else (0.0, 0.0, 0.0, 0.0)

    return alike


@compiled()
def one_limit(inverse, w, lb, ub):  # type: ignore[no-untyped-def]
    """What one sample adds; a weight of zero times an infinite bound is zero, not NaN."""
    H = w * w * inverse if lb < ub else 0.0
    if w == 0.0:
        return H, 0.0, 0.0
    return H, min(w * lb, w * ub), max(w * lb, w * ub)


@compiled(fastmath={"reassoc", "nsz"})
def evaluate(q, inverse, w, lb, ub, start, t_hi, t_lo, first, last, single, s, h, size):  # type: ignore[no-untyped-def]
    """One pass over first <= i < last, samples in cell order; see the top of the file.

    With ``single`` the values are rounded to float32 before they are summed: what an auditor of the
    returned tensor adds up.
    """
    for k in range(s.shape[0]):
        a = max(start[k], first)
        b = max(a, min(start[k + 1], last))
        q_, p_, w_ = q[a:b], part(inverse, a, b), part(w, a, b)
        lb_, ub_ = part(lb, a, b), part(ub, a, b)
        if single:
            s[k], size[k] = rounded_sums(q_, p_, w_, lb_, ub_, t_hi[k], t_lo[k])
        else:
            s[k], h[k], size[k] = sums(q_, p_, w_, lb_, ub_, t_hi[k], t_lo[k])


@compiled(fastmath={"reassoc", "nsz"})
def sums(q, inverse, w, lb, ub, t_hi, t_lo):  # type: ignore[no-untyped-def]
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
def rounded_sums(q, inverse, w, lb, ub, t_hi, t_lo):  # type: ignore[no-untyped-def]
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
def pair_limits(inverse, w, lb, ub, cell, first, last, H, low, high, mass):  # type: ignore[no-untyped-def]
    """``cell_limits`` for at most two cells, samples in any order."""
    cell = cell[first:last]
    inverse, w = part(inverse, first, last), part(w, first, last)
    lb, ub = part(lb, first, last), part(ub, first, last)
    K = H.shape[0]
    for k in range(K):
        H[k] = low[k] = high[k] = mass[k] = 0.0
    if isinstance(w, float):
        ones = 0
        for i in range(cell.shape[0]):
            ones += cell[i] != 0
        for k in range(K):
            number = ones if k == 1 else last - first - ones
            H[k], low[k], high[k], mass[k] = limits(inverse, w, lb, ub, 0, number)
    else:
        for i in range(cell.shape[0]):
            k = cell[i]
            a, b, c, d = limits(inverse, w, lb, ub, i, i + 1)
            H[k] += a
            low[k] += b
            high[k] += c
            mass[k] += d


@compiled(fastmath={"reassoc", "nsz"})
def pair_evaluate(q, inverse, w, lb, ub, cell, t_hi, t_lo, first, last, s, h, size):  # type: ignore[no-untyped-def]
    """``evaluate`` for at most two cells, samples in any order."""
    q, cell = q[first:last], cell[first:last]
    inverse, w = part(inverse, first, last), part(w, first, last)
    lb, ub = part(lb, first, last), part(ub, first, last)
    end = s.shape[0] - 1
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
    s[0], h[0], size[0] = s0, h0, size0
    if end == 1:
        s[1], h[1], size[1] = s1, h1, size1


@compiled(fastmath={"reassoc", "nsz"})
def pair_write(q, inverse, w, lb, ub, cell, t_hi, t_lo, first, last, x, s, size):  # type: ignore[no-untyped-def]
    """``write`` in float32 and the sums of what was written, for at most two cells."""
    q, cell, x = q[first:last], cell[first:last], x[first:last]
    inverse, w = part(inverse, first, last), part(w, first, last)
    lb, ub = part(lb, first, last), part(ub, first, last)
    end = s.shape[0] - 1
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
    s[0], size[0] = s0, size0
    if end == 1:
        s[1], size[1] = s1, size1


@compiled()
def write(q, inverse, w, lb, ub, cell, t_hi, t_lo, first, last, x):  # type: ignore[no-untyped-def]
    """The solution in the order of the samples."""
    q, cell, x = q[first:last], cell[first:last], x[first:last]
    inverse, w = part(inverse, first, last), part(w, first, last)
    lb, ub = part(lb, first, last), part(ub, first, last)
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


@compiled()
def is_free(q, inverse, w, lb, ub, t_hi, t_lo, reach):  # type: ignore[no-untyped-def]
    """Whether neither bound holds the sample: the activity rule of fairopt.optimality.derivative.

    v is the very number that the forward clipped. Beyond a bound it exceeds it by w/P of that
    bound's multiplier; at a bound, but for rounding, the multiplier is zero and the bound counts as
    inactive. The terms of the largest tilt have the size ``reach``.
    """
    v = unclipped(q, inverse, w, t_hi, t_lo)
    noise = WEAK * inverse * (abs(q) + abs(w) * reach)
    return (lb < ub) & (v >= lb - noise) & (v <= ub + noise)


@compiled(fastmath={"reassoc", "nsz"})
def adjoint_sums(q, inverse, w, lb, ub, cell, t_hi, t_lo, reach, g, first, last, s, h):  # type: ignore[no-untyped-def]
    """Per cell, over the free samples: s = sum of w g / P and h = sum of w^2 / P."""
    q, cell, g = q[first:last], cell[first:last], g[first:last]
    inverse, w = part(inverse, first, last), part(w, first, last)
    lb, ub = part(lb, first, last), part(ub, first, last)
    K = s.shape[0]
    if K > 2:
        table = np.zeros((4, K, 2))
        for i in range(cell.shape[0]):
            k, wi, p = cell[i], at(w, i), at(inverse, i)
            free = is_free(q[i], p, wi, at(lb, i), at(ub, i), t_hi[k], t_lo[k], reach)
            step = wi * p if free else 0.0
            table[i & 3, k, 0] += step * g[i]
            table[i & 3, k, 1] += step * wi
        for k in range(K):
            s[k] = table[0, k, 0] + table[1, k, 0] + table[2, k, 0] + table[3, k, 0]
            h[k] = table[0, k, 1] + table[1, k, 1] + table[2, k, 1] + table[3, k, 1]
        return
    hi0, hi1, lo0, lo1 = t_hi[0], t_hi[K - 1], t_lo[0], t_lo[K - 1]
    s0 = s1 = h0 = h1 = 0.0
    for i in range(cell.shape[0]):
        wi, p, zero = at(w, i), at(inverse, i), cell[i] == 0
        hi, lo = hi0 if zero else hi1, lo0 if zero else lo1
        free = is_free(q[i], p, wi, at(lb, i), at(ub, i), hi, lo, reach)
        step = wi * p if free else 0.0
        a, b = step * g[i], step * wi
        s0 += a if zero else 0.0
        s1 += 0.0 if zero else a
        h0 += b if zero else 0.0
        h1 += 0.0 if zero else b
    s[0], h[0] = s0, h0
    if K == 2:
        s[1], h[1] = s1, h1


@compiled()
def adjoint_write(q, inverse, w, lb, ub, cell, t_hi, t_lo, reach, g, shift, first, last, v):  # type: ignore[no-untyped-def]
    """v = -(g + w shift) / P on the free samples, 0 on the others."""
    q, cell, g, v = q[first:last], cell[first:last], g[first:last], v[first:last]
    inverse, w = part(inverse, first, last), part(w, first, last)
    lb, ub = part(lb, first, last), part(ub, first, last)
    K = t_hi.shape[0]
    if K > 2:
        for i in range(cell.shape[0]):
            k, wi, p = cell[i], at(w, i), at(inverse, i)
            free = is_free(q[i], p, wi, at(lb, i), at(ub, i), t_hi[k], t_lo[k], reach)
            v[i] = -(g[i] + wi * shift[k]) * p if free else 0.0
        return
    hi0, hi1, lo0, lo1 = t_hi[0], t_hi[K - 1], t_lo[0], t_lo[K - 1]
    shift0, shift1 = shift[0], shift[K - 1]
    for i in range(cell.shape[0]):
        wi, p, zero = at(w, i), at(inverse, i), cell[i] == 0
        hi, lo = hi0 if zero else hi1, lo0 if zero else lo1
        free = is_free(q[i], p, wi, at(lb, i), at(ub, i), hi, lo, reach)
        v[i] = -(g[i] + wi * (shift0 if zero else shift1)) * p if free else 0.0


@compiled()
def reach_of(C, y):  # type: ignore[no-untyped-def]
    """Size of the terms of the largest tilt, max_k (|C|^T |y|)_k."""
    largest = 0.0
    for k in range(C.shape[1]):
        reach = 0.0
        for r in range(C.shape[0]):
            reach += abs(C[r, k] * y[r])
        largest = max(largest, reach)
    return largest


@compiled()
def is_open(C, tight, q, inverse, w, lb, ub, cell, t_hi, t_lo, reach):  # type: ignore[no-untyped-def]
    """Whether other multipliers could hold samples that sit at a bound without one.

    So it may be where a cell of a tight row has no sample strictly inside its bounds
    (``fairopt.optimality.degenerate_bounds``). One look at a few samples in the usual case.
    """
    m, K = C.shape
    near = np.zeros(K, np.bool_)
    for k in range(K):
        for r in range(m):
            if tight[r] and C[r, k] != 0.0:
                near[k] = True
    return any_open(near, q, inverse, w, lb, ub, cell, t_hi, t_lo, reach)


@compiled()
def any_open(near, q, inverse, w, lb, ub, cell, t_hi, t_lo, reach):  # type: ignore[no-untyped-def]
    """``is_open``, given which cells a tight row looks at."""
    state = near.astype(np.uint8)  # 1: no sample strictly inside yet; 2: one without multiplier
    unseen = 0
    for k in range(near.shape[0]):
        unseen += state[k]
    for i in range(cell.shape[0]):
        if unseen == 0:
            return False
        k = cell[i]
        lo, up = at(lb, i), at(ub, i)
        if state[k] == 0 or lo == up:
            continue
        p, wi = at(inverse, i), at(w, i)
        v = unclipped(q[i], p, wi, t_hi[k], t_lo[k])
        noise = WEAK * p * (abs(q[i]) + abs(wi) * reach)
        if lo + noise < v < up - noise:
            state[k] = 0
            unseen -= 1
        elif is_free(q[i], p, wi, lo, up, t_hi[k], t_lo[k], reach):
            state[k] = 2
    found = False
    for k in range(near.shape[0]):
        found = found or state[k] == 2
    return found


# ---------------------------------------------------------------------------------------------
# The model problem
# ---------------------------------------------------------------------------------------------


@compiled()
def orthogonalise(N, r, Q, R, q):  # type: ignore[no-untyped-def]
    """Column q of the factorisation of the active normals (N_W^T = Q R); the length of the rest.

    Gram-Schmidt, twice: "twice is enough". Q is stored by rows (q, K).
    """
    K = N.shape[1]
    rest = Q[q]
    for k in range(K):
        rest[k] = N[r, k]
    for j in range(q):
        R[j, q] = 0.0
    for _ in range(2):
        for j in range(q):
            c = 0.0
            for k in range(K):
                c += Q[j, k] * rest[k]
            R[j, q] += c
            for k in range(K):
                rest[k] -= c * Q[j, k]
    length = 0.0
    for k in range(K):
        length += rest[k] * rest[k]
    return math.sqrt(length)


# A normal whose part outside the span of the active ones is shorter than this is dependent.
DEPENDENT = 1e-9
# A multiplier that changes more slowly than this does not change: the rate is rounding.
NO_RATE = 1e-10


@compiled()
def factorise(N, W, side, lam, q, Q, R, aside):  # type: ignore[no-untyped-def]
    """Factorise the normals of W afresh, leaving dependent ones aside; the number that stay."""
    kept = 0
    for j in range(q):
        length = orthogonalise(N, W[j], Q, R, kept)
        if length > DEPENDENT:
            for k in range(N.shape[1]):
                Q[kept, k] /= length
            R[kept, kept] = length
            W[kept], side[kept], lam[kept] = W[j], side[j], lam[j]
            kept += 1
        else:
            aside[W[j]] = side[j] * lam[j]
    return kept


@compiled()
def back_substitute(R, c, q, out):  # type: ignore[no-untyped-def]
    """out = R^-1 c."""
    for j in range(q - 1, -1, -1):
        a = c[j]
        for i in range(j + 1, q):
            a -= R[j, i] * out[i]
        out[j] = a / R[j, j]


@compiled()
def newton_step(C, l, u, floor, s, D, y, y_new, dt, ray):  # type: ignore[no-untyped-def]
    """Minimise the model; False if its rows contradict each other (then ``ray`` proves it).

    In z = (s_new - s) / sqrt(D) and normals N_r = C_r sqrt(D) / |C_r sqrt(D)|, signed so that
    an active row reads N_r z = b_r, the model is: minimise |z|^2 / 2 + (what y already pulls), and
    a multiplier that grows by a moves z by -a N_r. The method starts from the rows on which y
    acts, drops those that would pull the wrong way, then adds the most violated row, one at a
    time. Results: the new multipliers ``y_new`` and the change of tilt ``dt``.
    """
    m, K = C.shape
    root = np.sqrt(D)
    N = np.empty((m, K))
    length = np.empty(m)
    a = np.empty(m)  # row values at s
    for r in range(m):
        total = value = 0.0
        for k in range(K):
            c = C[r, k] * root[k]
            N[r, k] = c
            total += c * c
            value += C[r, k] * s[k]
        a[r] = value
        length[r] = math.sqrt(total)
        if length[r] > 0.0:
            for k in range(K):
                N[r, k] /= length[r]

    most = min(m, K)
    W = np.empty(most + 1, np.int64)
    side = np.empty(most + 1)
    Q = np.empty((most + 1, K))
    R = np.zeros((most + 1, most + 1))
    lam = np.zeros(most + 1)
    c = np.empty(most + 1)
    rate = np.empty(most + 1)
    z = np.zeros(K)
    active = np.zeros(m, np.bool_)
    aside = np.zeros(m)

    # Rows on which y acts. Rows that do not fit (dependent now) are dropped by factorise.
    q = 0
    for r in range(m):
        if y[r] != 0.0 and length[r] > 0.0 and q < most:
            W[q] = r
            side[q] = 1.0 if y[r] > 0.0 else -1.0
            q += 1
    while True:
        q = factorise(N, W, side, lam, q, Q, R, aside)  # lam is still zero
        active[:] = False
        for j in range(q):
            active[W[j]] = True
        z[:] = 0.0
        for r in range(m):
            if y[r] != 0.0 and not active[r]:
                for k in range(K):
                    z[k] += y[r] * length[r] * N[r, k]
        # e = signed excess of the active rows; c = R^-T e; z -= Q c; the multipliers grow R^-1 c.
        for j in range(q):
            r = W[j]
            e = (a[r] - (u[r] if side[j] > 0.0 else l[r])) / length[r]
            for k in range(K):
                e += N[r, k] * z[k]
            for i in range(j):
                e -= R[i, j] * c[i]
            c[j] = e / R[j, j]
        for j in range(q):
            for k in range(K):
                z[k] -= c[j] * Q[j, k]
        back_substitute(R, c, q, rate)
        kept = 0
        for j in range(q):
            r = W[j]
            grown = y[r] * length[r] + rate[j]  # unsigned normals: this is the signed multiplier
            if l[r] == u[r] or grown * side[j] > 0.0:
                W[kept], side[kept], lam[kept] = r, side[j], grown * side[j]
                kept += 1
        if kept == q:
            break
        q = kept
        lam[:] = 0.0

    solved = True
    contradiction = 0.0  # the worst so far; what ray proves
    for _ in range(50 * (m + K) + 50):
        # The most violated row, in the metric of the model.
        worst = 0.0
        p = -1
        p_side = 0.0
        for r in range(m):
            if active[r]:
                continue
            shift = rounding = 0.0
            for k in range(K):
                move = N[r, k] * z[k]
                shift += move
                rounding += abs(move)
            value = a[r] + length[r] * shift
            over = value - u[r]
            under = l[r] - value
            excess = max(over, under)
            if excess <= floor[r] + 8.0 * EPS * length[r] * rounding:
                continue
            if length[r] == 0.0:
                # No sample moves this row: it can never hold.
                ray[:] = 0.0
                ray[r] = 1.0 if over > under else -1.0
                return False
            if excess / length[r] > worst:
                worst = excess / length[r]
                p = r
                p_side = 1.0 if over > under else -1.0
        if p < 0:
            break
        lam_p = 0.0
        while True:
            reach = orthogonalise(N, p, Q, R, q)
            for j in range(q):
                c[j] = R[j, q] * p_side
            back_substitute(R, c, q, rate)  # N_p = sum_j rate_j N_Wj (unsigned) + rest
            step = np.inf
            blocking = -1
            for j in range(q):
                signed = rate[j] * side[j]
                if l[W[j]] != u[W[j]] and signed > NO_RATE and lam[j] < step * signed:
                    step = lam[j] / signed
                    blocking = j
            full = np.inf
            if reach > DEPENDENT and q < most:
                full = worst / (reach * reach)
            if blocking < 0 and full == np.inf:
                # Dependent on rows that cannot give way. Within rounding it holds; beyond, never.
                if worst > contradiction:
                    contradiction = worst
                    ray[:] = 0.0
                    ray[p] = p_side / length[p]
                    for j in range(q):
                        if abs(rate[j]) > NO_RATE:
                            ray[W[j]] = -rate[j] / length[W[j]]
                solved = False
                active[p] = True  # left aside with what it has pulled; the other rows still count
                aside[p] = p_side * lam_p
                break
            if full <= step:
                for k in range(K):
                    z[k] -= full * p_side * Q[q, k]
                for j in range(q):
                    lam[j] -= full * rate[j] * side[j]
                for k in range(K):
                    Q[q, k] /= reach
                R[q, q] = reach
                W[q], side[q], lam[q] = p, p_side, lam_p + full
                active[p] = True
                q += 1
                break
            if full < np.inf:
                for k in range(K):
                    z[k] -= step * p_side * Q[q, k]
                worst -= step * reach * reach
            for j in range(q):
                lam[j] -= step * rate[j] * side[j]
            lam_p += step
            active[W[blocking]] = False
            for j in range(blocking, q - 1):
                W[j], side[j], lam[j] = W[j + 1], side[j + 1], lam[j + 1]
            q = factorise(N, W, side, lam, q - 1, Q, R, aside)

    for j in range(q):
        aside[W[j]] = side[j] * lam[j]
    for r in range(m):
        y_new[r] = aside[r] / length[r] if aside[r] != 0.0 else 0.0
    for k in range(K):
        dt[k] = 0.0
        if root[k] > 0.0:
            dt[k] = -z[k] / root[k]
        else:  # nothing in this cell can move: its tilt only follows the multipliers
            for r in range(m):
                dt[k] += C[r, k] * (y_new[r] - y[r])
    return solved


# ---------------------------------------------------------------------------------------------
# The outer iteration
# ---------------------------------------------------------------------------------------------


@compiled()
def new_state(m, K):  # type: ignore[no-untyped-def]
    """Multipliers, tilts and counters of a solve that has not begun."""
    numbers = np.zeros(STATE_SIZE)
    numbers[MU] = 1e-2
    numbers[BEST] = np.inf
    counts = np.zeros(COUNTS_SIZE, np.int64)
    # multipliers: current, trial, and the target of the step; tilts: current and trial, hi and lo
    return numbers, counts, np.zeros((3, m)), np.zeros((4, K)), np.zeros(K)


@compiled()
def proves_infeasible(C, l, u, ray, low, high):  # type: ignore[no-untyped-def]
    """Farkas: the least value of ray.C s over all reachable s exceeds what the rows allow."""
    m, K = C.shape
    least = size = 0.0
    for r in range(m):
        if ray[r] > 0.0:
            least -= u[r] * ray[r]
            size += abs(u[r] * ray[r])
        elif ray[r] < 0.0:
            least -= l[r] * ray[r]
            size += abs(l[r] * ray[r])
    if not least > -np.inf:
        return False
    for k in range(K):
        c = total = 0.0
        for r in range(m):
            c += ray[r] * C[r, k]
            total += abs(ray[r] * C[r, k])
        end = low[k] if c > 0.0 else high[k]
        if not math.isinf(end):
            least += c * end
            size += total * max(abs(low[k]) if low[k] > -np.inf else 0.0, abs(end))
        elif abs(c) > 1e-9 * total:
            return False  # this cell alone can make up for anything
    return least > 1e-11 * size


@compiled(fastmath=False)
def two_sum_into(hi, lo, change):  # type: ignore[no-untyped-def]
    """(hi + lo) + change as an unevaluated sum (Knuth)."""
    a = lo + change
    total = hi + a
    b = total - hi
    return total, (hi - (total - b)) + (a - b)


@compiled()
def another_length(numbers, counts):  # type: ignore[no-untyped-def]
    """The next length of step to try, between the longest too short and the shortest too long."""
    counts[TRIES] += 1
    low, high = numbers[LOW], numbers[HIGH]
    share = numbers[LOW_SLOPE] / (numbers[LOW_SLOPE] - numbers[HIGH_SLOPE])
    share = min(max(share, 0.01), 0.9)
    if counts[TRIES] % 3 == 0:
        # A step may be ten orders too long: bisect the exponent now and then.
        alpha = math.sqrt(max(low, 1e-18) * high)
        if not low < alpha < high:
            alpha = 0.5 * (low + high)
    else:
        alpha = low + share * (high - low)
    numbers[ALPHA] = alpha
    return alpha


@compiled()
def slope_at(l, u, s, size, numbers, counts, Y, dt):  # type: ignore[no-untyped-def]
    """The slope of Phi along the step, approached from the left, and how large it may be."""
    y, trial, target = Y[0], Y[1], Y[2]
    slope = noise = 0.0
    for k in range(s.shape[0]):
        slope -= s[k] * dt[k]
        noise += size[k] * abs(dt[k])
    for r in range(l.shape[0]):
        d = target[r] - y[r]
        if d != 0.0:
            sign = trial[r] if trial[r] != 0.0 else -d
            term = (u[r] if sign > 0.0 else l[r]) * d
            slope += term
            noise += abs(term)
    limit = 8.0 * EPS * noise
    if counts[REGULAR] and counts[ITERATION] <= 25:
        limit = max(limit, 0.3 * abs(numbers[SLOPE0]))
    if numbers[SLOPE0] >= -limit:
        limit = np.inf  # no descent above rounding is left: the step is a correction, take it
    return slope, limit


@compiled()
def search(l, u, s, size, numbers, counts, Y, T, dt):  # type: ignore[no-untyped-def]
    """Take the trial, and return False; or set another on the same ray, and return True."""
    m, K = l.shape[0], s.shape[0]
    y, trial, target = Y[0], Y[1], Y[2]
    alpha = numbers[ALPHA]
    slope, limit = slope_at(l, u, s, size, numbers, counts, Y, dt)
    again = True
    if slope > limit and counts[TRIES] < MAX_TRIES:
        # Too far: the minimum of Phi on this ray lies before alpha.
        numbers[HIGH], numbers[HIGH_SLOPE] = alpha, slope
    elif (
        slope < -0.7 * abs(numbers[SLOPE0])
        and counts[TRIES] < MAX_TRIES // 2
        and numbers[HIGH] - alpha > 1e-3 * numbers[HIGH]
    ):
        # Far too short: Phi falls on as steeply as at the start.
        numbers[LOW], numbers[LOW_SLOPE] = alpha, slope
    else:
        again = False
    if again:
        alpha = another_length(numbers, counts)
        for r in range(m):
            trial[r] = y[r] + alpha * (target[r] - y[r])
        for k in range(K):
            T[2, k], T[3, k] = two_sum_into(T[0, k], T[1, k], alpha * dt[k])
        return True
    for r in range(m):
        y[r] = trial[r]
    for k in range(K):
        T[0, k], T[1, k] = T[2, k], T[3, k]
    if alpha >= 1.0:
        numbers[MU] = max(numbers[MU] * 1e-2, 1e-16)
    elif alpha < 0.3:
        numbers[MU] = min(numbers[MU] * 1e2, 1.0)
    return False


@compiled()
def miss(value, y, l, u):  # type: ignore[no-untyped-def]
    """How far a row is from where its multiplier says that it is."""
    if y > 0.0:
        return abs(value - u)
    if y < 0.0:
        return abs(value - l)
    return max(value - u, l - value, 0.0)


@compiled()
def with_sides(scale, l, u):  # type: ignore[no-untyped-def]
    """The scale of a row: no less than its finite sides."""
    if math.isfinite(u):
        scale = max(scale, abs(u))
    if math.isfinite(l):
        scale = max(scale, abs(l))
    return scale


@compiled()
def verdict(worst, numbers, counts):  # type: ignore[no-untyped-def]
    """Whether to stop, given the worst miss in units of what rounding allows."""
    if worst == 0.0:
        return CONVERGED
    if worst <= 1000.0:  # a few hundred roundings: better only if it comes at once
        counts[STALLS] += 1
        if counts[STALLS] > 2 and worst >= 0.5 * numbers[BEST]:
            return CONVERGED
    numbers[BEST] = min(numbers[BEST], worst)
    return STALLED if counts[ITERATION] >= MAX_ITERATIONS else CONTINUE


@compiled()
def model(h, H, D, numbers, counts):  # type: ignore[no-untyped-def]
    """The curvatures of the model, D = max(h, mu H)."""
    counts[REGULAR] = 1
    for k in range(h.shape[0]):
        D[k] = h[k]
        if h[k] < numbers[MU] * H[k]:
            D[k] = numbers[MU] * H[k]
            counts[REGULAR] = 0  # the model guesses: overshoot is not to be trusted


@compiled()
def aim(l, u, s, numbers, counts, Y, T, dt):  # type: ignore[no-untyped-def]
    """Set the first trial of a new step, whose target is Y[2]."""
    y, trial, target = Y[0], Y[1], Y[2]
    slope = 0.0
    for k in range(s.shape[0]):
        slope -= s[k] * dt[k]
    for r in range(l.shape[0]):
        d = target[r] - y[r]
        if d != 0.0:
            sign = y[r] if y[r] != 0.0 else d
            slope += (u[r] if sign > 0.0 else l[r]) * d
    numbers[SLOPE0] = numbers[LOW_SLOPE] = slope
    numbers[LOW], numbers[HIGH], numbers[HIGH_SLOPE], numbers[ALPHA] = 0.0, np.inf, 0.0, 1.0
    counts[TRIES], counts[PENDING] = 0, 1
    for r in range(l.shape[0]):
        trial[r] = target[r]
    for k in range(s.shape[0]):
        T[2, k], T[3, k] = two_sum_into(T[0, k], T[1, k], dt[k])


@compiled()
def advance(C, l, u, low, high, H, mass, s, h, size, rounding, numbers, counts, Y, T, dt):  # type: ignore[no-untyped-def]
    """Given the pass at the trial tilt, take it or shorten the step; then set the next trial.

    ``rounding`` is the relative error to expect of a sum over the samples.

    Returns CONTINUE when another pass at T[2] + T[3] is wanted; otherwise the solution is Y[0] with
    tilt T[0] + T[1].
    """
    m, K = C.shape
    counts[EVALUATIONS] += 1
    y, target = Y[0], Y[2]
    for k in range(K):
        if not math.isfinite(s[k]):
            return NOT_FINITE

    if counts[PENDING]:
        if search(l, u, s, size, numbers, counts, Y, T, dt):
            return CONTINUE
        # A tilt that grew large and came back has lost digits; then it is taken from y afresh.
        drifted = False
        for k in range(K):
            exact = scale = 0.0
            for r in range(m):
                exact += C[r, k] * y[r]
                scale += abs(C[r, k] * y[r])
            if abs(T[0, k] + T[1, k] - exact) > 32.0 * EPS * scale:
                drifted = True
                T[0, k], T[1, k] = exact, 0.0
        if drifted:
            counts[PENDING] = 0
            T[2], T[3] = T[0], T[1]
            return CONTINUE

    # How far from optimal, relative to what rounding allows.
    floor = np.empty(m)
    worst = 0.0
    largest = largest_mean(size, mass)
    for r in range(m):
        value = scale = 0.0
        for k in range(K):
            value += C[r, k] * s[k]
            scale += abs(C[r, k]) * mass[k] * largest
        off = miss(value, y[r], l[r], u[r])
        scale = with_sides(scale, l[r], u[r])
        floor[r] = rounding * (scale + TINY)
        if off > floor[r]:
            worst = max(worst, off / floor[r])
    status = verdict(worst, numbers, counts)
    if status != CONTINUE:
        return status
    if proves_infeasible(C, l, u, y, low, high):
        target[:] = y
        return INFEASIBLE
    ray = np.zeros(m)
    # Beside a multiplier that grows without end, those of rows that do hold are rounding; with them
    # it would prove nothing where bounds are infinite.
    largest_y = 0.0
    for r in range(m):
        largest_y = max(largest_y, abs(y[r]))
    stripped = False
    for r in range(m):
        if abs(y[r]) > 1e-9 * largest_y:
            ray[r] = y[r]
        elif y[r] != 0.0:
            stripped = True
    if stripped and proves_infeasible(C, l, u, ray, low, high):
        target[:] = ray
        return INFEASIBLE
    ray[:] = 0.0

    D = np.empty(K)
    model(h, H, D, numbers, counts)
    counts[ITERATION] += 1
    solved = newton_step(C, l, u, floor, s, D, y, target, dt, ray)
    if not solved and proves_infeasible(C, l, u, ray, low, high):
        target[:] = ray
        return INFEASIBLE
    # Contradictory only to rounding: the step towards the other rows is still good.

    aim(l, u, s, numbers, counts, Y, T, dt)
    return CONTINUE


@compiled()
def sum_rounding(n):  # type: ignore[no-untyped-def]
    """Relative error to expect of a sum of n terms in a few interleaved chains (a random walk)."""
    return EPS * (4.0 + 0.5 * math.sqrt(n))


@compiled()
def largest_mean(size, mass):  # type: ignore[no-untyped-def]
    """Largest mean |x| of a cell: never more than the largest |x|."""
    largest = 0.0
    for k in range(size.shape[0]):
        if mass[k] > 0.0:
            largest = max(largest, size[k] / mass[k])
    return largest


@compiled()
def excess(C, l, u, mass, s, size):  # type: ignore[no-untyped-def]
    """Worst violation of a row over its scale: at least what programs.solution.row_excess finds."""
    worst = 0.0
    largest = largest_mean(size, mass)
    for r in range(C.shape[0]):
        value = scale = 0.0
        for k in range(C.shape[1]):
            value += C[r, k] * s[k]
            scale += abs(C[r, k]) * mass[k] * largest
        if value > u[r]:
            worst = max(worst, (value - u[r]) / (scale + abs(u[r]) + TINY))
        elif value < l[r]:
            worst = max(worst, (l[r] - value) / (scale + abs(l[r]) + TINY))
    return worst


@compiled()
def solve_one(C, l, u, q, inverse, w, lb, ub, cell, grouped, single, precision, x, tight):  # type: ignore[no-untyped-def]
    """Solve one problem in one thread, and write its solution to x and its tight sides to tight.

    Returns status, passes, multipliers (of the solution, or of the proof that there is none), both
    parts of the tilts, and the worst excess of a row.
    """
    n = q.shape[0]
    m, K = C.shape
    start = np.zeros(K + 1, np.int64)
    low, high, H, mass = np.empty(K), np.empty(K), np.empty(K), np.empty(K)
    s, h, size = np.empty(K), np.empty(K), np.empty(K)
    pair = K <= 2 and not grouped
    qs, ps, ws, los, ups = q, inverse, w, lb, ub
    if pair:
        pair_limits(ps, ws, los, ups, cell, 0, n, H, low, high, mass)
    else:
        if grouped:
            for k in range(K + 1):
                start[k] = k
        else:
            count(cell, 0, n, start[1:])
            for k in range(K):
                start[k + 1] += start[k]
            qs = in_order(q, cell, start)
            ps, ws = in_order(inverse, cell, start), in_order(w, cell, start)
            los, ups = in_order(lb, cell, start), in_order(ub, cell, start)
        cell_limits(ps, ws, los, ups, start, 0, n, H, low, high, mass)
    numbers, counts, Y, T, dt = new_state(m, K)
    status = CONTINUE
    while status == CONTINUE:
        if pair:
            pair_evaluate(qs, ps, ws, los, ups, cell, T[2], T[3], 0, n, s, h, size)
        else:
            evaluate(qs, ps, ws, los, ups, start, T[2], T[3], 0, n, False, s, h, size)
        status = advance(
            C, l, u, low, high, H, mass, s, h, size, sum_rounding(n), numbers, counts, Y, T, dt
        )
    if single and pair:
        pair_write(q, inverse, w, lb, ub, cell, T[0], T[1], 0, n, x, s, size)
    else:
        write(q, inverse, w, lb, ub, cell, T[0], T[1], 0, n, x)
        if single:
            evaluate(qs, ps, ws, los, ups, start, T[0], T[1], 0, n, True, s, h, size)
    y = Y[2] if status == INFEASIBLE else Y[0]
    if status == CONVERGED:
        drop_weak(C, l, u, mass, s, size, H, y)
    tight_sides(C, l, u, mass, s, size, precision, tight)
    return status, counts[EVALUATIONS], y, T[0], T[1], excess(C, l, u, mass, s, size)


@compiled()
def drop_weak(C, l, u, mass, s, size, H, y):  # type: ignore[no-untyped-def]
    """Zero the multipliers that move their row by no more than rounding: weakly active rows.

    The rule of fairopt.optimality.finishing.
    """
    largest = largest_mean(size, mass)
    for r in range(C.shape[0]):
        if y[r] == 0.0 or l[r] == u[r]:
            continue
        scale = pull = 0.0
        for k in range(C.shape[1]):
            scale += abs(C[r, k]) * mass[k] * largest
            pull += C[r, k] * C[r, k] * H[k]
        if abs(y[r]) * pull <= WEAK * (scale + abs(u[r] if y[r] > 0.0 else l[r])):
            y[r] = 0.0


@compiled()
def tight_sides(C, l, u, mass, s, size, precision, tight):  # type: ignore[no-untyped-def]
    """For each row 1 if its upper side is met to the promised precision, plus 2 if its lower is."""
    largest = largest_mean(size, mass)
    for r in range(C.shape[0]):
        value = scale = 0.0
        for k in range(C.shape[1]):
            value += C[r, k] * s[k]
            scale += abs(C[r, k]) * mass[k] * largest
        tight[r] = 0
        if u[r] < np.inf and u[r] - value <= precision * (scale + abs(u[r])):
            tight[r] = 1
        if l[r] > -np.inf and value - l[r] <= precision * (scale + abs(l[r])):
            tight[r] += 2


@compiled()
def solve(
    C,
    l,
    u,
    q,
    inverse,
    w,
    lb,
    ub,
    cell,
    grouped,
    single,
    precision,
    first,
    last,
    x,
    y,
    T,
    status,
    passes,
    worst,
    tight,
):  # type: ignore[no-untyped-def]
    """Solve the problems first <= b < last of a batch, one after the other, in one thread.

    ``inverse`` (1/P), ``w``, ``lb`` and ``ub`` are four numbers or four arrays (B, n). With
    ``grouped`` the samples are in cell order already, one per cell (dense rows). Returns how many
    have no solution to the precision asked for.
    """
    failures = 0
    for b in range(first, last):
        qb, pb, wb, lo, up = q[b], at(inverse, b), at(w, b), at(lb, b), at(ub, b)
        status[b], passes[b], y[b], T[0, b], T[1, b], worst[b] = solve_one(
            C[b],
            l[b],
            u[b],
            qb,
            pb,
            wb,
            lo,
            up,
            cell[b],
            grouped,
            single,
            precision,
            x[b],
            tight[b],
        )
        if status[b] != CONVERGED or not worst[b] <= precision:
            failures += 1
    return failures


@compiled()
def adjoint(C, l, u, y, tight, q, inverse, w, lb, ub, cell, T, g, first, last, v, nu):  # type: ignore[no-untyped-def]
    """v and nu of the adjoint for problems with at most one active row: the least-squares problem
    for nu is then one division.

    Returns DONE; SEVERAL if a problem has more active rows; OPEN if one ``is_open``.
    """
    m, K = C.shape[1], C.shape[2]
    n = q.shape[1]
    s, h, shift = np.empty(K), np.empty(K), np.empty(K)
    which = np.empty(m, np.bool_)
    outcome = DONE
    for b in range(first, last):
        active = 0
        row = 0
        near = False
        for r in range(m):
            nu[b, r] = 0.0
            which[r] = y[b, r] != 0.0 or l[b, r] == u[b, r]
            if which[r]:
                active += 1
                row = r
            which[r] = which[r] or tight[b, r] != 0
            near = near or which[r]
        qb, pb, wb, lo, up = q[b], at(inverse, b), at(w, b), at(lb, b), at(ub, b)
        reach = reach_of(C[b], y[b])
        hi, low = T[0, b], T[1, b]
        if near and is_open(C[b], which, qb, pb, wb, lo, up, cell[b], hi, low, reach):
            return OPEN
        if active > 1:
            outcome = SEVERAL
        if outcome == SEVERAL:
            continue
        shift[:] = 0.0
        if active == 1:
            adjoint_sums(qb, pb, wb, lo, up, cell[b], hi, low, reach, g[b], 0, n, s, h)
            above = below = 0.0
            for k in range(K):
                above += C[b, row, k] * s[k]
                below += C[b, row, k] * C[b, row, k] * h[k]
            if below > 0.0:
                nu[b, row] = -above / below
                for k in range(K):
                    shift[k] = C[b, row, k] * nu[b, row]
        adjoint_write(qb, pb, wb, lo, up, cell[b], hi, low, reach, g[b], shift, 0, n, v[b])
    return outcome
