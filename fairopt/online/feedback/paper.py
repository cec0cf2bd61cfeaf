"""feedback="batch": the online primal-dual algorithm of Troxell, Montufar and Roemer (Algorithm 1).

One multiplier, lambda >= 0. Batch t, of b samples with scores s, is served

    x = argmin  sum_i w_i (x_i - s_i)^2 + lambda b gap(x)    over the bounds,
    lambda <- max(0, lambda + step_size / sqrt(t) * b * (gap(x) - tolerance)),

where gap is the largest violation within the batch alone, tolerance included again where several
rows have different ones: gap - tolerance = max_r max(value_r - upper_r, lower_r - value_r). A batch
that lacks a group has gap 0.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from fairopt import kernels
from fairopt.errors import ProblemError
from fairopt.kernels.stream_records import (
    BATCHES,
    GAPS,
    GAPS_LOW,
    HIGHEST_PRICE,
    PRICE,
    Arrays,
    Floats,
    Samples,
    Settings,
)
from fairopt.online import feedback
from fairopt.online.counting import Opened
from fairopt.online.layout import Programme
from fairopt.online.state import State

PROXIMAL_STEPS = 60


class Method(feedback.Method):
    """One multiplier, for the gaps within batches."""

    default_step = 0.01
    bounded = False  # its bound is of another quantity

    def check(self, made: Programme, expected: bool) -> None:
        if expected:
            raise ProblemError(
                f"targets: feedback='batch' with {', '.join(made.plan.targeted)} needs them with "
                "the scores, got none; pass them, or take feedback='pooled'"
            )
        if not bool(np.isfinite(made.arrays().sides).all()):
            raise ProblemError(
                "constraints: feedback='batch' bounds a gap, and needs rows with two finite sides "
                "as parity notions have; take feedback='pooled' for others"
            )

    def batch(self, state: State, part: Samples, arrays: Arrays, settings: Settings) -> Floats:
        multiplier = float(state.paper[PRICE])
        opened = Opened(State(state.programme), part, arrays)
        bounds = settings.low, settings.high
        x = np.clip(part.scores, *bounds)
        if opened.here.any() and multiplier > 0.0:
            x = penalised(opened, part.scores, bounds, multiplier * len(x))
        learn(state, opened, x, arrays, self.step_size)
        return x

    def answer(self, state: State, part: Samples, x: Floats, arrays: Arrays) -> None:
        opened = Opened(State(state.programme), part, arrays)
        learn(state, opened, x, arrays, self.step_size)

    def theorem(self, state: State, arrays: Arrays | None) -> tuple[float, float]:
        return theorem(state, self.step_size, arrays)


def learn(state: State, opened: Opened, x: Floats, arrays: Arrays, step: float) -> None:
    """Multiplier and the theorem's sums after a batch that was served x, by whomever."""
    multiplier, t, n = float(state.paper[PRICE]), int(state.totals[BATCHES]) + 1, len(x)
    here = opened.here
    if here.any():
        values = (opened.A[here] * opened.weight) @ x + opened.base[here]
        low, high = opened.sides[here].T
        excess = float(np.maximum(values - high, low - values).max())
        tolerance = float(((high - low) / 2).min())
    else:
        low, high = opened.sides.T if len(here) else (np.zeros(1), np.zeros(1))
        fixed = arrays.sides
        tolerance = float(((fixed[:, 1] - fixed[:, 0]) / 2).min()) if len(fixed) else 0.0
        excess = -tolerance
    gap = excess + tolerance
    state.paper[HIGHEST_PRICE] = max(state.paper[HIGHEST_PRICE], multiplier)
    state.paper[GAPS:] = kernels.stream.two_sum(state.paper[GAPS], state.paper[GAPS_LOW], n * gap)
    if math.isfinite(excess):
        state.paper[PRICE] = max(0.0, multiplier + step / math.sqrt(t) * n * excess)
    state.paper[HIGHEST_PRICE] = max(state.paper[HIGHEST_PRICE], state.paper[PRICE])


def penalised(opened: Opened, scores: Floats, bounds: tuple[float, float], price: float) -> Floats:
    """argmin sum_i w_i (x_i - s_i)^2 + price * max_r max(value_r - upper_r, lower_r - value_r).

    With one row, y = its multiplier in [-price, price] is the only unknown:
    x = clip(s - A^T y / 2), where the value falls in y, and y is an end unless the value is in the
    middle between the sides. With several, the largest violation h becomes a variable,

        minimise  sum_i w_i (x_i - s_i)^2 + price * h   subject to  l - h <= value <= u + h,

    made strictly convex by proximal steps on h, which converge because the optimum is a polyhedral
    piece away, and end when a step no longer moves anything.
    """
    here = opened.here
    A, base = np.ascontiguousarray(opened.A[here]), opened.base[here]
    sides = opened.sides[here]
    lo, hi = bounds
    if len(A) == 1 and bool(np.isfinite(sides).all()):
        middle = float(sides.mean())
        return one_row(A[0], float(base[0]) - middle, opened.weight, scores, lo, hi, price)
    return several_rows(A * opened.weight, base, sides, opened.weight, scores, lo, hi, price)


