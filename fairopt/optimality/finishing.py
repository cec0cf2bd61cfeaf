"""From a solver's answer to one that is exact to rounding.

A solver returns x and y to its own tolerance. Which rows and bounds are active can be read off them
(``optimality.active_sets``); with those known the exact solution is one linear system
away (``optimality.refinement``). The system is solved for a correction, not for x and y: its
rounding then shrinks with the residual, and where the system is singular the solver's own answer
remains. If the active set of the new point is another, the next step starts from there: the
primal-dual active set method (Hintermüller, Ito, Kunisch, The primal-dual active set strategy as a
semismooth Newton method, SIAM J. Optim. 13, 2002). It has no safeguard against a start far away,
where it may cycle. Which of two points is better, the natural residual decides.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fairopt.optimality.linear_systems import Reduced, has_cells, solve_reduced
from fairopt.optimality.refinement import Point, Refinement, clipped, finite
from fairopt.programs.problem import Problem
from fairopt.programs.solution import Solution, Status
from fairopt.tolerances import EXACT, ROW_PRECISION

ROUNDS = 10  # steps from one active set to the next, which may cycle
ASCENTS = 100  # multipliers dropped one by one; each makes progress


def refine(
    problem: Problem, x: Tensor, row_dual: Tensor, reduced: Reduced = solve_reduced
) -> tuple[Tensor, Tensor]:
    """A better point near (x, y), if there is one; usually exact to rounding.

    Args:
        problem: the problem; an ``LP`` counts as P = 0.
        x: ``(B, n)``, any float dtype; numbers that are not finite are replaced by zero.
        row_dual: ``(B, m)``, in the sign convention of ``Solution``.
        reduced: the solver of the linear systems.

    Returns:
        x within the bounds and y, float64, on the same device. Each problem of the batch keeps the
        best of the given point and those on the way.
    """
    point = refined(problem, x, row_dual, reduced)
    return point.x, point.y


def refined(
    problem: Problem, x: Tensor, row_dual: Tensor, reduced: Reduced = solve_reduced
) -> Point:
    """``refine``, with the active set and the error of the point."""
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
        inexact = best.error > EXACT  # false for NaN, which does not get better either
        if bool((settled & inexact).any()):
            y, moved = work.ascend(new, settled & inexact)
            settled = settled & ~moved
            new = work.point(new.x, y)
            ascents -= 1
        else:
            steps -= 1
        if bool((settled | ~inexact).all()):
            break
        now = new
    return replace(best, y=torch.where(best.weak, 0.0, best.y))


def refinement(problem: Problem, reduced: Reduced) -> Refinement:
    """The judge of points, which also takes steps: compiled where the structure allows."""
    if reduced is not solve_reduced or not has_cells(problem):
        return Refinement(problem, reduced)
    from fairopt.optimality.compiled_cells import CellRefinement  # and Numba

    return CellRefinement(problem)


def finish(
    problem: Problem,
    x: Tensor,
    row_dual: Tensor,
    *,
    backend: str,
    status: tuple[Status, ...] | None = None,
    iterations: tuple[int, ...] = (),
    reduced: Reduced = solve_reduced,
    point: Point | None = None,
) -> Solution:
    """The ``Solution`` of a backend: refined, in the dtype of q or c, rounded inside the bounds.

    Args:
        problem, x, row_dual, reduced: as for ``refine``.
        status: one per problem, all ``SOLVED`` if left out. A problem with another status keeps
            its x, clipped, and its multipliers, which may be a proof.
        backend, iterations: as in ``Solution``.
        point: ``refined(problem, x, row_dual, reduced)``, where that is known already.
    """
    status = status or (Status.SOLVED,) * len(x)
    point = point or refined(problem, x, row_dual, reduced)
    exact, y = point.x, point.y
    failed = [b for b, one in enumerate(status) if one is not Status.SOLVED]
    if failed:
        where = torch.tensor(failed, device=x.device)
        unchanged = clipped(finite(x), problem.lb.double(), problem.ub.double())
        exact = exact.index_copy(0, where, unchanged[where])
        y = y.index_copy(0, where, finite(row_dual)[where])
    dtype = problem.linear.dtype
    # Half of the promise: with a weak multiplier, a row may exceed its side by a little more.
    sure = dtype == torch.float64 and bool((point.error <= 0.5 * ROW_PRECISION[dtype]).all())
    return Solution(
        problem=problem,
        x=rounded_inside(exact, dtype, problem.lb, problem.ub),
        row_dual=y,
        status=status,
        backend=backend,
        iterations=iterations,
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
