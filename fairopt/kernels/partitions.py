"""The dual's small algebra where rows look at classes of cells, compiled.

``fairopt.kernels.projection`` tells the method; here only the arrays differ. With m rows, K cells
and S classes, V the S x K matrix that says which cell is in which class (one class of each of the F
partitions) and E the sparse m x S table, C = E V is never formed:

    values of the rows   a = E (V s)                 O(F K + nnz E)
    tilts                t = V^T (E^T y)             O(F K + nnz E)
    curvature            C D C^T = E (V D V^T) E^T

The model problem sees the rows only through their scalar products. V D V^T = L L^T with L of size
S x r, r the rank, by Cholesky's method with pivots; N = E L is then an isometric image of
the normals C sqrt(D) in r instead of K dimensions, and Goldfarb and Idnani's method runs on it. The
partitions make V D V^T singular (the classes of each add up to everyone), hence the pivots.

Precision. Squaring costs half the digits of what is nearly dependent: directions shorter than 1e-6
of a class are left out of L. A step only has to be good, because the residuals that end the
iteration are computed from C itself: what L does not see shows as an iteration that does not end.
The caller then takes the dense coefficients (LIMIT).
"""

from __future__ import annotations

import math

import numpy as np

from fairopt.kernels.combinations import class_sums
from fairopt.kernels.compilation import compiled
from fairopt.kernels.projection import (
    CONTINUE,
    EVALUATIONS,
    INFEASIBLE,
    ITERATION,
    NOT_FINITE,
    PENDING,
    STALLED,
    aim,
    back_substitute,
    largest_mean,
    miss,
    model,
    search,
    verdict,
    with_sides,
)
from fairopt.tolerances import TINY, WEAK

EPS = float(np.finfo(np.float64).eps)

# Squared length, as a share of the class's own, below which a direction is left out of L. What is
# kept has then an error of no more than EPS / 1e-6, below what makes a normal dependent.
DROP = 1e-12
DEPENDENT = 1e-8
NO_RATE = 1e-10

# What ``step`` may find.
SOLVED, CONTRADICTION, BLIND = 0, 1, 2
# A class that keeps less than this share of its curvature is summed afresh.
KEPT = 1e-4

# So many iterations; more are a sign of what L does not see. Scores within the bounds need four or
# five, scores a hundred times as far apart as the bounds some dozens.
LIMIT = 400
# From this iteration on the multipliers are tried as a proof that there is no solution.
PROOFS = 6


# ---------------------------------------------------------------------------------------------
# Products with E and V
# ---------------------------------------------------------------------------------------------


@compiled()
def compress(table, first, size):  # type: ignore[no-untyped-def]
    """The table ``(m, G)`` without zeros: the ends of the rows, classes and values.

    ``first`` and ``size`` tell which classes the columns of each row are, and how many.
    """
    m = table.shape[0]
    end = np.zeros(m + 1, np.uint32)
    total = 0
    for r in range(m):
        for c in range(size[r]):
            total += table[r, c] != 0.0
        end[r + 1] = total
    of, value = np.empty(total, np.uint32), np.empty(total)
    place = 0
    for r in range(m):
        for c in range(size[r]):
            if table[r, c] != 0.0:
                of[place], value[place] = first[r] + c, table[r, c]
                place += 1
    return end, of, value


@compiled()
def cell_tilts(member, classes, out):  # type: ignore[no-untyped-def]
    """out = V^T classes."""
    F = member.shape[1]
    for k in range(member.shape[0]):
        total = 0.0
        for f in range(F):
            total += classes[member[k, f]]
        out[k] = total


@compiled()
def row_values(end, of, value, classes, out):  # type: ignore[no-untyped-def]
    """out = E classes."""
    for r in range(out.shape[0]):
        total = 0.0
        for e in range(end[r], end[r + 1]):
            total += value[e] * classes[of[e]]
        out[r] = total