def one_row(
    a: Floats, base: float, weight: Floats, scores: Floats, lo: float, hi: float, price: float
) -> Floats:
    """The same for |base + sum w a x|: a root of a falling, piecewise linear function of y."""

    def at(y: float) -> tuple[Floats, float]:
        x = np.clip(scores - 0.5 * y * np.where(weight > 0, a, 0.0), lo, hi)
        return x, base + float((weight * a * x).sum())

    for y, sign in ((price, 1.0), (-price, -1.0)):
        x, value = at(y)
        if sign * value >= 0.0:
            return x
    # The value changes its sign between: sorted by where samples meet their bounds, it is linear
    # between neighbours.
    with np.errstate(divide="ignore", invalid="ignore"):
        knots = np.concatenate([2.0 * (scores - lo) / a, 2.0 * (scores - hi) / a])
    knots = np.unique(knots[np.isfinite(knots) & (np.abs(knots) < price)])
    knots = np.concatenate([[-price], knots, [price]])
    first, last = 0, len(knots) - 1
    while last - first > 1:
        middle = (first + last) // 2
        if at(float(knots[middle]))[1] >= 0.0:
            first = middle
        else:
            last = middle
    left, right = float(knots[first]), float(knots[last])
    up, down = at(left)[1], at(right)[1]
    return at(left + (right - left) * (up / (up - down) if up > down else 0.0))[0]


def several_rows(
    A: Floats, base: Floats, sides: Floats, weight: Floats, scores: Floats, lo: float, hi: float,
    price: float,
) -> Floats:  # fmt: skip
    """The same for several rows, by the QP with the largest violation as a variable."""
    from fairopt.programs.problem import QP  # and backends: one row needs neither
    from fairopt.solving.autograd import solve

    n = len(scores)
    uppers, lowers = np.isfinite(sides[:, 1]), np.isfinite(sides[:, 0])
    rows = np.concatenate([A[uppers], -A[lowers]])
    rows = np.concatenate([rows, -np.ones((len(rows), 1))], 1)
    u = np.concatenate([(sides[:, 1] - base)[uppers], (base - sides[:, 0])[lowers]])
    P = 2.0 * np.append(np.where(weight > 0, weight, 1.0), 0.0)
    q = np.append(-P[:n] * scores, price)
    proximal = 1e-2 * float(weight.sum())
    P[n] = proximal
    h = 0.0
    x = np.clip(scores, lo, hi)
    for _ in range(PROXIMAL_STEPS):
        cost = q.copy()
        cost[n] -= proximal * h
        solution = solve(
            QP(
                P=torch.from_numpy(P),
                q=torch.from_numpy(cost),
                rows=torch.from_numpy(rows),
                l=torch.full((len(u),), -math.inf, dtype=torch.float64),
                u=torch.from_numpy(u),
                lb=torch.from_numpy(np.append(np.full(n, lo), -math.inf)),
                ub=torch.from_numpy(np.append(np.full(n, hi), math.inf)),
            ),
            backend="numba",
        )
        found = solution.x[0].detach().numpy()
        x, moved = found[:n].copy(), abs(float(found[n]) - h)
        h = float(found[n])
        if moved <= 1e-14 * max(1.0, abs(h)):
            break
    return x


def theorem(state: State, step: float, arrays: Arrays | None) -> tuple[float, float]:
    """The mean gap of batches, weighted by size, and its bound.

    tolerance + largest multiplier / (step / sqrt(T) * N), for T batches of N samples together:
    summing the updates, sum_t b_t (gap_t - tolerance) <= sum_t (lambda_{t+1} - lambda_t) / eta_t,
    which telescopes, by parts, to at most lambda_max / eta_T, because eta_t falls.
    """
    samples, batches = state.served, int(state.totals[BATCHES])
    if not samples or arrays is None or not len(arrays.sides):
        return math.nan, math.nan
    tolerance = float(((arrays.sides[:, 1] - arrays.sides[:, 0]) / 2).min())
    mean = float(state.paper[GAPS] + state.paper[GAPS_LOW]) / samples
    return mean, tolerance + float(state.paper[HIGHEST_PRICE]) * math.sqrt(batches) / (
        step * samples
    )
