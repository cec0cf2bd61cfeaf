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

v is unique. nu is not when active rows depend on each other; the minimum-norm one is taken, on rows
scaled to unit length in the metric of P^-1. Every gradient that does not depend on the choice
(all of them, if the bounds' gradients see no dependent rows) is then right, and the others have one
documented value.

``optimality.linear_systems`` solves (*); ``optimality.active_sets`` says what W, F and T are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairopt.optimality.active_sets import active_set, minimum_norm_multipliers
from fairopt.optimality.linear_systems import Reduced, solve_reduced
from fairopt.programs.problem import QP
from fairopt.programs.solution import Solution


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


def adjoint(
    problem: QP, solution: Solution, g: Tensor, reduced: Reduced = solve_reduced
) -> Adjoint:
    """Solve (*) for dL/dx = g, ``(B, n)``."""
    d = problem.diagonal()
    active, free = solution.sides or active_set(problem, solution, d)
    return Adjoint(*reduced(problem, active, free, d, -g.double()))


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
        grad_P = 0.5 * (problem.products(v, x) + problem.products(x, v))
    if any(need_rows) or need_l or need_u or need_lb or need_ub:
        chosen = minimum_norm_multipliers(problem, solution, g, v, nu)
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
