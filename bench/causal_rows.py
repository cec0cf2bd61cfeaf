"""The same for two rows at once that one move serves both, with targets that come late.

Let D be the two sums of what samples, as served, are above the levels of their groups: row r holds
where D_r >= 0. A sample adds d to D, and w u more, a vector, if it is moved by u; its target adds
what no rule knew when it served, so many samples later. At each moment t at which the stream may
end, taken by itself, both rows must hold with probability 1 - alpha, all targets counted, and
within some slack with another. As in ``bench.causal``,

    cost  >=  V_0(0) - sum_k alpha_k sum_t mu_kt.

Time goes in blocks: the rule sees a whole block, and the targets that come then, before it moves
it. To move D by a in a block of b samples costs a' (b E[w w'])^-1 a. In coordinates in which that
is |a|^2 / b the best move is found along one axis after the other. What a block adds is nearly
normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray
from scipy import fft
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri

from bench.causal import Limit, envelope

__all__ = ["Rows", "least_change_causal", "least_change_known"]

Floats = NDArray[np.float64]
KNOTS, STRATA, PARTS = 4, 41, 12


@dataclass(frozen=True)
class Rows:
    """What samples add to D, with equal chances.

    Args:
        steps: ``(2, k)``, what is known when they are served.
        effects: ``(2, k)``, w.
        late: ``(2, k)``, what their targets add, ``delay`` samples later.
        delay: 0 where all is known at once.
    """

    steps: Floats
    effects: Floats
    late: Floats
    delay: int = 0

    @property
    def drift(self) -> Floats:
        """What a sample and its target add on average."""
        return np.asarray(self.steps.mean(1) + self.late.mean(1))

    @property
    def axes(self) -> Floats:
        """L with L L' = E[w w']: D = L z, and to move z by a in b samples costs |a|^2 / b."""
        return np.linalg.cholesky(self.effects @ self.effects.T / self.effects.shape[1])


def least_change_known(rows: Rows, samples: int) -> float:
    """The mean cost of one who knows what all samples will add, but not which target is whose.

    The mean of min |z|^2 / N with D + L z >= 0, D nearly normal.
    """
    normal = ndtri((np.arange(STRATA) + 0.5) / STRATA)
    normal = np.stack(np.meshgrid(normal, normal)).reshape(2, -1) / normal.std()
    variance = samples * np.cov(rows.steps + rows.late)
    short = -samples * rows.drift[:, None] - np.linalg.cholesky(variance) @ normal
    L, least = rows.axes, np.where((short <= 0.0).all(0), 0.0, math.inf)
    for active in ([0], [1], [0, 1]):
        z = np.linalg.pinv(L[active]) @ short[active]
        holds = (L @ z >= short - 1e-9 * np.abs(short).max()).all(0)
        least = np.where(holds, np.minimum(least, np.square(z).sum(0)), least)
    return float(least.mean()) / samples


def least_change_causal(
    rows: Rows, samples: int, first: int, limits: Sequence[Limit], *, grid: float,
    block: int = 100, evaluations: int = 120,
) -> float:  # fmt: skip
    """The lower bound, with the best multipliers that are found.

    They are exp of something linear in log t between a few knots, and one more for the last moment.
    They are searched for on a grid, and the bound is that of a grid twice as fine.

    Args:
        first: after how many samples the stream may end.
        limits: what both rows must hold at once; a slack for each row.
        grid: the step of z, in deviations of what a block adds.
    """
    unit = least_change_known(rows, samples)
    blocks = samples // block
    t = np.arange(first // block, blocks + 1)
    knots = np.linspace(0.0, math.log(blocks / t[0]), KNOTS)
    alpha = np.array([limit.alpha for limit in limits])

    def prices(x: Floats) -> Floats:
        out = np.zeros((len(limits), blocks + 1))
        for mu, row in zip(out, x.reshape(len(limits), -1), strict=True):
            mu[t] = unit / t * np.exp(np.interp(np.log(t / t[0]), knots, row[:-1]))
            mu[-1] += unit * math.exp(row[-1])
        return out

    def bound(plane: Plane, x: Floats) -> float:
        mu = prices(x)
        return plane.value(mu, limits) - float(alpha @ mu.sum(1))

    coarse, count = Plane(rows, samples, block, grid), len(limits) * (KNOTS + 1)
    found = minimize(
        lambda x: -bound(coarse, x) / unit, np.full(count, -1.0), method="Powell",
        bounds=[(-6.0, 4.0)] * count, options={"maxfev": evaluations, "xtol": 0.2, "ftol": 3e-4},
    )  # fmt: skip
    return bound(Plane(rows, samples, block, grid / 2), found.x)


class Plane:
    """z on a grid, and what a block does to functions of it."""

    def __init__(self, rows: Rows, samples: int, block: int, grid: float) -> None:
        L = rows.axes
        inverse = np.linalg.inv(L)
        drift = inverse @ rows.drift * block
        known, late = (inverse @ np.cov(x) @ inverse.T * block for x in (rows.steps, rows.late))
        step = grid * math.sqrt(np.diag(known + late).min())
        spread = np.sqrt(np.diag(known + late) * samples / block)
        half = np.ceil(4.0 * spread / step).astype(int) + 3
        z = np.stack(np.meshgrid(*(np.arange(-h, h + 1) * step for h in half), indexing="ij"))
        most = np.abs(drift) + 6.0 * np.sqrt(np.maximum(np.diag(known), np.diag(late)))
        self.block, self.step, self.inverse = block, step, inverse
        self.delay = -(-rows.delay // block)
        self.pad = int(most.max() / step) + 4
        self.shape = [fft.next_fast_len(int(2 * h + 1 + 2 * self.pad)) for h in half]
        self.known = self.transform(drift / step, known / step**2)
        self.late = self.transform(np.zeros(2), late / step**2)
        D = np.einsum("rk,kij->rij", L, z)
        self.outside = [
            chance_below(D, np.cov(rows.late) * n * block) for n in range(self.delay + 1)
        ]

    def transform(self, mean: Floats, variance: Floats) -> Floats:
        """Of normal steps, in steps of the grid."""
        f = np.stack(
            np.meshgrid(
                2.0 * np.pi * np.fft.fftfreq(self.shape[0]),
                2.0 * np.pi * np.fft.rfftfreq(self.shape[1]),
                indexing="ij",
            )
        )
        square = np.einsum("kij,kl,lij->ij", f, variance, f)
        return np.asarray(np.exp(1j * np.einsum("k,kij->ij", mean, f) - 0.5 * square))

    def expected(self, V: Floats, steps: Floats) -> Floats:
        """E[V(z + step)]; beyond its edges V goes on as it is there."""
        pads = [(self.pad, n - k - self.pad) for n, k in zip(self.shape, V.shape, strict=True)]
        out = fft.irfft2(fft.rfft2(np.pad(V, pads, mode="edge")) * steps, s=self.shape)
        return np.asarray(out[self.pad :, self.pad :][: V.shape[0], : V.shape[1]])

    def below(self, n: int, slack: Floats) -> Floats:
        """The chance that after block n a row is further than its slack below 0."""
        out = self.outside[min(n, self.delay)]
        for axis, far in enumerate(self.inverse @ slack * (n * self.block / self.step)):
            if far != 0.0:
                place = np.arange(out.shape[axis]) + far
                last = out.shape[axis] - 1
                down = np.clip(np.floor(place).astype(int), 0, last)
                share = np.expand_dims(place - np.floor(place), 1 - axis)
                up = np.minimum(down + 1, last)
                out = (1.0 - share) * out.take(down, axis) + share * out.take(up, axis)
        return out

    def value(self, prices: Floats, limits: Sequence[Limit]) -> float:
        """V_0(0); prices are the mu, ``(limits, blocks + 1)``."""
        V = np.zeros_like(self.outside[0])
        along, across = np.empty(V.shape), np.empty(V.shape[::-1])
        scale = self.step**2 / self.block
        for n in range(prices.shape[1] - 1, 0, -1):
            for limit, price in zip(limits, prices[:, n], strict=True):
                if price > 0.0:
                    V = V + price * self.below(n, np.array(limit.slack))
            moved(np.ascontiguousarray(V), scale, along)
            moved(np.ascontiguousarray(along.T), scale, across)
            V = across.T
            if n > self.delay > 0:
                V = self.expected(V, self.late)
            V = self.expected(V, self.known)
        return float(V[V.shape[0] // 2, V.shape[1] // 2])


def chance_below(D: Floats, variance: Floats) -> Floats:
    """That one of the two sums, with what is not known of them yet, is below 0."""
    if not variance.any():
        return np.asarray(((D < -1e-9).any(0)).astype(np.float64))
    deviation = math.sqrt(variance[0, 0])
    slope = variance[0, 1] / variance[0, 0]
    left = math.sqrt(variance[1, 1] - slope * variance[0, 1])
    below = ndtr(-D[0] / deviation)
    out = below.copy()
    for j in range(PARTS):  # parts of equal chance of what the first row may be above 0
        x = deviation * ndtri(np.minimum(below + (1.0 - below) * (j + 0.5) / PARTS, 1.0 - 1e-16))
        out += (1.0 - below) / PARTS * ndtr(-(D[1] + slope * x) / left)
    return out


@njit(cache=True, parallel=True)  # type: ignore[untyped-decorator]
def moved(V, scale, out):  # type: ignore[no-untyped-def]
    """``envelope`` of every row."""
    for i in prange(len(V)):
        G = V.shape[1]
        place, edge = np.empty(G, np.int64), np.empty(G + 1)
        envelope(V[i], scale, place, edge, out[i], np.empty(G, np.float32))
