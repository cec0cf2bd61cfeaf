"""The closed-form projection of a batch: the algorithm of ``fairopt.kernels.newton`` compiled
together with the passes over the samples as its oracle.
"""

from __future__ import annotations

import numpy as np

from fairopt.kernels.compilation import compiled
from fairopt.kernels.newton import advance, conclude, sum_rounding
from fairopt.kernels.passes import (
    at, cell_limits, count, evaluate, in_order, pair_evaluate, pair_limits, pair_write, write,
)  # fmt: skip
from fairopt.kernels.state import (
    CONTINUE, CONVERGED, DUAL, EVALUATIONS, SHIFT, SHIFT_REST, TRIAL_SHIFT, TRIAL_SHIFT_REST,
    begin, new_state,
)  # fmt: skip

STATUS, PASSES = range(2)  # columns of ``outcome``


@compiled()
def solve(C, l, u, q, metric, cell, options, x, y, T, tight, outcome):
    """Solve the problems of a batch, one after the other, in one thread.

    Args:
        C, l, u: ``(B, m, K)`` and ``(B, m)``.
        q, cell: ``(B, n)``.
        metric: 1/P, w, lb and ub: four numbers or four arrays ``(B, n)``.
        options: whether the samples are in cell order already, one per cell (dense rows); whether x
            is rounded to float32; and the largest excess of a row, relative to its scale.
        x, y, T, tight, outcome: written: the solutions, the multipliers (or those of the proof that
            there is none), both parts of the dual shifts ``(B, 2, K)``, ``tight_sides``, and STATUS
            and PASSES, ``(B, 2)``.

    Returns how many have no solution to the precision asked for.
    """
    batch, m, K = C.shape
    n = q.shape[1]
    grouped, single, precision = options
    pair = K <= 2 and not grouped
    cells, rows, numbers = new_state(m, K)
    start = np.arange(K + 1)
    rounding = sum_rounding(n)
    failures = 0
    for b in range(batch):
        begin(cells, rows, numbers)
        Cb, lower, upper, qb, cb = C[b], l[b], u[b], q[b], cell[b]
        ib, wb, lo, up = at(metric[0], b), at(metric[1], b), at(metric[2], b), at(metric[3], b)
        qs, ps, ws, los, ups = qb, ib, wb, lo, up
        if pair:
            pair_limits(ps, ws, los, ups, cb, cells)
        else:
            if not grouped:
                count(cb, start[1:])
                for k in range(K):
                    start[k + 1] += start[k]
                qs = in_order(qb, cb, start)
                ps, ws = in_order(ib, cb, start), in_order(wb, cb, start)
                los, ups = in_order(lo, cb, start), in_order(up, cb, start)
            cell_limits(ps, ws, los, ups, start, cells)
        hi, low = cells[TRIAL_SHIFT], cells[TRIAL_SHIFT_REST]
        status = CONTINUE
        while status == CONTINUE:
            if pair:
                pair_evaluate(qs, ps, ws, los, ups, cb, hi, low, cells)
            else:
                evaluate(qs, ps, ws, los, ups, start, hi, low, False, cells)
            status = advance(Cb, lower, upper, cells, rows, numbers, rounding)
        hi, low = cells[SHIFT], cells[SHIFT_REST]
        if single and pair:
            pair_write(qb, ib, wb, lo, up, cb, hi, low, x[b], cells)
        else:
            write(qb, ib, wb, lo, up, cb, hi, low, x[b])
            if single:
                evaluate(qs, ps, ws, los, ups, start, hi, low, True, cells)
        status = conclude(Cb, lower, upper, cells, rows, status, precision, tight[b])
        failures += status != CONVERGED
        outcome[b, STATUS], outcome[b, PASSES] = status, numbers[EVALUATIONS]
        y[b], T[b, 0], T[b, 1] = rows[DUAL], hi, low
    return failures
