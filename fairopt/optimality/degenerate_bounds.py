"""Which of rows and bounds carry the multiplier, where both hold the same variables.

Two groups clipped at one upper bound have equal means whatever the row says: row and bounds hold
the same variables, and of the multipliers

    A^T y + w = -(P x + q),   y_r >= 0 where only the upper side of row r is tight, <= 0 where only
                              the lower, free where both, 0 where neither; w alike

there are many, though the rows by themselves are independent. *Clipped out* is a problem whose
tight rows have a smaller rank on the variables strictly inside their bounds (F) than on all.

What moves x. What carries in any multiplier holds in every direction of first order: it is active.
The solver's multiplier shows it all, or at least what spans the same space, but where several of
its zeros come together: two samples of one score, say, whose bounds stop pushing at the same y.
Then (and only then is it looked for) every side that carries in some multiplier counts as active,
so that v, the gradient of scores, is the same whichever multiplier was returned.

What the gradients of rows, sides and bounds are. The y that is shortest counts, on rows of unit
length in the metric of P^-1 over all variables, and the w that goes with it. It is unique, for its
square is strictly convex and w follows from y; and it depends on x and the data alone. It leaves to
the bounds what bounds can hold, and a row takes over only what they cannot. With the bound
x_1 = x_2 = 1, scores 3 and 1/2 and the row 0 <= x_1 - x_2 <= u at u = 0 it is w_1 = 2 - y and
w_2 = y - 1/2, so y = 1/2: bound 1 holds x_1, the row holds x_2. And so it is: when u rises from 0,
x_2 falls. Only that side has feasible points, and its derivative is the answer. The longest, y = 2,
would say that x_1 rises, beyond its bound. For one row this is general, because relaxing a side by
du changes the optimal value by -du min |y|, and tightening it by du max |y|.
For several rows that one tolerance
relaxes it would take the smallest sum of |y_r|; the shortest need not have that, and the gradient
of their common tolerance is then the convention's, as for dependent rows
(``optimality.minimum_norm``).

The adjoint follows. nu is zero on rows without a multiplier, and makes  (g + P v + A^T nu)_i  zero
first on F, as ever, then (in least squares, in the metric of P^-1) on E, the tight bounds with
w_i = 0; what is still open is taken shortest. With v as above, (3) of ``optimality.derivative`` is
exact for every change under which all that carries stays compatible, whatever nu is: a bound that
all samples share, say. E decides, for the other changes, who yields.

Method. In units of scaled rows let B be an orthonormal basis of {z : A_WF^T z = 0}. From any one
multiplier (y, w) all others are y + B c, so with y + B c = (y - B B^T y) + B e it is

    min |e|^2 / 2   with the signs of y + B c and of w - A^T B c at the tight bounds:

a projection of 0 onto G e <= h, by the dual active-set method of Goldfarb and Idnani (1983). The
samples of a cell at one side share a row of G, the one with the least room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.programs.problem import QP, CellRows

__all__ = ["Carried", "Multipliers", "adjoint_rows", "clipped_out", "nearest"]

Array = NDArray[np.float64]

RANK = 1e-11  # singular values below this are rank deficiency; rows have unit length
ROUNDING = 10.0  # what is zero but for rounding, in tolerances of ``nearest``
NONE = 1e-9  # a multiplier below this share of what it is a difference of is zero but for rounding


def clipped_out(problem: QP, tight: Tensor, d: Tensor, N: Tensor) -> Tensor:
    """Whether the tight rows lose rank to variables at their bounds: ``(B,)``, bool.

    Args:
        tight: ``(B, m)``, bool.
        d: the metric, ``(B, n)``.
        N: ``problem.rows.factor`` on the variables strictly inside.
    """
    if tight.shape[-1] == 0:
        return tight.new_zeros(len(tight))
    length = problem.rows.norms(1 / d)
    scale = torch.where(tight & (length > 0), 1 / length, 0.0).unsqueeze(-1)
    inside = (torch.linalg.svdvals(N * scale) > RANK).sum(-1)
    if bool((inside == (scale > 0).sum((-2, -1))).all()):
        return tight.new_zeros(len(tight))
    whole, _ = problem.rows.factor(1 / d, d)
    found: Tensor = inside < (torch.linalg.svdvals(whole * scale) > RANK).sum(-1)
    return found


@dataclass(frozen=True)
class Carried:
    """The shortest multiplier of one problem.

    Attributes:
        y: ``(m,)``.
        w: ``(n,)``, zero at bounds that are not tight.
        left: the tight bounds that carry none, E of the derivation, ``(n,)``, bool.
    """

    y: Tensor
    w: Tensor
    left: Tensor


class Multipliers:
    """All multipliers of problem b, as start + B e with G e <= h on rows of unit length.

    Args:
        y, w: one multiplier of each problem of the batch, ``(B, m)`` and ``(B, n)``.
        rows, bounds: upper and lower sides that are tight, bool, ``(B, m)`` and ``(B, n)``.
        N: ``problem.rows.factor`` on the variables strictly inside, ``(B, m, k)``.
        d: the metric, ``(B, n)``.
        size: what multipliers are large or small to, in units of scaled rows.
    """

    def __init__(
        self,
        problem: QP,
        b: int,
        y: Tensor,
        w: Tensor,
        rows: tuple[Tensor, Tensor],
        bounds: tuple[Tensor, Tensor],
        N: Tensor,
        d: Tensor,
        size: float,
    ) -> None:
        self.problem, self.b, self.y, self.w, self.bounds = problem, b, y, w, bounds
        self.root = d[b].sqrt()
        self.upper, self.lower = (as_array(side[b]) > 0 for side in rows)
        self.scale = row_scale(problem, d, self.upper | self.lower, b)
        kept = self.scale > 0
        self.B = null_basis(as_array(N[b]) * self.scale[:, None], kept)
        self.given = as_array(y[b]) / np.where(kept, self.scale, 1.0) * kept
        back = self.B @ (self.B.T @ self.given)
        self.start = self.given - back
        G, h = [], []
        for side, sign in ((self.upper & ~self.lower, -1.0), (self.lower & ~self.upper, 1.0)):
            G.append(sign * self.B[side])
            h.append(-sign * self.start[side])
        for part, room in bound_rows(problem, b, w, bounds, self.scale):
            G.append(part @ self.B)
            h.append(room + part @ back)
        left, right = np.concatenate(G), np.concatenate(h)
        length = np.linalg.norm(left, axis=1)
        counts = length > 1e-12 * max(1.0, float(length.max(initial=0.0)))
        self.G, self.h = left[counts] / length[counts, None], right[counts] / length[counts]
        self.tolerance = 1e-13 * size
        self.e = nearest(self.G, self.h, self.tolerance)

    def pull(self, change: Array) -> Tensor:
        """A^T times a change of y, ``(n,)``."""
        whole = torch.zeros_like(self.y)
        whole[self.b] = torch.from_numpy(change).to(whole.device)
        return self.problem.rows.transpose_apply(whole)[self.b]

    def shortest(self) -> Carried:
        b, scale = self.b, self.scale
        z = self.start + self.B @ self.e
        largest = float(np.abs(self.given).max(initial=0.0))
        z[np.abs(z) <= max(NONE * largest, ROUNDING * self.tolerance)] = 0.0
        z = np.where(self.upper, z, np.minimum(z, 0.0))
        z = np.where(self.lower, z, np.maximum(z, 0.0))
        both = torch.zeros_like(self.y)
        both[b] = torch.from_numpy((np.abs(z) + np.abs(self.given)) * scale)
        magnitude = self.w[b].abs() + self.problem.rows.absolute().transpose_apply(both)[b]
        upper, lower = self.bounds[0][b], self.bounds[1][b]
        new = self.w[b] - self.pull((z - self.given) * scale)
        least = NONE * magnitude + ROUNDING * self.tolerance * self.root
        new = torch.where((upper | lower) & (new.abs() > least), new, 0.0)
        left = (upper ^ lower) & (new == 0)
        return Carried(torch.from_numpy(z * scale).to(self.y.device), new, left)

    def carriers(self) -> tuple[Tensor, Tensor]:
        """Which rows and bounds carry in some multiplier: ``(m,)`` and ``(n,)``, bool.

        Directions that lengthen what the shortest has at zero are found one projection each, until
        none is left; their sum lengthens all that any does.
        """
        room = np.abs(self.G @ self.e - self.h)
        close = room <= ROUNDING * self.tolerance + NONE * np.abs(self.h)
        G = self.G[close]
        whole = np.zeros(self.B.shape[1])
        still = np.ones(len(G), bool)
        while still.any():
            towards = -G[still].sum(0)
            step = towards + nearest(G, -(G @ towards), 1e-13)
            size = float(np.linalg.norm(step))
            if size <= NONE:
                break
            whole += step / size
            grown = G @ (step / size) < -NONE
            if not (grown & still).any():
                break
            still &= ~grown
        found, change = self.shortest(), self.B @ whole
        rows = torch.from_numpy(np.abs(change) > NONE).to(self.y.device) | (found.y != 0)
        pull = self.pull(change * self.scale)
        size_ = self.problem.rows.absolute().transpose_apply(
            torch.from_numpy(np.abs(change) * self.scale).to(pull).expand_as(self.y)
        )[self.b]
        return rows, (found.w != 0) | (found.left & (pull.abs() > NONE * size_))


def bound_rows(
    problem: QP, b: int, w: Tensor, bounds: tuple[Tensor, Tensor], scale: Array
) -> Iterator[tuple[Array, Array]]:
    """G and h of the tight bounds, for a change of z: the sign of w - A^T dz stays.

    One row per variable, or for cells one per cell and direction: the one with the least room.
    """
    upper, lower = bounds[0][b], bounds[1][b]
    side = upper.double() - lower.double()  # 0 where both: any sign is good
    room = w[b] * side
    rows = problem.rows
    if not isinstance(rows, CellRows):
        here = (side != 0).nonzero().squeeze(-1)
        part = rows.to_dense().matrix[b][:, here].double() * side[here]
        yield as_array(part).T * scale, as_array(room[here]).clip(min=0.0)
        return
    weight = rows.weight[b].double() * side
    cell, C = rows.cell[b].long(), as_array(rows.coefficient[b]).T * scale
    for sign in (1.0, -1.0):
        there = weight * sign > 0
        least = torch.full((len(C),), torch.inf, dtype=torch.float64, device=w.device)
        share = room[there].clamp(min=0) / weight[there].abs()
        found = as_array(least.scatter_reduce(0, cell[there], share, "amin"))
        kept = np.isfinite(found)
        yield sign * C[kept], found[kept]


def nearest(G: Array, h: Array, tolerance: float) -> Array:
    """The e closest to 0 with G e <= h, rows of G of unit length: Goldfarb and Idnani's method.

    A row that contradicts the others is feasible but for rounding, and left out.
    """
    e = np.zeros(G.shape[1])
    active: list[int] = []
    push = np.zeros(0)
    open_ = np.ones(len(G), bool)
    for _ in range(20 * (len(G) + 1)):
        over = np.where(open_, G @ e - h, -np.inf)
        over[active] = -np.inf
        if not len(over) or (worst := int(over.argmax())) < 0 or over[worst] <= tolerance:
            break
        added = 0.0
        while True:
            share = np.linalg.lstsq(G[active].T, G[worst], rcond=None)[0]
            step = share @ G[active] - G[worst]
            square = float(step @ step)
            full = float(G[worst] @ e - h[worst]) / square if square > 1e-18 else np.inf
            falling = np.where(share > 1e-12, push / np.where(share > 1e-12, share, 1.0), np.inf)
            first = int(falling.argmin()) if len(falling) else -1
            length = min(full, falling[first] if first >= 0 else np.inf)
            if not np.isfinite(length):
                open_[worst] = False
                break
            if np.isfinite(full):
                e = e + length * step
            push, added = push - length * share, added + length
            if length == full:
                active, push = [*active, worst], np.append(push, added)
                break
            del active[first]
            push = np.delete(push, first)
    return e


def adjoint_rows(
    problem: QP, b: int, carried: Carried, meet: Tensor, whole: Tensor, inside: Tensor, d: Tensor
) -> Tensor:
    """nu of problem b, ``(m,)``: see "The adjoint follows the multiplier".

    Args:
        meet: rows whose sides meet, ``(B, m)``, bool.
        whole: g + P v, ``(B, n)``.
        inside: variables strictly inside, ``(B, n)``, bool.
    """
    kept = ((carried.y != 0) | meet[b]).cpu().numpy()
    scale = row_scale(problem, d, kept, b)
    left = torch.zeros_like(inside)
    left[b] = carried.left
    nu = np.zeros(len(scale))
    B = np.eye(len(scale))[:, scale > 0]
    for where in (inside, left):
        N, c = problem.rows.factor(torch.where(where, 1 / d, 0.0), whole)
        M, target = as_array(N[b]) * scale[:, None], as_array(c[b])
        L = M.T @ B
        U, S, Vh = np.linalg.svd(L, full_matrices=True)
        rank = int((S > RANK).sum())
        move = Vh[:rank].T @ ((U[:, :rank].T @ -(target + M.T @ nu)) / S[:rank])
        nu, B = nu + B @ move, B @ Vh[rank:].T
    return torch.from_numpy(nu * scale).to(d.device)


def row_scale(problem: QP, d: Tensor, kept: Any, b: int) -> Array:
    """One over the length of each row, in the metric of P^-1; zero where it is not to count."""
    length = as_array(problem.rows.norms(1 / d)[b])
    return np.where(kept & (length > 0), 1 / np.where(length > 0, length, 1.0), 0.0)


def null_basis(M: Array, kept: Any) -> Array:
    """Orthonormal columns that span {z : M^T z = 0, z = 0 off ``kept``}."""
    here = np.flatnonzero(kept)
    B = np.zeros((len(M), len(here)))
    U, S, _ = np.linalg.svd(M[here], full_matrices=True)
    rank = int((S > RANK).sum())
    B[here] = U
    return B[:, rank:]


def as_array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().double().cpu().numpy()
    return found
