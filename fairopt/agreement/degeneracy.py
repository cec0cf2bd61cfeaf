"""How a solution stands among the constraints: whether it is unique, and by which margin.

Lengths are taken in the metric of P^-1, where d is the diagonal of P (1 for an LP and where it is
zero) and |A_r|^2 = sum_i A_ri^2 / d_i. There slacks and multipliers have one unit,

    slack of a side    (u_r - A_r x) / |A_r|         sqrt(d_i) (ub_i - x_i)
    its multiplier     y_r |A_r|                      w_i / sqrt(d_i)

and are divided by the largest of sqrt(d_i) |x_i| and |q_i| / sqrt(d_i). (For an LP, which has no P
to relate them, slacks are divided by the largest |x_i|, multipliers by the largest |c_i|.)

Margin. Of slack and multiplier one is zero at a solution. The larger of the two is how far the side
is from becoming active, or from ceasing to be; the smallest over all sides is the margin to the
next active set. An equality row stays active, and the size of its multiplier is how far it is from
pushing to the other side, which decides whether l or u gets its gradient.

Unique multipliers. It suffices that the gradients of all constraints that touch x are linearly
independent (Nocedal and Wright, Numerical Optimization, 2006, definition 12.4). With the variables
at a bound taken out, that is the rank of A_WF, seen in its singular values once the rows of A have
unit length.

Unique x. It suffices that no direction of zero curvature is free: P z = 0, A_W z = 0 and z_T = 0
for the constraints W, T that push only if z = 0 (the second-order sufficient condition, theorem
12.6 of the same book, on the critical cone made a subspace).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairopt.agreement.parameters import row_word
from fairopt.optimality.linear_systems import metric
from fairopt.programs.problem import LP, QP, Problem
from fairopt.programs.tensors import compact
from fairopt.tolerances import RANK


@dataclass(frozen=True)
class Standing:
    """The quantities that the module's header defines, one entry per problem.

    Attributes:
        margin: ``(B,)``, float64; infinite without any constraint.
        nearest: the constraint that has the margin, in words; empty without any.
        unique: ``(B,)`` bool, whether x is shown to be unique.
        unique_duals: ``(B,)`` bool, whether the multipliers are shown to be unique.
    """

    margin: Tensor
    nearest: tuple[str, ...]
    unique: Tensor
    unique_duals: Tensor


def standing(
    problem: Problem,
    x: Tensor,
    row_dual: Tensor,
    bound_dual: Tensor,
    *,
    touch: float,
    rank: float = RANK,
) -> Standing:
    """Examine solutions.

    Args:
        problem: the problem.
        x, row_dual, bound_dual: ``(B, n)``, ``(B, m)``, ``(B, n)``, as in ``Solution``.
        touch: slacks up to this size, in the units of the header, are zero.
        rank: singular values up to this share of a row's unit length are zero.
    """
    x, y, w = x.double(), row_dual.double(), bound_dual.double()
    rows, d = problem.rows, metric(problem)
    root = d.sqrt()
    length = rows.norms(1 / d)
    empty = length == 0
    slack_unit, dual_unit = units(problem, x, root)
    inverse = torch.where(empty, 0.0, 1 / length) / slack_unit
    value = rows.apply(x)

    row = sides((problem.l, problem.u), value, inverse, y * length / dual_unit, touch, absent=empty)
    bound = sides((problem.lb, problem.ub), x, root / slack_unit, w / root / dual_unit, touch)
    margins = torch.cat([row.margin, bound.margin], -1)
    margin, nearest = margins.min(-1)
    m = problem.shape[1]
    words = tuple(
        "" if far else f"row {row_word(problem, i)}" if i < m else f"bound of x[{i - m}]"
        for i, far in zip(nearest.tolist(), margin.isinf().tolist(), strict=True)
    )
    return Standing(
        margin,
        words,
        unique_point(problem, row.pushes, ~bound.pushes, d),
        independent(problem, row.touches & ~empty, ~bound.touches, d, length, rank),
    )


@dataclass(frozen=True)
class Sides:
    """How the sides of rows or of bounds stand: ``(B, m)`` or ``(B, n)`` each."""

    margin: Tensor
    touches: Tensor
    pushes: Tensor


def sides(
    ends: tuple[Tensor, Tensor],
    value: Tensor,
    scale: Tensor,
    multiplier: Tensor,
    touch: float,
    absent: Tensor | None = None,
) -> Sides:
    low, high = (end.double() for end in ends)
    above = torch.where(high.isinf(), high, ((high - value) * scale).clamp(min=0))
    below = torch.where(low.isinf(), -low, ((value - low) * scale).clamp(min=0))
    is_equality = low == high
    margin = torch.minimum(
        torch.maximum(above, multiplier.clamp(min=0)),
        torch.maximum(below, (-multiplier).clamp(min=0)),
    )
    margin = torch.where(is_equality, multiplier.abs(), margin)
    pushes = is_equality | (multiplier > above) | (-multiplier > below)
    touches = pushes | (torch.minimum(above, below) <= touch)
    if absent is not None:  # a row of zeros constrains nothing
        margin = torch.where(absent, torch.inf, margin)
        pushes, touches = pushes & ~absent, touches & ~absent
    return Sides(margin, touches, pushes)


def units(problem: Problem, x: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The units of slacks and of multipliers, ``(B, 1)`` each."""
    length = (root * x).abs().amax(-1, keepdim=True)
    if isinstance(problem, LP):
        force = problem.c.double().abs().amax(-1, keepdim=True)
    else:
        force = (problem.q.double() / root).abs().amax(-1, keepdim=True)
        length = force = torch.maximum(length, force)
    return torch.where(length > 0, length, 1.0), torch.where(force > 0, force, 1.0)