@compiled()
def row_tilts(end, of, value, y, out):  # type: ignore[no-untyped-def]
    """out = E^T y."""
    out[:] = 0.0
    for r in range(y.shape[0]):
        if y[r] != 0.0:
            for e in range(end[r], end[r + 1]):
                out[of[e]] += value[e] * y[r]


@compiled()
def absolute_scale(end, of, value, member, mass, S):  # type: ignore[no-untyped-def]
    """|C| mass: times the largest |x| it is the scale of each row."""
    classes, out = np.empty(S), np.empty(end.shape[0] - 1)
    class_sums(member, mass, classes)
    row_values(end, of, np.abs(value), classes, out)
    return out


@compiled()
def gram(member, change, H):  # type: ignore[no-untyped-def]
    """H += V diag(change) V^T, the upper triangle; cells without change are passed over.

    The classes of a cell must rise with the partition.
    """
    F = member.shape[1]
    for k in range(member.shape[0]):
        d = change[k]
        if d == 0.0:
            continue
        for f in range(F):
            row = H[member[k, f]]
            for g in range(f, F):
                row[member[k, g]] += d


# ---------------------------------------------------------------------------------------------
# Factors
# ---------------------------------------------------------------------------------------------


@compiled(fastmath={"reassoc", "nsz", "contract"})
def dot(a, b):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@compiled(fastmath={"contract"})
def subtract(a, c, b):  # type: ignore[no-untyped-def]
    """a -= c b."""
    for i in range(a.shape[0]):
        a[i] -= c * b[i]


@compiled()
def factorise_classes(H, drop):  # type: ignore[no-untyped-def]
    """L ``(S, r)`` with L L^T = H, rows scaled to unit length first; H by its upper triangle.

    Returns L, the smallest pivot that was kept and the largest that was not, as shares of 1.
    """
    S = H.shape[0]
    root = np.empty(S)
    left = np.empty(S)  # what is left of each squared length
    for i in range(S):
        root[i] = math.sqrt(H[i, i]) if H[i, i] > 0.0 else 0.0
        left[i] = 1.0 if H[i, i] > 0.0 else 0.0
    L = np.zeros((S, S))
    rank = 0
    least = 1.0
    while rank < S:
        p = 0
        for i in range(S):
            if left[i] > left[p]:
                p = i
        if left[p] <= drop:
            break
        least = min(least, left[p])
        pivot = math.sqrt(left[p])
        mine = L[p, :rank]
        for i in range(S):
            if left[i] <= 0.0 or i == p:
                continue
            entry = (H[i, p] if i < p else H[p, i]) / (root[i] * root[p])
            entry = (entry - dot(L[i, :rank], mine)) / pivot
            L[i, rank] = entry
            left[i] -= entry * entry
            if left[i] <= 0.0:
                left[i] = 1e-300  # rounding; its row of L still has entries to come
        L[p, rank] = pivot
        left[p] = 0.0
        rank += 1
    rest = 0.0
    for i in range(S):
        rest = max(rest, left[i])
    out = np.empty((S, rank))
    for i in range(S):
        for j in range(rank):
            out[i, j] = L[i, j] * root[i]
    return out, least, rest


@compiled()
def normals(end, of, value, L, N, length):  # type: ignore[no-untyped-def]
    """N = E L with rows of unit length, and the lengths that they had."""
    for r in range(N.shape[0]):
        mine = N[r]
        mine[:] = 0.0
        for e in range(end[r], end[r + 1]):
            subtract(mine, -value[e], L[of[e]])
        length[r] = math.sqrt(dot(mine, mine))
        if length[r] > 0.0:
            for j in range(mine.shape[0]):
                mine[j] /= length[r]


