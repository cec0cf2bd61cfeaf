"""The algorithm of the closed-form projection: a globalised Newton method on the row multipliers.

The problem, for one element of the batch, with samples i, cells k and rows r::

    minimise  sum_i  P_i x_i^2 / 2 + q_i x_i
    subject to  l <= C s <= u,   s_k = sum_{i in cell k} w_i x_i,   lb_i <= x_i <= ub_i

(w_i is the weight with which sample i enters its cell; dense rows are the case of one sample per
cell, w = 1.) With row multipliers y and dual shifts t = C^T y the primal is explicit, x(t), and all
that the method asks about the samples is, for given shifts, per cell the sum s_k(t), the curvature
h_k(t) = -ds_k/dt_k and the magnitude sum |w_i x_i|, to which every rounding-aware test below is
relative. Whoever answers is the *cell-sum oracle*: ``fairopt.kernels.passes``, compiled together
with it by ``fairopt.kernels.projection``, or anything else through ``fairopt.kernels.oracle``.

The dual  minimise  Phi(y) = -min_x L(x, y) + u.y^+ - l.y^-  is convex and piecewise quadratic.
``advance`` is a proximal Newton method on it. Its model of the cell sums is linear,
s_k(t + dt) = s_k - D_k dt_k with D_k = max(h_k, mu H_k), where H_k is the curvature of the
whole cell when nothing is clipped and mu a Levenberg-Marquardt factor that keeps the model strictly
convex where a cell is wholly clipped. The model problem is a least-distance problem in as many
unknowns as there are cells (``fairopt.kernels.active_set``). Steps are globalised by a line search
on the slope of Phi, not on its value: differences of values cancel near the solution, slopes do
not.

C is an array (m, K). What is asked of it stands in ``measure``, ``combine``, ``pulls`` and
``newton_step``, which have a second form for rows over partitions (``fairopt.kernels.partitions``).
``cells``, ``rows`` and ``numbers`` are those of ``fairopt.kernels.state``. Everything runs without
the GIL and touches no global state.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from fairopt.kernels.active_set import BLIND, EPS, MODEL_SOLVED, solve_model
from fairopt.kernels.compilation import compiled
from fairopt.kernels.state import (
    ALPHA, ARRIVED, BEST, CELL_MASS, CHANGE, COMBINED, CONTINUE, CONVERGED, DUAL, EVALUATIONS,
    FLOOR, FREE, GREATEST_SUM, INFEASIBLE, ITERATION, LEAST_SUM, LENGTH, LONG, LONG_SLOPE,
    MAGNITUDE, MODEL, MU, NOT_FINITE, PULL, RAY, REGULAR, ROW_SCALE, ROW_VALUE, SHIFT, SHIFT_REST,
    SHORT, SHORT_SLOPE, STALLED, STALLS, START_SLOPE, SUM, TARGET_DUAL, TERMS, TRIAL_DUAL,
    TRIAL_SHIFT, TRIAL_SHIFT_REST, TRIES, UNCLIPPED, UNDER_WAY,
)  # fmt: skip
from fairopt.tolerances import PROOF, PROOF_COEFFICIENT, PROOF_SUPPORT, TINY, WEAK

MAX_ITERATIONS = 2000
MAX_TRIES = 60


# ---------------------------------------------------------------------------------------------
# What is asked of the rows
# ---------------------------------------------------------------------------------------------


def measure(C, cells, rows):
    """Set the value and the scale of each row at the sums of the last pass."""
    raise NotImplementedError


def combine(C, y, cells):
    """Set cells[COMBINED] = C^T y, and cells[TERMS] = |C|^T |y|."""
    raise NotImplementedError


def pulls(C, cells, rows):
    """Set rows[PULL]: by how much a multiplier of 1 would move its row, were nothing clipped."""
    raise NotImplementedError


def newton_step(C, l, u, cells, rows):
    """Solve the model problem: rows[TARGET_DUAL] and cells[CHANGE]; see ``solve_model``."""
    raise NotImplementedError


def policy(C):
    """So many iterations, the first in which the multipliers are tried as a proof, and whether the
    method ends where the model is blind.
    """
    raise NotImplementedError


@overload(measure)
def measure_dense(C, cells, rows):
    if not isinstance(C, types.Array):
        return None

    def dense(C, cells, rows):
        largest = largest_mean(cells)
        for r in range(C.shape[0]):
            value = scale = 0.0
            for k in range(C.shape[1]):
                value += C[r, k] * cells[SUM, k]
                scale += abs(C[r, k]) * cells[CELL_MASS, k] * largest
            rows[ROW_VALUE, r], rows[ROW_SCALE, r] = value, scale

    return dense


@overload(combine)
def combine_dense(C, y, cells):
    if not isinstance(C, types.Array):
        return None

    def dense(C, y, cells):
        for k in range(C.shape[1]):
            total = terms = 0.0
            for r in range(C.shape[0]):
                total += C[r, k] * y[r]
                terms += abs(C[r, k] * y[r])
            cells[COMBINED, k], cells[TERMS, k] = total, terms

    return dense


@overload(pulls)
def pulls_dense(C, cells, rows):
    if not isinstance(C, types.Array):
        return None

    def dense(C, cells, rows):
        for r in range(C.shape[0]):
            rows[PULL, r] = 0.0
            for k in range(C.shape[1]):
                rows[PULL, r] += C[r, k] * C[r, k] * cells[UNCLIPPED, k]

    return dense


@overload(newton_step)
def newton_step_dense(C, l, u, cells, rows):
    if not isinstance(C, types.Array):
        return None

    def dense(C, l, u, cells, rows):
        # z = (s_new - s) / sqrt(D) and N_r = C_r sqrt(D) / |C_r sqrt(D)|.
        m, K = C.shape
        space = np.empty((m + 2, K))
        N, root, z = space[:m], space[m], space[m + 1]
        for k in range(K):
            root[k] = math.sqrt(cells[MODEL, k])
        for r in range(m):
            for k in range(K):
                N[r, k] = C[r, k] * root[k]
        normalise(N, rows)
        found = solve_model(N, l, u, rows, z, None)
        if found == BLIND:
            return found
        for k in range(K):
            cells[CHANGE, k] = 0.0
            if root[k] > 0.0:
                cells[CHANGE, k] = -z[k] / root[k]
            else:  # nothing in this cell can move: its shift only follows the multipliers
                for r in range(m):
                    cells[CHANGE, k] += C[r, k] * (rows[TARGET_DUAL, r] - rows[DUAL, r])
        return found

    return dense


@overload(policy)
def policy_dense(C):
    if isinstance(C, types.Array):
        return lambda C: (MAX_ITERATIONS, 0, False)
    return None


@compiled()
def normalise(N, rows):
    """Scale normals to unit length, and set rows[LENGTH] to what they had."""
    for r in range(N.shape[0]):
        total = 0.0
        for k in range(N.shape[1]):
            total += N[r, k] * N[r, k]
        length = rows[LENGTH, r] = math.sqrt(total)
        if length > 0.0:
            for k in range(N.shape[1]):
                N[r, k] /= length


# ---------------------------------------------------------------------------------------------
# Proof that there is no solution
# ---------------------------------------------------------------------------------------------


@compiled()
def against_sides(l, u, ray):
    """-(the most of ray.v over l <= v <= u), and the sum of the terms' magnitudes."""
    least = size = 0.0
    for r in range(l.shape[0]):
        if ray[r] != 0.0:
            side = (u[r] if ray[r] > 0.0 else l[r]) * ray[r]
            least -= side
            size += abs(side)
    return least, size


