"""Solutions, and the independent judge of them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fairopt.programs.problem import QP, Problem
from fairopt.programs.rows.base import Rows
from fairopt.programs.tensors import unchecked
from fairopt.tolerances import ROW_PRECISION, TINY, WEAK


class Status(enum.Enum):
    """How a solve ended; the value says it in words, with the remedy."""

    SOLVED = "solved to the promised precision"
    STALLED = (
        "stopped before the promised precision: the data may span too many orders of magnitude; "
        "rescale them, loosen a tolerance that is zero or tiny, or try another backend"
    )
    INFEASIBLE = (
        "no point satisfies all rows within the bounds; loosen a tolerance or widen the bounds"
    )
    ELASTIC = (
        "no point satisfies all rows within the bounds; this is the one of least objective among "
        "those with the least total violation, and Solution.exceeded says by how much"
    )
    UNBOUNDED = (
        "the objective falls without end; bound the variables, or add a quadratic term in the "
        "directions that are free"
    )
    NONCONVEX = (
        "P has a negative eigenvalue, so the problem is not convex; expected a positive "
        "semidefinite P"
    )


class RowValues:
    """Rows at a point x, beside their sides, in float64, all ``(B, m)``.

    Args:
        x: ``(B, n)``.
        size: ``(B, n)`` or ``(B, 1)``, of which the largest sets the scale; by default |x|.

    Attributes:
        value: A x.
        l, u: the sides.
    """

    def __init__(
        self, rows: Rows, l: Tensor, u: Tensor, x: Tensor, size: Tensor | None = None
    ) -> None:
        self.rows, self.x = rows, x.double()
        self.size = self.x.abs() if size is None else size
        self.value, self.l, self.u = rows.apply(self.x), l.double(), u.double()

    @staticmethod
    def at(problem: Problem, x: Tensor) -> RowValues:
        return RowValues(problem.rows, problem.l, problem.u, x)

    @cached_property
    def absolute(self) -> Rows:
        """|A|."""
        return self.rows.absolute()

    @cached_property
    def scale(self) -> Tensor:
        """sum_i |A_ri| max_j |x_j|."""
        return self.absolute.apply(self.size.amax(-1, keepdim=True).expand_as(self.x))

    @cached_property
    def excess(self) -> Tensor:
        """max(A x - u, l - A x, 0), in the rows' own units."""
        return torch.maximum(self.value - self.u, self.l - self.value).clamp(min=0)

    @cached_property
    def relative(self) -> Tensor:
        """The excess over ``scale`` + |side|; NaN stays NaN."""
        side = torch.where(self.value - self.u > self.l - self.value, self.u, self.l).abs()
        return torch.where(self.excess <= 0, 0.0, self.excess / (self.scale + side + TINY))


@dataclass(frozen=True)
class Residuals:
    """Optimality residuals, one number per problem, ``(B,)``, float64. All are relative.

    Attributes:
        stationarity: max_i |P x + q + A^T y + w|_i over max_i of the sum of the magnitudes of its
            terms.
        primal: worst violation of a row over its scale sum_i |A_ri| max_j |x_j| + |side|;
            infinite if any bound is exceeded at all.
        dual_sign: worst multiplier that pushes towards a side that is not there (infinite), over
            the largest multiplier.
        complementarity: sum of |multiplier| times the distance to the side it belongs to, over
            the magnitude of the objective's terms, here and at its minimum without constraints.
    """

    stationarity: Tensor
    primal: Tensor
    dual_sign: Tensor
    complementarity: Tensor

    @property
    def worst(self) -> float:
        """The largest of all; NaN if any is."""
        return float(torch.stack(tuple(self.__dict__.values())).max())

    def __str__(self) -> str:
        return ", ".join(f"{k} {float(v.max()):.1e}" for k, v in self.__dict__.items())