@compiled()
def orthogonalise(normal, Q, R, q):  # type: ignore[no-untyped-def]
    """Row q of Q and column q of R for one more normal; the length of the rest.

    Gram-Schmidt, and once more where most of the length is gone: twice is enough.
    """
    rest = Q[q]
    rest[:] = normal
    for j in range(q):
        R[j, q] = 0.0
    before = dot(rest, rest)
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
def keep(Q, R, q, length):  # type: ignore[no-untyped-def]
    """Row q of Q is one of the basis now."""
    mine = Q[q]
    for k in range(mine.shape[0]):
        mine[k] /= length
    R[q, q] = length


@compiled()
def remove(Q, R, W, side, lam, j, q):  # type: ignore[no-untyped-def]
    """Take the j-th of q active rows out of the factorisation, by Givens' rotations."""
    for i in range(j, q - 1):
        W[i], side[i], lam[i] = W[i + 1], side[i + 1], lam[i + 1]
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
def independent(N, rows):  # type: ignore[no-untyped-def]
    """Gram-Schmidt over some rows of unit length: basis, triangle, and which rows they come from.

    A row whose part outside the span of those before it is shorter than DEPENDENT is passed over.
    Also returned are the shortest part of a row that was taken and the longest of one that was not.
    """
    taken, left = 1.0, 0.0
    most = min(rows.shape[0], N.shape[1])
    Q, R = np.empty((most + 1, N.shape[1])), np.zeros((most + 1, most + 1))
    W = np.empty(most, np.int64)
    q = 0
    for r in rows:
        length = orthogonalise(N[r], Q, R, q)
        if length > DEPENDENT and q < most:
            keep(Q, R, q, length)
            W[q] = r
            q += 1
            taken = min(taken, length)
        else:
            left = max(left, length)
    return Q[:q].copy(), R[:q, :q].copy(), W[:q].copy(), taken, left


# ---------------------------------------------------------------------------------------------
# The model problem
# ---------------------------------------------------------------------------------------------


