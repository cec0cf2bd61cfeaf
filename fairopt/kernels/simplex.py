"""Compiled kernels of the closed-form projection onto simplices under few rows.

The problem, for one element of the batch, with samples i, classes c, cells k and rows r::

    minimise  sum_i  P_i |x_i|^2 / 2 + q_i . x_i
    subject to  l <= sum_k A_k s_k <= u,   s_k = sum_{i in cell k} w_i x_i,
                x_i >= 0,   sum_c x_ic = 1

A_k is (m, C), a sample's x_i and q_i have C entries. With row multipliers y and *tilts*
t_k = A_k^T y, the primal is one projection per sample,

    x_i(t) = the point of the simplex nearest to v_i = -(q_i + w_i t_k) / P_i
           = max(v_i - theta_i, 0),   theta_i such that the sum is 1

(Held, Wolfe, Crowder, "Validation of subgradient optimization", Math. Programming 6, 1974). The
threshold is found by Michelot's method ("A finite algorithm for finding the projection of a point
onto the canonical simplex of R^n", JOTA 50, 1986): the mean of those that are left, minus what they
lack to 1, until none is below it. The classes not below it are *free*, F_i; a class exactly at it
has x = 0 without a multiplier, and counts as free.

The dual in y is concave, once differentiable and piecewise quadratic. The curvature of a cell is

    H_k = -ds_k/dt_k = sum_{i in cell k} (w_i^2 / P_i) (diag(1_F) - 1_F 1_F^T / |F|),   F = F_i,

the Laplacian of a weighted graph whose nodes are the classes: classes c and d are joined by an edge
of weight W_cd = sum w_i^2 / (P_i |F_i|) over the samples in which both are free. Weights only add
up, so they have no cancellation, and neither has ``factorise_graph``: eliminating a node of a graph
Laplacian, whose diagonal is the sum of what is beside it, takes no subtraction (Grassmann, Taksar,
Heyman, "Regenerative analysis and steady state distributions for Markov chains", Oper. Res. 33,
1985). With H_k = L_k L_k^T the model of a Newton step is that of ``_projection.newton_step`` with
the rows A_k L_k, and the rank of a cell (classes no sample connects) is exact.

Steps are globalised as in ``_projection.advance``: the model's edges are at least mu times those of
the cell with nothing clipped, and a line search on the slope of the dual shortens what overshoots.

The shift of a tilt along (1, ..., 1) moves nothing, but would cost digits of the rest. So the last
class is the *reference*: with M_k = sum w_i, rows A_kc - A_kC and sides less sum_k A_kC M_k say the
same of points whose samples sum to 1, and their tilts are zero there.

Tilts are unevaluated sums t_hi + t_lo, and each sample is shifted to a largest value of zero before
and after they enter, so that neither large scores nor large tilts cost digits of x.
"""

from __future__ import annotations

import math

import numpy as np

from fairopt.kernels.compilation import compiled
from fairopt.kernels.projection import (
    ALPHA,
    BEST,
    CONTINUE,
    CONVERGED,
    EPS,
    EVALUATIONS,
    HIGH,
    HIGH_SLOPE,
    INFEASIBLE,
    ITERATION,
    LOW,
    LOW_SLOPE,
    MAX_ITERATIONS,
    MAX_TRIES,
    MU,
    NOT_FINITE,
    PENDING,
    REGULAR,
    SLOPE0,
    STALLED,
    STALLS,
    TRIES,
    another_length,
    excess,
    largest_mean,
    new_state,
    newton_step,
    slope_at,
    sum_rounding,
    tight_sides,
    two_sum_into,
)
from fairopt.tolerances import TINY

# ---------------------------------------------------------------------------------------------
# Passes over the samples
# ---------------------------------------------------------------------------------------------