@compiled()
def proves_infeasible(C, l, u, ray, cells):
    """Farkas: the least value of ray.C s over all reachable s exceeds what the rows allow."""
    least, size = against_sides(l, u, ray)
    if not least > -np.inf:
        return False
    combine(C, ray, cells)
    for k in range(cells.shape[1]):
        c, low, high = cells[COMBINED, k], cells[LEAST_SUM, k], cells[GREATEST_SUM, k]
        end = low if c > 0.0 else high
        if not math.isinf(end):
            least += c * end
            size += cells[TERMS, k] * max(abs(low) if low > -np.inf else 0.0, abs(end))
        elif abs(c) > PROOF_COEFFICIENT * cells[TERMS, k]:
            return False  # this cell alone can make up for anything
    return least > PROOF * size


# ---------------------------------------------------------------------------------------------
# The line search
# ---------------------------------------------------------------------------------------------


@compiled(fastmath=False)
def two_sum_into(hi, lo, change):
    """(hi + lo) + change as an unevaluated sum (Knuth)."""
    a = lo + change
    total = hi + a
    b = total - hi
    return total, (hi - (total - b)) + (a - b)


@compiled()
def another_length(numbers):
    """The next length of step to try, between the longest too short and the shortest too long."""
    numbers[TRIES] += 1
    low, high = numbers[SHORT], numbers[LONG]
    share = numbers[SHORT_SLOPE] / (numbers[SHORT_SLOPE] - numbers[LONG_SLOPE])
    share = min(max(share, 0.01), 0.9)
    if numbers[TRIES] % 3 == 0:
        # A step may be ten orders too long: bisect the exponent now and then.
        alpha = math.sqrt(max(low, 1e-18) * high)
        if not low < alpha < high:
            alpha = 0.5 * (low + high)
    else:
        alpha = low + share * (high - low)
    numbers[ALPHA] = alpha
    return alpha


