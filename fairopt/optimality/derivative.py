"""The derivative of a solution: one rule for every backend.

Derivation. Let W be the active rows, F the variables strictly between their bounds ("free") and T
those held at a bound. Near a solution the active set does not change, so x moves as the
solution of

    P_FF x_F + P_FT x_T + q_F + (A^T y)_F = 0,     A_W x = b_W,     x_T = the bounds,

where b_r is u_r or l_r, whichever is active. Differentiate, and let g = dL/dx. With the adjoint
variables v (zero on T) and nu (zero off W) defined by

    P_FF v_F + A_WF^T nu = -g_F,     A_WF v_F = 0,                                         (*)

take v_F times the first differentiated equation plus nu times the second; the unknown
dx_F and dy drop out and what is left is

    dL = v.(dP x + dq + dA^T y) + nu.(dA x - db) + (g + P v + A^T nu)_T . dx_T.

So, for every parameter at once,

    dL/dq = v            dL/dP = v x^T (symmetrised; v * x for a diagonal)
    dL/dA = y v^T + nu x^T                 dL/db = -nu
    dL/d(bound)_T = g + P v + A^T nu.

v is unique. nu is not when active rows depend on each other; the shortest one is taken, on rows
scaled to unit length in the metric of P^-1. All that does not depend on the choice (everything, if
the bounds' gradients see no dependent rows) is then right, and what does has one documented value.

Diagonal P. Eliminating v_F = -P_FF^-1 (g + A^T nu)_F from (*) leaves the m x m system
A_WF P_FF^-1 A_WF^T nu = -A_WF P_FF^-1 g_F. With N N^T = A P_FF^-1 A^T and N c = A P_FF^-1 g
(``Rows.factor``) it is the least-squares problem  min |N^T nu + c|, solved by a singular-value
decomposition of N, never of N N^T: no digit is lost to squaring, and rank is seen.

Activity. The upper side of a row is active if its multiplier exceeds its slack, y |A_r|^2 > u - a x
with |.| in the metric of P^-1 (so that both sides have one unit); a row whose sides meet is always
active; the same for bounds. The rule needs no threshold, and it is right also at a solver's own
accuracy. A weakly active row or bound (zero multiplier but for rounding, zero slack) counts as
inactive: one element of the generalised Jacobian, and what ``torch.clamp`` does at its boundary.
Where several multipliers belong to x the shortest decides (``optimality.minimum_norm``; jointly
with the bounds, ``fairopt.optimality.degenerate_bounds``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fairopt.optimality.degenerate_bounds import Multipliers, adjoint_rows, clipped_out
from fairopt.optimality.least_squares import RANK, least_norm
from fairopt.optimality.lu import lu_factor
from fairopt.optimality.minimum_norm import NONE, carrying, dependent, shortest
from fairopt.programs.problem import QP, CellRows, Problem, SparseRows
from fairopt.programs.solution import Solution
from fairopt.tolerances import ROW_PRECISION

__all__ = ["Adjoint", "Gradients", "Reduced", "adjoint", "gradients", "solve_reduced"]


@dataclass(frozen=True)
class Adjoint:
    """The solution of (*): v ``(B, n)`` and nu ``(B, m)``, float64."""

    v: Tensor
    nu: Tensor


@dataclass(frozen=True)
class Gradients:
    """dL/d(parameter) for each of ``QP.tensors``, in their order; ``None`` where not asked for."""

    P: Tensor | None
    q: Tensor | None
    rows: tuple[Tensor | None, ...]
    l: Tensor | None
    u: Tensor | None
    lb: Tensor | None
    ub: Tensor | None

    @property
    def flat(self) -> tuple[Tensor | None, ...]:
        return self.P, self.q, *self.rows, self.l, self.u, self.lb, self.ub


def active_sides(
    multiplier: Tensor, value: Tensor, low: Tensor, high: Tensor, metric: Tensor
) -> Tensor:
    """+1 where the upper side is active, -1 where the lower is, 0 where neither; see "Activity".

    Where the sides meet, the sign of the multiplier tells (+1 if it is zero).
    """
    push = multiplier * metric
    upper, lower = push > high - value, -push > value - low
    meet = high == low
    side = torch.where(upper & (push > 0), 1, torch.where(lower & (push < 0), -1, 0))
    return torch.where(meet, torch.where(push < 0, -1, 1), side)


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


def metric(problem: Problem) -> Tensor:
    """The diagonal of P, ``(B, n)``, float64, 1 where it is zero.

    For an LP one number per problem: the largest cost over the median distance of finite sides and
    bounds from zero, so that a cost and a slack can be compared whatever the units of c and x.
    """
    if isinstance(problem, QP):
        return problem.diagonal()
    lengths = problem.rows.norms(torch.ones_like(problem.c, dtype=torch.float64))
    sides = [problem.l / lengths, problem.u / lengths, problem.lb, problem.ub]
    distance = torch.cat([side.double().abs() for side in sides], -1)
    there = torch.isfinite(distance) & (distance > 0)
    d = problem.c.abs().amax(-1) / torch.where(there, distance, torch.nan).nanmedian(-1).values
    return torch.where(d > 0, d, 1.0).unsqueeze(-1).expand(problem.c.shape)  # NaN is not


class Reduced(Protocol):
    """A way to solve (*): ``solve_reduced``, or one that knows more of the problem's structure."""

    def __call__(
        self,
        problem: Problem,
        active: Tensor,
        free: Tensor,
        d: Tensor,
        right: Tensor,
        row_right: Tensor | None = None,
        /,
    ) -> tuple[Tensor, Tensor]: ...