@compiled(fastmath=False)  # said aloud: left unsaid, it would inherit the flags of its caller
def shifted(q, inverse, w, t_hi, t_lo, v):  # type: ignore[no-untyped-def]
    """v = -(q + w t) / P, shifted to a largest entry of zero; what was taken off."""
    C = q.shape[0]
    base = top = rest = -np.inf
    for c in range(C):
        v[c] = -(inverse * q[c])
        base = max(base, v[c])
    step = w * inverse
    for c in range(C):
        v[c] = (v[c] - base) - step * t_hi[c]
        top = max(top, v[c])
    for c in range(C):
        v[c] = (v[c] - top) - step * t_lo[c]
        rest = max(rest, v[c])
    for c in range(C):
        v[c] -= rest
    return base + top + rest


@compiled(fastmath=False)
def threshold(v):  # type: ignore[no-untyped-def]
    """theta with sum max(v - theta, 0) = 1, for a largest entry of zero; and how many are free."""
    theta = -1.0  # never less: the largest entry gets at most 1
    free = 0
    while True:
        total, number = 0.0, 0
        for c in range(v.shape[0]):
            inside = v[c] >= theta
            total += v[c] if inside else 0.0
            number += inside
        if number == free:
            return theta, free
        free = number
        theta = max(theta, (total - 1.0) / number)


@compiled()
def evaluate(q, inverse, w, cell, t_hi, t_lo, s, W, size):  # type: ignore[no-untyped-def]
    """One pass: per cell the sums of w x by class, the edges W and the sums of |w x|."""
    n, C = q.shape
    v, free = np.empty(C), np.empty(C, np.int64)
    s[:] = 0.0
    W[:] = 0.0
    size[:] = 0.0
    for i in range(n):
        k = cell[i]
        shifted(q[i], inverse[i], w[i], t_hi[k], t_lo[k], v)
        theta, number = threshold(v)
        share = w[i] * w[i] * inverse[i] / number
        j = 0
        for c in range(C):
            if v[c] >= theta:
                wx = w[i] * (v[c] - theta)
                s[k, c] += wx
                size[k, c] += abs(wx)
                for a in range(j):
                    W[k, free[a], c] += share
                free[j] = c
                j += 1
    symmetric(W)


@compiled()
def symmetric(W):  # type: ignore[no-untyped-def]
    """Copy the edges W[k, c, d], c < d, to W[k, d, c]."""
    K, C, _ = W.shape
    for k in range(K):
        for c in range(C):
            for d in range(c):
                W[k, c, d] = W[k, d, c]


@compiled()
def write(q, inverse, w, cell, t_hi, t_lo, shift, single, x, theta, multiplier, s, size):  # type: ignore[no-untyped-def]
    """x, the local threshold and the multiplier of each sample's sum; and the sums of what is
    written, in float32 with ``single``: what an auditor of the returned tensor adds up.
    """
    n, C = q.shape
    v = np.empty(C)
    s[:] = 0.0
    size[:] = 0.0
    for i in range(n):
        k = cell[i]
        base = shifted(q[i], inverse[i], w[i], t_hi[k], t_lo[k], v)
        theta[i], _ = threshold(v)
        multiplier[i] = (theta[i] + base) / inverse[i] - w[i] * shift[k]
        for c in range(C):
            value = max(v[c] - theta[i], 0.0)
            if single:
                value = np.float64(np.float32(value))
            x[i, c] = value
            s[k, c] += w[i] * value
            size[k, c] += abs(w[i] * value)


@compiled()
def reach(inverse, w, cell, E, positive, negative, mass):  # type: ignore[no-untyped-def]
    """Per cell: sum of w^2 / P, of the positive and of the negative weights, and of |w|."""
    E[:] = 0.0
    positive[:] = 0.0
    negative[:] = 0.0
    for i in range(cell.shape[0]):
        k = cell[i]
        E[k] += w[i] * w[i] * inverse[i]
        positive[k] += max(w[i], 0.0)
        negative[k] += min(w[i], 0.0)
    for k in range(E.shape[0]):
        mass[k] = positive[k] - negative[k]


# ---------------------------------------------------------------------------------------------
# Curvature
# ---------------------------------------------------------------------------------------------


