"""Which rows and bounds are active at a solution, and with which multipliers.

Activity. The upper side of a row is active if its multiplier exceeds its slack, y |A_r|^2 > u - a x
with |.| in the metric of P^-1 (so that both sides have one unit); an equality row is always active;
the same for bounds. The rule needs no threshold, and it is right also at a solver's own accuracy.

A weakly active row or bound (its multiplier is zero but for rounding, and so is its slack) counts
as inactive, in every backend: the gradient passes as if the side were not there. This is one
element of the generalised Jacobian. For a single bound it means d clip(s, lb, ub) / ds = 1 at
s = lb and at s = ub (``optimality.refinement.clipped``). ``torch.clamp`` has had either convention,
depending on its version, and does not define ours.

Where several multipliers belong to x the minimum-norm one decides (``optimality.minimum_norm``;
jointly with the bounds, ``optimality.degenerate_bounds``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fairopt.optimality.degenerate_bounds import (
    MultiplierSet,
    TightSides,
    adjoint_rows,
    degenerate_at_bounds,
)
from fairopt.optimality.linear_systems import least_norm
from fairopt.optimality.minimum_norm import are_dependent, minimum_norm, support
from fairopt.programs.problem import QP, Problem
from fairopt.programs.solution import RowValues, Solution
from fairopt.tolerances import ROW_PRECISION, ZERO_MULTIPLIER


def active_sides(
    multiplier: Tensor, value: Tensor, low: Tensor, high: Tensor, metric: Tensor
) -> Tensor:
    """+1 where the upper side is active, -1 where the lower is, 0 where neither; see above.

    Of an equality the sign of the multiplier decides (+1 if it is zero).
    """
    push = multiplier * metric
    upper, lower = push > high - value, -push > value - low
    equality = high == low
    side = torch.where(upper & (push > 0), 1, torch.where(lower & (push < 0), -1, 0))
    return torch.where(equality, torch.where(push < 0, -1, 1), side)


def row_sides(problem: QP, solution: Solution, d: Tensor) -> Tensor:
    """``active_sides`` of the rows, ``(B, m)``."""
    x = solution.x.detach().double()
    metric = problem.rows.norms(1 / d).square()
    return active_sides(
        solution.row_dual, problem.rows.apply(x), problem.l.double(), problem.u.double(), metric
    )


def bound_sides(problem: QP, solution: Solution, d: Tensor) -> Tensor:
    """``active_sides`` of the bounds, ``(B, n)``."""
    x = solution.x.detach().double()
    return active_sides(solution.bound_dual, x, problem.lb.double(), problem.ub.double(), 1 / d)


def tight_sides(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which upper and which lower sides x meets, to the promised precision: ``(B, m)``, bool."""
    limit = ROW_PRECISION[x.dtype]
    rows = RowValues.at(problem, x.detach())
    value, scale, u, l = rows.value, rows.scale, rows.u, rows.l
    upper = torch.isfinite(u) & (u - value <= limit * (scale + u.abs()))
    lower = torch.isfinite(l) & (value - l <= limit * (scale + l.abs()))
    return upper, lower


