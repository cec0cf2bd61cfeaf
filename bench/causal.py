"""The least change of rules that know every distribution, but not which samples will come.

Several groups are each to be held at a level, in a window of some width above it. Let D_g be the
sum of what the samples of group g, as served, are above its level. Its next sample adds d, drawn
from a distribution that the rule knows, and u more if it is moved by u, which costs u^2; the rule
sees a sample before it moves it. At each moment t at which the stream may end, taken by itself, all
groups must be in their windows with probability 1 - alpha, and within some slack of them with
another; each is a limit k.

If each group is held by its own samples alone, the chances P_gkt of being outside are independent,
and sum_g P_gkt <= beta_k = -log(1 - alpha_k) must hold. For all mu_kt >= 0, by weak duality,

    cost  >=  sum_g V_g0(0) - sum_k beta_k sum_t mu_kt,
    V_gn(D) = E[ min_u u^2 + (V_g,n+1 + sum_k mu_k [. outside k]) (D + d + u) ],

where mu_k is that of the moments at which group g has n + 1 samples, and V is 0 behind the last
one. The dynamic programme gives the bound, and sum_g P_gkt - beta_k under its policy is its
gradient, by which the multipliers are improved. For one group alone (beta > alpha) it is a bound on
any rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import ndtr

__all__ = ["Group", "Limit", "envelope", "least_change_causal", "least_change_known", "value"]

Floats = NDArray[np.float64]
KNOTS = 6


@dataclass(frozen=True)
class Group:
    """What the samples of a group add to D, with equal chances, and how many there are.

    Args:
        steps: what a sample adds unmoved.
        samples: how many come.
        width: D must be within [0, width n] when n samples have come.
    """

    steps: Floats
    samples: int
    width: float = math.inf


@dataclass(frozen=True)
class Limit:
    """D may leave [-slack n, (width + slack) n] with probability alpha, at each moment by itself.

    Where there are several sums D, ``slack`` is that of the first, and that of the others in turn.
    """

    alpha: float
    slack: tuple[float, ...] = (0.0,)


def least_change_known(group: Group) -> float:
    """The mean cost of one who knows all samples: E[max(0, -D)^2] / N, D nearly normal."""
    mean = group.samples * float(group.steps.mean())
    deviation = math.sqrt(group.samples) * float(group.steps.std())
    z = mean / deviation
    density = math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    square = (mean**2 + deviation**2) * float(ndtr(-z)) - mean * deviation * density
    return square / group.samples


def least_change_causal(
    groups: Sequence[Group],
    samples: int,
    first: int,
    limits: Sequence[Limit],
    *,
    iterations: int = 25,
) -> float:
    """The lower bound, with the best multipliers that are found.

    They are exp of something linear in log t between a few knots, and one more for the last moment.
    They are searched for on a grid, and the bound is that of a grid twice as fine.

    Args:
        groups: their samples come evenly over the stream.
        samples: how many there are in all, also of other groups.
        first: after which of them the stream may end.
        limits: what all groups must hold at once.
    """
    beta = np.array([-math.log1p(-limit.alpha) for limit in limits])
    slack = np.array([limit.slack[0] for limit in limits])
    unit = sum(map(least_change_known, groups))
    t = np.arange(first, samples + 1)
    places = [np.maximum(1, np.round(t * (g.samples / samples)).astype(np.int64)) for g in groups]
    knots = np.linspace(0.0, math.log(samples / first), KNOTS)
    basis = np.stack([np.interp(np.log(t / first), knots, row) for row in np.eye(KNOTS)], 1)
    grids = [float(g.steps.std()) * (g.samples / 150) ** 0.25 / 10 for g in groups]

    def multipliers(x: Floats) -> tuple[Floats, Floats]:
        x = x.reshape(len(limits), KNOTS + 1)
        return unit / t * np.exp(x[:, :-1] @ basis.T), unit * np.exp(x[:, -1])

    def prices(along: Floats, last: Floats, group: Group, place: NDArray[np.int64]) -> Floats:
        out = np.zeros((len(limits), group.samples + 1))
        for row, mu in zip(out, along, strict=True):
            np.add.at(row, place, mu)
        out[:, -1] += last
        return out

    def paid(along: Floats, last: Floats) -> float:
        return float(beta @ (along.sum(1) + last))

    def loss(x: Floats) -> tuple[float, Floats]:
        along, last = multipliers(x)
        bound, over = -paid(along, last), np.tile(-beta[:, None], len(t))
        for group, place, grid in zip(groups, places, grids, strict=True):
            cost, outside = value(group, prices(along, last, group, place), slack, grid)
            bound += cost
            over += outside[:, place]
        slope = np.column_stack([(along * over) @ basis, last * over[:, -1]])
        return -bound / unit, -slope.ravel() / unit

    start = np.full(len(limits) * (KNOTS + 1), -1.0)
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=[(-12.0, 6.0)] * len(start),
        options={"maxiter": iterations, "maxfun": iterations + 10},
    )  # fmt: skip
    along, last = multipliers(found.x)
    return -paid(along, last) + sum(
        value(group, prices(along, last, group, place), slack, grid / 2, chances=False)[0]
        for group, place, grid in zip(groups, places, grids, strict=True)
    )


def value(
    group: Group, prices: Floats, slack: Floats, grid: float, *, chances: bool = True
) -> tuple[float, Floats]:
    """V_0(0), and the chances of D_n outside under its policy.

    Args:
        prices: ``(k, N + 1)``, as the chances are.
        slack: ``(k,)``.
    """
    samples = group.samples
    cells = math.ceil(4.5 * math.sqrt(samples) * float(group.steps.std()) / grid) + 10
    first, table = histogram(group.steps, grid)
    sides = np.column_stack([-slack, group.width + slack])
    policy = np.empty((samples if chances else 1, 2 * cells + 1), np.float32)
    cost = backward(table, first, sides, prices, grid, cells, policy)
    outside = np.zeros((len(slack), 0))
    if chances:
        outside = forward(table, first, sides, grid, cells, policy)
    return float(cost), outside


def histogram(steps: Floats, grid: float) -> tuple[int, Floats]:
    """The steps on a grid, each on its two neighbours; the first place.

    So their mean stays. Between neighbours they spread a little, and are drawn together before, by
    a common factor, so that their variance stays, too.
    """
    mean, variance = float(steps.mean()), float(steps.var())
    shrink = 1.0
    for _ in range(5):
        place = (mean + shrink * (steps - mean)) / grid
        share = place - np.floor(place)
        spread = grid**2 * float((share * (1.0 - share)).mean())
        shrink = math.sqrt(max(0.0, 1.0 - spread / variance)) if variance > 0.0 else 1.0
    down = np.floor(place).astype(np.int64)
    first = int(down.min())
    out = np.zeros(int(down.max()) - first + 2)
    np.add.at(out, down - first, (1.0 - share) / len(steps))
    np.add.at(out, down - first + 1, share / len(steps))
    return first, out


@njit(cache=True)  # type: ignore[untyped-decorator]
def envelope(V, scale, place, edge, out, landing):  # type: ignore[no-untyped-def]
    """out[i] = min over real j of scale (i - j)^2 + V(j), V linear between its values.

    Least at a kink, found by the lower envelope of parabolas, or inside a piece of slope g, at a
    distance of g / (2 scale). ``landing[i]`` is the best j.
    """
    count = 0
    place[0] = 0
    edge[0], edge[1] = -math.inf, math.inf
    for j in range(1, len(V)):
        while True:
            k = place[count]
            cross = 0.5 * (j + k) + 0.5 * (V[j] - V[k]) / (scale * (j - k))
            if cross > edge[count]:
                break
            count -= 1
        count += 1
        place[count] = j
        edge[count], edge[count + 1] = cross, math.inf
    count = 0
    for i in range(len(V)):
        while edge[count + 1] < i:
            count += 1
        j = place[count]
        out[i] = scale * (i - j) * (i - j) + V[j]
        landing[i] = j
    for j in range(len(V) - 1):
        slope = V[j + 1] - V[j]
        away = 0.5 * slope / scale
        i = math.ceil(j + away)
        if i <= j + 1 + away and 0 <= i < len(V):
            inside = scale * away * away + V[j] + slope * (i - away - j)
            if inside < out[i]:
                out[i] = inside
                landing[i] = i - away


@njit(cache=True)  # type: ignore[untyped-decorator]
def backward(table, first, sides, prices, grid, cells, policy):  # type: ignore[no-untyped-def]
    samples, G = prices.shape[1] - 1, 2 * cells + 1
    V, moved, place, edge = np.zeros(G), np.empty(G), np.empty(G, np.int64), np.empty(G + 1)
    for n in range(samples, 0, -1):
        for k in range(len(sides)):
            if prices[k, n] > 0.0:
                for i in range(G):
                    D = (i - cells) * grid
                    if D < sides[k, 0] * n - 1e-9 or D > sides[k, 1] * n + 1e-9:
                        V[i] += prices[k, n]
        envelope(V, grid * grid, place, edge, moved, policy[min(n, len(policy)) - 1])
        V[:] = 0.0
        for j in range(len(table)):
            if table[j] > 0.0:
                for i in range(G):
                    V[i] += table[j] * moved[min(max(i + first + j, 0), G - 1)]
    return V[cells]


@njit(cache=True)  # type: ignore[untyped-decorator]
def forward(table, first, sides, grid, cells, policy):  # type: ignore[no-untyped-def]
    samples, G = len(policy), 2 * cells + 1
    p, q = np.zeros(G), np.empty(G)
    p[cells] = 1.0
    outside = np.zeros((len(sides), samples + 1))
    for n in range(1, samples + 1):
        q[:] = 0.0
        for j in range(len(table)):
            if table[j] > 0.0:
                for i in range(G):
                    q[min(max(i + first + j, 0), G - 1)] += table[j] * p[i]
        p[:] = 0.0
        for i in range(G):
            j = min(int(policy[n - 1, i]), G - 2)
            share = policy[n - 1, i] - j
            p[j] += (1.0 - share) * q[i]
            p[j + 1] += share * q[i]
        for k in range(len(sides)):
            for i in range(G):
                D = (i - cells) * grid
                if D < sides[k, 0] * n - 1e-9 or D > sides[k, 1] * n + 1e-9:
                    outside[k, n] += p[i]
    return outside