@compiled()
def factorise_graph(W, root, ratio):  # type: ignore[no-untyped-def]
    """L with L L^T the Laplacian of the graph with edges W, which is overwritten.

    Column j of L is root[j] at j and -root[j] ratio[j, c] at c > j. A node without edges to later
    ones has a column of zeros.
    """
    C = W.shape[0]
    for j in range(C - 1):
        degree = 0.0
        for c in range(j + 1, C):
            degree += W[j, c]
        root[j] = math.sqrt(degree)
        for c in range(j + 1, C):
            ratio[j, c] = W[j, c] / degree if degree > 0.0 else 0.0
        for c in range(j + 1, C):
            if ratio[j, c] != 0.0:
                for d in range(j + 1, C):
                    if d != c:
                        W[c, d] += ratio[j, c] * W[j, d]


@compiled()
def through(A, root, ratio, N):  # type: ignore[no-untyped-def]
    """N = A L, cell by cell: (m, K, C) to (m, K, C - 1)."""
    m, K, C = A.shape
    for r in range(m):
        for k in range(K):
            a = A[r, k]
            some = False
            for c in range(C):
                some = some or a[c] != 0.0
            for j in range(C - 1):
                total = 0.0
                if some:
                    for c in range(j + 1, C):
                        total += (a[j] - a[c]) * ratio[k, j, c]
                N[r, k, j] = total * root[k, j]


# ---------------------------------------------------------------------------------------------
# The outer iteration
# ---------------------------------------------------------------------------------------------


@compiled()
def proves_infeasible(A, l, u, ray, positive, negative):  # type: ignore[no-untyped-def]
    """Farkas: the least value of ray.A s over all reachable s exceeds what the rows allow."""
    m, K, C = A.shape
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
        low, high, largest = np.inf, -np.inf, 0.0
        for c in range(C):
            value = total = 0.0
            for r in range(m):
                value += ray[r] * A[r, k, c]
                total += abs(ray[r] * A[r, k, c])
            low, high, largest = min(low, value), max(high, value), max(largest, total)
        least += positive[k] * low + negative[k] * high
        size += (positive[k] - negative[k]) * largest
    return least > 1e-11 * size


@compiled()
def set_trial(alpha, y, target, dt, trial, T):  # type: ignore[no-untyped-def]
    """The point alpha along the step."""
    for r in range(y.shape[0]):
        trial[r] = target[r] if alpha == 1.0 else y[r] + alpha * (target[r] - y[r])
    for k in range(dt.shape[0]):
        T[2, k], T[3, k] = two_sum_into(T[0, k], T[1, k], alpha * dt[k])


@compiled()
def search(l, u, s, size, numbers, counts, patience, Y, T, dt):  # type: ignore[no-untyped-def]
    """Given the sums at the trial point, take it (True) or set another trial (False).

    By the slope of the dual along the step, approached from the left. Where a step was far too long
    mu grows, and stays for as many good steps as ``patience`` says: lowered at once, it would come
    back to the same kink of the dual, for cells of few samples again and again.
    """
    y, trial, target = Y[0], Y[1], Y[2]
    alpha = numbers[ALPHA]
    slope, limit = slope_at(l, u, s, size, numbers, counts, Y, dt)
    tries = counts[TRIES]
    if slope > limit and tries < MAX_TRIES:
        numbers[HIGH], numbers[HIGH_SLOPE] = alpha, slope
    elif (
        slope < -0.7 * abs(numbers[SLOPE0])
        and tries < MAX_TRIES // 2
        and numbers[HIGH] - alpha > 1e-3 * numbers[HIGH]
    ):
        numbers[LOW], numbers[LOW_SLOPE] = alpha, slope
    else:
        y[:] = trial
        T[0], T[1] = T[2], T[3]
        if alpha < 0.3:
            numbers[MU] = min(numbers[MU] * 1e1, 1.0)
            patience[1] = min(2 * patience[1] + 1, 15)
            patience[0] = patience[1]
        elif alpha >= 1.0:
            patience[0] -= 1
            if patience[0] < 0:
                numbers[MU] = max(numbers[MU] * 1e-1, 1e-16)
                patience[0] = patience[1]
        return True
    alpha = another_length(numbers, counts)
    set_trial(alpha, y, target, dt, trial, T)
    return False


