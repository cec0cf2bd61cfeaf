"""From a solver's answer to one that is exact to rounding.

A solver returns x and y to its own tolerance. Which rows and bounds are active can be read off them
(``fairopt.kkt``, "Activity"); with those known the exact solution is one linear system away. With
W the active rows, b their sides, F the free variables and T those at a bound,

    P_FF dx_F + A_WF^T dy = -(P x + q + A^T y)_F,     A_WF dx_F = b_W - A_W x,     x_T = the bounds.

The system is solved for a correction, not for x and y: its rounding then shrinks with the residual,
and what a singular system leaves open stays as the solver had it. If the active set of the new
point is another, the next step starts from there: the primal-dual active set method (Hintermüller,
Ito, Kunisch, The primal-dual active set strategy as a semismooth Newton method, SIAM J. Optim. 13,
2002). It has no safeguard against a start far away, where it may cycle.

Which of two points is better, the natural residual decides, relative to the size of its terms:

    bounds   d |x - clip(x - (P x + q + A^T y) / d, lb, ub)|       d the diagonal of P
    rows     |A x - clip(A x + |A_r|^2 y, l, u)|                   |.| in the metric of P^-1

It is zero at solutions and nowhere else. Where its clip acts, a row or bound is active.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fairopt.kkt import Reduced, least_norm, metric, solve_reduced
from fairopt.problem import LP, Problem
from fairopt.solution import ROW_PRECISION, TINY, Solution, Status, gradient

__all__ = ["Point", "finish", "proves_infeasible", "refine", "refined", "sharpen_proof"]

ROUNDS = 10  # steps from one active set to the next, which may cycle
ASCENTS = 100  # multipliers dropped one by one; each makes progress
EXACT = 1e-15  # relative to the size of the terms: nothing is left to correct
# Of the terms that x is the sum of: P^-1 q, and what a step cancels.
ROUNDING, CANCELLED = 1e-15, 1e-14
# A multiplier that moves its row by less than this share of the row's scale is taken for zero: the
# row is weakly active, which counts as inactive. Above rounding, below the promise of 1e-12.
WEAK = 1e-13
# A proof of infeasibility may take coefficients for zero that are this much smaller than the terms
# they are the sum of, and must exceed the sides by more than this share of its own terms.
PROOF = 1e-11
# In a solver's own proof, what is smaller than this share of its terms is meant to be zero.
MEANT = 1e-5


def refine(
    problem: Problem, x: Tensor, row_dual: Tensor, reduced: Reduced = solve_reduced
) -> tuple[Tensor, Tensor]:
    """A better point near (x, y), if there is one; usually exact to rounding.

    Args:
        problem: the problem; an ``LP`` counts as P = 0.
        x: ``(B, n)``, any float dtype; what is not finite is replaced by zero.
        row_dual: ``(B, m)``, in the sign convention of ``Solution``.
        reduced: what solves the linear systems.

    Returns:
        x within the bounds and y, float64, on the same device. Each problem of the batch keeps the
        better of the given point and those found.
    """
    found = refined(problem, x, row_dual, reduced)
    return found.x, found.y


def refined(
    problem: Problem, x: Tensor, row_dual: Tensor, reduced: Reduced = solve_reduced
) -> Point:
    """``refine``, with the active set and the error of what it found."""
    work = Refinement(problem, reduced)
    best = now = work.point(work.clip(finite(x)), finite(row_dual))
    steps, ascents = ROUNDS, ASCENTS
    while steps and ascents:
        new = work.or_zero(work.point(*work.step(now)), now)
        if bool((new.error <= EXACT).all()):  # as a rule, after one step
            best = new
            break
        best = best.or_better(new)
        same = (new.row_side == now.row_side).all(-1) & (new.bound_side == now.bound_side).all(-1)
        settled = same & ~(new.error < 0.5 * now.error)
        open_ = best.error > EXACT  # false for NaN, which does not get better either
        if bool((settled & open_).any()):
            y, moved = work.ascend(new, settled & open_)
            settled = settled & ~moved
            new = work.point(new.x, y)
            ascents -= 1
        else:
            steps -= 1
        if bool((settled | ~open_).all()):
            break
        now = new
    return replace(best, y=torch.where(best.weak, 0.0, best.y))


def finish(
    problem: Problem,
    x: Tensor,
    row_dual: Tensor,
    *,
    backend: str,
    status: tuple[Status, ...] | None = None,
    iterations: tuple[int, ...] = (),
    seconds: float = 0.0,
    context: Any = None,
    reduced: Reduced = solve_reduced,
    point: Point | None = None,
) -> Solution:
    """The ``Solution`` of a backend: refined, in the dtype of q or c, rounded inside the bounds.

    Args:
        problem, x, row_dual, reduced: as for ``refine``.
        status: one per problem, all ``SOLVED`` if left out. A problem with another status keeps
            its x, clipped, and its multipliers, which may be a proof.
        backend, iterations, seconds, context: as in ``Solution``.
        point: ``refined(problem, x, row_dual, reduced)``, where that is known already.
    """
    status = status or (Status.SOLVED,) * len(x)
    point = point or refined(problem, x, row_dual, reduced)
    exact, y = point.x, point.y
    failed = [b for b, one in enumerate(status) if one is not Status.SOLVED]
    if failed:
        where = torch.tensor(failed, device=x.device)
        kept = clipped(finite(x), problem.lb.double(), problem.ub.double())
        exact = exact.index_copy(0, where, kept[where])
        y = y.index_copy(0, where, finite(row_dual)[where])
    dtype = (problem.c if isinstance(problem, LP) else problem.q).dtype
    # Half of the promise: with a weak multiplier, a row may exceed its side by a little more.
    sure = dtype == torch.float64 and bool((point.error <= 0.5 * ROW_PRECISION[dtype]).all())
    return Solution(
        problem=problem,
        x=rounded_inside(exact, dtype, problem.lb, problem.ub),
        row_dual=y,
        status=status,
        backend=backend,
        iterations=iterations,
        seconds=seconds,
        context=context,
        verified=sure and not failed,
    )


def finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor.double(), nan=0.0, posinf=0.0, neginf=0.0)


def clipped(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, lower), upper)


def rounded_inside(x: Tensor, dtype: torch.dtype, lb: Tensor, ub: Tensor) -> Tensor:
    """x, which lies within the bounds, in another dtype and still within them."""
    if dtype == torch.float64:
        return x
    near = x.to(dtype)
    infinity = near.new_full((), torch.inf)
    near = torch.where(near > ub, torch.nextafter(near, -infinity), near)
    return torch.where(near < lb, torch.nextafter(near, infinity), near)


@dataclass
class Point:
    """x and y, and what is known of them.

    Attributes:
        row_side, bound_side: +1 where the upper side is active, -1 the lower, 0 neither.
        weak: rows whose multiplier counts as zero.
        error: the natural residual, ``(B,)``.
    """

    x: Tensor
    y: Tensor
    row_side: Tensor
    bound_side: Tensor
    weak: Tensor
    error: Tensor

    def or_better(self, other: Point) -> Point:
        """Problem by problem, the one with the smaller error."""
        better = (other.error < self.error) | torch.isnan(self.error)
        pick = {
            name: torch.where(better.unsqueeze(-1) if old.dim() == 2 else better, new, old)
            for (name, old), new in zip(vars(self).items(), vars(other).values(), strict=True)
        }
        return Point(**pick)


class Refinement:
    """A problem in float64, and what all rounds share."""

    def __init__(self, problem: Problem, reduced: Reduced = solve_reduced) -> None:
        self.problem = problem
        self.reduced = reduced
        self.l, self.u = problem.l.double(), problem.u.double()
        self.lb, self.ub = problem.lb.double(), problem.ub.double()
        self.meet, self.fixed = self.l == self.u, self.lb == self.ub
        self.d = metric(problem)
        self.linear = (problem.c if isinstance(problem, LP) else problem.q).double()
        self.rounding = ROUNDING * (self.linear / self.d).abs().amax(-1)
        self.row_metric = problem.rows.norms(1 / self.d).square()
        ones = self.linear.new_ones(()).expand_as(self.linear)
        self.row_sum = problem.rows.absolute().apply(ones)

    def clip(self, x: Tensor) -> Tensor:
        return clipped(x, self.lb, self.ub)

    def point(self, x: Tensor, y: Tensor) -> Point:
        """Judge x, which lies within the bounds, and y."""
        rows = self.problem.rows
        Aty = rows.transpose_apply(y)
        Px = (
            torch.zeros_like(x) if isinstance(self.problem, LP) else self.problem.apply_quadratic(x)
        )
        goal = x - (Px + self.linear + Aty) / self.d
        above = (goal > self.ub) | self.fixed
        bound_side = above.to(torch.int8) - ((goal < self.lb) & ~above).to(torch.int8)
        size = (Px.abs() + self.linear.abs() + Aty.abs()).amax(-1) + TINY
        error = (self.d * (x - self.clip(goal)).abs()).amax(-1) / size
        if not y.shape[-1]:
            return Point(x, y, y.to(torch.int8), bound_side, y.bool(), error)

        value, pull = rows.apply(x), y * self.row_metric
        side = torch.where(value - self.u > self.l - value, self.u, self.l).abs()
        scale = self.row_sum * x.abs().amax(-1, keepdim=True) + side + TINY
        row_goal, weak = value + pull, WEAK * scale
        upper = torch.where(self.meet, row_goal >= self.u, row_goal > self.u + weak)
        lower = torch.where(self.meet, ~upper, row_goal < self.l - weak)
        gap = torch.where(upper, value - self.u, torch.where(lower, value - self.l, pull))
        return Point(
            x,
            y,
            upper.to(torch.int8) - lower.to(torch.int8),
            bound_side,
            ~self.meet & (pull.abs() <= weak),
            torch.maximum(error, (gap.abs() / scale).amax(-1)),
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
        """Multipliers with another active set, ``(B, m)``, and which problems got such, ``(B,)``.

        Args:
            stuck: ``(B,)``, where the active set is the step's own answer, though no point meets
                all of its sides: a row is taken for active that is not, and depends on others.

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
        sinks = (p.y * t < 0) & ~self.meet
        row_end = torch.where(sinks, -p.y / t, torch.inf)
        w, change = -gradient(self.problem, p.x, p.y), -rows.transpose_apply(t)
        sinks = held & (w * change < 0) & ~self.fixed
        bound_end = torch.where(sinks, -w / change, torch.inf)
        end = torch.cat([row_end, bound_end], -1).amin(-1)  # there may be no rows
        moved = torch.isfinite(end) & (end > 0)
        # A little further than the end, or rounding may stop short of it.
        alpha = torch.where(moved, (1 + 1e-6) * end, 0.0)
        return p.y + alpha.unsqueeze(-1) * t, moved


