"""The model problem of a Newton step: the dual active-set method of Goldfarb and Idnani.

In z, a linear image of the change of the cell sums, and with normals N_r of unit length, signed so
that an active row reads N_r z = b_r, the model is: minimise |z|^2 / 2 + (what y already pulls), and
a multiplier that grows by a moves z by -a N_r. The method (Math. Programming 27, 1983) starts from
the rows on which y acts, drops those that would pull the wrong way, then adds the most violated
row, one at a time. It never takes a dependent row into its active set, so that redundant rows need
no treatment.

Where rows look at parts (``fairopt.kernels.partitions``), N = E L is wide: ``parts`` are then E's
ends, columns and values, and L; loops vectorise, a row leaves the factorisation by rotations, and
rows outside the active set are valued through the parts. Elsewhere ``parts`` is None, which is
decided when it is compiled.
"""

from __future__ import annotations

import math

import numpy as np

from fairopt.kernels.compilation import compiled
from fairopt.kernels.state import ASIDE, DUAL, FLOOR, LENGTH, RAY, ROW_VALUE, TARGET_DUAL
from fairopt.tolerances import DEPENDENT, DEPENDENT_IN_PARTS, NO_RATE

EPS = float(np.finfo(np.float64).eps)

# What ``solve_model`` found: a solution; that the rows contradict each other, which rows[RAY]
# proves of the model; or that nothing in the model moves a row that does not hold.
MODEL_SOLVED, CONTRADICTED, BLIND = range(3)


@compiled(fastmath={"reassoc", "nsz", "contract"})
def dot(a, b):
    total = 0.0
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@compiled(fastmath={"contract"})
def subtract(a, c, b):
    """a -= c b."""
    for i in range(a.shape[0]):
        a[i] -= c * b[i]


@compiled()
def orthogonalise(N, r, Q, R, q, parts):
    """Column q of the factorisation of the active normals (N_W^T = Q R); the length of the rest.

    Gram-Schmidt, twice: "twice is enough". Wide normals are done once where most of the length is
    left. Q is stored by rows.
    """
    rest = Q[q]
    K = N.shape[1]
    for k in range(K):
        rest[k] = N[r, k]
    for j in range(q):
        R[j, q] = 0.0
    if parts is None:
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
    before = dot(rest, rest)
    after = before
    for _ in range(2):
        for j in range(q):
            c = dot(Q[j], rest)
            R[j, q] += c
            subtract(rest, c, Q[j])
        after = dot(rest, rest)
        if after > 0.5 * before:
            break
        before = after
    return math.sqrt(after)


@compiled()
def keep(Q, R, q, length):
    """Row q of Q is one of the basis now."""
    for k in range(Q.shape[1]):
        Q[q, k] /= length
    R[q, q] = length


@compiled()
def factorise(N, W, side, lam, q, Q, R, rows, parts):
    """Factorise the normals of W afresh, leaving dependent ones aside; the number that stay."""
    kept = 0
    dependent = DEPENDENT if parts is None else DEPENDENT_IN_PARTS
    for j in range(q):
        length = orthogonalise(N, W[j], Q, R, kept, parts)
        if length > dependent and kept < Q.shape[0] - 1:
            keep(Q, R, kept, length)
            W[kept], side[kept], lam[kept] = W[j], side[j], lam[j]
            kept += 1
        else:
            rows[ASIDE, W[j]] = side[j] * lam[j]
    return kept


@compiled()
def remove(Q, R, W, side, lam, j, q, parts):
    """Take the j-th of q active rows out; wide ones also out of the factorisation, by rotations."""
    for i in range(j, q - 1):
        W[i], side[i], lam[i] = W[i + 1], side[i + 1], lam[i + 1]
    if parts is None:
        return
    for i in range(j, q - 1):
        for t in range(i + 2):
            R[t, i] = R[t, i + 1]
    for i in range(j, q - 1):
        a, b = R[i, i], R[i + 1, i]
        length = math.hypot(a, b)
        c, s = a / length, b / length
        upper, lower = R[i], R[i + 1]
        for t in range(i, q - 1):
            x, y = upper[t], lower[t]
            upper[t], lower[t] = c * x + s * y, c * y - s * x
        upper, lower = Q[i], Q[i + 1]
        for t in range(upper.shape[0]):
            x, y = upper[t], lower[t]
            upper[t], lower[t] = c * x + s * y, c * y - s * x


