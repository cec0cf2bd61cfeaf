"""The adjoint of a projection: the passes over its samples, and the whole of it for one active row.

Letters as in ``fairopt.kernels.passes`` and ``fairopt.optimality.derivative``: g is the gradient of
x, v and nu solve the adjoint system.
"""

from __future__ import annotations

import numpy as np

from fairopt.kernels.compilation import compiled
from fairopt.kernels.passes import at, unclipped
from fairopt.tolerances import WEAK

WRITTEN, SEVERAL, OPEN = range(3)  # what ``adjoint`` found
PULLED, CURVED = range(2)  # rows of what ``adjoint_sums`` writes


@compiled()
def is_free(q, inverse, w, lb, ub, t_hi, t_lo, reach):
    """Whether neither bound holds the sample: the activity rule of fairopt.optimality.derivative.

    v is the very number that the forward clipped. Beyond a bound it exceeds it by w/P of that
    bound's multiplier; at a bound, but for rounding, the multiplier is zero and the bound counts as
    inactive. The terms of the largest shift have the size ``reach``.
    """
    v = unclipped(q, inverse, w, t_hi, t_lo)
    noise = WEAK * inverse * (abs(q) + abs(w) * reach)
    return (lb < ub) & (v >= lb - noise) & (v <= ub + noise)


@compiled(fastmath={"reassoc", "nsz"})
def adjoint_sums(q, inverse, w, lb, ub, cell, t_hi, t_lo, reach, g, out):
    """Per cell, over the free samples: PULLED, sum of w g / P, and CURVED, sum of w^2 / P."""
    K = out.shape[1]
    if K > 2:
        table = np.zeros((4, K, 2))
        for i in range(cell.shape[0]):
            k, wi, p = cell[i], at(w, i), at(inverse, i)
            free = is_free(q[i], p, wi, at(lb, i), at(ub, i), t_hi[k], t_lo[k], reach)
            step = wi * p if free else 0.0
            table[i & 3, k, 0] += step * g[i]
            table[i & 3, k, 1] += step * wi
        for k in range(K):
            out[PULLED, k] = table[0, k, 0] + table[1, k, 0] + table[2, k, 0] + table[3, k, 0]
            out[CURVED, k] = table[0, k, 1] + table[1, k, 1] + table[2, k, 1] + table[3, k, 1]
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
    out[PULLED, 0], out[CURVED, 0] = s0, h0
    if K == 2:
        out[PULLED, 1], out[CURVED, 1] = s1, h1


@compiled()
def adjoint_write(q, inverse, w, lb, ub, cell, t_hi, t_lo, reach, g, shift, v):
    """v = -(g + w shift) / P on the free samples, 0 on the others."""
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
def reach_of(C, y):
    """Size of the terms of the largest shift, max_k (|C|^T |y|)_k."""
    largest = 0.0
    for k in range(C.shape[1]):
        reach = 0.0
        for r in range(C.shape[0]):
            reach += abs(C[r, k] * y[r])
        largest = max(largest, reach)
    return largest


@compiled()
def is_open(C, tight, q, inverse, w, lb, ub, cell, t_hi, t_lo, reach):
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
def any_open(near, q, inverse, w, lb, ub, cell, t_hi, t_lo, reach):
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


@compiled()
def adjoint(C, l, u, y, tight, q, metric, cell, T, g, v, nu):
    """v and nu of the adjoint for problems with at most one active row: the least-squares problem
    for nu is then one division. The arguments are those of ``fairopt.kernels.projection.solve``.

    Returns WRITTEN; SEVERAL if a problem has more active rows; OPEN if one ``is_open``.
    """
    batch, m, K = C.shape
    inverse, w, lb, ub = metric
    sums, shift = np.empty((2, K)), np.empty(K)
    which = np.empty(m, np.bool_)
    outcome = WRITTEN
    for b in range(batch):
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
        hi, low = T[b, 0], T[b, 1]
        if near and is_open(C[b], which, qb, pb, wb, lo, up, cell[b], hi, low, reach):
            return OPEN
        if active > 1:
            outcome = SEVERAL
        if outcome == SEVERAL:
            continue
        shift[:] = 0.0
        if active == 1:
            adjoint_sums(qb, pb, wb, lo, up, cell[b], hi, low, reach, g[b], sums)
            above = below = 0.0
            for k in range(K):
                above += C[b, row, k] * sums[PULLED, k]
                below += C[b, row, k] * C[b, row, k] * sums[CURVED, k]
            if below > 0.0:
                nu[b, row] = -above / below
                for k in range(K):
                    shift[k] = C[b, row, k] * nu[b, row]
        adjoint_write(qb, pb, wb, lo, up, cell[b], hi, low, reach, g[b], shift, v[b])
    return outcome


@compiled()
def batch_sums(C, y, q, metric, cell, T, g, out):
    """``adjoint_sums`` of each problem of a batch, ``(B, 2, K)``."""
    inverse, w, lb, ub = metric
    for b in range(q.shape[0]):
        adjoint_sums(
            q[b], at(inverse, b), at(w, b), at(lb, b), at(ub, b), cell[b], T[b, 0], T[b, 1],
            reach_of(C[b], y[b]), g[b], out[b],
        )  # fmt: skip


@compiled()
def batch_write(C, y, q, metric, cell, T, g, shift, v):
    """``adjoint_write`` for each problem of a batch."""
    inverse, w, lb, ub = metric
    for b in range(q.shape[0]):
        adjoint_write(
            q[b], at(inverse, b), at(w, b), at(lb, b), at(ub, b), cell[b], T[b, 0], T[b, 1],
            reach_of(C[b], y[b]), g[b], shift[b], v[b],
        )  # fmt: skip
