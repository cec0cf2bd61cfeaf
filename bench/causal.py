"""The least change of a rule that knows every distribution, but neither the future nor the end.

A group is to be held at a level. Let D be the sum of what its samples, as served, are above it. The
next sample adds d, drawn from a distribution that the rule knows, and w u more if it is moved by u,
which costs u^2; the rule sees a sample before it moves it. Whenever the stream may end, that is
after every sample from a first one on, D >= 0 must hold with probability 1 - alpha. For all
mu_n >= 0, by weak duality,

    cost  >=  V_0(0) - alpha sum_n mu_n,
    V_n(D) = E[ min_u u^2 + (V_n+1 + mu_n+1 [. < 0]) (D + d + w u) ],      V_N = 0.

The dynamic programme gives the bound, and the chances P(D_n < 0) under its policy less alpha are
its gradient, by which the multipliers are improved. A label that comes late adds to D what no
rule knew when it served.
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

__all__ = ["Walk", "least_change_causal", "least_change_known", "value"]

Floats = NDArray[np.float64]
KNOTS = 8


@dataclass(frozen=True)
class Walk:
    """What a sample adds to D, in classes of equal effect.

    Args:
        effects: ``(c,)``, what moving a sample of each class by one adds.
        steps: for each class, what its samples add unmoved.
        chances: for each class, their chances; 1 over all classes together.
        late: what a label adds when it comes, of mean 0, all with equal chances.
        delay: after how many samples it comes.
    """

    effects: Sequence[float]
    steps: Sequence[Floats]
    chances: Sequence[Floats]
    late: Floats | None = None
    delay: int = 0

    @property
    def mean(self) -> float:
        return sum(float(p @ d) for p, d in zip(self.chances, self.steps, strict=True))

    @property
    def variance(self) -> float:
        """Of one sample, with its label."""
        square = sum(float(p @ d**2) for p, d in zip(self.chances, self.steps, strict=True))
        return square - self.mean**2 + (0.0 if self.late is None else float(self.late.var()))

    @property
    def effect(self) -> float:
        """The mean of w^2."""
        return sum(float(p.sum()) * w**2 for p, w in zip(self.chances, self.effects, strict=True))


def least_change_known(walk: Walk, samples: int) -> float:
    """The mean cost of one who knows all samples: E[max(0, -D)^2] / (N E[w^2]), D nearly normal."""
    mean, deviation = samples * walk.mean, math.sqrt(samples * walk.variance)
    z = mean / deviation
    density = math.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    square = (mean**2 + deviation**2) * float(ndtr(-z)) - mean * deviation * density
    return square / (samples * walk.effect)


def least_change_causal(
    walk: Walk, samples: int, first: int, alpha: float, *, grid: float, iterations: int = 25
) -> float:
    """The lower bound, with the best multipliers that are found.

    They are exp of something linear in log n between a few knots, and one more for the last sample.
    They are searched for on a grid, and the bound is that of a grid twice as fine.

    Args:
        samples: how many there are.
        first: after which of them the stream may end.
        alpha: the chance of an excess.
        grid: the step of D.
    """
    unit = least_change_known(walk, samples)
    n = np.arange(first, samples + 1)
    knots = np.linspace(0.0, math.log(samples / first), KNOTS)
    basis = np.stack([np.interp(np.log(n / first), knots, row) for row in np.eye(KNOTS)], 1)

    def multipliers(z: Floats) -> tuple[Floats, Floats, float]:
        along, last = unit / n * np.exp(basis @ z[:-1]), unit * math.exp(z[-1])
        prices = np.zeros(samples + 1)
        prices[n] = along
        prices[-1] += last
        return prices, along, last

    def loss(z: Floats) -> tuple[float, Floats]:
        prices, along, last = multipliers(z)
        bound, below = value(walk, prices, grid)
        slope = np.append(basis.T @ (along * (below[n] - alpha)), last * (below[-1] - alpha))
        return (alpha * float(prices.sum()) - bound) / unit, -slope / unit

    start = np.append(np.full(KNOTS, -1.0), 0.0)
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=[(-12.0, 6.0)] * len(start),
        options={"maxiter": iterations, "maxfun": iterations + 10},
    )  # fmt: skip
    prices, _, _ = multipliers(found.x)
    bound, _ = value(walk, prices, grid / 2, chances=False)
    return bound - alpha * float(prices.sum())


def value(walk: Walk, prices: Floats, grid: float, *, chances: bool = True) -> tuple[float, Floats]:
    """V_0(0), and P(D_n < 0) under its policy, ``(N + 1,)``; prices ``(N + 1,)`` are the mu_n."""
    samples = len(prices) - 1
    cells = math.ceil(4.5 * math.sqrt(samples * walk.variance) / grid) + 10
    classes = [histogram(d, p, grid) for d, p in zip(walk.steps, walk.chances, strict=True)]
    start, late, noise = 0, np.ones(1), 0.0
    if walk.late is not None:
        start, late = histogram(walk.late, np.full(len(walk.late), 1.0 / len(walk.late)), grid)
        noise = float(walk.late.std())
    table = np.zeros((len(classes), max(len(p) for _, p in classes)))
    for row, (_, p) in zip(table, classes, strict=True):
        row[: len(p)] = p
    firsts = np.array([f for f, _ in classes])
    ends = np.arange(-cells, cells + 1) * grid
    # What is not known yet, of the last ``delay`` labels, as a normal number.
    outside = np.zeros((max(walk.delay, 1) + 1, len(ends)))
    for n, row in enumerate(outside):
        spread = noise * math.sqrt(n)
        row[:] = ndtr(-ends / spread) if spread > 0.0 else ends < -1e-9
    effects = np.asarray(walk.effects, np.float64)
    policy = np.empty((samples if chances else 1, len(classes), len(ends)), np.float32)
    cost = backward(
        table, firsts, effects, late, start, walk.delay, outside, prices, grid, cells, policy
    )
    below = np.zeros(0)
    if chances:
        below = forward(table, firsts, late, start, walk.delay, outside, cells, policy)
    return float(cost), below


def histogram(steps: Floats, chances: Floats, grid: float) -> tuple[int, Floats]:
    """The steps on a grid, each on its two neighbours; the first place.

    So their mean stays. Between neighbours they spread a little, and are drawn together before, by
    a common factor, so that their variance stays, too.
    """
    mean = float(chances @ steps) / float(chances.sum())
    variance = float(chances @ (steps - mean) ** 2)
    shrink = 1.0
    for _ in range(5):
        place = (mean + shrink * (steps - mean)) / grid
        share = place - np.floor(place)
        spread = grid**2 * float(chances @ (share * (1.0 - share)))
        shrink = math.sqrt(max(0.0, 1.0 - spread / variance)) if variance > 0.0 else 1.0
    down = np.floor(place).astype(np.int64)
    first = int(down.min())
    out = np.zeros(int(down.max()) - first + 2)
    np.add.at(out, down - first, chances * (1.0 - share))
    np.add.at(out, down - first + 1, chances * share)
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
def expected(V, first, chances, out):  # type: ignore[no-untyped-def]
    """out[i] += sum_j chances[j] V[i + first + j]; beyond its ends V goes on as it is there."""
    n = len(V)
    for j in range(len(chances)):
        if chances[j] > 0.0:
            for i in range(n):
                out[i] += chances[j] * V[min(max(i + first + j, 0), n - 1)]


@njit(cache=True)  # type: ignore[untyped-decorator]
def arrived(p, first, chances, out):  # type: ignore[no-untyped-def]
    """out[i + first + j] += chances[j] p[i]: the transpose."""
    n = len(p)
    for j in range(len(chances)):
        if chances[j] > 0.0:
            for i in range(n):
                out[min(max(i + first + j, 0), n - 1)] += chances[j] * p[i]


@njit(cache=True)  # type: ignore[untyped-decorator]
def backward(  # type: ignore[no-untyped-def]
    table, firsts, effects, late, late_first, delay, outside, prices, grid, cells, policy
):
    samples, G = len(prices) - 1, 2 * cells + 1
    V, out = np.zeros(G), np.empty(G)
    place, edge, moved = np.empty(G, np.int64), np.empty(G + 1), np.empty(G)
    for n in range(samples, 0, -1):
        V += prices[n] * outside[min(n, delay)]
        if n > delay > 0:
            out[:] = 0.0
            expected(V, late_first, late, out)
            V[:] = out
        out[:] = 0.0
        for c in range(len(effects)):
            scale, landing = (grid / effects[c]) ** 2, policy[min(n, len(policy)) - 1, c]
            envelope(V, scale, place, edge, moved, landing)
            expected(moved, firsts[c], table[c], out)
        V[:] = out
    return V[cells]


@njit(cache=True)  # type: ignore[untyped-decorator]
def forward(  # type: ignore[no-untyped-def]
    table, firsts, late, late_first, delay, outside, cells, policy
):
    samples, G = len(policy), 2 * cells + 1
    p, q, out = np.zeros(G), np.empty(G), np.empty(G)
    p[cells] = 1.0
    below = np.zeros(samples + 1)
    for n in range(1, samples + 1):
        out[:] = 0.0
        for c in range(len(firsts)):
            q[:] = 0.0
            arrived(p, firsts[c], table[c], q)
            for i in range(G):
                j = min(int(policy[n - 1, c, i]), G - 2)
                share = policy[n - 1, c, i] - j
                out[j] += (1.0 - share) * q[i]
                out[j + 1] += share * q[i]
        if n > delay > 0:
            p[:] = 0.0
            arrived(out, late_first, late, p)
        else:
            p[:] = out
        below[n] = p @ outside[min(n, delay)]
    return below
