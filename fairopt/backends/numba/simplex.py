"""The projection onto simplices under few rows: from a problem to the kernels, and back."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.backends.numba.data import active_rows, outcomes
from fairopt.errors import UnsupportedProblemError
from fairopt.kernels import simplex as kernels
from fairopt.kernels.projection import PASSES
from fairopt.kernels.threads import in_parallel
from fairopt.optimality.derivative import Adjoint
from fairopt.optimality.linear_systems import least_norm
from fairopt.programs.problem import QP
from fairopt.programs.rows.blocks import BlockRows
from fairopt.programs.solution import Solution
from fairopt.programs.tensors import compact, is_uniform, unchecked
from fairopt.tolerances import ROW_PRECISION

Array = NDArray[Any]


class Blocks:
    """A problem over blocks as the kernels take it: float64 arrays without expanded dimensions.

    Attributes:
        A: ``(B, m, K, C)``.
        l, u: ``(B, m)``.
        q: ``(B, n, C)``.
        inverse, w: 1/P and the weight, ``(B, n)``.
        cell: int64 ``(B, n)``.
    """

    def __init__(self, problem: QP) -> None:
        rows = problem.rows
        assert isinstance(rows, BlockRows)
        m, n, C = rows.blocks
        batch = len(problem.q)
        on_simplices(problem, m)
        self.A = contiguous(rows.coefficient)
        self.l, self.u = contiguous(problem.l[:, :m]), contiguous(problem.u[:, :m])
        self.q = contiguous(problem.q).reshape(batch, n, C)
        self.inverse = contiguous(1 / of_blocks(problem, n, C).expand(batch, n))
        self.w = contiguous(rows.weight)
        self.cell = np.ascontiguousarray(rows.cell.numpy(), np.int64)

    @property
    def rows(self) -> tuple[Array, ...]:
        return self.A, self.l, self.u

    @property
    def samples(self) -> tuple[Array, ...]:
        return self.q, self.inverse, self.w, self.cell

    def of(self, b: int) -> tuple[Array, ...]:
        """q, 1/P, weight and cells of one problem."""
        return tuple(array[b] for array in self.samples)


def contiguous(tensor: Tensor) -> Array:
    return np.ascontiguousarray(tensor.numpy(), np.float64)


def on_simplices(problem: QP, m: int) -> None:
    """Raise unless bounds and sums say that each block is a point of the simplex."""
    lower, upper = compact(problem.lb), compact(problem.ub)
    sums = (problem.l[:, m:], problem.u[:, m:])
    if not (
        bool((lower == 0).all())
        and bool((upper == torch.inf).all())
        and all(bool((side == 1).all()) for side in sums)
    ):
        raise UnsupportedProblemError(
            "backend 'numba' solves rows in blocks form on simplices only: it needs bounds of 0 "
            "and infinity and sums of 1; choose another backend, or make the problem with "
            "rows.to_sparse()"
        )


def of_blocks(problem: QP, n: int, C: int) -> Tensor:
    """P as one positive number for each block: ``(B, n)`` or ``(1, 1)``, float64."""
    P = problem.P
    assert isinstance(P, Tensor)
    if is_uniform(P):
        each = compact(P).double()
    else:
        whole = P.double().reshape(len(P), n, C)
        each = whole[..., 0]
        if not bool((whole == each.unsqueeze(-1)).all()):
            raise UnsupportedProblemError(
                "backend 'numba' needs a P that is the same for all variables of a block, or the "
                "projection onto the simplex is another; choose another backend"
            )
    if not bool((each > 0).all()):
        raise UnsupportedProblemError(
            "backend 'numba' needs a positive diagonal P: where it is zero the projection is "
            "not unique; add a small positive weight there"
        )
    return each


def solve_blocks(problem: QP, workers: int = 1) -> Solution:
    """Solve a batch, its problems by so many threads; see ``fairopt.kernels.simplex``."""
    begun = time.perf_counter()
    data = Blocks(problem)
    batch, m, K, C = data.A.shape
    n = data.q.shape[1]
    x, theta = np.empty((batch, n, C)), np.empty((batch, n))
    y, T = np.empty((batch, m + n)), np.empty((batch, 2, K, C))
    tight, outcome = np.empty((batch, m), np.uint8), np.empty((batch, 2), np.int64)
    single, precision = problem.q.dtype == torch.float32, ROW_PRECISION[problem.q.dtype]

    def some(first: int, last: int) -> int:
        def cut(*arrays: Array) -> tuple[Array, ...]:
            return tuple(array[first:last] for array in arrays)

        written = cut(x, theta, y, T, tight, outcome)
        failed: int = kernels.solve(
            cut(*data.rows), cut(*data.samples), single, precision, *written
        )
        return failed

    failures = sum(in_parallel(some, batch, workers))
    return unchecked(
        Solution,
        problem=problem,
        x=torch.from_numpy(x).view(batch, n * C).to(problem.q.dtype),
        row_dual=torch.from_numpy(y),
        status=outcomes(outcome, failures),
        backend="numba",
        iterations=tuple(outcome[:, PASSES].tolist()),
        seconds=time.perf_counter() - begun,
        context=(data, y[:, :m], T, theta, tight),
    )


def vjp_blocks(solution: Solution, grad_x: Tensor) -> Adjoint:
    """Two passes over the samples, and the shared least-squares problem in the cells.

    On its free classes F a sample's equations are P v + w A_k^T nu + nu_i = -g and sum_F v = 0, so
    that v = -(g + w A_k^T nu, less its mean over F) / P; what is left are the rows' equations, with
    the curvature of ``fairopt.kernels.simplex`` in the place of 1/P.
    """
    data, multipliers, T, theta, tight = solution.context
    batch, m, K, C = data.A.shape
    n = data.q.shape[1]
    g = contiguous(grad_x.detach()).reshape(batch, n, C)
    W, G = np.empty((batch, K, C, C)), np.empty((batch, K, C))
    N, c = np.empty((batch, m, K, C - 1)), np.empty((batch, K, C - 1))
    for b in range(batch):
        kernels.adjoint_sums(*data.of(b), *T[b], theta[b], g[b], W[b], G[b])
        kernels.adjoint_factor(data.A[b], W[b], G[b], N[b], c[b])
    y = torch.from_numpy(multipliers)
    factor = torch.from_numpy(N).view(batch, m, K * (C - 1))
    active = active_rows(factor, multipliers, data.l == data.u, tight)
    some = active.any(0).nonzero().squeeze(-1)  # of many pairs few are active
    least = least_norm(
        (factor * active.unsqueeze(-1))[:, some], torch.from_numpy(c).view(batch, -1)
    )
    rows_nu = torch.zeros_like(y).index_copy(1, some, least)
    shift = torch.einsum("bm,bmkc->bkc", rows_nu, torch.from_numpy(data.A)).numpy()
    v, sums_nu = np.empty((batch, n, C)), np.empty((batch, n))
    for b in range(batch):
        kernels.adjoint_write(*data.of(b), *T[b], theta[b], g[b], shift[b], v[b], sums_nu[b])
    return Adjoint(
        torch.from_numpy(v).view(batch, n * C), torch.cat([rows_nu, torch.from_numpy(sums_nu)], -1)
    )