@compiled()
def slope_at(l, u, cells, rows, numbers):
    """The slope of Phi along the step, approached from the left, and how large it may be."""
    slope = noise = 0.0
    for k in range(cells.shape[1]):
        slope -= cells[SUM, k] * cells[CHANGE, k]
        noise += cells[MAGNITUDE, k] * abs(cells[CHANGE, k])
    for r in range(l.shape[0]):
        d = rows[TARGET_DUAL, r] - rows[DUAL, r]
        if d != 0.0:
            sign = rows[TRIAL_DUAL, r] if rows[TRIAL_DUAL, r] != 0.0 else -d
            term = (u[r] if sign > 0.0 else l[r]) * d
            slope += term
            noise += abs(term)
    limit = 8.0 * EPS * noise
    if numbers[REGULAR] != 0.0 and numbers[ITERATION] <= 25:
        limit = max(limit, 0.3 * abs(numbers[START_SLOPE]))
    if numbers[START_SLOPE] >= -limit:
        limit = np.inf  # no descent above rounding is left: the step is a correction, take it
    return slope, limit


@compiled()
def search(l, u, cells, rows, numbers):
    """Take the trial, and return False; or set another on the same ray, and return True."""
    alpha = numbers[ALPHA]
    slope, limit = slope_at(l, u, cells, rows, numbers)
    again = True
    if slope > limit and numbers[TRIES] < MAX_TRIES:
        # Too far: the minimum of Phi on this ray lies before alpha.
        numbers[LONG], numbers[LONG_SLOPE] = alpha, slope
    elif (
        slope < -0.7 * abs(numbers[START_SLOPE])
        and numbers[TRIES] < MAX_TRIES // 2
        and numbers[LONG] - alpha > 1e-3 * numbers[LONG]
    ):
        # Far too short: Phi falls on as steeply as at the start.
        numbers[SHORT], numbers[SHORT_SLOPE] = alpha, slope
    else:
        again = False
    if again:
        alpha = another_length(numbers)
        for r in range(l.shape[0]):
            y = rows[DUAL, r]
            rows[TRIAL_DUAL, r] = y + alpha * (rows[TARGET_DUAL, r] - y)
        set_shifts(alpha, cells)
        return True
    for r in range(l.shape[0]):
        rows[DUAL, r] = rows[TRIAL_DUAL, r]
    for k in range(cells.shape[1]):
        cells[SHIFT, k] = cells[TRIAL_SHIFT, k]
        cells[SHIFT_REST, k] = cells[TRIAL_SHIFT_REST, k]
    return False


@compiled()
def set_shifts(alpha, cells):
    """The trial's dual shifts, a share alpha along the step."""
    for k in range(cells.shape[1]):
        cells[TRIAL_SHIFT, k], cells[TRIAL_SHIFT_REST, k] = two_sum_into(
            cells[SHIFT, k], cells[SHIFT_REST, k], alpha * cells[CHANGE, k]
        )


@compiled()
def arrive(l, u, cells, rows, numbers):
    """Look at a pass: ARRIVED if its point is taken, else NOT_FINITE, or CONTINUE at another."""
    numbers[EVALUATIONS] += 1
    for k in range(cells.shape[1]):
        if not math.isfinite(cells[SUM, k]):
            return NOT_FINITE
    if numbers[UNDER_WAY] != 0.0 and search(l, u, cells, rows, numbers):
        return CONTINUE
    return ARRIVED


@compiled()
def drifted(C, cells, rows, numbers):
    """Whether dual shifts grew large, came back and lost digits; they are taken from y afresh."""
    found = False
    combine(C, rows[DUAL], cells)
    for k in range(cells.shape[1]):
        exact = cells[COMBINED, k]
        if abs(cells[SHIFT, k] + cells[SHIFT_REST, k] - exact) > 32.0 * EPS * cells[TERMS, k]:
            found = True
            cells[SHIFT, k], cells[SHIFT_REST, k] = exact, 0.0
    if found:
        numbers[UNDER_WAY] = 0
        for k in range(cells.shape[1]):
            cells[TRIAL_SHIFT, k] = cells[SHIFT, k]
            cells[TRIAL_SHIFT_REST, k] = cells[SHIFT_REST, k]
    return found