@compiled()
def distance(flat, l, u, y, s, size, spread, rounding, floor):  # type: ignore[no-untyped-def]
    """How far rows and multipliers are from optimal, in units of what rounding allows, or 0.

    Args:
        flat: the rows, (m, K C).
        spread: the sum of |w| of each cell, once for each class.
        floor: to be filled with what rounding allows of each row.
    """
    worst = 0.0
    largest = largest_mean(size, spread)
    for r in range(flat.shape[0]):
        value = scale = 0.0
        for k in range(s.shape[0]):
            value += flat[r, k] * s[k]
            scale += abs(flat[r, k]) * spread[k] * largest
        if y[r] > 0.0:
            off = abs(value - u[r])
        elif y[r] < 0.0:
            off = abs(value - l[r])
        else:
            off = max(value - u[r], l[r] - value, 0.0)
        if math.isfinite(u[r]):
            scale = max(scale, abs(u[r]))
        if math.isfinite(l[r]):
            scale = max(scale, abs(l[r]))
        floor[r] = rounding * (scale + TINY)
        if off > floor[r]:
            worst = max(worst, off / floor[r])
    return worst


@compiled()
def drift(flat, y, T):  # type: ignore[no-untyped-def]
    """Whether the tilt had lost digits, having grown large and come back: it is then made anew."""
    found = False
    for k in range(flat.shape[1]):
        exact = scale = 0.0
        for r in range(flat.shape[0]):
            exact += flat[r, k] * y[r]
            scale += abs(flat[r, k] * y[r])
        if abs(T[0, k] + T[1, k] - exact) > 32.0 * EPS * scale:
            found = True
            T[0, k], T[1, k] = exact, 0.0
    return found


@compiled()
def step(A, l, u, floor, s, W, E, numbers, counts, y, target, dt, ray):  # type: ignore[no-untyped-def]
    """The Newton step: new multipliers and the change of tilt; False if the model has no point."""
    m, K, C = A.shape
    root, ratio = np.zeros((K, C)), np.zeros((K, C, C))
    counts[REGULAR] = 1
    for k in range(K):
        least = numbers[MU] * E[k] / C
        for c in range(C):
            for d in range(C):
                if c != d and W[k, c, d] < least:
                    W[k, c, d] = least
                    counts[REGULAR] = 0  # the model guesses: overshoot is not to be trusted
        factorise_graph(W[k], root[k], ratio[k])
    N = np.empty((m, K, C - 1))
    through(A, root, ratio, N)
    below, above = np.empty(m), np.empty(m)
    for r in range(m):
        value = 0.0
        for k in range(K):
            for c in range(C):
                value += A[r, k, c] * s[k, c]
        below[r], above[r] = l[r] - value, u[r] - value
    size = K * (C - 1)
    z = np.empty(size)
    solved = newton_step(
        N.reshape(m, size), below, above, floor, np.zeros(size), np.ones(size), y, target, z, ray
    )
    for k in range(K):
        # L^T dt = z, from the reference class on.
        dt[k, C - 1] = 0.0
        for j in range(C - 2, -1, -1):
            if root[k, j] > 0.0:
                total = z[k * (C - 1) + j] / root[k, j]
                for c in range(j + 1, C):
                    total += ratio[k, j, c] * dt[k, c]
            else:
                total = 0.0
                for r in range(m):
                    total += A[r, k, j] * (target[r] - y[r])
            dt[k, j] = total
    return solved