@compiled()
def step(end, of, value, L, l, u, floor, a, y, y_new, ray):  # type: ignore[no-untyped-def]
    """``_projection.newton_step`` on N = E L: the new multipliers.

    Returns SOLVED; CONTRADICTION, which ``ray`` proves of the model; or BLIND where L sees nothing
    of a row that does not hold, and there are no new multipliers.

    ``a`` holds the rows' values at the point where the model is made. What leaves the active set is
    rotated out of the factorisation, and the rows not in it are valued through the classes.
    """
    m = l.shape[0]
    S, rank = L.shape
    N, length = np.empty((m, rank)), np.empty(m)
    normals(end, of, value, L, N, length)

    most = min(m, rank)
    W = np.empty(most + 1, np.int64)
    side = np.empty(most + 1)
    Q, R = np.empty((most + 1, rank)), np.zeros((most + 1, most + 1))
    lam = np.zeros(most + 1)
    c, rate = np.empty(most + 1), np.empty(most + 1)
    z, moved = np.zeros(rank), np.empty(S)
    active = np.zeros(m, np.bool_)
    aside = np.zeros(m)

    # Rows on which y acts; those that are dependent now stay out.
    q = 0
    for r in range(m):
        if y[r] != 0.0 and length[r] > 0.0 and q < most:
            reach = orthogonalise(N[r], Q, R, q)
            if reach > DEPENDENT:
                keep(Q, R, q, reach)
                W[q], side[q] = r, (1.0 if y[r] > 0.0 else -1.0)
                active[r] = True
                q += 1
    while True:
        z[:] = 0.0
        for r in range(m):
            if y[r] != 0.0 and not active[r]:
                subtract(z, -y[r] * length[r], N[r])
        # e = signed excess of the active rows; c = R^-T e; z -= Q c; the multipliers grow R^-1 c.
        for j in range(q):
            r = W[j]
            e = (a[r] - (u[r] if side[j] > 0.0 else l[r])) / length[r] + dot(N[r], z)
            for i in range(j):
                e -= R[i, j] * c[i]
            c[j] = e / R[j, j]
        for j in range(q):
            subtract(z, c[j], Q[j])
        back_substitute(R, c, q, rate)
        wrong = 0
        for j in range(q):
            r = W[j]
            grown = y[r] * length[r] + rate[j]
            lam[j] = grown * side[j]
            if l[r] == u[r]:
                continue
            if not lam[j] > 0.0:
                wrong += 1
        if wrong == 0:
            break
        for j in range(q - 1, -1, -1):
            if l[W[j]] != u[W[j]] and not lam[j] > 0.0:
                active[W[j]] = False
                remove(Q, R, W, side, lam, j, q)
                q -= 1

    found = SOLVED
    contradiction = 0.0
    for _ in range(50 * (m + S) + 50):
        worst = 0.0
        p = -1
        p_side = 0.0
        for i in range(S):
            moved[i] = dot(L[i], z)
        for r in range(m):
            if active[r]:
                continue
            shift = rounding = 0.0
            for e in range(end[r], end[r + 1]):
                part = value[e] * moved[of[e]]
                shift += part
                rounding += abs(part)
            now = a[r] + shift
            over, under = now - u[r], l[r] - now
            excess = max(over, under)
            if excess <= floor[r] + 8.0 * EPS * rounding:
                continue
            if length[r] == 0.0:
                ray[:] = 0.0
                ray[r] = 1.0 if over > under else -1.0
                return BLIND
            if excess / length[r] > worst:
                worst = excess / length[r]
                p = r
                p_side = 1.0 if over > under else -1.0
        if p < 0:
            break
        lam_p = 0.0
        while True:
            reach = orthogonalise(N[p], Q, R, q)
            for j in range(q):
                c[j] = R[j, q] * p_side
            back_substitute(R, c, q, rate)
            length_of_step = np.inf
            blocking = -1
            for j in range(q):
                signed = rate[j] * side[j]
                if l[W[j]] != u[W[j]] and signed > NO_RATE and lam[j] < length_of_step * signed:
                    length_of_step = lam[j] / signed
                    blocking = j
            full = np.inf
            if reach > DEPENDENT and q < most:
                full = worst / (reach * reach)
            if blocking < 0 and full == np.inf:
                if worst > contradiction:
                    contradiction = worst
                    ray[:] = 0.0
                    ray[p] = p_side / length[p]
                    for j in range(q):
                        if abs(rate[j]) > NO_RATE:
                            ray[W[j]] = -rate[j] / length[W[j]]
                found = CONTRADICTION
                active[p] = True
                aside[p] = p_side * lam_p
                break
            if full <= length_of_step:
                subtract(z, full * p_side, Q[q])
                for j in range(q):
                    lam[j] -= full * rate[j] * side[j]
                keep(Q, R, q, reach)
                W[q], side[q], lam[q] = p, p_side, lam_p + full
                active[p] = True
                q += 1
                break
            if full < np.inf:
                subtract(z, length_of_step * p_side, Q[q])
                worst -= length_of_step * reach * reach
            for j in range(q):
                lam[j] -= length_of_step * rate[j] * side[j]
            lam_p += length_of_step
            active[W[blocking]] = False
            remove(Q, R, W, side, lam, blocking, q)
            q -= 1

    for j in range(q):
        aside[W[j]] = side[j] * lam[j]
    for r in range(m):
        y_new[r] = aside[r] / length[r] if aside[r] != 0.0 else 0.0
    return found


# ---------------------------------------------------------------------------------------------
# The outer iteration
# ---------------------------------------------------------------------------------------------


