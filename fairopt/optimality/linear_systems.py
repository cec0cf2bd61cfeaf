"""The linear systems of the derivative and of refinement, for rows that may depend on each other.

    P_FF v_F + A_WF^T nu = right_F,     A_WF v_F = row_right_W.

W are the active rows and F the free variables. Where the system is singular its minimum-norm
solution is taken: every backend then has the same.

Diagonal P. Eliminating v_F leaves the m x m system A_WF P_FF^-1 A_WF^T nu = A_WF P_FF^-1 right_F -
row_right_W. With N N^T = A P_FF^-1 A^T and N c = A P_FF^-1 right (``Rows.factor``) it is the
least-squares problem  min |N^T nu - c|, solved by a singular-value decomposition of N, never of
N N^T: no digit is lost to squaring, and rank is seen.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fairopt.programs.problem import QP, Problem
from fairopt.tolerances import RANK

# torch factors the matrices of a batch in parallel on the CPU, by a routine that is not safe for
# that: from about 150 rows on the factors are silently wrong, or pivots come out as zero
# (pytorch issues 141358 and 142815; seen in 2.13). With a margin.
UNSAFE = 100


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
    """A solver of the system above: ``solve_reduced``, or one that exploits more structure."""

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
    """The system above by dense factorisations, or compiled where ``has_cells``.

    Args:
        problem: an LP counts as P = 0.
        active, free: W and F as masks, ``(B, m)`` and ``(B, n)``.
        d: ``metric(problem)``.
        right: ``(B, n)``, float64.
        row_right: ``(B, m)``, float64; zero if left out.

    Returns:
        v, zero outside F, and nu, zero outside W. Where the system is singular, the minimum-norm
        solution (in the metric; on rows of unit length) for the closest right-hand side that some
        point reaches.
    """
    rows = problem.rows
    if isinstance(problem, QP):
        if not problem.is_definite_diagonal:
            return solve_dense(problem, active, free, d, right, row_right)
        if has_cells(problem):
            from fairopt.optimality.compiled_cells import solve_cells  # and Numba

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
    """Whether a compiled solver applies: a definite diagonal P and rows over cells, on the CPU."""
    return (
        isinstance(problem, QP)
        and problem.rows.cell_data is not None
        and problem.l.is_cpu
        and problem.shape[1] > 0
        and problem.is_definite_diagonal
    )


def solve_dense(
    problem: QP, active: Tensor, free: Tensor, d: Tensor, right: Tensor, row_right: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``solve_reduced`` for any P: one symmetric matrix, O((n + m)^3).

    It is scaled to a unit diagonal of P and rows of unit length; what is not in F or W is replaced
    by the identity. An LU factorisation serves where its pivots show full rank; the other problems
    of the batch get the eigendecomposition, whose small eigenvalues are left out.
    """
    n = right.shape[-1]
    root = d.rsqrt() * free
    A = problem.rows.to_tensor().double() * root.unsqueeze(-2)
    length = torch.linalg.vector_norm(A, dim=-1)
    scale = torch.where(length > 0, 1 / length, 0.0) * active
    A = A * scale.unsqueeze(-1)
    H = problem.quadratic_tensor().double() * root.unsqueeze(-1) * root.unsqueeze(-2)
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


def least_norm(N: Tensor, c: Tensor, e: Tensor | None = None) -> Tensor:
    """The minimum-norm minimiser of |N^T nu + c|, on rows of N scaled to unit length: ``(B, m)``.

    Given e, ``(B, m)``, the minimum-norm solution of N (N^T nu + c) = e instead, e projected
    onto what some nu reaches. Rows of N that are zero get zero.
    """
    if N.shape[-2] == 0:
        return N.new_zeros(N.shape[:-1])
    length = torch.linalg.vector_norm(N, dim=-1)
    scale = torch.where(length > 0, 1 / length, 0.0)
    if N.shape[-2] == 1:
        nu = -(N * c.unsqueeze(-2)).sum(-1) * scale.square()
        return nu if e is None else nu + e * scale.square()
    U, S, Vh = torch.linalg.svd(N * scale.unsqueeze(-1), full_matrices=False)
    inverse = torch.where(S > RANK * S[..., :1], 1 / S, 0.0)
    z = -(Vh @ c.unsqueeze(-1)).squeeze(-1) * inverse
    if e is not None:
        z = z + torch.einsum("bmk,bm->bk", U, e * scale) * inverse.square()
    return torch.einsum("bmk,bk->bm", U, z) * scale


def lu_factor(matrix: Tensor, *, pivot: bool = True) -> tuple[Tensor, Tensor]:
    """``torch.linalg.lu_factor``, ``(B, n, n)``, without raising where a matrix is singular.

    Large matrices on the CPU are factored one after the other, each with all threads.
    """
    if (
        matrix.is_cuda
        or len(matrix) <= 1
        or matrix.shape[-1] < UNSAFE
        or torch.get_num_threads() == 1
    ):
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrix, pivot=pivot)
        return factors, pivots
    each = [torch.linalg.lu_factor_ex(one, pivot=pivot) for one in matrix.unbind()]
    return torch.stack([e[0] for e in each]), torch.stack([e[1] for e in each])
