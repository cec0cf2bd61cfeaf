# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Compiled: the matrix of a problem whose bounds are rows, column by column."""

from __future__ import annotations

import math

import numpy as np

from fairopt.kernels.compilation import compiled


@compiled()
def cell_entries(C, cell, weight):
    """Row, column and value of the entries of cell-structured rows that are not zero."""
    m, K = C.shape
    count = np.zeros(K, np.int64)
    for r in range(m):
        for k in range(K):
            count[k] += C[r, k] != 0
    total = 0
    for k in cell:
        total += count[k]
    row, column, value = np.empty(total, np.int64), np.empty(total, np.int64), np.empty(total)
    at = 0
    for i in range(len(cell)):
        for r in range(m if count[cell[i]] else 0):
            if C[r, cell[i]] != 0:
                row[at], column[at], value[at] = r, i, C[r, cell[i]] * weight[i]
                at += 1
    return row, column, value


@compiled()
def columns(row, column, value, root, q, l, u, lb, ub):
    """Rows of unit length, below them an entry 1 for each bounded variable, and all in its unit.

    Args:
        row, column, value: the entries of the m rows, column by column.
        root: the square root of the diagonal of P, ``(n,)``.
        q, l, u, lb, ub: of the problem.

    Returns:
        Of the matrix in compressed columns: the start of each column and the row of each entry,
        int32, and the values; then q, the sides of all rows, the length of each of the m, 1 where
        it is zero, and the unit.
    """
    m, n, entries = len(l), len(root), len(row)
    length = np.zeros(m)
    for e in range(entries):
        length[row[e]] += (value[e] / root[column[e]]) ** 2
    last = m
    unit = 0.0
    for r in range(m):
        length[r] = math.sqrt(length[r]) if length[r] > 0 else 1.0
        unit = max(unit, l[r] / length[r], -u[r] / length[r])
    for i in range(n):
        last += math.isfinite(lb[i]) or math.isfinite(ub[i])
        unit = max(unit, abs(q[i]) / root[i], lb[i] * root[i], -ub[i] * root[i])
    unit = unit if unit > 0 else 1.0

    size = entries + last - m
    start, rows, values = np.zeros(n + 1, np.int32), np.empty(size, np.int32), np.ones(size)
    linear, low, high = np.empty(n), np.empty(last), np.empty(last)
    for r in range(m):
        low[r], high[r] = l[r] / length[r] / unit, u[r] / length[r] / unit
    e = at = 0
    last = m
    for i in range(n):
        linear[i] = q[i] / root[i] / unit
        while e < entries and column[e] == i:
            rows[at], values[at] = row[e], value[e] / root[i] / length[row[e]]
            e += 1
            at += 1
        if math.isfinite(lb[i]) or math.isfinite(ub[i]):
            rows[at], low[last], high[last] = last, lb[i] * root[i] / unit, ub[i] * root[i] / unit
            last += 1
            at += 1
        start[i + 1] = at
    return start, rows, values, linear, low, high, length, unit


@compiled()
def priced(start, rows, values, q, l, u, price):
    """x and y where the rows have these multipliers, for P = 1: the best start from elsewhere.

    x_i = clip(-(q + A^T price)_i), and the multiplier of its bound is what was clipped.
    """
    m, n = len(price), len(q)
    x, y = np.empty(n), np.zeros(len(l))
    y[:m] = price
    for i in range(n):
        z, bound = -q[i], -1
        for e in range(start[i], start[i + 1]):
            if rows[e] < m:
                z -= values[e] * price[rows[e]]
            else:
                bound = rows[e]
        x[i] = z
        if bound >= 0:
            x[i] = min(max(z, l[bound]), u[bound])
            y[bound] = z - x[i]
    return x, y