# ---------------------------------------------------------------------------------------------
# Proofs of infeasibility (Farkas)
#
# With a = A^T y, every x within the bounds has y.(A x) = a.x >= sum_i min(a_i lb_i, a_i ub_i), and
# every x that satisfies the rows has y.(A x) <= sum_r y_r (u_r if y_r > 0, else l_r). If the first
# number exceeds the second there is no such x.
# ---------------------------------------------------------------------------------------------


def proves_infeasible(problem: Problem, y: Tensor) -> Tensor:
    """Whether y, ``(B, m)``, proves that no point satisfies rows and bounds: ``(B,)``, bool.

    Coefficients a_i that are zero but for rounding count as zero where a bound is infinite.
    """
    y = y.double()
    a = problem.rows.transpose_apply(y)
    zero = a.abs() <= PROOF * problem.rows.absolute().transpose_apply(y.abs())
    corner = torch.where(a > 0, problem.lb.double(), problem.ub.double())
    least = torch.where((a == 0) | (zero & torch.isinf(corner)), 0.0, a * corner)
    side = torch.where(y > 0, problem.u.double(), problem.l.double())
    most = torch.where(y == 0, 0.0, y * side)
    size = least.abs().sum(-1) + most.abs().sum(-1)
    gap = least.sum(-1) - most.sum(-1)
    return torch.isfinite(gap) & (gap > PROOF * size)


def sharpen_proof(problem: Problem, y: Tensor) -> Tensor:
    """A solver's approximate proof of infeasibility made exact where that is possible: ``(B, m)``.

    Multipliers that push to a side that is not there, or are negligible, become zero. From the
    others the part is removed that gives variables without bounds a coefficient.
    """
    y = finite(y)
    pushed = torch.where(y > 0, problem.u.double(), problem.l.double())
    length = problem.rows.norms(metric(problem).new_ones(()).expand_as(problem.lb))
    share = y.abs() * length
    support = torch.isfinite(pushed)
    if y.shape[-1]:
        support = support & (share > 1e-7 * share.amax(-1, keepdim=True))
    y = torch.where(support, y, 0.0)
    a = problem.rows.transpose_apply(y)
    small = a.abs() <= MEANT * problem.rows.absolute().transpose_apply(y.abs())
    no_lower, no_upper = torch.isinf(problem.lb), torch.isinf(problem.ub)
    unbounded = torch.where(small, no_lower | no_upper, torch.where(a > 0, no_lower, no_upper))
    N, c = problem.rows.factor(unbounded.double(), a)
    return y + least_norm(N * support.unsqueeze(-1), c)