@compiled()
def aim(l, u, cells, rows, numbers):
    """Set the first trial of a new step, whose target is rows[TARGET_DUAL]."""
    slope = 0.0
    for k in range(cells.shape[1]):
        slope -= cells[SUM, k] * cells[CHANGE, k]
    for r in range(l.shape[0]):
        d = rows[TARGET_DUAL, r] - rows[DUAL, r]
        if d != 0.0:
            sign = rows[DUAL, r] if rows[DUAL, r] != 0.0 else d
            slope += (u[r] if sign > 0.0 else l[r]) * d
        rows[TRIAL_DUAL, r] = rows[TARGET_DUAL, r]
    numbers[START_SLOPE] = numbers[SHORT_SLOPE] = slope
    numbers[SHORT], numbers[LONG], numbers[LONG_SLOPE], numbers[ALPHA] = 0.0, np.inf, 0.0, 1.0
    numbers[TRIES], numbers[UNDER_WAY] = 0, 1
    set_shifts(1.0, cells)


# ---------------------------------------------------------------------------------------------
# How far from optimal
# ---------------------------------------------------------------------------------------------


@compiled()
def sum_rounding(n):
    """Relative error to expect of a sum of n terms in a few interleaved chains (a random walk)."""
    return EPS * (4.0 + 0.5 * math.sqrt(n))


@compiled()
def largest_mean(cells):
    """Largest mean |x| of a cell: never more than the largest |x|."""
    largest = 0.0
    for k in range(cells.shape[1]):
        if cells[CELL_MASS, k] > 0.0:
            largest = max(largest, cells[MAGNITUDE, k] / cells[CELL_MASS, k])
    return largest


@compiled()
def residual(l, u, rows, rounding):
    """The worst miss of a row from where its multiplier says it is, in units of what rounding
    allows, rows[FLOOR]; 0 if all are within.
    """
    worst = 0.0
    for r in range(l.shape[0]):
        value, y, scale = rows[ROW_VALUE, r], rows[DUAL, r], rows[ROW_SCALE, r]
        if y > 0.0:
            off = abs(value - u[r])
        elif y < 0.0:
            off = abs(value - l[r])
        else:
            off = max(value - u[r], l[r] - value, 0.0)
        if math.isfinite(u[r]):
            scale = max(scale, abs(u[r]))
        if math.isfinite(l[r]):
            scale = max(scale, abs(l[r]))
        rows[FLOOR, r] = rounding * (scale + TINY)
        if off > rows[FLOOR, r]:
            worst = max(worst, off / rows[FLOOR, r])
    return worst


@compiled()
def verdict(worst, numbers):
    """Whether to stop, given the residual."""
    if worst == 0.0:
        return CONVERGED
    if worst <= 1000.0:  # a few hundred roundings: better only if it comes at once
        numbers[STALLS] += 1
        if numbers[STALLS] > 2 and worst >= 0.5 * numbers[BEST]:
            return CONVERGED
    numbers[BEST] = min(numbers[BEST], worst)
    return STALLED if numbers[ITERATION] >= MAX_ITERATIONS else CONTINUE


@compiled()
def excess(l, u, rows):
    """Worst violation of a row over its scale: at least what programs.solution.row_excess finds."""
    worst = 0.0
    for r in range(l.shape[0]):
        value, scale = rows[ROW_VALUE, r], rows[ROW_SCALE, r]
        if value > u[r]:
            worst = max(worst, (value - u[r]) / (scale + abs(u[r]) + TINY))
        elif value < l[r]:
            worst = max(worst, (l[r] - value) / (scale + abs(l[r]) + TINY))
    return worst


@compiled()
def tight_sides(l, u, rows, precision, tight):
    """For each row 1 if its upper side is met to the promised precision, plus 2 if its lower is."""
    for r in range(l.shape[0]):
        value, scale = rows[ROW_VALUE, r], rows[ROW_SCALE, r]
        tight[r] = 0
        if u[r] < np.inf and u[r] - value <= precision * (scale + abs(u[r])):
            tight[r] = 1
        if l[r] > -np.inf and value - l[r] <= precision * (scale + abs(l[r])):
            tight[r] += 2


