"""Auxiliary problems that always have a solution, which proves that another has none.

Infeasible or not. The elastic problem gives every row a slack of its own,

    minimise 1/2 |v|^2   subject to  l <= A x + v <= u,  lb <= x <= ub.

Its multipliers y satisfy v = -y and A^T y + w = 0, so that with v != 0 they are Farkas'
proof, which ``optimality.certificates`` checks.

Unbounded or not. The objective of a feasible problem falls without end if and only if there is a
direction d with P d = 0, q.d < 0, and no side in the way. The one closest to -q is the projection

    minimise 1/2 |d + q|^2   subject to  P d = 0, and A d and d in the recession cone of the sides,

at whose solution q.d = -|d|^2.

All functions take and return problems made by ``standard_form.to_dense``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairopt.backends.qpth.standard_form import quadratic
from fairopt.optimality.certificates import first_proof, recession_side, sharpen_proof
from fairopt.programs.problem import QP, Problem
from fairopt.programs.rows.dense import DenseRows
from fairopt.programs.tensors import unchecked

# Rows that push with at least these shares of the hardest push are tried as a proof of their own.
LEADING = (5e-1, 1e-1, 1e-2, 1e-3, 0.0)


def elastic(problem: Problem) -> tuple[QP, Tensor]:
    """The elastic problem on rows of unit length, in (x, v), and 1 over the rows' length.

    A multiplier of its row times that number is one of the original row.
    """
    A = problem.rows.to_tensor()
    batch, m, n = A.shape
    length = torch.linalg.vector_norm(A, dim=-1)
    scale = torch.where(length > 0, 1 / length, 1.0)
    free = A.new_full((), torch.inf).expand(batch, m)
    eye = torch.eye(m, dtype=A.dtype, device=A.device).expand(batch, m, m)
    return unchecked(
        QP,
        P=torch.cat([A.new_zeros(batch, n), A.new_ones(batch, m)], -1),
        q=A.new_zeros(batch, n + m),
        rows=DenseRows(torch.cat([A * scale.unsqueeze(-1), eye], -1)),
        l=problem.l * scale,
        u=problem.u * scale,
        lb=torch.cat([problem.lb, -free], -1),
        ub=torch.cat([problem.ub, free], -1),
    ), scale


def proof(problem: Problem, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Whether elastic multipliers y prove that there is no solution, and the proof, ``(B, m)``.

    Where the rows that push hardest already conflict among themselves, they are the proof: in the
    least-squares solution others give way a little with them.
    """
    share, y = y.abs(), y * scale
    if not y.shape[-1]:
        return first_proof(problem, y)
    top = share.amax(-1, keepdim=True)
    hardest = (sharpen_proof(problem, torch.where(share >= cut * top, y, 0.0)) for cut in LEADING)
    return first_proof(problem, *hardest, y)


def recession(problem: Problem) -> QP:
    """The projection of -q onto the directions in which nothing but q acts.

    In variables whose P_ii is not zero, a diagonal P forbids any move; a dense one is made rows.
    """
    P, A, q = quadratic(problem), problem.rows.to_tensor(), problem.linear
    lb, ub, l, u = map(recession_side, (problem.lb, problem.ub, problem.l, problem.u))
    if P.dim() == 2:
        lb, ub = torch.where(P > 0, 0.0, lb), torch.where(P > 0, 0.0, ub)
    else:
        A = torch.cat([A, P], -2)
        zero = torch.zeros_like(q)
        l, u = torch.cat([l, zero], -1), torch.cat([u, zero], -1)
    return unchecked(
        QP, P=torch.ones_like(q), q=q, rows=DenseRows(A), l=l, u=u, lb=lb, ub=ub,
    )  # fmt: skip