def tight_bounds(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which upper and which lower bounds x meets, to the promised precision: ``(B, n)``, bool."""
    limit = ROW_PRECISION[x.dtype]
    x = x.detach().double()
    ub, lb = problem.ub.double(), problem.lb.double()
    size = x.abs().amax(-1, keepdim=True)
    upper = torch.isfinite(ub) & (ub - x <= limit * (size + ub.abs()))
    lower = torch.isfinite(lb) & (x - lb <= limit * (size + lb.abs()))
    return upper, lower


def force(problem: QP, x: Tensor, d: Tensor) -> Tensor:
    """The length of |P x| + |q| in the metric of P^-1: the magnitude of multipliers.

    ``(B, 1)``.
    """
    terms = problem.apply_quadratic(x.detach().double()).abs() + problem.q.double().abs()
    length: Tensor = torch.linalg.vector_norm(terms * d.rsqrt(), dim=-1, keepdim=True)
    return length


def tight_at(problem: QP, solution: Solution, row_side: Tensor, free: Tensor) -> TightSides:
    """All sides that x meets or is pushed to, whether or not they have a multiplier."""
    upper, lower = tight_sides(problem, solution.x)
    ub, lb = tight_bounds(problem, solution.x)
    equality = problem.l == problem.u
    return TightSides(
        upper=upper | equality | (row_side > 0),
        lower=lower | equality | (row_side < 0),
        ub=ub,
        lb=lb,
        inside=free & ~(ub | lb),
    )


def degenerate_problems(
    problem: QP, solution: Solution, tight: TightSides, d: Tensor, N: Tensor
) -> Iterator[tuple[Tensor, int, MultiplierSet]]:
    """The problems that are degenerate at bounds: each as a mask ``(B, 1)``, its number, its set.

    Args:
        N: ``problem.rows.factor`` on the variables strictly inside.
    """
    degenerate = degenerate_at_bounds(problem, tight, d, N)
    index = torch.arange(len(d), device=d.device)
    for b in degenerate.nonzero().squeeze(-1).tolist():
        size = float(force(problem, solution.x, d)[b])
        y, w = solution.row_dual, solution.bound_dual
        yield (index == b).unsqueeze(-1), b, MultiplierSet(problem, b, y, w, tight, N, d, size)


def active_set(problem: QP, solution: Solution, d: Tensor) -> tuple[Tensor, Tensor]:
    """Active rows and free variables, also where several multipliers belong to x.

    The support of the solver's multiplier has them all except where several of its zeros at bounds
    coincide (``optimality.degenerate_bounds``), or tight rows depend on each other
    (``optimality.minimum_norm``).
    """
    row_side = row_sides(problem, solution, d)
    active, free = row_side != 0, bound_sides(problem, solution, d) == 0
    tight = tight_at(problem, solution, row_side, free)
    weak = free & ~tight.inside
    extra = (tight.upper | tight.lower) & ~active
    if not bool(weak.any() | extra.any()):  # as a rule; asked once, because a GPU must wait for it
        return active, free
    if bool(weak.any()):
        N, _ = problem.rows.factor(torch.where(tight.inside, 1 / d, 0.0), d)
        for mask, _, multipliers in degenerate_problems(problem, solution, tight, d, N):
            rows, held = multipliers.support()
            active, free = active | (mask & rows), free & ~(mask & held)
    N, _ = problem.rows.factor(torch.where(free, 1 / d, 0.0), d)
    return support(N, solution.row_dual, active, tight.upper, tight.lower), free


@dataclass(frozen=True)
class Multipliers:
    """The multipliers and adjoint variables at which gradients are taken.

    Attributes:
        y, nu: ``(B, m)``.
        side: the side that each row is pushed to, ``(B, m)``. An equality row is pushed to the one
            that the sign of y tells, and to both alike (0) where y is zero.
        bound_side: the same for bounds, ``(B, n)``, where fixed variables are pushed to the upper
            one if w is zero.
    """

    y: Tensor
    nu: Tensor
    side: Tensor
    bound_side: Tensor


def minimum_norm_multipliers(
    problem: QP, solution: Solution, g: Tensor, v: Tensor, nu: Tensor
) -> Multipliers:
    """The multipliers of ``optimality.minimum_norm`` and ``optimality.degenerate_bounds``.

    Where tight rows depend on each other, or hold the same variables as bounds, the gradients of
    rows, sides and bounds depend on which multipliers are taken, so these are the minimum-norm
    ones: every backend has the same.

    Args:
        g: dL/dx, ``(B, n)``.
        v, nu: the adjoint variables.
    """
    d = problem.diagonal()
    row_side, bound_side = row_sides(problem, solution, d), bound_sides(problem, solution, d)
    free = bound_side == 0
    tight = tight_at(problem, solution, row_side, free)
    equality = problem.l == problem.u
    y = solution.row_dual
    zero = y.abs() * problem.rows.norms(1 / d) <= ZERO_MULTIPLIER * force(problem, solution.x, d)
    side = torch.where(equality, torch.where(zero, 0.0, y.sign()), row_side.double())
    whole = g.double() + problem.apply_quadratic(v)
    N, c = problem.rows.factor(torch.where(free, 1 / d, 0.0), whole)
    dependent = are_dependent(N, tight.upper | tight.lower).unsqueeze(-1)
    if bool(dependent.any()):
        given = torch.where(equality & zero, 0.0, y)
        least_y = minimum_norm(N, given, tight.upper, tight.lower)
        least_nu = least_norm(N * ((least_y != 0) | equality).unsqueeze(-1), c)
        y, nu = torch.where(dependent, least_y, y), torch.where(dependent, least_nu, nu)
        side = torch.where(dependent, least_y.sign(), side)

    if not torch.equal(tight.inside, free):
        N, _ = problem.rows.factor(torch.where(tight.inside, 1 / d, 0.0), whole)
    for mask, b, multipliers in degenerate_problems(problem, solution, tight, d, N):
        least = multipliers.minimum_norm()
        least_nu = adjoint_rows(problem, b, least, whole, tight.inside, d)
        pushed = torch.where(tight.ub & tight.lb, least.w, tight.ub.double() - tight.lb.double())
        fixed = torch.where(least.w < 0, -1, 1)
        pushed = torch.where(problem.lb == problem.ub, fixed, pushed.sign())
        y, nu = torch.where(mask, least.y, y), torch.where(mask, least_nu, nu)
        side = torch.where(mask, least.y.sign(), side)
        bound_side = torch.where(mask, pushed, bound_side)
    return Multipliers(y, nu, side, bound_side)