@dataclass(frozen=True, eq=False)
class Solution:
    """A solution with its certificate.

    Sign convention: P x + q + A^T y + w = 0, with y > 0 only where A x = u, y < 0 only where
    A x = l, and the same for w against ub and lb.

    Attributes:
        problem: the problem solved, detached.
        x: ``(B, n)``, dtype of the problem's q (or c). Carries autograd when ``solve`` returned it.
        row_dual: y, ``(B, m)``, float64, detached. Not unique when rows depend on each other. For
            an infeasible problem it is the proof: every point within the bounds has y.(A x) above
            the sum of y_r times the side that y_r pushes to; rows with y_r = 0 have no part in it.
            For an elastic one it belongs to the problem in which each row may be exceeded at a
            price; see ``fairopt.solving.elastic``.
        status: one per problem.
        backend: name of the backend.
        iterations: one per problem.
        seconds: wall time of the backend's solve.
        context: whatever the backend keeps for its own ``vjp``.
        verified: whether ``optimality.finishing`` found its residual within the promise: ``solve``
        then
            does not judge again.
        sides: active rows, ``(B, m)``, and variables between their bounds, ``(B, n)``, bool, where
            refinement found them and no multiplier or slack is near zero; else ``None``.
    """

    problem: Problem
    x: Tensor
    row_dual: Tensor
    status: tuple[Status, ...]
    backend: str
    iterations: tuple[int, ...] = ()
    seconds: float = 0.0
    context: Any = None
    verified: bool = False
    sides: tuple[Tensor, Tensor] | None = None

    @cached_property
    def bound_dual(self) -> Tensor:
        """w, ``(B, n)``, float64: what stationarity leaves over, at the bounds that hold x.

        With the primal and the row multipliers given, w is determined: -(P x + q + A^T y) where
        that pushes beyond the slack (the rule of ``optimality.active_sets``) by more than rounding
        could, or the bounds meet, else zero.
        """
        problem = self.problem
        x = self.x.detach().double()
        objective, pull = slope(problem, x), problem.rows.transpose_apply(self.row_dual)
        w = -(objective + pull)
        size = problem.rows.absolute().transpose_apply(self.row_dual.abs())
        noise = WEAK * (objective.abs() + size)
        lower, upper = problem.lb.double(), problem.ub.double()
        if isinstance(problem, QP):
            d = problem.diagonal()
            push, noise = w / d, noise / d + WEAK * x.abs().amax(-1, keepdim=True)
        else:
            push = w
        held = (push > (upper - x).clamp(min=0) + noise) | (
            -push > (x - lower).clamp(min=0) + noise
        )
        return torch.where(held | (lower == upper), w, 0.0)

    @cached_property
    def residuals(self) -> Residuals:
        """Our residuals of this solution, computed when first asked for."""
        return residuals(self.problem, self.x.detach(), self.row_dual, self.bound_dual)

    def with_x(self, x: Tensor) -> Solution:
        """The same solution around another tensor: the same values, perhaps rounded."""
        kept = {**self.__dict__, "x": x}
        for computed in ("residuals", "bound_dual", "values"):  # from the other x
            kept.pop(computed, None)
        return unchecked(Solution, **kept)

    def detach(self) -> Solution:
        """The same solution with x cut from its history."""
        return self.with_x(self.x.detach()) if self.x.requires_grad else self

    @cached_property
    def values(self) -> RowValues:
        """The rows at x."""
        return RowValues.at(self.problem, self.x.detach())

    @property
    def excess(self) -> Tensor:
        """How far each row is beyond its side, max(A x - u, l - A x, 0): ``(B, m)``, float64.

        In the row's own units. What is within the promised precision is rounding, not excess, and
        is not taken away.
        """
        return self.values.excess

    @property
    def exceeded(self) -> dict[str, float]:
        """Names of the rows that do not hold and by how much, the worst of the batch first.

        Rows hold if they do to the promised precision; see ``residuals``. Rows of one name count
        together.
        """
        dtype = self.x.dtype
        beyond = self.values.relative > ROW_PRECISION.get(dtype, torch.finfo(dtype).eps)
        worst = torch.where(beyond, self.excess, 0.0).amax(0)
        found: dict[str, float] = {}
        for r in worst.argsort(descending=True).tolist():
            if worst[r] > 0:
                found.setdefault(self.problem.row_name(r), float(worst[r]))
        return found

    @property
    def skipped(self) -> tuple[str, ...]:
        """Rows that were left out when the problem was written, each with the reason."""
        return self.problem.skipped

    def __str__(self) -> str:
        batch, m, n = self.problem.shape
        words = {s.name.lower() for s in self.status}
        beyond = self.exceeded if Status.ELASTIC in self.status else {}
        shown = "".join(f"; '{name}' exceeded by {by:.4g}" for name, by in beyond.items())
        return (
            f"Solution by {self.backend}: {', '.join(sorted(words))}, {batch} x {n} variables, "
            f"{m} rows; {self.residuals}{shown}"
        )


