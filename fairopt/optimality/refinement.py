"""Points, their error, and one step of refinement; ``optimality.finishing`` takes the steps.

With W the active rows, b their sides, F the free variables and T those at a bound, the step is

    P_FF dx_F + A_WF^T dy = -(P x + q + A^T y)_F,     A_WF dx_F = b_W - A_W x,     x_T = the bounds,

and how far a point is from a solution, its natural residual, relative to the size of its terms,

    bounds   d |x - clip(x - (P x + q + A^T y) / d, lb, ub)|       d the diagonal of P
    rows     |A x - clip(A x + |A_r|^2 y, l, u)|                   |.| in the metric of P^-1

It is zero at solutions and nowhere else. Where its clip acts, a row or bound is active.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fairopt.optimality.linear_systems import Reduced, metric, solve_reduced
from fairopt.programs.problem import Problem
from fairopt.programs.rows.base import Rows
from fairopt.programs.solution import gradient
from fairopt.tolerances import BEYOND, CANCELLED, CLEAR, EXACT, ROUNDING_OF_TERMS, TINY, WEAK


@dataclass
class Point:
    """x and y with their active set and error.

    Attributes:
        row_side, bound_side: +1 where the upper side is active, -1 the lower, 0 neither.
        weak: rows whose multiplier counts as zero.
        error: the natural residual, ``(B,)``.
        clear: whether nothing is near to changing its side, ``(B,)``, bool.
    """

    x: Tensor
    y: Tensor
    row_side: Tensor
    bound_side: Tensor
    weak: Tensor
    error: Tensor
    clear: Tensor

    def or_better(self, other: Point) -> Point:
        """Problem by problem, the one with the smaller error."""
        better = (other.error < self.error) | torch.isnan(self.error)
        pick = {
            name: torch.where(better.unsqueeze(-1) if old.dim() == 2 else better, new, old)
            for (name, old), new in zip(vars(self).items(), vars(other).values(), strict=True)
        }
        return Point(**pick)


class Refinement:
    """A problem in float64, and the quantities that all rounds share."""

    def __init__(self, problem: Problem, reduced: Reduced = solve_reduced) -> None:
        self.problem = problem
        self.reduced = reduced
        self.l, self.u = problem.l.double(), problem.u.double()
        self.lb, self.ub = problem.lb.double(), problem.ub.double()
        self.d = metric(problem)
        self.linear = problem.linear.double()

    @cached_property
    def equality(self) -> Tensor:
        return self.l == self.u

    @cached_property
    def fixed(self) -> Tensor:
        return self.lb == self.ub

    @cached_property
    def absolute(self) -> Rows:
        return self.problem.rows.absolute()

    @cached_property
    def row_metric(self) -> Tensor:
        return self.problem.rows.norms(1 / self.d).square()

    @cached_property
    def row_sum(self) -> Tensor:
        return self.absolute.apply(self.linear.new_ones(()).expand_as(self.linear))

    @cached_property
    def rounding(self) -> Tensor:
        return ROUNDING_OF_TERMS * (self.linear / self.d).abs().amax(-1)

    def clip(self, x: Tensor) -> Tensor:
        return clipped(x, self.lb, self.ub)

    def start(self, x: Tensor, y: Tensor) -> Point:
        """Judge any x and y: numbers that are not finite become zero, and x is clipped."""
        return self.point(self.clip(finite(x)), finite(y))

    def point(self, x: Tensor, y: Tensor) -> Point:
        """Judge x, which lies within the bounds, and y."""
        rows = self.problem.rows
        Aty = rows.transpose_apply(y)
        Px = self.problem.apply_quadratic(x)
        goal = x - (Px + self.linear + Aty) / self.d
        above = (goal > self.ub) | self.fixed
        bound_side = above.to(torch.int8) - ((goal < self.lb) & ~above).to(torch.int8)
        size = (Px.abs() + self.linear.abs() + Aty.abs()).amax(-1) + TINY
        error = (self.d * (x - self.clip(goal)).abs()).amax(-1) / size
        largest = x.abs().amax(-1, keepdim=True)
        terms = Px.abs() + self.linear.abs() + self.absolute.transpose_apply(y.abs())
        near = CLEAR * (largest + terms.amax(-1, keepdim=True) / self.d)
        to_side = torch.minimum((goal - self.ub).abs(), (goal - self.lb).abs())
        clear = (self.fixed | (to_side > near)).all(-1)
        if not y.shape[-1]:
            return Point(x, y, y.to(torch.int8), bound_side, y.bool(), error, clear)

        value, pull = rows.apply(x), y * self.row_metric
        side = torch.where(value - self.u > self.l - value, self.u, self.l).abs()
        scale = self.row_sum * largest + side + TINY
        row_goal, weak = value + pull, WEAK * scale
        upper = torch.where(self.equality, row_goal >= self.u, row_goal > self.u + weak)
        lower = torch.where(self.equality, ~upper, row_goal < self.l - weak)
        gap = torch.where(upper, value - self.u, torch.where(lower, value - self.l, pull))
        to_side = torch.minimum((row_goal - self.u).abs(), (row_goal - self.l).abs())
        return Point(
            x,
            y,
            upper.to(torch.int8) - lower.to(torch.int8),
            bound_side,
            ~self.equality & (pull.abs() <= weak),
            torch.maximum(error, (gap.abs() / scale).amax(-1)),
            clear & (self.equality | (to_side > CLEAR * scale)).all(-1),
        )

    def or_zero(self, p: Point, before: Point) -> Point:
        """Zero, if that is better, where all of x is the rounding of its terms.

        Such an x may have no correct digit, and rows whose sides are zero have nothing to be
        relative to.

        Args:
            before: where the step to p started.
        """
        limit = torch.maximum(self.rounding, CANCELLED * before.x.abs().amax(-1))
        tiny = (p.x.abs().amax(-1) <= limit) & (p.error > EXACT)
        if not bool(tiny.any()):
            return p
        x = self.clip(torch.where(tiny.unsqueeze(-1), 0.0, p.x))
        return p.or_better(self.point(x, p.y))

    def step(self, p: Point) -> tuple[Tensor, Tensor]:
        """The correction above from a point, clipped into the bounds."""
        active, free = p.row_side != 0, p.bound_side == 0
        x = torch.where(free, p.x, torch.where(p.bound_side > 0, self.ub, self.lb))
        y = torch.where(active, p.y, 0.0)
        side = torch.where(p.row_side > 0, self.u, self.l)
        miss = torch.where(active, side - self.problem.rows.apply(x), 0.0)
        dx, dy = self.reduced(
            self.problem, active, free, self.d, -gradient(self.problem, x, y), miss
        )
        return self.clip(x + dx), y + dy

    def ascend(self, p: Point, stuck: Tensor) -> tuple[Tensor, Tensor]:
        """Multipliers with another active set, ``(B, m)``, and which problems got one, ``(B,)``.

        Args:
            stuck: ``(B,)``, where the active set is the step's own answer, though no point meets
                all of its sides: a row is taken for active that is not, and that depends on others.

        With e = b_W - A_W x the misses, made as small as any x can, t = -e on rows scaled to unit
        length satisfies A_WF^T t = 0: x does not move along y + alpha t, and the dual objective
        rises. At some alpha a multiplier becomes zero, of a row or of a bound, and leaves the
        active set. (A partial step of the dual method: Goldfarb and Idnani, A numerically stable
        dual method for solving strictly convex quadratic programs, Math. Program. 27, 1983.)
        """
        rows = self.problem.rows
        side = torch.where(p.row_side > 0, self.u, self.l)
        miss = torch.where(p.row_side != 0, side - rows.apply(p.x), 0.0)
        scale = self.row_sum * p.x.abs().amax(-1, keepdim=True) + side.abs() + TINY
        miss = torch.where(miss.abs() > EXACT * scale, miss, 0.0)
        held = p.bound_side != 0
        free_part = rows.norms(torch.where(held, 0.0, 1 / self.d)).square()
        length = torch.where(free_part > 0, free_part, self.row_metric)
        t = torch.where(stuck.unsqueeze(-1) & (length > 0), -miss / length, 0.0)

        # Equalities may have multipliers of either sign.
        sinks = (p.y * t < 0) & ~self.equality
        row_end = torch.where(sinks, -p.y / t, torch.inf)
        w, change = -gradient(self.problem, p.x, p.y), -rows.transpose_apply(t)
        sinks = held & (w * change < 0) & ~self.fixed
        bound_end = torch.where(sinks, -w / change, torch.inf)
        end = torch.cat([row_end, bound_end], -1).amin(-1)  # there may be no rows
        moved = torch.isfinite(end) & (end > 0)
        # A little further than the end, or rounding may stop short of it.
        alpha = torch.where(moved, (1 + BEYOND) * end, 0.0)
        return p.y + alpha.unsqueeze(-1) * t, moved


def finite(tensor: Tensor) -> Tensor:
    """In float64, zero where it was not finite."""
    return torch.nan_to_num(tensor.double(), nan=0.0, posinf=0.0, neginf=0.0)


def clipped(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """x inside the bounds; NaN stays NaN.

    At a bound the derivative is 1 by x and 0 by the bound: a weakly active bound counts as
    inactive. That of ``torch.clamp`` depends on the version of torch (by x it is 1 up to 2.13).
    """
    return torch.where(x < lower, lower, torch.where(x > upper, upper, x))
