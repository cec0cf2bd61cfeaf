"""The dual's small algebra where rows look at parts of the cells, compiled.

``fairopt.kernels.newton`` has the method; here only the coefficients differ. With m rows, K cells
and S parts, V the S x K matrix that says which cell is in which part (one part of each of the F
partitions) and E the sparse m x S table, C = E V is never formed:

    values of the rows   a = E (V s)                 O(F K + nnz E)
    dual shifts          t = V^T (E^T y)             O(F K + nnz E)
    curvature            C D C^T = E (V D V^T) E^T

The model problem sees the rows only through their scalar products. V D V^T = L L^T with L of size
S x r, r the rank, by Cholesky's method with pivots; N = E L is then an isometric image of
the normals C sqrt(D) in r instead of K dimensions, and the active-set method runs on it. The
partitions make V D V^T singular (the parts of each add up to everyone), hence the pivots.

Precision. Squaring costs half the digits of what is nearly dependent: directions shorter than 1e-6
of a part are left out of L. A step only has to be good, because the residuals that end the
iteration are computed from C itself: what L does not see shows as an iteration that does not end.
The caller then takes the dense coefficients (LIMIT).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import NDArray

from fairopt.kernels.active_set import BLIND, dot, solve_model, subtract
from fairopt.kernels.combinations import class_sums
from fairopt.kernels.compilation import compiled
from fairopt.kernels.newton import combine, largest_mean, measure, newton_step, policy, pulls
from fairopt.kernels.state import (
    CELL_MASS, CHANGE, COMBINED, DUAL, LENGTH, MODEL, PULL, ROW_MASS, ROW_SCALE, ROW_VALUE, SUM,
    TARGET_DUAL, TERMS, UNCLIPPED,
)  # fmt: skip
from fairopt.tolerances import DROPPED_PIVOT, KEPT_CURVATURE

# So many iterations; more are a sign of what L does not see. Scores within the bounds need four or
# five, scores a hundred times as far apart as the bounds some dozens.
LIMIT = 400
# From this iteration on the multipliers are tried as a proof that there is no solution.
PROOFS = 6

Array = NDArray[np.float64]


class PartRows(NamedTuple):
    """The coefficients E V of one problem, as the kernels take them.

    Attributes:
        end, column, value: E without zeros, by rows, as ``compress`` makes it.
        member: which part of each partition a cell is in, uint32 ``(K, F)``, rising along a row.
        last, gram, whole: of ``remodel``, zero at first, kept from pass to pass: ``(K,)``,
            ``(S, S)`` and ``(S,)``.
    """

    end: NDArray[np.uint32]
    column: NDArray[np.uint32]
    value: Array
    member: NDArray[np.uint32]
    last: Array
    gram: Array
    whole: Array


# ---------------------------------------------------------------------------------------------
# Products with E and V
# ---------------------------------------------------------------------------------------------


@compiled()
def compress(table, first, size):
    """The table ``(m, G)`` without zeros: the ends of the rows, parts and values.

    ``first`` and ``size`` say which parts the columns of each row are, and how many.
    """
    m = table.shape[0]
    end = np.zeros(m + 1, np.uint32)
    total = 0
    for r in range(m):
        for c in range(size[r]):
            total += table[r, c] != 0.0
        end[r + 1] = total
    column, value = np.empty(total, np.uint32), np.empty(total)
    place = 0
    for r in range(m):
        for c in range(size[r]):
            if table[r, c] != 0.0:
                column[place], value[place] = first[r] + c, table[r, c]
                place += 1
    return end, column, value


@compiled()
def cell_shifts(member, parts, out):
    """out = V^T parts."""
    F = member.shape[1]
    for k in range(member.shape[0]):
        total = 0.0
        for f in range(F):
            total += parts[member[k, f]]
        out[k] = total


@compiled()
def row_values(end, column, value, parts, out):
    """out = E parts."""
    for r in range(out.shape[0]):
        total = 0.0
        for e in range(end[r], end[r + 1]):
            total += value[e] * parts[column[e]]
        out[r] = total


@compiled()
def row_shifts(end, column, value, y, out):
    """out = E^T y."""
    out[:] = 0.0
    for r in range(y.shape[0]):
        if y[r] != 0.0:
            for e in range(end[r], end[r + 1]):
                out[column[e]] += value[e] * y[r]


@compiled()
def gram(member, change, H):
    """H += V diag(change) V^T, the upper triangle; cells without change are passed over.

    The parts of a cell must rise with the partition.
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


