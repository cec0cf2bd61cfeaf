"""Compiled kernels of the closed-form projection onto simplices under few rows.

The problem, for one element of the batch, with samples i, classes c, cells k and rows r::

    minimise  sum_i  P_i |x_i|^2 / 2 + q_i . x_i
    subject to  l <= sum_k A_k s_k <= u,   s_k = sum_{i in cell k} w_i x_i,
                x_i >= 0,   sum_c x_ic = 1

A_k is (m, C), a sample's x_i and q_i have C entries. With row multipliers y and dual shifts
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
1985). With H_k = L_k L_k^T the model of a Newton step is that of ``fairopt.kernels.newton`` with
the rows A_k L_k, and the rank of a cell (classes no sample connects) is exact.

Steps are globalised as in ``fairopt.kernels.newton``: the model's edges are at least mu times those
of the cell with nothing clipped, and a line search on the slope of the dual shortens what
overshoots.

The part of a shift along (1, ..., 1) moves nothing, but would cost digits of the rest. So the last
class is the *reference*: with M_k = sum w_i, rows A_kc - A_kC and sides less sum_k A_kC M_k say the
same of points whose samples sum to 1, and their shifts are zero there.

Dual shifts are unevaluated sums t_hi + t_lo, and each sample is shifted to a largest value of zero
before and after they enter, so that neither large scores nor large shifts cost digits of x.
"""

from __future__ import annotations

import math

import numpy as np

from fairopt.kernels.active_set import MODEL_SOLVED, solve_model
from fairopt.kernels.compilation import compiled
from fairopt.kernels.newton import (
    against_sides, aim, arrive, drifted, excess, measure, normalise, residual, sum_rounding,
    tight_sides, verdict,
)  # fmt: skip
from fairopt.kernels.projection import PASSES, STATUS
from fairopt.kernels.state import (
    ALPHA, ARRIVED, CELL_MASS, CHANGE, CONTINUE, CONVERGED, DUAL, EVALUATIONS, INFEASIBLE,
    ITERATION, MAGNITUDE, MU, RAY, REGULAR, ROW_VALUE, SHIFT, SHIFT_REST, STALLED, SUM,
    TARGET_DUAL, TRIAL_SHIFT, TRIAL_SHIFT_REST, UNDER_WAY, begin, new_state,
)  # fmt: skip
from fairopt.tolerances import PROOF

EDGE, POSITIVE, NEGATIVE = range(3)  # rows of the weights of cells

# ---------------------------------------------------------------------------------------------
# Passes over the samples
# ---------------------------------------------------------------------------------------------


@compiled(fastmath=False)  # said aloud: left unsaid, it would inherit the flags of its caller
def shifted(q, inverse, w, t_hi, t_lo, v):
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
def threshold(v):
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
def evaluate(q, inverse, w, cell, t_hi, t_lo, cells, W):
    """One pass: per cell the sums of w x by class, the edges W and the sums of |w x|."""
    n, C = q.shape
    v, free = np.empty(C), np.empty(C, np.int64)
    s, size = cells[SUM].reshape(t_hi.shape), cells[MAGNITUDE].reshape(t_hi.shape)
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
def symmetric(W):
    """Copy the edges W[k, c, d], c < d, to W[k, d, c]."""
    K, C, _ = W.shape
    for k in range(K):
        for c in range(C):
            for d in range(c):
                W[k, c, d] = W[k, d, c]