@compiled()
def proves_infeasible(end, of, value, member, S, l, u, ray, low, high):  # type: ignore[no-untyped-def]
    """Farkas, as in ``_projection.proves_infeasible``."""
    least = size = 0.0
    for r in range(l.shape[0]):
        if ray[r] != 0.0:
            side = u[r] if ray[r] > 0.0 else l[r]
            least -= side * ray[r]
            size += abs(side * ray[r])
    if not least > -np.inf:
        return False
    K = member.shape[0]
    classes, c, total = np.empty(S), np.empty(K), np.empty(K)
    row_tilts(end, of, value, ray, classes)
    cell_tilts(member, classes, c)
    row_tilts(end, of, np.abs(value), np.abs(ray), classes)
    cell_tilts(member, classes, total)
    for k in range(K):
        corner = low[k] if c[k] > 0.0 else high[k]
        if not math.isinf(corner):
            least += c[k] * corner
            size += total[k] * max(abs(low[k]) if low[k] > -np.inf else 0.0, abs(corner))
        elif abs(c[k]) > 1e-9 * total[k]:
            return False
    return least > 1e-11 * size


@compiled()
def drifted(end, of, value, member, S, y, T):  # type: ignore[no-untyped-def]
    """Whether a tilt has lost digits, as in ``_projection.advance``; such are taken from y."""
    K, F = member.shape
    classes, sizes, exact = np.empty(S), np.empty(S), np.empty(K)
    row_tilts(end, of, value, y, classes)
    cell_tilts(member, classes, exact)
    row_tilts(end, of, np.abs(value), np.abs(y), sizes)
    found = False
    for k in range(K):
        off = abs(T[0, k] + T[1, k] - exact[k])
        if off <= 32.0 * EPS * abs(exact[k]):
            continue  # the rule, and the scale is no less
        scale = 0.0
        for f in range(F):
            scale += sizes[member[k, f]]
        if off > 32.0 * EPS * scale:
            found = True
            T[0, k], T[1, k] = exact[k], 0.0
    return found


@compiled()
def remodel(member, D, last, G, whole):  # type: ignore[no-untyped-def]
    """V D V^T in the upper triangle of G, which is that of the curvatures ``last``.

    Only what changed is added, unless that would cancel most of what a class had when the matrix
    was last made from nothing (``whole``: the diagonal then).
    """
    diagonal = np.empty(G.shape[0])
    class_sums(member, D, diagonal)
    anew = False
    for c in range(G.shape[0]):
        anew |= diagonal[c] < KEPT * whole[c]
    if anew:
        G[:] = 0.0
        last[:] = 0.0
    if anew or not whole.any():
        whole[:] = diagonal
    gram(member, D - last, G)
    last[:] = D
    for c in range(G.shape[0]):
        G[c, c] = diagonal[c]


@compiled()
def advance(  # type: ignore[no-untyped-def]
    end,
    of,
    value,
    member,
    absolute,
    l,
    u,
    low,
    high,
    H,
    mass,
    s,
    h,
    size,
    rounding,
    numbers,
    counts,
    Y,
    T,
    dt,
    last,
    G,
    whole,
):
    """``_projection.advance``; STALLED where the dense coefficients have to be asked.

    Args:
        absolute: ``absolute_scale``.
        last, G, whole: of ``remodel``, kept from call to call.
    """
    m, K, S = l.shape[0], member.shape[0], G.shape[0]
    counts[EVALUATIONS] += 1
    y, target = Y[0], Y[2]
    for k in range(K):
        if not math.isfinite(s[k]):
            return NOT_FINITE

    if counts[PENDING]:
        if search(l, u, s, size, numbers, counts, Y, T, dt):
            return CONTINUE
        if drifted(end, of, value, member, S, y, T):
            counts[PENDING] = 0
            T[2], T[3] = T[0], T[1]
            return CONTINUE

    classes, a, floor = np.empty(S), np.empty(m), np.empty(m)
    class_sums(member, s, classes)
    row_values(end, of, value, classes, a)
    worst = 0.0
    largest = largest_mean(size, mass)
    for r in range(m):
        off = miss(a[r], y[r], l[r], u[r])
        floor[r] = rounding * (with_sides(absolute[r] * largest, l[r], u[r]) + TINY)
        if off > floor[r]:
            worst = max(worst, off / floor[r])
    status = verdict(worst, numbers, counts)
    if status != CONTINUE:
        return status
    if counts[ITERATION] >= LIMIT:
        return STALLED
    if counts[ITERATION] >= PROOFS and proves_infeasible(
        end, of, value, member, S, l, u, y, low, high
    ):
        target[:] = y
        return INFEASIBLE

    D, ray = np.empty(K), np.zeros(m)
    model(h, H, D, numbers, counts)
    remodel(member, D, last, G, whole)
    L, _, _ = factorise_classes(G, DROP)
    counts[ITERATION] += 1
    found = step(end, of, value, L, l, u, floor, a, y, target, ray)
    if found != SOLVED and proves_infeasible(end, of, value, member, S, l, u, ray, low, high):
        target[:] = ray
        return INFEASIBLE
    if found == BLIND:
        return STALLED
    row_tilts(end, of, value, target - y, classes)
    cell_tilts(member, classes, dt)
    aim(l, u, s, numbers, counts, Y, T, dt)
    return CONTINUE