# ---------------------------------------------------------------------------------------------
# The outer iteration
# ---------------------------------------------------------------------------------------------


@compiled()
def advance(C, l, u, cells, rows, numbers, rounding):
    """Given the pass at the trial shifts, take it or shorten the step; then set the next trial.

    ``rounding`` is the relative error to expect of a sum over the samples.

    Returns CONTINUE when another pass is wanted, at cells[TRIAL_SHIFT] + cells[TRIAL_SHIFT_REST];
    otherwise the solution is rows[DUAL] with the shifts cells[SHIFT] + cells[SHIFT_REST], or, if
    INFEASIBLE, the proof is rows[TARGET_DUAL].
    """
    status = arrive(l, u, cells, rows, numbers)
    if status != ARRIVED:
        return status
    if numbers[UNDER_WAY] != 0.0:
        if numbers[ALPHA] >= 1.0:
            numbers[MU] = max(numbers[MU] * 1e-2, 1e-16)
        elif numbers[ALPHA] < 0.3:
            numbers[MU] = min(numbers[MU] * 1e2, 1.0)
        if drifted(C, cells, rows, numbers):
            return CONTINUE

    measure(C, cells, rows)
    status = verdict(residual(l, u, rows, rounding), numbers)
    if status != CONTINUE:
        return status
    most, first_proof, ends_blind = policy(C)
    if numbers[ITERATION] >= most:
        return STALLED
    if numbers[ITERATION] >= first_proof and dual_proves(C, l, u, cells, rows):
        return INFEASIBLE

    # The model's curvatures, D = max(h, mu H).
    numbers[REGULAR] = 1
    for k in range(cells.shape[1]):
        cells[MODEL, k] = cells[FREE, k]
        if cells[FREE, k] < numbers[MU] * cells[UNCLIPPED, k]:
            cells[MODEL, k] = numbers[MU] * cells[UNCLIPPED, k]
            numbers[REGULAR] = 0  # the model guesses: overshoot is not to be trusted
    numbers[ITERATION] += 1
    rows[RAY] = 0.0
    found = newton_step(C, l, u, cells, rows)
    if found != MODEL_SOLVED and proves_infeasible(C, l, u, rows[RAY], cells):
        rows[TARGET_DUAL] = rows[RAY]
        return INFEASIBLE
    if found == BLIND and ends_blind:
        return STALLED
    # Contradictory only to rounding: the step towards the other rows is still good.
    aim(l, u, cells, rows, numbers)
    return CONTINUE


@compiled()
def dual_proves(C, l, u, cells, rows):
    """Whether the multipliers prove that there is no solution; then they are rows[TARGET_DUAL]."""
    if proves_infeasible(C, l, u, rows[DUAL], cells):
        rows[TARGET_DUAL] = rows[DUAL]
        return True
    # Beside a multiplier that grows without end, those of rows that do hold are rounding; with them
    # it would prove nothing where bounds are infinite.
    largest = 0.0
    for r in range(l.shape[0]):
        largest = max(largest, abs(rows[DUAL, r]))
    stripped = False
    for r in range(l.shape[0]):
        y = rows[DUAL, r]
        small = abs(y) <= PROOF_SUPPORT * largest
        rows[RAY, r] = 0.0 if small else y
        stripped = stripped or (small and y != 0.0)
    if stripped and proves_infeasible(C, l, u, rows[RAY], cells):
        rows[TARGET_DUAL] = rows[RAY]
        return True
    return False


@compiled()
def conclude(C, l, u, cells, rows, status, precision, tight):
    """What a solve ends with: tight sides, and its status, STALLED if a row is off by too much.

    The sums are those of what was written. Multipliers that move their row by no more than rounding
    become zero, because such rows are weakly active: see ``fairopt.optimality.finishing``.
    """
    measure(C, cells, rows)
    if status == INFEASIBLE:
        rows[DUAL] = rows[TARGET_DUAL]
    if status == CONVERGED:
        pulls(C, cells, rows)
        for r in range(l.shape[0]):
            y = rows[DUAL, r]
            if y == 0.0 or l[r] == u[r]:
                continue
            scale = rows[ROW_SCALE, r] + abs(u[r] if y > 0.0 else l[r])
            if abs(y) * rows[PULL, r] <= WEAK * scale:
                rows[DUAL, r] = 0.0
        if not excess(l, u, rows) <= precision:
            status = STALLED
    tight_sides(l, u, rows, precision, tight)
    return status