def solve_reduced(
    problem: Problem,
    active: Tensor,
    free: Tensor,
    d: Tensor,
    right: Tensor,
    row_right: Tensor | None = None,
    /,
) -> tuple[Tensor, Tensor]:
    """(*) for any right-hand side: P_FF v_F + A_WF^T nu = right_F,  A_WF v_F = row_right_W.

    Args:
        problem: an LP counts as P = 0.
        active, free: W and F as masks, ``(B, m)`` and ``(B, n)``.
        d: ``metric(problem)``.
        right: ``(B, n)``, float64.
        row_right: ``(B, m)``, float64; zero if left out.

    Returns:
        v, zero outside F, and nu, zero outside W. Where the system is singular, the shortest
        solution (in the metric; on rows of unit length), and of right-hand sides that no point
        reaches, the closest that one does.
    """
    rows = problem.rows
    if isinstance(problem, QP):
        if not problem.is_definite_diagonal:
            return solve_dense(problem, active, free, d, right, row_right)
        if has_cells(problem):
            from fairopt.optimality.cell_systems import solve_cells  # and Numba

            return solve_cells(problem, active, free, d, right, row_right)
    inverse = torch.where(free, 1 / d, 0.0)
    N, c = rows.factor(inverse, right)
    N = N * active.unsqueeze(-1)
    if isinstance(problem, QP):
        nu = least_norm(N, -c, None if row_right is None else -row_right)
        return inverse * (right - rows.transpose_apply(nu)), nu
    # Without P the two equations part: A_WF^T nu = right_F and A_WF v_F = row_right.
    nu = least_norm(N, -c)
    if row_right is None:
        return torch.zeros_like(right), nu
    push = least_norm(N, torch.zeros_like(c), row_right)
    return inverse * rows.transpose_apply(push), nu


def has_cells(problem: Problem) -> bool:
    """Whether there is a compiled way: a definite diagonal P and rows over cells, on the CPU."""
    return (
        isinstance(problem, QP)
        and type(problem.rows) is CellRows
        and problem.l.is_cpu
        and problem.shape[1] > 0
        and problem.is_definite_diagonal
    )