@compiled()
def factorise_parts(H, drop):
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
def normals(end, column, value, L, N, length):
    """N = E L with rows of unit length, and the lengths that they had."""
    for r in range(N.shape[0]):
        mine = N[r]
        mine[:] = 0.0
        for e in range(end[r], end[r + 1]):
            subtract(mine, -value[e], L[column[e]])
        length[r] = math.sqrt(dot(mine, mine))
        if length[r] > 0.0:
            for j in range(mine.shape[0]):
                mine[j] /= length[r]


@compiled()
def remodel(member, D, last, G, whole):
    """V D V^T in the upper triangle of G, which is that of the curvatures ``last``.

    Only what changed is added, unless that would cancel most of what a part had when the matrix
    was last made from nothing (``whole``: the diagonal then).
    """
    diagonal = np.empty(G.shape[0])
    class_sums(member, D, diagonal)
    anew = False
    for c in range(G.shape[0]):
        anew |= diagonal[c] < KEPT_CURVATURE * whole[c]
    if anew:
        G[:] = 0.0
        last[:] = 0.0
    if anew or not whole.any():
        whole[:] = diagonal
    gram(member, D - last, G)
    last[:] = D
    for c in range(G.shape[0]):
        G[c, c] = diagonal[c]


# ---------------------------------------------------------------------------------------------
# What ``fairopt.kernels.newton`` asks of the rows
# ---------------------------------------------------------------------------------------------


@overload(measure)
def measure_parts(C, cells, rows):
    if not isinstance(C, types.NamedTuple):
        return None

    def of_parts(C, cells, rows):
        sums = np.empty(C.whole.shape[0])
        if not rows[ROW_MASS].any():
            class_sums(C.member, cells[CELL_MASS], sums)
            row_values(C.end, C.column, np.abs(C.value), sums, rows[ROW_MASS])
        class_sums(C.member, cells[SUM], sums)
        row_values(C.end, C.column, C.value, sums, rows[ROW_VALUE])
        largest = largest_mean(cells)
        for r in range(rows.shape[1]):
            rows[ROW_SCALE, r] = rows[ROW_MASS, r] * largest

    return of_parts


@overload(combine)
def combine_parts(C, y, cells):
    if not isinstance(C, types.NamedTuple):
        return None

    def of_parts(C, y, cells):
        sums = np.empty(C.whole.shape[0])
        row_shifts(C.end, C.column, C.value, y, sums)
        cell_shifts(C.member, sums, cells[COMBINED])
        row_shifts(C.end, C.column, np.abs(C.value), np.abs(y), sums)
        cell_shifts(C.member, sums, cells[TERMS])

    return of_parts


@overload(pulls)
def pulls_parts(C, cells, rows):
    if not isinstance(C, types.NamedTuple):
        return None

    def of_parts(C, cells, rows):  # the parts of one row are disjoint
        sums = np.empty(C.whole.shape[0])
        class_sums(C.member, cells[UNCLIPPED], sums)
        row_values(C.end, C.column, C.value * C.value, sums, rows[PULL])

    return of_parts


@overload(newton_step)
def newton_step_parts(C, l, u, cells, rows):
    if not isinstance(C, types.NamedTuple):
        return None

    def of_parts(C, l, u, cells, rows):
        remodel(C.member, cells[MODEL], C.last, C.gram, C.whole)
        L, _, _ = factorise_parts(C.gram, DROPPED_PIVOT)
        N = np.empty((rows.shape[1], L.shape[1]))
        normals(C.end, C.column, C.value, L, N, rows[LENGTH])
        z = np.zeros(L.shape[1])
        found = solve_model(N, l, u, rows, z, (C.end, C.column, C.value, L))
        if found != BLIND:
            sums = np.empty(C.whole.shape[0])
            row_shifts(C.end, C.column, C.value, rows[TARGET_DUAL] - rows[DUAL], sums)
            cell_shifts(C.member, sums, cells[CHANGE])
        return found

    return of_parts


@overload(policy)
def policy_parts(C):
    return (lambda C: (LIMIT, PROOFS, True)) if isinstance(C, types.NamedTuple) else None


@compiled()
def looked_at(end, column, member, S, rows):
    """Which cells some of the rows look at."""
    parts = np.zeros(S, np.bool_)
    for r in range(rows.shape[0]):
        if rows[r]:
            for e in range(end[r], end[r + 1]):
                parts[column[e]] = True
    out = np.zeros(member.shape[0], np.bool_)
    for k in range(member.shape[0]):
        for f in range(member.shape[1]):
            out[k] |= parts[member[k, f]]
    return out