def independent(
    problem: Problem, touching: Tensor, free: Tensor, d: Tensor, length: Tensor, rank: float
) -> Tensor:
    """Whether the touching rows, restricted to free variables, have full rank: ``(B,)``."""
    count = touching.sum(-1)
    inverse = torch.where(free, 1 / d, 0.0)
    N, _ = problem.rows.factor(inverse, inverse)
    N = N * torch.where(touching, 1 / length, 0.0).unsqueeze(-1)
    if N.shape[-2] == 0:
        return count == 0
    values = torch.linalg.svdvals(N)
    found: Tensor = (values > rank).sum(-1) == count
    return found


def unique_point(problem: Problem, pushing: Tensor, free: Tensor, d: Tensor) -> Tensor:
    """Whether P z = 0, A_W z = 0, z_T = 0 has only z = 0: ``(B,)``."""
    batch, _, n = problem.shape
    shown = torch.zeros(batch, dtype=torch.bool, device=d.device)
    flat, curved = torch.ones_like(free), None  # where P may be zero; P where it is a matrix
    if isinstance(problem, QP) and problem.is_diagonal:
        flat = problem.tensors[0] <= 0
        if not bool(compact(flat).any()):
            return ~shown
    elif isinstance(problem, QP):
        curved = scaled(problem, d)
        eye = torch.eye(n, dtype=curved.dtype, device=curved.device)
        failed: Tensor = torch.linalg.cholesky_ex(curved - RANK * n * eye).info
        shown = failed == 0
        if bool(shown.all()):
            return shown
    A = problem.rows.to_tensor().double() * d.rsqrt().unsqueeze(-2)
    found = []
    for b, known in enumerate(shown.tolist()):
        columns = (flat[b] & free[b]).nonzero().squeeze(-1)
        if known or not len(columns):
            found.append(True)
            continue
        W = A[b][pushing[b]]
        norms = torch.linalg.vector_norm(W, dim=-1, keepdim=True)
        M = (W / torch.where(norms > 0, norms, 1.0))[:, columns]
        if curved is not None:
            M = torch.cat([curved[b][:, columns], M])
        values = torch.linalg.svdvals(M) if len(M) else M.new_zeros(0)
        found.append(int((values > RANK * n).sum()) == len(columns))
    return torch.tensor(found, dtype=torch.bool, device=d.device)


def scaled(problem: QP, d: Tensor) -> Tensor:
    """P with a diagonal of ones, ``(B, n, n)``."""
    root = d.rsqrt()
    curved: Tensor = problem.quadratic_tensor().double() * (root.unsqueeze(-1) * root.unsqueeze(-2))
    return curved
