"""The multipliers of a problem whose rows and bounds hold the same variables.

Two groups clipped at one upper bound have equal means whatever the row says: row and bounds hold
the same variables, and of the multipliers

    A^T y + w = -(P x + q),   y_r >= 0 where only the upper side of row r is tight, <= 0 where only
                              the lower, free where both, 0 where neither; w alike

there are many, though the rows by themselves are independent. A problem is *degenerate at bounds*
if its tight rows have a smaller rank on the variables strictly inside their bounds (F) than on all.

What moves x. A side in the support of some multiplier holds in every direction of first order: it
is active. The solver's multiplier has these sides in its support, or sides that span the same
space, except where several of its zeros coincide: two samples of one score, say, whose bounds stop
pushing at the same y. Only then are the other multipliers examined. Every side in the support of
some multiplier counts as active, so that v, the gradient of scores, is the same whichever
multiplier was returned.

The gradients of rows, sides and bounds are taken at the minimum-norm y, on rows of unit length in
the metric of P^-1 over all variables, and at the w that goes with it. It is unique, because its
square is strictly convex and w follows from y; and it depends on x and the data alone. It leaves to
the bounds all that bounds can hold, and a row takes over only the rest. With the bound
x_1 = x_2 = 1, scores 3 and 1/2 and the row 0 <= x_1 - x_2 <= u at u = 0 it is w_1 = 2 - y and
w_2 = y - 1/2, so y = 1/2: bound 1 holds x_1, the row holds x_2. Indeed, when u rises from 0,
x_2 falls. Only that side has feasible points, and its derivative is the answer. The longest, y = 2,
would say that x_1 rises, beyond its bound. For one row this is general, because relaxing a side by
du changes the optimal value by -du min |y|, and tightening it by du max |y|.
For several rows that one tolerance relaxes it would take the smallest sum of |y_r|; the
minimum-norm y need not have that, and the gradient of their common tolerance is then the
convention's, as for dependent rows (``optimality.minimum_norm``).

The adjoint follows the multiplier. nu is zero on rows without a multiplier, and makes
(g + P v + A^T nu)_i  zero first on F, as ever, then (in least squares, in the metric of P^-1) on E,
the tight bounds with w_i = 0; of all that remain, the minimum-norm one is taken. With v as above,
(3) of ``optimality.derivative`` is exact for every change under which the support stays compatible,
whatever nu is: a bound that all samples share, say. For the other changes E decides which side
yields.

Method. In units of scaled rows let B be an orthonormal basis of {z : A_WF^T z = 0}. From any one
multiplier (y, w) all others are y + B c, so with y + B c = (y - B B^T y) + B e it is

    min |e|^2 / 2   with the signs of y + B c and of w - A^T B c at the tight bounds:

a projection of 0 onto G e <= h, by the dual active-set method of ``kernels.active_set``. The
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

from fairopt.programs.problem import QP
from fairopt.programs.rows.base import Rows
from fairopt.tolerances import ACTIVE_SET, ACTIVE_SET_ROUNDING, NO_ROW, RANK, ZERO_MULTIPLIER

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TightSides:
    """The sides of rows, ``(B, m)``, and of bounds, ``(B, n)``, that x meets or is pushed to; bool.

    Attributes:
        upper, lower: of rows; both for equality rows.
        ub, lb: of bounds.
        inside: the variables strictly inside their bounds, F of the derivation, ``(B, n)``.
    """

    upper: Tensor
    lower: Tensor
    ub: Tensor
    lb: Tensor
    inside: Tensor


def degenerate_at_bounds(problem: QP, tight: TightSides, d: Tensor, N: Tensor) -> Tensor:
    """Whether the tight rows lose rank to variables at their bounds: ``(B,)``, bool.

    Args:
        d: the metric, ``(B, n)``.
        N: ``problem.rows.factor`` on the variables strictly inside.
    """
    rows = tight.upper | tight.lower
    if rows.shape[-1] == 0:
        return rows.new_zeros(len(rows))
    length = problem.rows.norms(1 / d)
    scale = torch.where(rows & (length > 0), 1 / length, 0.0).unsqueeze(-1)
    rank_inside = (torch.linalg.svdvals(N * scale) > RANK).sum(-1)
    if bool((rank_inside == (scale > 0).sum((-2, -1))).all()):
        return rows.new_zeros(len(rows))
    whole, _ = problem.rows.factor(1 / d, d)
    degenerate: Tensor = rank_inside < (torch.linalg.svdvals(whole * scale) > RANK).sum(-1)
    return degenerate


@dataclass(frozen=True)
class MinimumNorm:
    """The minimum-norm multiplier of one problem.

    Attributes:
        y: ``(m,)``.
        w: ``(n,)``, zero at bounds that are not tight.
        weak: the tight bounds with w_i = 0, E of the derivation, ``(n,)``, bool.
    """

    y: Tensor
    w: Tensor
    weak: Tensor


class MultiplierSet:
    """All multipliers of problem b, as start + B e with G e <= h on rows of unit length.

    Args:
        y, w: one multiplier of each problem of the batch, ``(B, m)`` and ``(B, n)``.
        tight: the sides that may have a multiplier.
        N: ``problem.rows.factor`` on the variables strictly inside, ``(B, m, k)``.
        d: the metric, ``(B, n)``.
        size: the magnitude that multipliers are compared with, in units of scaled rows.
    """

    def __init__(
        self,
        problem: QP,
        b: int,
        y: Tensor,
        w: Tensor,
        tight: TightSides,
        N: Tensor,
        d: Tensor,
        size: float,
    ) -> None:
        self.problem, self.b, self.y, self.w, self.tight = problem, b, y, w, tight
        self.root = d[b].sqrt()
        self.upper, self.lower = (as_array(side[b]) > 0 for side in (tight.upper, tight.lower))
        self.scale = row_scale(problem, d, self.upper | self.lower, b)
        counted = self.scale > 0
        self.B = null_basis(as_array(N[b]) * self.scale[:, None], counted)
        self.solver_y = as_array(y[b]) / np.where(counted, self.scale, 1.0) * counted
        back = self.B @ (self.B.T @ self.solver_y)
        self.start = self.solver_y - back
        G, h = [], []
        for side, sign in ((self.upper & ~self.lower, -1.0), (self.lower & ~self.upper, 1.0)):
            G.append(sign * self.B[side])
            h.append(-sign * self.start[side])
        for part, room in bound_rows(problem, b, w, tight, self.scale):
            G.append(part @ self.B)
            h.append(room + part @ back)
        left, right = np.concatenate(G), np.concatenate(h)
        length = np.linalg.norm(left, axis=1)
        counts = length > NO_ROW * max(1.0, float(length.max(initial=0.0)))
        self.G, self.h = left[counts] / length[counts, None], right[counts] / length[counts]
        self.tolerance = ACTIVE_SET * size
        self.rounding = ACTIVE_SET_ROUNDING * self.tolerance
        self.e = nearest(self.G, self.h, self.tolerance)

    def pull(self, change: Array, rows: Rows) -> Tensor:
        """A^T times a change of y, ``(n,)``; A are the problem's rows or their absolute values."""
        whole = torch.zeros_like(self.y)
        whole[self.b] = torch.from_numpy(change).to(whole.device)
        return rows.transpose_apply(whole)[self.b]

    def minimum_norm(self) -> MinimumNorm:
        b, scale = self.b, self.scale
        z = self.start + self.B @ self.e
        largest = float(np.abs(self.solver_y).max(initial=0.0))
        z[np.abs(z) <= max(ZERO_MULTIPLIER * largest, self.rounding)] = 0.0
        z = np.where(self.upper, z, np.minimum(z, 0.0))
        z = np.where(self.lower, z, np.maximum(z, 0.0))
        rows = self.problem.rows
        sizes = (np.abs(z) + np.abs(self.solver_y)) * scale
        terms = self.w[b].abs() + self.pull(sizes, rows.absolute())
        ub, lb = self.tight.ub[b], self.tight.lb[b]
        w = self.w[b] - self.pull((z - self.solver_y) * scale, rows)
        least = ZERO_MULTIPLIER * terms + self.rounding * self.root
        w = torch.where((ub | lb) & (w.abs() > least), w, 0.0)
        weak = (ub ^ lb) & (w == 0)
        return MinimumNorm(torch.from_numpy(z * scale).to(self.y.device), w, weak)

    def support(self) -> tuple[Tensor, Tensor]:
        """Rows and bounds in the support of some multiplier: ``(m,)`` and ``(n,)``, bool.

        Directions that increase what is zero in the minimum-norm multiplier are found by one
        projection each, until none is left; their sum increases everything that any of them does.
        """
        room = np.abs(self.G @ self.e - self.h)
        G = self.G[room <= self.rounding + ZERO_MULTIPLIER * np.abs(self.h)]
        whole = np.zeros(self.B.shape[1])
        still = np.ones(len(G), bool)
        while still.any():
            towards = -G[still].sum(0)
            step = towards + nearest(G, -(G @ towards), ACTIVE_SET)
            size = float(np.linalg.norm(step))
            if size <= ZERO_MULTIPLIER:
                break
            whole += step / size
            grown = G @ (step / size) < -ZERO_MULTIPLIER
            if not (grown & still).any():
                break
            still &= ~grown
        least, change = self.minimum_norm(), self.B @ whole
        rows = torch.from_numpy(np.abs(change) > ZERO_MULTIPLIER).to(self.y.device) | (least.y != 0)
        pull = self.pull(change * self.scale, self.problem.rows)
        size_ = self.pull(np.abs(change) * self.scale, self.problem.rows.absolute())
        moves = pull.abs() > ZERO_MULTIPLIER * size_
        return rows, (least.w != 0) | (least.weak & moves)


