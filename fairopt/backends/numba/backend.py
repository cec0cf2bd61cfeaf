"""Closed-form projection, compiled with Numba: the embedded backend.

Best for what a fairness layer solves: diagonal P, any bounds, few rows; in particular rows in cell
form, where a pass costs O(n + m K) and memory one copy of the scores. Exact to rounding. CPU only.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.backends.contract import Backend, Capabilities
from fairopt.backends.numba.data import Data, as_numpy, by_cells, outcomes
from fairopt.backends.numba.partitioned import Many
from fairopt.errors import ProblemError, UnsupportedProblemError
from fairopt.kernels import projection as kernels
from fairopt.kernels.memory import empty
from fairopt.kernels.threads import each, in_parallel
from fairopt.optimality.derivative import Adjoint
from fairopt.optimality.linear_systems import least_norm
from fairopt.optimality.minimum_norm import support
from fairopt.programs.problem import QP, Problem
from fairopt.programs.rows.blocks import BlockRows
from fairopt.programs.rows.cells import CellRows, cell_factor
from fairopt.programs.rows.partitioned import PartitionedRows
from fairopt.programs.solution import Solution, Status
from fairopt.programs.tensors import unchecked
from fairopt.tolerances import ROW_PRECISION

Array = NDArray[Any]

# Below this many samples a second thread costs more than it brings: a pass over a million takes
# 0.2 ms, and torch's own threads still spin on the other core when ours wake.
PARALLEL_FROM = 2_000_000

# More rows than this, and than variables, are not what the method is for: its work grows with the
# cube of the number of active ones.
MOST_ROWS = 256


class Numba(Backend):
    """The closed-form projection.

    Args:
        threads: at most this many; by default ``torch.get_num_threads()`` at each call.
    """

    name: ClassVar[str] = "numba"
    capabilities: ClassVar[Capabilities] = Capabilities(
        quadratic=frozenset({"diagonal"}),
        rows=frozenset({"blocks", "cells", "dense", "sparse"}),
        devices=frozenset({"cpu"}),
        certifies=True,
    )

    def __init__(self, *, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise ProblemError(f"threads: expected at least 1, got {threads}")
        self.threads = threads

    def workers(self, batch: int, n: int) -> int:
        """How many threads a batch of this size is worth."""
        if batch * n < PARALLEL_FROM:
            return 1
        available = self.threads or torch.get_num_threads()
        return max(1, min(available, batch * n // (PARALLEL_FROM // 2)))

    def solve(self, problem: Problem) -> Solution:
        assert isinstance(problem, QP)
        if isinstance(problem.rows, PartitionedRows):
            return self.solve_many(problem)
        if isinstance(problem.rows, BlockRows):
            from fairopt.backends.numba.simplex import solve_blocks  # compiled code that few need

            workers = self.workers(*problem.q.shape)
            return solve_blocks(problem, self.name, workers)
        begun = time.perf_counter()
        m, n = problem.l.shape[1], problem.q.shape[1]
        if m > max(n, MOST_ROWS) and not isinstance(problem.rows, CellRows):
            raise UnsupportedProblemError(
                f"backend 'numba' is for few rows; expected at most {max(n, MOST_ROWS)} in dense "
                f"or sparse form over {n} variables, got {m}; choose another backend or "
                'backend="auto"'
            )
        data = Data(problem)
        fixed = data.constants
        batch, m, K = fixed.C.shape
        n = data.q.shape[1]
        answer, x = empty((batch, n), fixed.dtype)
        y, T, worst = np.empty((batch, m)), np.empty((2, batch, K)), np.empty(batch)
        status, passes = np.empty(batch, np.int64), np.empty(batch, np.int64)
        tight = np.empty((batch, m), np.uint8)
        precision = ROW_PRECISION[problem.q.dtype]
        workers = self.workers(batch, n)
        if workers > 1 and batch == 1 and not fixed.grouped:
            status[0], passes[0], worst[0] = solve_parallel(
                data, workers, precision, x[0], y[0], T[:, 0], tight[0]
            )
            failures = int(status[0] != kernels.CONVERGED or not worst[0] <= precision)
        else:

            def some(first: int, last: int) -> int:
                failed: int = kernels.solve(
                    fixed.C, fixed.l, fixed.u, data.q, *fixed.scalars_or_arrays, data.cell,
                    fixed.grouped, fixed.single, precision, first, last,
                    x, y, T, status, passes, worst, tight,
                )  # fmt: skip
                return failed

            failures = some(0, batch) if workers == 1 else sum(in_parallel(some, batch, workers))
        return unchecked(
            Solution,
            problem=problem,
            x=answer if answer.dtype == problem.q.dtype else answer.to(problem.q.dtype),
            row_dual=torch.from_numpy(y),
            status=outcomes(status, worst, precision) if failures else (Status.SOLVED,) * batch,
            backend=self.name,
            iterations=tuple(passes.tolist()),
            seconds=time.perf_counter() - begun,
            context=(data, y, T, tight),
        )

    def solve_many(self, problem: QP) -> Solution:
        """Rows over partitions; the dense coefficients are taken where these do not get through."""
        begun = time.perf_counter()
        work = Many(problem, self.workers)
        if not work.solve():
            whole = self.solve(work.dense)
            return replace(whole, problem=problem, seconds=time.perf_counter() - begun)
        return unchecked(
            Solution,
            problem=problem,
            x=work.answer
            if work.answer.dtype == problem.q.dtype
            else work.answer.to(problem.q.dtype),
            row_dual=torch.from_numpy(work.y),
            status=work.outcomes(),
            backend=self.name,
            iterations=tuple(work.passes.tolist()),
            seconds=time.perf_counter() - begun,
            context=work,
        )

    def vjp(self, problem: QP, solution: Solution, grad_x: Tensor) -> Adjoint:
        """Two passes over the samples and the shared least-squares problem in the cells."""
        if isinstance(problem.rows, BlockRows):
            from fairopt.backends.numba.simplex import vjp_blocks

            return vjp_blocks(solution, grad_x)
        if not isinstance(problem.rows, CellRows):
            return super().vjp(problem, solution, grad_x)
        if isinstance(solution.context, Many):
            found = solution.context.adjoint(grad_x)
            if found is not None:
                return found
            data, y, T, tight = solution.context.plain()
        else:
            data, y, T, tight = solution.context
        fixed = data.constants
        batch, n = data.q.shape
        g = as_numpy(grad_x.detach() if grad_x.requires_grad else grad_x, data.q.dtype)
        step, v = empty(g.shape, fixed.dtype)
        nu = np.empty_like(y)
        workers = self.workers(batch, n)
        if workers == 1:
            outcome = kernels.adjoint(
                fixed.C, fixed.l, fixed.u, y, tight, data.q, *fixed.scalars_or_arrays, data.cell,
                T, g, 0, batch, v, nu,
            )  # fmt: skip
            if outcome == kernels.DONE:
                return Adjoint(step, torch.from_numpy(nu))
            open_ = outcome == kernels.OPEN
        reach = [kernels.reach_of(fixed.C[b], y[b]) for b in range(batch)]
        if workers > 1:
            open_ = any(
                kernels.is_open(
                    fixed.C[b], (y[b] != 0) | (fixed.l[b] == fixed.u[b]) | (tight[b] != 0),
                    data.q[b], *data.of(b), data.cell[b], T[0, b], T[1, b], reach[b],
                )
                for b in range(batch)
            )  # fmt: skip
        if open_:
            return super().vjp(problem, solution, grad_x)

        cut = [n * i // workers for i in range(workers + 1)]
        sums = np.empty((2, workers, batch, fixed.C.shape[2]))

        def accumulate(c: int) -> None:
            for b in range(batch):
                kernels.adjoint_sums(
                    data.q[b], *data.of(b), data.cell[b], T[0, b], T[1, b], reach[b], g[b],
                    cut[c], cut[c + 1], sums[0, c, b], sums[1, c, b],
                )  # fmt: skip

        each(workers, accumulate)
        s, h = torch.from_numpy(sums.sum(1))
        active = torch.from_numpy((y != 0) | (fixed.l == fixed.u))
        coefficient = torch.from_numpy(fixed.C)
        N, c = cell_factor(coefficient, h, s)
        upper, lower = (
            torch.from_numpy((tight & 1 != 0) | (y > 0)),
            torch.from_numpy((tight & 2 != 0) | (y < 0)),
        )
        active = support(N, torch.from_numpy(y), active, upper, lower)
        least = least_norm(N * active.unsqueeze(-1), c)
        shift = (least.unsqueeze(-2) @ coefficient).squeeze(-2).numpy()

        def spread(c: int) -> None:
            for b in range(batch):
                kernels.adjoint_write(
                    data.q[b], *data.of(b), data.cell[b], T[0, b], T[1, b], reach[b], g[b],
                    shift[b], cut[c], cut[c + 1], v[b],
                )  # fmt: skip

        each(workers, spread)
        return Adjoint(step, least)


def solve_parallel(
    data: Data, workers: int, precision: float, x: Array, y: Array, tilts: Array, tight: Array
) -> tuple[int, int, float]:
    """One large problem: every pass split over the threads, the small algebra in one."""
    fixed = data.constants
    q, cell, C, l, u = data.q[0], data.cell[0], fixed.C[0], fixed.l[0], fixed.u[0]
    inverse, w, lb, ub = data.of(0)
    n, (m, K) = len(q), C.shape
    cut = [n * i // workers for i in range(workers + 1)]
    parts = np.empty((4, workers, K))
    pair = K <= 2
    if pair:
        qs, ps, ws, los, ups, place = q, inverse, w, lb, ub, cell
        each(
            workers,
            lambda c: kernels.pair_limits(ps, ws, los, ups, cell, cut[c], cut[c + 1], *parts[:, c]),
        )
    else:
        (qs, ps, ws, los, ups), place = by_cells(cell, K, cut, (q, inverse, w, lb, ub))
        each(
            workers,
            lambda c: kernels.cell_limits(
                ps, ws, los, ups, place, cut[c], cut[c + 1], *parts[:, c]
            ),
        )
    H, low, high, mass = parts.sum(1)
    numbers, counts, Y, T, dt = kernels.new_state(m, K)

    def one_pass(c: int) -> None:
        if pair:
            kernels.pair_evaluate(
                q, inverse, w, lb, ub, cell, T[2], T[3], cut[c], cut[c + 1], *parts[:3, c]
            )
        else:
            kernels.evaluate(
                qs, ps, ws, los, ups, place, T[2], T[3], cut[c], cut[c + 1], False, *parts[:3, c]
            )

    def write(c: int) -> None:
        ends = cut[c], cut[c + 1]
        if pair and fixed.single:
            kernels.pair_write(
                q, inverse, w, lb, ub, cell, T[0], T[1], *ends, x, parts[0, c], parts[2, c]
            )
            return
        kernels.write(q, inverse, w, lb, ub, cell, T[0], T[1], *ends, x)
        if fixed.single:
            kernels.evaluate(qs, ps, ws, los, ups, place, T[0], T[1], *ends, True, *parts[:3, c])

    rounding = kernels.sum_rounding(n)
    status = kernels.CONTINUE
    while status == kernels.CONTINUE:
        each(workers, one_pass)
        s, h, size = parts[:3].sum(1)
        status = kernels.advance(
            C, l, u, low, high, H, mass, s, h, size, rounding, numbers, counts, Y, T, dt
        )
    y[:] = Y[2] if status == kernels.INFEASIBLE else Y[0]
    tilts[:] = T[:2]
    each(workers, write)
    s, _, size = parts[:3].sum(1)
    if status == kernels.CONVERGED:
        kernels.drop_weak(C, l, u, mass, s, size, H, y)
    kernels.tight_sides(C, l, u, mass, s, size, precision, tight)
    return status, int(counts[kernels.EVALUATIONS]), kernels.excess(C, l, u, mass, s, size)