@compiled()
def solve_one(A, l, u, q, inverse, w, cell, single, precision, x, theta, multiplier, tight):  # type: ignore[no-untyped-def]
    """Solve one problem in one thread.

    Returns status, passes, multipliers (of the solution, or of the proof that there is none), both
    parts of the tilts, and the worst excess of a row.
    """
    n = q.shape[0]
    m, K, C = A.shape
    E, positive, negative, mass = np.empty(K), np.empty(K), np.empty(K), np.empty(K)
    reach(inverse, w, cell, E, positive, negative, mass)
    spread = np.repeat(mass, C)
    # The same rows less those of the reference class.
    given, below, above, whole = A, l, u, A.reshape(m, K * C)
    A, l, u = A.copy(), l.copy(), u.copy()
    for r in range(m):
        for k in range(K):
            last = A[r, k, C - 1]
            l[r] -= last * (positive[k] + negative[k])
            u[r] -= last * (positive[k] + negative[k])
            for c in range(C):
                A[r, k, c] -= last
    flat = A.reshape(m, K * C)
    s, size, W = np.empty((K, C)), np.empty((K, C)), np.empty((K, C, C))
    numbers, counts, Y, T, dt = new_state(m, K * C)
    tilts = T.reshape(4, K, C)
    s_flat, size_flat = s.reshape(K * C), size.reshape(K * C)
    rounding = sum_rounding(n)
    floor, ray = np.empty(m), np.zeros(m)
    patience = np.zeros(2, np.int64)
    y, target = Y[0], Y[2]
    status = CONTINUE
    while status == CONTINUE:
        evaluate(q, inverse, w, cell, tilts[2], tilts[3], s, W, size)
        counts[EVALUATIONS] += 1
        for k in range(K * C):
            if not math.isfinite(s_flat[k]):
                status = NOT_FINITE
        if status != CONTINUE:
            break
        if counts[PENDING]:
            if not search(l, u, s_flat, size_flat, numbers, counts, patience, Y, T, dt):
                continue
            if drift(flat, y, T):
                counts[PENDING] = 0
                T[2], T[3] = T[0], T[1]
                continue
        worst = distance(flat, l, u, y, s_flat, size_flat, spread, rounding, floor)
        if worst == 0.0:
            status = CONVERGED
            break
        if worst <= 1000.0:  # a few hundred roundings: better only if it comes at once
            counts[STALLS] += 1
            if counts[STALLS] > 2 and worst >= 0.5 * numbers[BEST]:
                status = CONVERGED
                break
        numbers[BEST] = min(numbers[BEST], worst)
        if counts[ITERATION] >= MAX_ITERATIONS:
            status = STALLED
            break
        if proves_infeasible(given, below, above, y, positive, negative):
            target[:] = y
            status = INFEASIBLE
            break
        counts[ITERATION] += 1
        solved = step(
            A, l, u, floor, s, W, E, numbers, counts, y, target, dt.reshape(K, C), ray
        )  # fmt: skip
        if not solved and proves_infeasible(given, below, above, ray, positive, negative):
            target[:] = ray
            status = INFEASIBLE
            break
        # Contradictory only to rounding: the step towards the other rows is still good.
        slope = 0.0
        for k in range(K * C):
            slope -= s_flat[k] * dt[k]
        for r in range(m):
            d = target[r] - y[r]
            if d != 0.0:
                sign = y[r] if y[r] != 0.0 else d
                slope += (u[r] if sign > 0.0 else l[r]) * d
        numbers[SLOPE0] = numbers[LOW_SLOPE] = slope
        numbers[LOW], numbers[HIGH], numbers[HIGH_SLOPE], numbers[ALPHA] = 0.0, np.inf, 0.0, 1.0
        counts[TRIES], counts[PENDING] = 0, 1
        set_trial(1.0, y, target, dt, Y[1], T)
    shift = np.zeros(K)
    for k in range(K):
        for r in range(m):
            shift[k] += given[r, k, C - 1] * y[r]
    write(q, inverse, w, cell, tilts[0], tilts[1], shift, single, x, theta, multiplier, s, size)
    tight_sides(whole, below, above, spread, s_flat, size_flat, precision, tight)
    worst = excess(whole, below, above, spread, s_flat, size_flat)
    if status == INFEASIBLE:
        # Every point of the simplices has y.(A x) >= -(the sum of these).
        y = target
        for i in range(n):
            least = np.inf
            for c in range(C):
                value = 0.0
                for r in range(m):
                    value += given[r, cell[i], c] * y[r]
                least = min(least, w[i] * value)
            multiplier[i] = -least
    return status, counts[EVALUATIONS], y, tilts[0], tilts[1], worst


