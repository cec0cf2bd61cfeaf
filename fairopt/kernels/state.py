"""What a solve of the projection keeps between passes: rows of arrays, and their names.

Letters as in ``fairopt.kernels.newton``: cells k, rows r of the problem.
"""

from __future__ import annotations

import numpy as np

from fairopt.kernels.compilation import compiled

# How a solve stands. ARRIVED: the pass was at a point that the line search takes.
CONTINUE, CONVERGED, STALLED, INFEASIBLE, NOT_FINITE, ARRIVED = range(6)

# ``cells``, one column for each cell. Its limits: curvature h_k with nothing clipped, the least and
# the greatest sum s_k that the bounds allow, and the sum of |w|.
UNCLIPPED, LEAST_SUM, GREATEST_SUM, CELL_MASS = range(4)
# What a pass finds: s_k, the curvature h_k of the unclipped, and the sum of |w x|.
SUM, FREE, MAGNITUDE = range(4, 7)
# Dual shift of the current and of the trial point, each in two parts; what the whole step adds.
SHIFT, SHIFT_REST, TRIAL_SHIFT, TRIAL_SHIFT_REST, CHANGE = range(7, 12)
# The model's curvature; sum_r C_rk y_r for some y, and the sum of the terms' magnitudes.
MODEL, COMBINED, TERMS, OF_CELL = range(12, 16)

# ``rows``, one column for each row. Multipliers: current, trial, and those the step aims at, or the
# proof that there is no solution.
DUAL, TRIAL_DUAL, TARGET_DUAL = range(3)
# A combination that may prove it; value and scale of the row, and what rounding allows it to miss.
RAY, ROW_VALUE, ROW_SCALE, FLOOR = range(3, 7)
# The length of the row in the model's metric, and multipliers of rows left out of its active set;
# sum_k |C_rk| mass_k where it is not computed anew, and sum_k C_rk^2 h_k.
LENGTH, ASIDE, ROW_MASS, PULL, OF_ROW = range(7, 12)

# ``numbers``: of the model and the line search, and counts.
MU, ALPHA, SHORT, SHORT_SLOPE, LONG, LONG_SLOPE, START_SLOPE, BEST = range(8)
ITERATION, TRIES, STALLS, UNDER_WAY, EVALUATIONS, REGULAR, OF_SOLVE = range(8, 15)


@compiled()
def new_state(m, K):
    """``cells``, ``rows`` and ``numbers`` of a solve that has not begun."""
    cells, rows, numbers = np.empty((OF_CELL, K)), np.empty((OF_ROW, m)), np.empty(OF_SOLVE)
    begin(cells, rows, numbers)
    return cells, rows, numbers


@compiled()
def begin(cells, rows, numbers):
    """Forget the solve before."""
    cells[:] = 0.0
    rows[:] = 0.0
    numbers[:] = 0.0
    numbers[MU], numbers[BEST] = 1e-2, np.inf
