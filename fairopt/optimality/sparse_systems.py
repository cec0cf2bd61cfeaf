"""``solve_reduced`` for sparse P and rows: one sparse factorisation.

The KKT matrix is singular where rows depend on each other or P is singular. With J = diag(I, -I),

    K = ( P_FF   A_WF^T )         K + delta J  is quasi-definite: never singular, and a symmetric
        ( A_WF   0      ),        ordering serves whatever the values.

J maps the null space of K into itself, because P v = 0, A v = 0 and A^T nu = 0 hold there one by
one. So z + (K + delta J)^-1 (b - K z), repeated from z = 0, stays orthogonal to the null space and
converges to the minimum-norm solution, each time by a factor of delta over the smallest nonzero
|eigenvalue| of K. The residual tends to the part of b that no z reaches; that is subtracted from b,
and the iteration repeated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor

from fairopt.programs.problem import LP, QP, Problem
from fairopt.programs.rows.sparse import SparseRows
from fairopt.tolerances import EXACT

Array = NDArray[Any]

# Of matrices with a unit diagonal and unit rows. Larger, and small eigenvalues take many steps;
# smaller, and the solves lose more digits.
DELTA = 1e-6
FEWEST = 3
STEPS = 300
THRESHOLD = 0.01  # pivots of size DELTA would lose what the solves need; costs little fill
STALLED = 0.99  # a residual that shrinks by less in one step is out of reach


def solve_sparse(
    problem: Problem,
    active: Tensor,
    free: Tensor,
    d: Tensor,
    right: Tensor,
    row_right: Tensor | None = None,
    /,
) -> tuple[Tensor, Tensor]:
    """``solve_reduced`` with one sparse factorisation per problem, on the CPU."""
    rows = problem.rows.to_sparse()
    v, nu = torch.zeros_like(right), torch.zeros_like(active, dtype=torch.float64)
    for b in range(len(right)):
        F, W = free[b].numpy().nonzero()[0], active[b].numpy().nonzero()[0]
        scale = 1 / np.sqrt(d[b].numpy()[F])
        if isinstance(problem, LP):
            H = sparse.csr_array((len(F), len(F)))
        else:
            H = quadratic(problem, b)[:, F][F]
            H = sparse.diags_array(scale) @ H @ sparse.diags_array(scale)
        A = csc(rows, b)[:, F][W] @ sparse.diags_array(scale)
        length = np.sqrt(np.asarray(A.multiply(A).sum(1)).ravel())
        row_scale = np.divide(1, length, out=np.zeros(len(W)), where=length > 0)
        A = sparse.diags_array(row_scale) @ A
        low = np.zeros(len(W)) if row_right is None else row_right[b].numpy()[W] * row_scale
        z = nearest_solution(H, A, np.concatenate([right[b].numpy()[F] * scale, low]))
        v[b, torch.from_numpy(F)] = torch.from_numpy(z[: len(F)] * scale)
        nu[b, torch.from_numpy(W)] = torch.from_numpy(z[len(F) :] * row_scale)
    return v, nu


def nearest_solution(H: Any, A: Any, b: Array) -> Array:
    """The z of minimum norm that brings K z closest to b."""
    n, m = H.shape[0], A.shape[0]
    if not n + m:
        return b
    K = sparse.block_array([[H, A.T], [A, sparse.csr_array((m, m))]], format="csc")
    J = np.concatenate([np.ones(n), -np.ones(m)])
    factors = factorised(K + sparse.diags_array(DELTA * J, format="csc"), THRESHOLD)
    last = np.inf
    while True:
        z, rest = np.zeros(len(b)), b
        for step in range(STEPS):
            dz = factors.solve(rest)
            z = z + dz
            rest, before = b - K @ z, rest
            size = top(rest)
            if size <= EXACT * (top(b) + top(z)) or (
                step >= FEWEST and size > STALLED * top(before)
            ):
                break
        if size <= EXACT * top(b) or size > 0.1 * last:
            return z
        # By now dz lies in the null space: the part of b that made it, without what K z rounds.
        b, last = b - DELTA * J * dz, size


def top(z: Array) -> float:
    return float(np.abs(z).max(initial=0.0))


def factorised(M: Any, threshold: float) -> Any:
    """LU of a symmetric matrix in an order that keeps it sparse.

    Args:
        threshold: a pivot stays on the diagonal unless it is smaller than this share of its
            column; with zero all do, and their signs are those of the eigenvalues.
    """
    options = {"SymmetricMode": True}
    return splu(M.tocsc(), "MMD_AT_PLUS_A", diag_pivot_thresh=threshold, options=options)


def csc(matrix: SparseRows, b: int) -> Any:
    """One matrix of the batch as a SciPy array of float64, repeated entries added up."""
    values, place = matrix.values[b].double().numpy(), (matrix.row.numpy(), matrix.column.numpy())
    return sparse.coo_array((values, place), shape=(matrix.m, matrix.n)).tocsc()


def quadratic(problem: QP, b: int) -> Any:
    """P of one problem of the batch, in full, as a SciPy array of float64."""
    if isinstance(problem.P, SparseRows):
        return csc(problem.P, b)
    one = problem.P[b].double().numpy()
    return sparse.diags_array(one, format="csc") if one.ndim == 1 else sparse.csc_array(one)


def is_convex(problem: QP, b: int) -> bool:
    """Whether P of one problem is positive semidefinite, but for rounding.

    By the signs of the pivots of P + rounding (Sylvester's law of inertia), scaled to a unit
    diagonal; rounding is 8 n times the precision of P, relative to the largest row sum.
    """
    if problem.is_diagonal:
        return True  # which a QP checks itself
    P = quadratic(problem, b)
    d = P.diagonal()
    largest = np.abs(d).max()
    if (d < 0).any():
        return False
    root = sparse.diags_array(1 / np.sqrt(np.where(d > 0, d, largest if largest > 0 else 1.0)))
    H = root @ P @ root
    dtype = problem.tensors[0].dtype
    n = len(d)
    shift = 8 * n * torch.finfo(dtype).eps * float(abs(H).sum(0).max())
    if problem.quadratic_form == "dense":
        try:
            np.linalg.cholesky(H.toarray() + shift * np.eye(n))
        except np.linalg.LinAlgError:
            return False
        return True
    try:
        factors = factorised(H + sparse.diags_array(np.full(n, shift)), 0.0)
    except RuntimeError:  # a pivot is exactly zero, which cannot be in a definite matrix
        return False
    return bool((factors.perm_r == factors.perm_c).all() and (factors.U.diagonal() > 0).all())