def slope(problem: Problem, x: Tensor) -> Tensor:
    """P x + q in float64: ``(B, n)``."""
    return problem.apply_quadratic(x) + problem.linear.double()


def gradient(problem: Problem, x: Tensor, row_dual: Tensor) -> Tensor:
    """P x + q + A^T y in float64: ``(B, n)``."""
    return slope(problem, x) + problem.rows.transpose_apply(row_dual)


def residuals(problem: Problem, x: Tensor, row_dual: Tensor, bound_dual: Tensor) -> Residuals:
    """Judge a point and its multipliers, in float64, whatever solver they came from.

    Args:
        problem: the problem.
        x: ``(B, n)``.
        row_dual: ``(B, m)``, in the sign convention of ``Solution``.
        bound_dual: ``(B, n)``.
    """
    x, y, w = x.double(), row_dual.double(), bound_dual.double()
    rows = RowValues.at(problem, x)
    l, u, value = rows.l, rows.u, rows.value
    lb, ub = problem.lb.double(), problem.ub.double()
    linear, Px = problem.linear.double(), problem.apply_quadratic(x)

    gap = Px + linear + problem.rows.transpose_apply(y) + w
    magnitude = Px.abs() + linear.abs() + rows.absolute.transpose_apply(y.abs()) + w.abs()
    stationarity = ratio(gap.abs().amax(-1), magnitude.amax(-1))

    primal = rows.relative
    primal = primal.amax(-1) if primal.shape[-1] else x.new_zeros(len(x))
    outside = ((x < lb) | (x > ub)).any(-1)
    primal = torch.where(outside, torch.inf, primal)

    row_wrong = wrong_sign(y, l, u)
    bound_wrong = wrong_sign(w, lb, ub)
    dual_sign = torch.maximum(
        ratio(row_wrong.amax(-1) if y.shape[-1] else x.new_zeros(len(x)), top(y)),
        ratio(bound_wrong.amax(-1), top(w)),
    )

    slack = (y.abs() * distance(value, y, l, u)).sum(-1) + (w.abs() * distance(x, w, lb, ub)).sum(
        -1
    )
    size = (
        (x * Px).abs().sum(-1)
        + (linear * x).abs().sum(-1)
        + (y * value).abs().sum(-1)
        + (w * x).abs().sum(-1)
        + unconstrained_size(problem)
    )
    return Residuals(stationarity, primal, dual_sign, ratio(slack, size))


def unconstrained_size(problem: Problem) -> Tensor:
    """sum_i q_i^2 / P_ii, the magnitude of the objective far from the constraints: ``(B,)``.

    Without it a solution at zero would have nothing to be relative to.
    """
    if isinstance(problem, QP):
        return (problem.q.double().square() / problem.diagonal()).sum(-1)
    return torch.zeros(len(problem.c), dtype=torch.float64, device=problem.c.device)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a <= 0, 0.0, a / b)  # 0 / 0 is 0, but NaN stays NaN


def top(y: Tensor) -> Tensor:
    return y.abs().amax(-1) if y.shape[-1] else y.new_zeros(len(y))


def wrong_sign(y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    wrong = ((y > 0) & torch.isinf(high)) | ((y < 0) & torch.isinf(low))
    return torch.where(wrong, y.abs(), 0.0)


def distance(value: Tensor, y: Tensor, low: Tensor, high: Tensor) -> Tensor:
    side = torch.where(y > 0, high, low)
    return torch.where((y != 0) & torch.isfinite(side), (value - side).abs(), 0.0)
