"""feedback="hard": no batch leaves the pooled rows outside their sides, where that can be had.

With S the sums so far and the batch's masses known, the pooled value of row r after the batch is
base_r + (A x)_r, and so the batch is a projection whose sides are shifted by what was served:

    minimise  1/2 sum_i w_i (x_i - s_i)^2   subject to  l - base <= A x <= u - base,  lo <= x <= hi
"""

from __future__ import annotations

import numpy as np

from fairopt import kernels
from fairopt.kernels.stream_records import (
    AWAY,
    MEMORY,
    MULTIPLIER,
    Arrays,
    Floats,
    Problem,
    Samples,
    Settings,
)
from fairopt.online import feedback
from fairopt.online.counting import Opened
from fairopt.online.feedback import pooled
from fairopt.online.state import State

# Each round of the method of multipliers divides the violation by about this.
GAIN = 1e4
ROUNDS = 30
ROUNDING = 4e-16


class Method(pooled.Method):
    """After ``warm_up`` samples that are served as by ``pooled``, batch by batch."""

    early = 0.0  # a warm-up has to end inside
    warms_up = True
    fast = False
    serve = feedback.Method.serve

    def batch(self, state: State, part: Samples, arrays: Arrays, settings: Settings) -> Floats:
        if state.served + len(part.scores) <= self.warm_up:
            return super().batch(state, part, arrays, settings)
        x, dual, left = hard_batch(state, part, arrays, (settings.low, settings.high))
        state.rows[:, MULTIPLIER], state.rows[:, MEMORY], state.rows[:, AWAY] = dual, 0.0, left
        kernels.stream.widen(state.extent, part.scores, 0, len(x))
        return x


def hard_batch(
    state: State, samples: Samples, arrays: Arrays, bounds: tuple[float, float]
) -> tuple[Floats, Floats, Floats]:
    """Predictions of a batch, and of all rows the multipliers and the violations that are left.

    By the method of multipliers: ``kernels.project`` with prices so high that each round leaves
    a ten-thousandth of the violation. Where rows and bounds cannot all hold, its rounds converge to
    the predictions of least violation (in the sum of squares of the priced rows), so that the
    others are not given up with the one that cannot hold.
    """
    opened = Opened(state, samples, arrays)
    n, m = len(samples.scores), len(opened.here)
    lo, hi = bounds
    x = np.clip(samples.scores, lo, hi)
    dual, left = np.zeros(m), np.zeros(m)
    reach = opened.A**2 @ opened.weight
    priced = opened.here & (reach > 0.0)
    left[opened.here] = violation(opened, x)[opened.here]
    if not left[priced].any():
        return x, dual, left
    price = np.where(priced, GAIN / np.where(priced, reach, 1.0), 0.0)
    y, columns = np.zeros(m), np.zeros(0, np.int64)
    compiled = kernels.stream
    work = compiled.workspace(m, n)
    for _ in range(ROUNDS):
        offset = np.where(priced, y / np.where(priced, price, 1.0), 0.0)
        problem = Problem(
            samples.scores, opened.weight, columns, opened.A, opened.base, opened.rows.lower,
            opened.rows.upper, price, offset, lo, hi,
        )  # fmt: skip
        compiled.project(problem, 0, n, n, x, y, work)
        before = left
        left = np.where(opened.here, violation(opened, x), 0.0)
        if left[priced].max() <= ROUNDING * np.abs(opened.base[priced]).max(initial=1.0) or (
            left[priced].max() > 0.5 * before[priced].max()
        ):
            break
    dual[opened.here] = (y * opened.rows.curvature)[opened.here]
    return x, dual, left


def violation(opened: Opened, x: Floats) -> Floats:
    """By how much each row is outside its sides."""
    value = (opened.A * opened.weight) @ x + opened.base
    low, high = opened.sides.T
    found: Floats = np.maximum(0.0, np.maximum(low - value, value - high))
    return found
