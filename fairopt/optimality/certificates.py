"""Proofs that a problem has no solution: no point satisfies it, or its objective falls for ever.

Infeasible (Farkas). With t = A^T y, every x within the bounds has
y.(A x) = t.x >= sum_i min(t_i lb_i, t_i ub_i), and every x that satisfies the rows has
y.(A x) <= sum_r y_r side_r, where side_r is u_r if y_r > 0 and else l_r. Their difference

    D(y) = min over the bounds of t.x  -  sum_r y_r side_r

is therefore a lower bound on the total violation of the rows, for -1 <= y <= 1, and if it is
positive there is no such x.

Unbounded. If the problem has a point and there is a direction d with P d = 0 and q.d < 0 that no
row and no bound ever stops, the objective falls without end along d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairopt.optimality.linear_systems import least_norm
from fairopt.optimality.refinement import finite
from fairopt.programs.problem import LP, Problem
from fairopt.tolerances import MEANT, MEANT_MULTIPLIER, PROOF, PROOF_SUPPORT, RECESSION


def dual_value(problem: Problem, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """D(y) and the sum of the sizes of its terms, both ``(B,)``.

    Args:
        t: A^T y, ``(B, n)``, zero where it is that but for rounding.
    """
    corner = torch.where(t > 0, problem.lb, problem.ub).double()
    least = torch.where(t == 0, 0.0, t * corner)
    side = torch.where(y > 0, problem.u, problem.l).double()
    most = torch.where(y == 0, 0.0, y * side)
    return least.sum(-1) - most.sum(-1), least.abs().sum(-1) + most.abs().sum(-1)


def proves_infeasible(problem: Problem, y: Tensor) -> Tensor:
    """Whether y, ``(B, m)``, proves that no point satisfies rows and bounds: ``(B,)``, bool.

    Coefficients t_i that are zero but for rounding count as zero where a bound is infinite.
    """
    y = y.double()
    t = problem.rows.transpose_apply(y)
    zero = t.abs() <= PROOF * problem.rows.absolute().transpose_apply(y.abs())
    corner = torch.where(t > 0, problem.lb, problem.ub)
    value, size = dual_value(problem, y, torch.where(zero & torch.isinf(corner), 0.0, t))
    return torch.isfinite(value) & (value > PROOF * size)


def first_proof(problem: Problem, *candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Whether one of these proves infeasibility, ``(B,)``, and the first that does, ``(B, m)``.

    Of a problem that none proves infeasible the last candidate is returned.
    """
    proven, y = proves_infeasible(problem, candidates[-1]), candidates[-1]
    for candidate in reversed(candidates[:-1]):
        better = proves_infeasible(problem, candidate)
        proven, y = proven | better, torch.where(better.unsqueeze(-1), candidate, y)
    return proven, y


def sharpen_proof(problem: Problem, y: Tensor) -> Tensor:
    """A solver's approximate proof of infeasibility made exact where that is possible: ``(B, m)``.

    Multipliers that push to an infinite side, or are negligible, become zero. From the others the
    part is removed that gives variables without bounds a coefficient.
    """
    y = finite(y)
    side = torch.where(y > 0, problem.u.double(), problem.l.double())
    share = y.abs() * problem.rows.norms(torch.ones_like(problem.lb, dtype=torch.float64))
    support = torch.isfinite(side)
    if y.shape[-1]:
        support = support & (share > MEANT_MULTIPLIER * share.amax(-1, keepdim=True))
    y = torch.where(support, y, 0.0)
    t = problem.rows.transpose_apply(y)
    small = t.abs() <= MEANT * problem.rows.absolute().transpose_apply(y.abs())
    no_lower, no_upper = torch.isinf(problem.lb), torch.isinf(problem.ub)
    unbounded = torch.where(small, no_lower | no_upper, torch.where(t > 0, no_lower, no_upper))
    N, c = problem.rows.factor(unbounded.double(), t)
    return y + least_norm(N * support.unsqueeze(-1), c)


def proof_support(y: Tensor) -> Tensor:
    """Which rows have a part in a proof of infeasibility: as y, bool."""
    share = y.abs()
    return share > PROOF_SUPPORT * (share.amax(-1, keepdim=True) if share.shape[-1] else 0.0)


def proves_unbounded(problem: Problem, d: Tensor) -> Tensor:
    """Whether the objective, if the problem has a point, falls without end along d: ``(B,)``.

    Args:
        d: ``(B, n)``, float64.
    """
    q = problem.linear.double()
    size = d.abs().amax(-1, keepdim=True)
    lb, ub, l, u = map(recession_side, (problem.lb, problem.ub, problem.l, problem.u))
    stays = ((d <= ub) & (d >= lb)).all(-1)
    value = problem.rows.apply(d)
    room = RECESSION * problem.rows.absolute().apply(size.expand_as(d))
    stays = stays & ((value <= u + room) & (value >= l - room)).all(-1)
    if not isinstance(problem, LP):
        P = problem.tensors[0].double()
        largest = P.abs().flatten(1).amax(-1, keepdim=True)  # which is on the diagonal
        flat = problem.apply_quadratic(d).abs() <= RECESSION * largest * size
        stays = stays & flat.all(-1)
    fall = (q * d).sum(-1)
    steep = torch.linalg.vector_norm(q, dim=-1) * torch.linalg.vector_norm(d, dim=-1)
    proven: Tensor = stays & (fall < -RECESSION * steep)
    return proven


def recession_side(side: Tensor) -> Tensor:
    """The side of the directions that never reach this one: zero, or infinite as the side is."""
    return torch.where(torch.isfinite(side), 0.0, side.double())