def bound_rows(
    problem: QP, b: int, w: Tensor, tight: TightSides, scale: Array
) -> Iterator[tuple[Array, Array]]:
    """G and h of the tight bounds, for a change of z: the sign of w - A^T dz stays."""
    side = tight.ub[b].double() - tight.lb[b].double()  # 0 where both: any sign is good
    room = w[b] * side
    for part, least in problem.rows.sign_conditions(b, side, room):
        yield as_array(part) * scale, as_array(least)


def nearest(G: Array, h: Array, tolerance: float) -> Array:
    """The e closest to 0 with G e <= h, rows of G of unit length: a model of a Newton step.

    A row that contradicts the others is feasible but for rounding, and left out.
    """
    from fairopt.kernels.active_set import solve_model  # and Numba
    from fairopt.kernels.state import FLOOR, LENGTH, OF_ROW

    rows, e = np.zeros((OF_ROW, len(h))), np.zeros(G.shape[1])
    rows[FLOOR], rows[LENGTH] = tolerance, 1.0
    solve_model(np.ascontiguousarray(G), np.full(len(h), -np.inf), h, rows, e, None)
    return e


def adjoint_rows(
    problem: QP, b: int, least: MinimumNorm, whole: Tensor, inside: Tensor, d: Tensor
) -> Tensor:
    """nu of problem b, ``(m,)``: see "The adjoint follows the multiplier".

    Args:
        whole: g + P v, ``(B, n)``.
        inside: variables strictly inside, ``(B, n)``, bool.
    """
    equality = problem.l[b] == problem.u[b]
    scale = row_scale(problem, d, ((least.y != 0) | equality).cpu().numpy(), b)
    weak = torch.zeros_like(inside)
    weak[b] = least.weak
    nu = np.zeros(len(scale))
    B = np.eye(len(scale))[:, scale > 0]
    for where in (inside, weak):
        N, c = problem.rows.factor(torch.where(where, 1 / d, 0.0), whole)
        M, target = as_array(N[b]) * scale[:, None], as_array(c[b])
        L = M.T @ B
        U, S, Vh = np.linalg.svd(L, full_matrices=True)
        rank = int((S > RANK).sum())
        move = Vh[:rank].T @ ((U[:, :rank].T @ -(target + M.T @ nu)) / S[:rank])
        nu, B = nu + B @ move, B @ Vh[rank:].T
    return torch.from_numpy(nu * scale).to(d.device)


def row_scale(problem: QP, d: Tensor, rows: Any, b: int) -> Array:
    """One over the length of each of these rows, in the metric of P^-1; zero for the others."""
    length = as_array(problem.rows.norms(1 / d)[b])
    return np.where(rows & (length > 0), 1 / np.where(length > 0, length, 1.0), 0.0)


def null_basis(M: Array, rows: Any) -> Array:
    """Orthonormal columns that span {z : M^T z = 0, z = 0 off ``rows``}."""
    index = np.flatnonzero(rows)
    B = np.zeros((len(M), len(index)))
    U, S, _ = np.linalg.svd(M[index], full_matrices=True)
    rank = int((S > RANK).sum())
    B[index] = U
    return B[:, rank:]


def as_array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().double().cpu().numpy()
    return array