@compiled()
def excess(end, of, value, member, absolute, l, u, mass, s, size, S):  # type: ignore[no-untyped-def]
    """``_projection.excess``."""
    classes, a = np.empty(S), np.empty(l.shape[0])
    class_sums(member, s, classes)
    row_values(end, of, value, classes, a)
    worst = 0.0
    largest = largest_mean(size, mass)
    for r in range(l.shape[0]):
        scale = absolute[r] * largest
        if a[r] > u[r]:
            worst = max(worst, (a[r] - u[r]) / (scale + abs(u[r]) + TINY))
        elif a[r] < l[r]:
            worst = max(worst, (l[r] - a[r]) / (scale + abs(l[r]) + TINY))
    return worst


@compiled()
def drop_weak(end, of, value, member, absolute, l, u, mass, s, size, S, H, y):  # type: ignore[no-untyped-def]
    """``_projection.drop_weak``; the classes of one row are disjoint."""
    classes, pull = np.empty(S), np.empty(l.shape[0])
    class_sums(member, H, classes)
    row_values(end, of, value * value, classes, pull)
    largest = largest_mean(size, mass)
    for r in range(l.shape[0]):
        if y[r] == 0.0 or l[r] == u[r]:
            continue
        side = abs(u[r] if y[r] > 0.0 else l[r])
        if abs(y[r]) * pull[r] <= WEAK * (absolute[r] * largest + side):
            y[r] = 0.0


@compiled()
def reach_of(end, of, value, member, S, y):  # type: ignore[no-untyped-def]
    """``_projection.reach_of``."""
    classes, cells = np.empty(S), np.empty(member.shape[0])
    row_tilts(end, of, np.abs(value), np.abs(y), classes)
    cell_tilts(member, classes, cells)
    return cells.max()


@compiled()
def near(end, of, member, S, rows):  # type: ignore[no-untyped-def]
    """Which cells some of the rows look at."""
    classes = np.zeros(S, np.bool_)
    for r in range(rows.shape[0]):
        if rows[r]:
            for e in range(end[r], end[r + 1]):
                classes[of[e]] = True
    out = np.zeros(member.shape[0], np.bool_)
    for k in range(member.shape[0]):
        for f in range(member.shape[1]):
            out[k] |= classes[member[k, f]]
    return out


@compiled()
def tight_sides(end, of, value, member, absolute, l, u, mass, s, size, S, precision, tight):  # type: ignore[no-untyped-def]
    """``_projection.tight_sides``."""
    classes, a = np.empty(S), np.empty(l.shape[0])
    class_sums(member, s, classes)
    row_values(end, of, value, classes, a)
    largest = largest_mean(size, mass)
    for r in range(l.shape[0]):
        scale = absolute[r] * largest
        tight[r] = 0
        if u[r] < np.inf and u[r] - a[r] <= precision * (scale + abs(u[r])):
            tight[r] = 1
        if l[r] > -np.inf and a[r] - l[r] <= precision * (scale + abs(l[r])):
            tight[r] += 2
