"""From a solver's answer to one that is exact to rounding.

A solver returns x and y to its own tolerance. Which rows and bounds are active can be read off them
(``optimality.derivative``, "Activity"); with those known the exact solution is one linear system
away (``optimality.refinement``). The system is solved for a correction, not for x and y: its
rounding then shrinks with the residual, and what a singular system leaves open stays as the solver
had it. If the active set of the new point is another, the next step starts from there: the
primal-dual active set method (Hintermüller, Ito, Kunisch, The primal-dual active set strategy as a
semismooth Newton method, SIAM J. Optim. 13, 2002). It has no safeguard against a start far away,
where it may cycle. Which of two points is better, the natural residual decides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fairopt.optimality.derivative import Reduced, has_cells, metric, solve_reduced
from fairopt.optimality.least_squares import least_norm
from fairopt.optimality.refinement import EXACT, Point, Refinement, clipped, finite
from fairopt.programs.problem import LP, Problem
from fairopt.programs.solution import Solution, Status
from fairopt.tolerances import ROW_PRECISION

__all__ = ["finish", "proves_infeasible", "refine", "refined", "sharpen_proof"]

ROUNDS = 10  # steps from one active set to the next, which may cycle
ASCENTS = 100  # multipliers dropped one by one; each makes progress
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
    work = refinement(problem, reduced)
    best = now = work.start(x, row_dual)
    steps, ascents = ROUNDS, ASCENTS
    while steps and ascents:
        new = work.point(*work.step(now))
        if bool((new.error <= EXACT).all()):  # as a rule, after one step
            best = new
            break
        new = work.or_zero(new, now)
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


def refinement(problem: Problem, reduced: Reduced) -> Refinement:
    """What judges points and takes steps: compiled where the structure allows."""
    if reduced is not solve_reduced or not has_cells(problem):
        return Refinement(problem, reduced)
    from fairopt.optimality.cell_refinement import CellRefinement  # and Numba

    return CellRefinement(problem)


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
        sides=(point.row_side != 0, point.bound_side == 0)
        if sure and not failed and bool(point.clear.all())
        else None,
    )


def rounded_inside(x: Tensor, dtype: torch.dtype, lb: Tensor, ub: Tensor) -> Tensor:
    """x, which lies within the bounds, in another dtype and still within them."""
    if dtype == torch.float64:
        return x
    near = x.to(dtype)
    infinity = near.new_full((), torch.inf)
    near = torch.where(near > ub, torch.nextafter(near, -infinity), near)
    return torch.where(near < lb, torch.nextafter(near, infinity), near)


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
