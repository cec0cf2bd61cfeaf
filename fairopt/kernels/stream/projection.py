# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The prediction of one batch, of least change with rows at a price: ``project`` and its solvers.

Letters: ``fairopt.kernels.stream_records.Problem``; y the multipliers, x = clip(s - A^T y).
"""

from __future__ import annotations

import math

import numpy as np

from fairopt.kernels.compilation import compiled
from fairopt.kernels.stream_records import Problem, Work

NEWTON_STEPS = 40
DESCENTS = 100
ROUNDING = 4e-16


@compiled(inline="always")
def primal(p, first, last, columns, y, x, work):
    """x = clip(s - A^T y), and per column the sum of w x and the mass of the unclipped."""
    A, weight, lo, hi, total, free = p.A, p.weight, p.lo, p.hi, work.total, work.free
    for k in range(columns):
        total[k] = 0.0
        free[k] = 0.0
    for i in range(first, last):
        k = p.column[i] if len(p.column) > 0 else i - first
        t = 0.0
        for r in range(len(A)):
            t += A[r, k] * y[r]
        w = weight[i] if len(weight) > 1 else weight[0]
        value = p.scores[i] - t if w > 0.0 else p.scores[i]  # what counts for nothing: only clipped
        if value < lo:
            value = lo
        elif value > hi:
            value = hi
        else:
            free[k] += w
        x[i] = value
        total[k] += w * value


@compiled(inline="always")
def row_residual(p, columns, r, total, y):
    """v_r - y_r / kappa_r - clip(v_r, l_r, u_r), v = value + offset: zero at the solution.

    Returns also v and its size, to which rounding is relative.
    """
    v = p.base[r] + p.offset[r]
    size = abs(p.base[r]) + abs(p.offset[r])
    for k in range(columns):
        v += p.A[r, k] * total[k]
        size += abs(p.A[r, k] * total[k])
    return v - y[r] / p.kappa[r] - min(max(v, p.l[r]), p.u[r]), v, size


@compiled(_nrt=True)
def workspace(m, columns):
    """What ``project`` computes in, so that a stream of single samples allocates once."""
    rows = np.empty((2, m))
    return Work(
        np.empty(columns), np.empty(columns), rows[0], np.empty((m, m)), rows[1],
        np.empty(m, np.int64),
    )  # fmt: skip


@compiled(inline="always")
def newton(p, first, last, columns, x, y, work):
    """``project``, by semismooth Newton on y_r = kappa_r (v_r - clip(v_r)), x = clip(s - A^T y).

    Its matrix, A D A^T + 1 / kappa on the active rows, D the unclipped, is positive definite.
    """
    A, l, u, kappa = p.A, p.l, p.u, p.kappa
    total, free, v, H, d, active = work
    m = len(A)
    for r in range(m):
        if kappa[r] == 0.0:
            y[r] = 0.0
    worst = 0.0
    before = math.inf
    for _ in range(NEWTON_STEPS):
        primal(p, first, last, columns, y, x, work)
        worst = 0.0
        count = 0
        for r in range(m):
            if kappa[r] == 0.0:
                continue
            residual, v[r], size = row_residual(p, columns, r, total, y)
            worst = max(worst, abs(residual) / max(size, 1e-300))
            if v[r] < l[r] or v[r] > u[r]:
                active[count] = r
                count += 1
        if worst <= ROUNDING or (worst <= 1e-13 and worst >= before):
            return worst
        before = worst
        # v(y') = v(y) - H (y' - y); wanted: y'_r / kappa_r = v_r(y') - side_r.
        for a in range(count):
            r = active[a]
            side = l[r] if v[r] < l[r] else u[r]
            right = v[r] - side
            for q in range(m):
                if y[q] != 0.0:
                    h = 0.0
                    for k in range(columns):
                        if free[k] > 0.0:
                            h += A[r, k] * free[k] * A[q, k]
                    right += h * y[q]
            d[a] = right
            for c in range(a + 1):
                h = 0.0
                for k in range(columns):
                    if free[k] > 0.0:
                        h += A[r, k] * free[k] * A[active[c], k]
                H[a, c] = h
            H[a, a] += 1.0 / kappa[r]
        solve_positive(H, d, count)
        for r in range(m):
            y[r] = 0.0
        for a in range(count):
            y[active[a]] = d[a]
    return worst


@compiled(_nrt=True)
def patient(p, first, last, columns, x, y, work):
    """``project``, with prices that rise tenfold from low ones, at which Newton does not cycle.

    Where rows contradict each other, multipliers grow with the price: the next start is ten times
    the last answer. What Newton does not solve then is left to ``descend``, which always gains.
    """
    worst = 0.0
    part = p.kappa * 1e-7
    easier = Problem(
        p.scores, p.weight, p.column, p.A, p.base, p.l, p.u, part, p.offset, p.lo, p.hi
    )  # fmt: skip
    start = np.zeros(len(y))
    for stage in range(8):
        for r in range(len(y)):
            part[r] = p.kappa[r] * 10.0 ** (stage - 7)
            start[r] = 10.0 * y[r] if stage > 0 else 0.0
            y[r] = start[r]
        worst = newton(easier, first, last, columns, x, y, work)
        if worst > 1e-12:
            y[:] = start
            worst = descend(easier, first, last, columns, x, y, work)
    return worst


@compiled(inline="always")
def project(p, first, last, columns, x, y, work):
    """The prediction of one batch, the solution of a ``Problem``.

    Semismooth Newton, ``newton``; where it cycles, ``patient``.

    Args:
        first, last: which of the samples are the batch.
        columns: how many of A's are in use.
        x: ``(n,)``, written.
        y: ``(m,)``, the multipliers to start from, overwritten.
        work: from ``workspace``, for at least as many columns.

    Returns:
        The largest residual, relative to the size of what it is the difference of.
    """
    worst = newton(p, first, last, columns, x, y, work)
    if worst > 1e-11:
        worst = patient(p, first, last, columns, x, y, work)
    return worst


@compiled()
def solve_positive(H, d, n):
    """d <- H^-1 d by Cholesky, H given by its lower triangle and overwritten."""
    for a in range(n):
        for c in range(a + 1):
            h = H[a, c]
            for j in range(c):
                h -= H[a, j] * H[c, j]
            if a == c:
                H[a, a] = math.sqrt(max(h, 1e-300))
            else:
                H[a, c] = h / H[c, c]
    for a in range(n):
        for j in range(a):
            d[a] -= H[a, j] * d[j]
        d[a] /= H[a, a]
    for a in range(n - 1, -1, -1):
        for j in range(a + 1, n):
            d[a] -= H[j, a] * d[j]
        d[a] /= H[a, a]


@compiled(_nrt=True)
def settle(H, y, z, v, kappa, l, u):
    """Solve the model exactly, given the signs that coordinate steps found; if they stay so."""
    m = len(y)
    rows = np.empty(m, np.int64)
    count = 0
    for r in range(m):
        if z[r] != 0.0:
            rows[count] = r
            count += 1
    part, d = np.empty((count, count)), np.empty(count)
    for a in range(count):
        r = rows[a]
        d[a] = v[r] - y[r] / kappa[r] - (u[r] if z[r] > 0.0 else l[r])
        for q in range(m):
            d[a] += H[r, q] * y[q]
        for c in range(count):
            part[a, c] = H[r, rows[c]]
    solve_positive(part, d, count)
    for a in range(count):
        if not d[a] * z[rows[a]] > 0.0:
            return
    for a in range(count):
        z[rows[a]] = d[a]


@compiled(_nrt=True)
def descend(p, first, last, columns, x, y, work):
    """The same for any problem, by proximal Newton steps on the dual, with a line search.

    The dual, to be minimised, is smooth(y) + sum_r (u_r y_r if y_r > 0, l_r y_r if y_r < 0), where
    smooth has the gradient y / kappa - v and, in turn, the Hessian of the unclipped samples and
    that of all samples, of which it is never more. Each step minimises this model, kinks included,
    and so descends; the slope along it, not the value, says how far.
    """
    A, l, u, kappa = p.A, p.l, p.u, p.kappa
    total, free, v, H, d, _ = work
    m = len(A)
    mass = np.zeros(columns)
    for i in range(first, last):
        k = p.column[i] if len(p.column) > 0 else i - first
        mass[k] += p.weight[i] if len(p.weight) > 1 else p.weight[0]
    z = np.empty(m)
    trial = np.empty(m)
    best = math.inf
    since = 0
    worst = 0.0
    for step in range(DESCENTS):
        primal(p, first, last, columns, y, x, work)
        worst = 0.0
        for r in range(m):
            z[r] = y[r]
            if kappa[r] > 0.0:
                residual, v[r], size = row_residual(p, columns, r, total, y)
                worst = max(worst, abs(residual) / max(size, 1e-300))
        since = 0 if worst < 0.5 * best else since + 1
        best = min(best, worst)
        if worst <= 1e-15 or (worst <= 1e-9 and since > 6):
            break
        D = free if step % 2 == 0 else mass
        for r in range(m):
            for q in range(m):
                h = 0.0
                for k in range(columns):
                    if D[k] > 0.0:
                        h += A[r, k] * D[k] * A[q, k]
                H[r, q] = h
            if kappa[r] > 0.0:
                H[r, r] += 1.0 / kappa[r]
        for _sweep in range(100):
            moved = 0.0
            for r in range(m):
                if kappa[r] == 0.0:
                    continue
                gradient = y[r] / kappa[r] - v[r]
                for q in range(m):
                    gradient += H[r, q] * (z[q] - y[q])
                free_r = H[r, r] * z[r] - gradient
                new = 0.0
                if free_r > u[r]:
                    new = (free_r - u[r]) / H[r, r]
                elif free_r < l[r]:
                    new = (free_r - l[r]) / H[r, r]
                moved = max(moved, abs(new - z[r]))
                z[r] = new
            if moved <= 1e-15:
                break
        settle(H, y, z, v, kappa, l, u)
        near, far = 0.0, 1.0
        for halving in range(60):
            share = 1.0 if halving == 0 else 0.5 * (near + far)
            for r in range(m):
                d[r] = z[r] - y[r]
                trial[r] = z[r] if share == 1.0 else y[r] + share * d[r]
            primal(p, first, last, columns, trial, x, work)
            slope = 0.0
            for r in range(m):
                if kappa[r] > 0.0 and d[r] != 0.0:
                    _, value, _ = row_residual(p, columns, r, total, trial)
                    up = trial[r] > 0.0 or (trial[r] == 0.0 and d[r] > 0.0)
                    slope += d[r] * (trial[r] / kappa[r] - value + (u[r] if up else l[r]))
            if slope <= 0.0:
                near = share
            else:
                far = share
            if near == 1.0:
                break
        share = near if near > 0.0 else far
        for r in range(m):
            y[r] = z[r] if share == 1.0 else y[r] + share * (z[r] - y[r])
    primal(p, first, last, columns, y, x, work)
    return worst
