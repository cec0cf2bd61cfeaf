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
from torch import Tensor

from fairopt.backends.contract import Backend, Capabilities
from fairopt.backends.numba.data import Answer, Data, Shares, active_rows, as_numpy, solve_large
from fairopt.backends.numba.partitioned import Many
from fairopt.errors import ProblemError, UnsupportedProblemError
from fairopt.kernels.adjoint import (
    OPEN,
    WRITTEN,
    adjoint,
    batch_sums,
    batch_write,
    is_open,
    reach_of,
)
from fairopt.kernels.memory import empty
from fairopt.kernels.passes import part
from fairopt.kernels.projection import solve
from fairopt.kernels.threads import in_parallel
from fairopt.optimality.derivative import Adjoint
from fairopt.optimality.linear_systems import least_norm
from fairopt.programs.problem import QP, Problem
from fairopt.programs.rows.blocks import BlockRows
from fairopt.programs.rows.cells import CellRows, cell_factor
from fairopt.programs.rows.partitioned import PartitionedRows
from fairopt.programs.solution import Solution

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

            return solve_blocks(problem, self.workers(*problem.q.shape))
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
        answer = Answer(data, K)
        workers = self.workers(batch, n)
        failures = 1
        if workers > 1 and batch == 1 and not fixed.grouped:
            solve_large(fixed.C[0], data, 0, workers, answer)
        elif workers == 1:
            failures = solve(
                *fixed.rows, data.q, fixed.metric, data.cell, fixed.options, *answer.arrays
            )
        else:

            def some(first: int, last: int) -> None:
                def cut(*arrays: Any) -> tuple[Any, ...]:
                    return tuple(part(array, first, last) for array in arrays)

                metric, written = cut(*fixed.metric), cut(*answer.arrays)
                solve(*cut(*fixed.rows, data.q), metric, *cut(data.cell), fixed.options, *written)

            in_parallel(some, batch, workers)
        return answer.solution(problem, answer, begun, failures)

    def solve_many(self, problem: QP) -> Solution:
        """Rows over partitions; the dense coefficients are taken where these do not get through."""
        begun = time.perf_counter()
        work = Many(problem, self.workers)
        if not work.solve():
            whole = self.solve(work.dense)
            return replace(whole, problem=problem, seconds=time.perf_counter() - begun)
        return work.answer.solution(problem, work, begun)

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
            answer = solution.context.plain()
        else:
            answer = solution.context
        data, y, T, tight = answer.data, answer.y, answer.T, answer.tight
        fixed = data.constants
        batch, n = data.q.shape
        g = as_numpy(grad_x.detach() if grad_x.requires_grad else grad_x, data.q.dtype)
        step, v = empty(g.shape, fixed.dtype)
        workers = self.workers(batch, n)
        given = data.q, fixed.metric, data.cell, T, g
        if workers == 1:
            nu = np.empty_like(y)
            outcome = adjoint(*fixed.rows, y, tight, *given, v, nu)
            if outcome == WRITTEN:
                return Adjoint(step, torch.from_numpy(nu))
            open_ = outcome == OPEN
        else:
            shares = [Shares(data, b, workers, T.shape[-1]) for b in range(batch)]
            reach = [reach_of(fixed.C[b], y[b]) for b in range(batch)]
            looked = (y != 0) | (fixed.l == fixed.u) | (tight != 0)
            open_ = any(
                is_open(fixed.C[b], looked[b], *data.samples(b), *T[b], reach[b])
                for b in range(batch)
            )
        if open_:
            return super().vjp(problem, solution, grad_x)

        sums = np.empty((batch, 2, T.shape[-1]))
        if workers == 1:
            batch_sums(fixed.C, y, *given, sums)
        else:
            for b in range(batch):
                sums[b] = shares[b].adjoint_sums(T[b], reach[b], g[b])
        coefficient = torch.from_numpy(fixed.C)
        s, h = torch.from_numpy(sums).unbind(1)
        N, c = cell_factor(coefficient, h, s)
        least = least_norm(N * active_rows(N, y, fixed.l == fixed.u, tight).unsqueeze(-1), c)
        change = (least.unsqueeze(-2) @ coefficient).squeeze(-2).numpy()
        if workers == 1:
            batch_write(fixed.C, y, *given, change, v)
        else:
            for b in range(batch):
                shares[b].adjoint_write(T[b], reach[b], g[b], change[b], v[b])
        return Adjoint(step, least)