@compiled()
def write(q, inverse, w, cell, t_hi, t_lo, shift, single, x, theta, multiplier, cells):
    """x, the local threshold and the multiplier of each sample's sum; and the sums of what is
    written, in float32 with ``single``: what an auditor of the returned tensor adds up.
    """
    n, C = q.shape
    v = np.empty(C)
    s, size = cells[SUM].reshape(t_hi.shape), cells[MAGNITUDE].reshape(t_hi.shape)
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
def limits(inverse, w, cell, weights, cells):
    """Per cell: sum of w^2 / P and of the positive and the negative weights; by class, of |w|."""
    weights[:] = 0.0
    for i in range(cell.shape[0]):
        k = cell[i]
        weights[EDGE, k] += w[i] * w[i] * inverse[i]
        weights[POSITIVE, k] += max(w[i], 0.0)
        weights[NEGATIVE, k] += min(w[i], 0.0)
    C = cells.shape[1] // weights.shape[1]
    for k in range(cells.shape[1]):
        cells[CELL_MASS, k] = weights[POSITIVE, k // C] - weights[NEGATIVE, k // C]


# ---------------------------------------------------------------------------------------------
# Curvature
# ---------------------------------------------------------------------------------------------


@compiled()
def factorise_graph(W, root, ratio):
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
def through(A, root, ratio, N):
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
def proves_infeasible(A, l, u, ray, weights):
    """Farkas: the least value of ray.A s over all reachable s exceeds what the rows allow."""
    m, K, C = A.shape
    least, size = against_sides(l, u, ray)
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
        least += weights[POSITIVE, k] * low + weights[NEGATIVE, k] * high
        size += (weights[POSITIVE, k] - weights[NEGATIVE, k]) * largest
    return least > PROOF * size


@compiled()
def soften(numbers, patience):
    """Set mu after a step was taken.

    Where a step was far too long mu grows, and stays for as many good steps as ``patience`` says:
    lowered at once, it would come back to the same kink of the dual, for cells of few samples again
    and again.
    """
    if numbers[ALPHA] < 0.3:
        numbers[MU] = min(numbers[MU] * 1e1, 1.0)
        patience[1] = min(2 * patience[1] + 1, 15)
        patience[0] = patience[1]
    elif numbers[ALPHA] >= 1.0:
        patience[0] -= 1
        if patience[0] < 0:
            numbers[MU] = max(numbers[MU] * 1e-1, 1e-16)
            patience[0] = patience[1]


@compiled()
def step(A, l, u, W, edge, cells, rows, numbers):
    """The Newton step: new multipliers and the change of the dual shifts; see ``solve_model``."""
    m, K, C = A.shape
    root, ratio = np.zeros((K, C)), np.zeros((K, C, C))
    numbers[REGULAR] = 1
    for k in range(K):
        least = numbers[MU] * edge[k] / C
        for c in range(C):
            for d in range(C):
                if c != d and W[k, c, d] < least:
                    W[k, c, d] = least
                    numbers[REGULAR] = 0  # the model guesses: overshoot is not to be trusted
        factorise_graph(W[k], root[k], ratio[k])
    N = np.empty((m, K, C - 1))
    through(A, root, ratio, N)
    flat, z = N.reshape(m, K * (C - 1)), np.zeros(K * (C - 1))
    normalise(flat, rows)
    below, above = l - rows[ROW_VALUE], u - rows[ROW_VALUE]
    rows[ROW_VALUE] = 0.0
    found = solve_model(flat, below, above, rows, z, None)
    change = cells[CHANGE].reshape(K, C)
    for k in range(K):
        # L^T change = -z, from the reference class on.
        change[k, C - 1] = 0.0
        for j in range(C - 2, -1, -1):
            total = 0.0
            if root[k, j] > 0.0:
                total = -z[k * (C - 1) + j] / root[k, j]
                for c in range(j + 1, C):
                    total += ratio[k, j, c] * change[k, c]
            else:
                for r in range(m):
                    total += A[r, k, j] * (rows[TARGET_DUAL, r] - rows[DUAL, r])
            change[k, j] = total
    return found


@compiled()
def without_reference(A, l, u, weights):
    """The same rows less those of the reference class."""
    A, l, u = A.copy(), l.copy(), u.copy()
    m, K, C = A.shape
    for r in range(m):
        for k in range(K):
            last = A[r, k, C - 1]
            l[r] -= last * (weights[POSITIVE, k] + weights[NEGATIVE, k])
            u[r] -= last * (weights[POSITIVE, k] + weights[NEGATIVE, k])
            for c in range(C):
                A[r, k, c] -= last
    return A, l, u


@compiled()
def least_products(A, y, w, cell, out):
    """Every point of the simplices has y.(A x) >= -(the sum of these)."""
    for i in range(cell.shape[0]):
        least = np.inf
        for c in range(A.shape[2]):
            value = 0.0
            for r in range(A.shape[0]):
                value += A[r, cell[i], c] * y[r]
            least = min(least, w[i] * value)
        out[i] = -least


@compiled()
def solve(given, samples, single, precision, x, theta, y, T, tight, outcome):
    """Solve the problems of a batch, one after the other, in one thread.

    Args:
        given: A, l, u: ``(B, m, K, C)`` and ``(B, m)``.
        samples: q, 1/P, w and cell: ``(B, n, C)`` and ``(B, n)``.
        single: whether x is rounded to float32.
        precision: the largest excess of a row, relative to its scale.
        x, theta: written, the solutions and the threshold of each sample.
        y: written, the multipliers of rows and sums (of the solution, or of the proof that there is
            none), ``(B, m + n)``.
        T, tight, outcome: written, as by ``fairopt.kernels.projection.solve``; T is
            ``(B, 2, K, C)``.

    Returns how many have no solution to the precision asked for.
    """
    batch, m, K, C = given[0].shape
    cells, rows, numbers = new_state(m, K * C)
    weights, W, shift = np.empty((3, K)), np.empty((K, C, C)), np.empty(K)
    rounding = sum_rounding(samples[0].shape[1])
    patience = np.empty(2, np.int64)
    trial, trial_rest = cells[TRIAL_SHIFT].reshape(K, C), cells[TRIAL_SHIFT_REST].reshape(K, C)
    hi, low = cells[SHIFT].reshape(K, C), cells[SHIFT_REST].reshape(K, C)
    failures = 0
    for b in range(batch):
        begin(cells, rows, numbers)
        patience[:] = 0
        q, inverse, w, cell = samples[0][b], samples[1][b], samples[2][b], samples[3][b]
        whole, below, above = given[0][b], given[1][b], given[2][b]
        limits(inverse, w, cell, weights, cells)
        A, l, u = without_reference(whole, below, above, weights)
        flat = A.reshape(m, K * C)
        status = CONTINUE
        while status == CONTINUE:
            evaluate(q, inverse, w, cell, trial, trial_rest, cells, W)
            status = arrive(l, u, cells, rows, numbers)
            if status != ARRIVED:
                continue
            status = CONTINUE
            if numbers[UNDER_WAY] != 0.0:
                soften(numbers, patience)
                if drifted(flat, cells, rows, numbers):
                    continue
            measure(flat, cells, rows)
            status = verdict(residual(l, u, rows, rounding), numbers)
            if status != CONTINUE:
                continue
            if proves_infeasible(whole, below, above, rows[DUAL], weights):
                rows[TARGET_DUAL] = rows[DUAL]
                status = INFEASIBLE
                continue
            numbers[ITERATION] += 1
            found = step(A, l, u, W, weights[EDGE], cells, rows, numbers)
            if found != MODEL_SOLVED and proves_infeasible(whole, below, above, rows[RAY], weights):
                rows[TARGET_DUAL] = rows[RAY]
                status = INFEASIBLE
                continue
            # Contradictory only to rounding: the step towards the other rows is still good.
            aim(l, u, cells, rows, numbers)
        for k in range(K):
            shift[k] = 0.0
            for r in range(m):
                shift[k] += whole[r, k, C - 1] * rows[DUAL, r]
        write(q, inverse, w, cell, hi, low, shift, single, x[b], theta[b], y[b, m:], cells)
        measure(whole.reshape(m, K * C), cells, rows)
        tight_sides(below, above, rows, precision, tight[b])
        if status == INFEASIBLE:
            rows[DUAL] = rows[TARGET_DUAL]
            least_products(whole, rows[DUAL], w, cell, y[b, m:])
        elif status == CONVERGED and not excess(below, above, rows) <= precision:
            status = STALLED
        failures += status != CONVERGED
        y[b, :m], T[b, 0], T[b, 1] = rows[DUAL], hi, low
        outcome[b, STATUS], outcome[b, PASSES] = status, numbers[EVALUATIONS]
    return failures


# ---------------------------------------------------------------------------------------------
# The adjoint
# ---------------------------------------------------------------------------------------------


@compiled()
def adjoint_sums(q, inverse, w, cell, t_hi, t_lo, theta, g, W, G):
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
def adjoint_factor(A, W, G, N, c):
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
def adjoint_write(q, inverse, w, cell, t_hi, t_lo, theta, g, shift, v, nu):
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