@compiled()
def back_substitute(R, c, q, out):
    """out = R^-1 c."""
    for j in range(q - 1, -1, -1):
        a = c[j]
        for i in range(j + 1, q):
            a -= R[j, i] * out[i]
        out[j] = a / R[j, j]


@compiled()
def excess_at(N, r, z, l, u, rows, moved, parts):
    """By how much row r misses its upper and its lower side at z; and what rounding allows."""
    shift = rounding = 0.0
    length = rows[LENGTH, r]
    if parts is None:
        for k in range(N.shape[1]):
            move = N[r, k] * z[k]
            shift += move
            rounding += abs(move)
        shift *= length
        rounding *= length
    else:
        end, column, value, _ = parts
        for e in range(end[r], end[r + 1]):
            move = value[e] * moved[column[e]]
            shift += move
            rounding += abs(move)
    now = rows[ROW_VALUE, r] + shift
    return now - u[r], l[r] - now, rows[FLOOR, r] + 8.0 * EPS * rounding


@compiled()
def solve_model(N, l, u, rows, z, parts):
    """Minimise the model: z and rows[TARGET_DUAL]; MODEL_SOLVED, CONTRADICTED or BLIND.

    Read are rows[ROW_VALUE] at z = 0, [FLOOR], [LENGTH] (of the normals before they were scaled)
    and [DUAL]. Where BLIND there are no new multipliers.
    """
    m, K = N.shape
    most = min(m, K)
    W = np.empty(m + 1, np.int64)
    work = np.zeros((4, m + 1))
    side, lam, c, rate = work[0], work[1], work[2], work[3]
    Q, R = np.empty((most + 1, K)), np.zeros((most + 1, most + 1))
    active = np.zeros(m, np.bool_)
    moved = z if parts is None else np.empty(parts[3].shape[0])
    dependent = DEPENDENT if parts is None else DEPENDENT_IN_PARTS

    # Rows on which y acts. Rows that do not fit (dependent now) are dropped by factorise.
    q = 0
    for r in range(m):
        rows[ASIDE, r] = 0.0
        if rows[DUAL, r] != 0.0 and rows[LENGTH, r] > 0.0 and q < (most if parts is None else m):
            W[q] = r
            side[q] = 1.0 if rows[DUAL, r] > 0.0 else -1.0
            q += 1
    q = factorise(N, W, side, lam, q, Q, R, rows, parts)  # lam is still zero
    while True:
        active[:] = False
        for j in range(q):
            active[W[j]] = True
        z[:] = 0.0
        for r in range(m):
            if rows[DUAL, r] != 0.0 and not active[r]:
                pull = rows[DUAL, r] * rows[LENGTH, r]
                if parts is None:
                    for k in range(K):
                        z[k] += pull * N[r, k]
                else:
                    subtract(z, -pull, N[r])
        # e = signed excess of the active rows; c = R^-T e; z -= Q c; the multipliers grow R^-1 c.
        for j in range(q):
            r = W[j]
            e = (rows[ROW_VALUE, r] - (u[r] if side[j] > 0.0 else l[r])) / rows[LENGTH, r]
            if parts is None:
                for k in range(K):
                    e += N[r, k] * z[k]
            else:
                e += dot(N[r], z)
            for i in range(j):
                e -= R[i, j] * c[i]
            c[j] = e / R[j, j]
        for j in range(q):
            move_along(z, c[j], Q, j, parts)
        back_substitute(R, c, q, rate)
        wrong = 0
        for j in range(q):
            r = W[j]
            grown = rows[DUAL, r] * rows[LENGTH, r] + rate[j]  # of unsigned normals: it has a sign
            lam[j] = grown * side[j]
            wrong += l[r] != u[r] and not lam[j] > 0.0
        if wrong == 0:
            break
        for j in range(q - 1, -1, -1):
            if l[W[j]] != u[W[j]] and not lam[j] > 0.0:
                remove(Q, R, W, side, lam, j, q, parts)
                q -= 1
        if parts is None:
            lam[:] = 0.0
            q = factorise(N, W, side, lam, q, Q, R, rows, parts)

    found = MODEL_SOLVED
    contradiction = 0.0  # the worst so far; what the ray proves
    for _ in range(50 * (m + max(K, moved.shape[0])) + 50):
        # The most violated row, in the metric of the model.
        worst = 0.0
        p = -1
        p_side = 0.0
        if parts is not None:
            for i in range(moved.shape[0]):
                moved[i] = dot(parts[3][i], z)
        for r in range(m):
            if active[r]:
                continue
            over, under, allowed = excess_at(N, r, z, l, u, rows, moved, parts)
            excess = max(over, under)
            if excess <= allowed:
                continue
            sign = 1.0 if over > under else -1.0
            if rows[LENGTH, r] == 0.0:
                # No sample moves this row: it can never hold.
                rows[RAY] = 0.0
                rows[RAY, r] = sign
                return BLIND
            if excess / rows[LENGTH, r] > worst:
                worst = excess / rows[LENGTH, r]
                p, p_side = r, sign
        if p < 0:
            break
        lam_p = 0.0
        while True:
            reach = orthogonalise(N, p, Q, R, q, parts)
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
            if reach > dependent and q < most:
                full = worst / (reach * reach)
            if blocking < 0 and full == np.inf:
                # Dependent on rows that cannot give way. Within rounding it holds; beyond, never.
                if worst > contradiction:
                    contradiction = worst
                    rows[RAY] = 0.0
                    rows[RAY, p] = p_side / rows[LENGTH, p]
                    for j in range(q):
                        if abs(rate[j]) > NO_RATE:
                            rows[RAY, W[j]] = -rate[j] / rows[LENGTH, W[j]]
                found = CONTRADICTED
                active[p] = True  # left aside with what it has pulled; the other rows still count
                rows[ASIDE, p] = p_side * lam_p
                break
            length = min(full, step)
            if full < np.inf:
                move_along(z, length * p_side, Q, q, parts)
            for j in range(q):
                lam[j] -= length * rate[j] * side[j]
            if full <= step:
                keep(Q, R, q, reach)
                W[q], side[q], lam[q] = p, p_side, lam_p + full
                active[p] = True
                q += 1
                break
            if full < np.inf:
                worst -= step * reach * reach
            lam_p += step
            active[W[blocking]] = False
            remove(Q, R, W, side, lam, blocking, q, parts)
            q -= 1
            if parts is None:
                q = factorise(N, W, side, lam, q, Q, R, rows, parts)

    for j in range(q):
        rows[ASIDE, W[j]] = side[j] * lam[j]
    for r in range(m):
        aside = rows[ASIDE, r]
        rows[TARGET_DUAL, r] = aside / rows[LENGTH, r] if aside != 0.0 else 0.0
    return found


@compiled()
def move_along(z, c, Q, j, parts):
    """z -= c Q_j."""
    if parts is None:
        for k in range(z.shape[0]):
            z[k] -= c * Q[j, k]
    else:
        subtract(z, c, Q[j])


@compiled()
def independent(N, some, parts):
    """Gram-Schmidt over some rows of unit length: basis, triangle, and which rows they come from.

    A row whose part outside the span of those before it is shorter than DEPENDENT_IN_PARTS is
    passed over. Also returned are the shortest part of a row that was taken and the longest of one
    that was not.
    """
    taken, left = 1.0, 0.0
    most = min(some.shape[0], N.shape[1])
    Q, R = np.empty((most + 1, N.shape[1])), np.zeros((most + 1, most + 1))
    W = np.empty(most, np.int64)
    q = 0
    for r in some:
        length = orthogonalise(N, r, Q, R, q, parts)
        if length > DEPENDENT_IN_PARTS and q < most:
            keep(Q, R, q, length)
            W[q] = r
            q += 1
            taken = min(taken, length)
        else:
            left = max(left, length)
    return Q[:q].copy(), R[:q, :q].copy(), W[:q].copy(), taken, left