@compiled()
def solve(  # type: ignore[no-untyped-def]
    A,
    l,
    u,
    q,
    inverse,
    w,
    cell,
    single,
    precision,
    first,
    last,
    x,
    theta,
    y,
    T,
    status,
    passes,
    worst,
    tight,
):
    """Solve the problems first <= b < last of a batch, one after the other, in one thread.

    Returns how many have no solution to the precision asked for.
    """
    m = A.shape[1]
    failures = 0
    for b in range(first, last):
        status[b], passes[b], y[b, :m], T[0, b], T[1, b], worst[b] = solve_one(
            A[b],
            l[b],
            u[b],
            q[b],
            inverse[b],
            w[b],
            cell[b],
            single,
            precision,
            x[b],
            theta[b],
            y[b, m:],
            tight[b],
        )
        if status[b] != CONVERGED or not worst[b] <= precision:
            failures += 1
    return failures


# ---------------------------------------------------------------------------------------------
# The adjoint
# ---------------------------------------------------------------------------------------------


@compiled()
def adjoint_sums(q, inverse, w, cell, t_hi, t_lo, theta, g, W, G):  # type: ignore[no-untyped-def]
    """Per cell the edges W, and G = sum of (w / P) (g less its mean over F), on the free classes.

    theta is what the forward found: a class is free if its very number there was not below it.
    """
    n, C = q.shape
    v, free = np.empty(C), np.empty(C, np.int64)
    W[:] = 0.0
    G[:] = 0.0
    for i in range(n):
        k = cell[i]
        shifted(q[i], inverse[i], w[i], t_hi[k], t_lo[k], v)
        number, total = 0, 0.0
        for c in range(C):
            if v[c] >= theta[i]:
                free[number] = c
                number += 1
                total += g[i, c]
        if number < 2:
            continue
        mean, scale = total / number, w[i] * inverse[i]
        share = w[i] * scale / number
        for b in range(number):
            c = free[b]
            G[k, c] += scale * (g[i, c] - mean)
            for a in range(b):
                W[k, free[a], c] += share
    symmetric(W)


@compiled()
def adjoint_factor(A, W, G, N, c):  # type: ignore[no-untyped-def]
    """N with N N^T = A H A^T, and c with N c = A G: (m, K (C - 1)) and (K (C - 1)).

    L c = G by elimination: what a class has passes on to those that it is joined with.
    """
    _, K, C = A.shape
    root, ratio = np.zeros((K, C)), np.zeros((K, C, C))
    for k in range(K):
        factorise_graph(W[k], root[k], ratio[k])
        for j in range(C - 1):
            c[k, j] = G[k, j] / root[k, j] if root[k, j] > 0.0 else 0.0
            for d in range(j + 1, C):
                G[k, d] += ratio[k, j, d] * G[k, j]
    through(A, root, ratio, N)


@compiled()
def adjoint_write(q, inverse, w, cell, t_hi, t_lo, theta, g, shift, v, nu):  # type: ignore[no-untyped-def]
    """v = -(g + w shift + nu) / P on the free classes, with the nu that makes it sum to zero."""
    n, C = q.shape
    u = np.empty(C)
    for i in range(n):
        k = cell[i]
        shifted(q[i], inverse[i], w[i], t_hi[k], t_lo[k], u)
        number, total = 0, 0.0
        for c in range(C):
            if u[c] >= theta[i]:
                number += 1
                total += g[i, c] + w[i] * shift[k, c]
        nu[i] = -total / number
        for c in range(C):
            inside = u[c] >= theta[i] and number > 1
            v[i, c] = -(g[i, c] + w[i] * shift[k, c] + nu[i]) * inverse[i] if inside else 0.0