def adjoint(
    problem: QP, solution: Solution, g: Tensor, reduced: Reduced = solve_reduced
) -> Adjoint:
    """Solve (*) for dL/dx = g, ``(B, n)``."""
    d = problem.diagonal()
    active, free = solution.sides or carriers(problem, solution, d)
    return Adjoint(*reduced(problem, active, free, d, -g.double()))


def tight_sides(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which upper and which lower sides x meets, to the promised precision: ``(B, m)``, bool."""
    limit = ROW_PRECISION[x.dtype]
    x = x.detach().double()
    value = problem.rows.apply(x)
    scale = problem.rows.absolute().apply(x.abs().amax(-1, keepdim=True).expand_as(x))
    u, l = problem.u.double(), problem.l.double()
    upper = torch.isfinite(u) & (u - value <= limit * (scale + u.abs()))
    lower = torch.isfinite(l) & (value - l <= limit * (scale + l.abs()))
    return upper, lower


def carriers(problem: QP, solution: Solution, d: Tensor) -> tuple[Tensor, Tensor]:
    """Active rows and free variables, also where several multipliers belong to x.

    The solver's multiplier has them all but where several of its zeros at bounds come together
    (``optimality.degenerate_bounds``), or tight rows depend on each other
    (``optimality.minimum_norm``).
    """
    active = row_sides(problem, solution, d) != 0
    free = bound_sides(problem, solution, d) == 0
    upper, lower = tight_sides(problem, solution.x)
    bounds = tight_bounds(problem, solution.x)
    weak = free & (bounds[0] | bounds[1])
    extra = (upper | lower) & ~active
    if not bool(weak.any() | extra.any()):  # as a rule; asked once, for a GPU stops to answer
        return active, free
    y = solution.row_dual
    if bool(weak.any()):
        meet = problem.l == problem.u
        sides = upper | meet | (active & (y > 0)), lower | meet | (active & (y < 0))
        N, _ = problem.rows.factor(torch.where(free & ~weak, 1 / d, 0.0), d)
        out = clipped_out(problem, sides[0] | sides[1], d, N)
        for b in out.nonzero().squeeze(-1).tolist():
            size = float(force(problem, solution.x, d)[b])
            rows, held = Multipliers(
                problem, b, y, solution.bound_dual, sides, bounds, N, d, size
            ).carriers()
            here = (torch.arange(len(y), device=y.device) == b).unsqueeze(-1)
            active, free = active | (here & rows), free & ~(here & held)
    N, _ = problem.rows.factor(torch.where(free, 1 / d, 0.0), d)
    return (
        carrying(N, y, active, upper | (active & (y > 0)), lower | (active & (y < 0))),
        free,
    )


def solve_dense(
    problem: QP,
    active: Tensor,
    free: Tensor,
    d: Tensor,
    right: Tensor,
    row_right: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``solve_reduced`` for any P: one symmetric matrix, O((n + m)^3).

    It is scaled to a unit diagonal of P and rows of unit length; what is not in F or W is replaced
    by the identity. An LU factorisation serves where its pivots show full rank; the other problems
    of the batch get the eigendecomposition, whose small eigenvalues are left out.
    """
    n = right.shape[-1]
    root = d.rsqrt() * free
    A = problem.rows.to_dense().matrix.double() * root.unsqueeze(-2)
    length = torch.linalg.vector_norm(A, dim=-1)
    scale = torch.where(length > 0, 1 / length, 0.0) * active
    A = A * scale.unsqueeze(-1)
    P = problem.P.to_dense().matrix if isinstance(problem.P, SparseRows) else problem.P
    P = torch.diag_embed(P) if P.dim() == 2 else P
    H = P.double() * root.unsqueeze(-1) * root.unsqueeze(-2)
    zero = A.new_zeros(*A.shape[:-1], A.shape[-2])
    K = torch.cat([torch.cat([H, A.mT], -1), torch.cat([A, zero], -1)], -2)
    K.diagonal(dim1=-2, dim2=-1).add_(torch.cat([~free, scale == 0], -1))
    low = scale.new_zeros(scale.shape) if row_right is None else row_right * scale
    b = torch.cat([right * root, low], -1).unsqueeze(-1)

    factors, order = lu_factor(K)
    pivots = factors.diagonal(dim1=-2, dim2=-1).abs()
    regular = pivots.amin(-1) > RANK * pivots.amax(-1)
    z = torch.linalg.lu_solve(factors, order, b)
    z = z + torch.linalg.lu_solve(factors, order, b - K @ z)
    if not bool(regular.all()):
        singular = (~regular).nonzero().squeeze(-1)
        K, b = K[singular], b[singular]
        values, vectors = torch.linalg.eigh(K)
        keep = values.abs() > RANK * values.abs().amax(-1, keepdim=True)
        inverse = torch.where(keep, 1 / values, 0.0).unsqueeze(-1)
        least = vectors @ (inverse * (vectors.mT @ b))
        least = least + vectors @ (inverse * (vectors.mT @ (b - K @ least)))
        z = z.index_copy(0, singular, least)
    z = z.squeeze(-1)
    return z[:, :n] * root, z[:, n:] * scale


def force(problem: QP, x: Tensor, d: Tensor) -> Tensor:
    """The length of |P x| + |q| in the metric of P^-1: what multipliers are large or small to.

    ``(B, 1)``.
    """
    terms = problem.apply_quadratic(x.detach().double()).abs() + problem.q.double().abs()
    found: Tensor = torch.linalg.vector_norm(terms * d.rsqrt(), dim=-1, keepdim=True)
    return found


def tight_bounds(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Which upper and which lower bounds x meets, to the promised precision: ``(B, n)``, bool."""
    limit = ROW_PRECISION[x.dtype]
    x = x.detach().double()
    ub, lb = problem.ub.double(), problem.lb.double()
    size = x.abs().amax(-1, keepdim=True)
    upper = torch.isfinite(ub) & (ub - x <= limit * (size + ub.abs()))
    lower = torch.isfinite(lb) & (x - lb <= limit * (size + lb.abs()))
    return upper, lower


@dataclass(frozen=True)
class Chosen:
    """Of the multipliers and adjoint variables of a solution those that count.

    Attributes:
        y, nu: ``(B, m)``.
        side: the side that each row is pushed to, ``(B, m)``. A row whose sides meet is pushed to
            the one that the sign of y tells, and to both alike (0) where y is zero.
        bound_side: the same for bounds, ``(B, n)``, where bounds that meet are pushed to the upper
            one if w is zero.
    """

    y: Tensor
    nu: Tensor
    side: Tensor
    bound_side: Tensor


def shortest_multipliers(problem: QP, solution: Solution, g: Tensor, adjoint: Adjoint) -> Chosen:
    """The multipliers of ``optimality.minimum_norm`` and ``optimality.degenerate_bounds``.

    Where tight rows depend on each other, or hold the same variables as bounds, the gradients of
    rows, sides and bounds depend on which multipliers are taken, so these are the shortest: every
    backend has the same.
    """
    d = problem.diagonal()
    row_side, bound_side = row_sides(problem, solution, d), bound_sides(problem, solution, d)
    free = bound_side == 0
    upper, lower = tight_sides(problem, solution.x)
    upper, lower = upper | (row_side > 0), lower | (row_side < 0)
    meet = problem.l == problem.u
    y, nu = solution.row_dual, adjoint.nu
    size = force(problem, solution.x, d)
    zero = y.abs() * problem.rows.norms(1 / d) <= NONE * size
    side = torch.where(meet, torch.where(zero, 0.0, y.sign()), row_side.double())
    whole = g.double() + problem.apply_quadratic(adjoint.v)
    N, c = problem.rows.factor(torch.where(free, 1 / d, 0.0), whole)
    tight = upper | lower | meet
    several = dependent(N, tight).unsqueeze(-1)
    if bool(several.any()):
        short = shortest(N, torch.where(meet & zero, 0.0, y), upper | meet, lower | meet)
        least = least_norm(N * ((short != 0) | meet).unsqueeze(-1), c)
        y = torch.where(several, short, y)
        nu = torch.where(several, least, nu)
        side = torch.where(several, short.sign(), side)

    bounds = tight_bounds(problem, solution.x)
    inside = free & ~(bounds[0] | bounds[1])
    if not torch.equal(inside, free):
        N, _ = problem.rows.factor(torch.where(inside, 1 / d, 0.0), whole)
    out = clipped_out(problem, tight, d, N)
    for b in out.nonzero().squeeze(-1).tolist():
        rows = upper | meet, lower | meet
        found = Multipliers(
            problem, b, solution.row_dual, solution.bound_dual, rows, bounds, N, d, float(size[b])
        ).shortest()
        least = adjoint_rows(problem, b, found, meet, whole, inside, d)
        at = torch.where(bounds[0] & bounds[1], found.w, bounds[0].double() - bounds[1].double())
        at = torch.where(problem.lb == problem.ub, torch.where(found.w < 0, -1, 1), at.sign())
        here = (torch.arange(len(out), device=out.device) == b).unsqueeze(-1)
        y, nu = torch.where(here, found.y, y), torch.where(here, least, nu)
        side = torch.where(here, found.y.sign(), side)
        bound_side = torch.where(here, at, bound_side)
    return Chosen(y, nu, side, bound_side)


def gradients(
    problem: QP, solution: Solution, g: Tensor, adjoint: Adjoint, needed: tuple[bool, ...]
) -> Gradients:
    """Turn the adjoint into the gradients of all parameters that are needed; see the derivation.

    Args:
        needed: one flag for each of ``problem.tensors``.
    """
    v, nu = adjoint.v, adjoint.nu
    if not any(needed[:1] + needed[2:]):  # the usual case: only the scores
        return Gradients(None, v, (None,) * (len(needed) - 6), None, None, None, None)
    need_P, need_q, *need_rows, need_l, need_u, need_lb, need_ub = needed
    grad_P = grad_l = grad_u = grad_lb = grad_ub = None
    grad_rows: tuple[Tensor | None, ...] = (None,) * len(need_rows)
    x = solution.x.detach().double() if need_P or any(need_rows) or need_lb or need_ub else v
    if need_P:
        if isinstance(problem.P, SparseRows):
            row, column = problem.P.row, problem.P.column
            grad_P = 0.5 * (v[:, row] * x[:, column] + v[:, column] * x[:, row])
        elif problem.P.dim() == 2:
            grad_P = v * x
        else:
            outer = v.unsqueeze(-1) * x.unsqueeze(-2)
            grad_P = 0.5 * (outer + outer.mT)
    if any(need_rows) or need_l or need_u or need_lb or need_ub:
        chosen = shortest_multipliers(problem, solution, g, adjoint)
        y, nu, side = chosen.y, chosen.nu, chosen.side
        if any(need_rows):
            grad_rows = problem.rows.pull_back(y, v, nu, x)
        above = torch.where(side > 0, 1.0, torch.where(side < 0, 0.0, 0.5))
        grad_u, grad_l = -nu * above, -nu * (1 - above)
        if need_lb or need_ub:
            whole = g.double() + problem.apply_quadratic(v) + problem.rows.transpose_apply(nu)
            grad_ub = torch.where(chosen.bound_side > 0, whole, 0.0)
            grad_lb = torch.where(chosen.bound_side < 0, whole, 0.0)
    return Gradients(grad_P, v if need_q else None, grad_rows, grad_l, grad_u, grad_lb, grad_ub)
