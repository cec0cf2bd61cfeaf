"""The closed-form projection for rows over partitions: hundreds of rows, thousands of cells.

Passes over the samples are those of ``_projection``; the algebra between them that of ``_classes``.

The backward needs the rank of the active rows, which squaring blurs. It is taken from the classes
only where it is plain: where pivots and lengths are either far above rounding or at rounding.
Otherwise ``adjoint`` returns None, and the dense coefficients are decomposed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.backends.numba.data import Constants, Data, as_numpy, by_cells, outcomes
from fairopt.kernels import combinations
from fairopt.kernels import partitions as classes
from fairopt.kernels import projection as kernels
from fairopt.kernels.memory import empty
from fairopt.kernels.threads import each
from fairopt.optimality.derivative import Adjoint
from fairopt.optimality.minimum_norm import minimum_norm
from fairopt.programs.problem import QP
from fairopt.programs.rows.partitioned import PartitionedRows
from fairopt.programs.solution import Status
from fairopt.tolerances import ROW_PRECISION

Array = NDArray[Any]

# Where the rank is plain. Squared lengths, as shares of a class's own; and lengths, of unit rows.
PLAIN_SQUARE = 1e-7, 1e-13
PLAIN_LENGTH = 1e-5, 1e-11


class Blurred(Exception):
    """The rank is not plain, or other multipliers could hold samples that sit at a bound."""


class Many:
    """One batch and its solution; the ``context`` of that."""

    def __init__(self, problem: QP, workers: Callable[[int, int], int]) -> None:
        rows = problem.rows
        assert isinstance(rows, PartitionedRows)
        self.problem, self.rows = problem, rows
        self.data = Data(problem)
        self.fixed: Constants = self.data.constants
        parts = rows.partitions
        self.member: Array = np.ascontiguousarray(parts.member.numpy()).view(np.uint32)
        first, size = np.array([0, *parts.sizes]).cumsum(), np.array(parts.sizes)
        of_row = parts.of_row.numpy()
        batch, m, _ = self.fixed.C.shape
        self.tables = [
            classes.compress(table, first[of_row], size[of_row]) for table in self.fixed.C
        ]
        n = self.data.q.shape[1]
        self.K, self.S = len(self.member), parts.total
        self.workers = workers(1, n)
        self.answer, self.x = empty((batch, n), self.fixed.dtype)
        self.y, self.T = np.empty((batch, m)), np.empty((2, batch, self.K))
        self.worst = np.empty(batch)
        self.status, self.passes = np.empty(batch, np.int64), np.empty(batch, np.int64)
        self.tight = np.empty((batch, m), np.uint8)
        self.precision = ROW_PRECISION[problem.q.dtype]

    @cached_property
    def dense(self) -> QP:
        """The same problem with dense coefficients."""
        return self.problem.replace(rows=self.rows.plain().replace(cell=self.rows.cell.long()))

    def plain(self) -> tuple[Data, Array, Array, Array]:
        """The context of the solution, as if it came from the dense coefficients."""
        return Data(self.dense), self.y, self.T, self.tight

    def outcomes(self) -> tuple[Status, ...]:
        return outcomes(self.status, self.worst, self.precision)

    def solve(self) -> bool:
        """Solve all; False if one needs the dense coefficients."""
        return all(self.solve_one(b) for b in range(len(self.y)))

    def solve_one(self, b: int) -> bool:
        fixed, workers, K, S = self.fixed, self.workers, self.K, self.S
        q, cell, l, u = self.data.q[b], self.data.cell[b], fixed.l[b], fixed.u[b]
        inverse, w, lb, ub = self.data.of(b)
        end, of, value = self.tables[b]
        n, m = len(q), len(l)
        cut = [n * c // workers for c in range(workers + 1)]
        (qs, ps, ws, los, ups), place = by_cells(cell, K, cut, (q, inverse, w, lb, ub))
        parts = np.empty((4, workers, K))
        each(
            workers,
            lambda c: kernels.cell_limits(
                ps, ws, los, ups, place, cut[c], cut[c + 1], *parts[:, c]
            ),
        )
        H, low, high, mass = parts.sum(1)
        absolute = classes.absolute_scale(end, of, value, self.member, mass, S)
        numbers, counts, Y, T, dt = kernels.new_state(m, K)
        kept = np.zeros(K), np.zeros((S, S)), np.zeros(S)  # of ``remodel``

        def one_pass(c: int, single: bool, row: int) -> None:
            kernels.evaluate(
                qs, ps, ws, los, ups, place, T[row], T[row + 1], cut[c], cut[c + 1], single,
                *parts[:3, c],
            )  # fmt: skip

        rounding = kernels.sum_rounding(n)
        status = kernels.CONTINUE
        while status == kernels.CONTINUE:
            each(workers, lambda c: one_pass(c, False, 2))
            s, h, size = parts[:3].sum(1)
            status = classes.advance(
                end, of, value, self.member, absolute, l, u, low, high, H, mass, s, h, size,
                rounding, numbers, counts, Y, T, dt, *kept,
            )  # fmt: skip
        self.status[b], self.passes[b] = status, counts[kernels.EVALUATIONS]
        self.y[b] = Y[2] if status == kernels.INFEASIBLE else Y[0]
        self.T[:, b] = T[:2]

        each(
            workers,
            lambda c: kernels.write(
                q, inverse, w, lb, ub, cell, T[0], T[1], cut[c], cut[c + 1], self.x[b]
            ),
        )
        if fixed.single:
            each(workers, lambda c: one_pass(c, True, 0))
            s, _, size = parts[:3].sum(1)
        common = end, of, value, self.member, absolute, l, u, mass, s, size, S
        if status == kernels.CONVERGED:
            classes.drop_weak(*common, H, self.y[b])
        classes.tight_sides(*common, self.precision, self.tight[b])
        self.worst[b] = classes.excess(*common)
        if status == kernels.INFEASIBLE:
            return True
        return status == kernels.CONVERGED and bool(self.worst[b] <= self.precision)

    # -----------------------------------------------------------------------------------------

    def adjoint(self, grad_x: Tensor) -> Adjoint | None:
        """v and nu of the adjoint; None where the rank of the active rows is not plain."""
        fixed, data = self.fixed, self.data
        g = as_numpy(grad_x.detach() if grad_x.requires_grad else grad_x, data.q.dtype)
        step, v = empty(g.shape, fixed.dtype)
        nu = np.zeros_like(self.y)
        try:
            for b in range(len(g)):
                nu[b] = self.adjoint_of(b, g[b], v[b])
        except Blurred:
            return None
        return Adjoint(step, torch.from_numpy(nu))

    def adjoint_of(self, b: int, g: Array, v: Array) -> Array:
        """nu of one problem; v is written."""
        data, workers = self.data, self.workers
        cut = [len(g) * c // workers for c in range(workers + 1)]
        sums = np.empty((2, workers, self.K))
        table, y = (*self.tables[b], self.member, self.S), self.y[b]
        reach = classes.reach_of(*table, y)
        at = data.q[b], *data.of(b), data.cell[b], self.T[0, b], self.T[1, b], reach
        tight = (y != 0) | (self.fixed.l[b] == self.fixed.u[b]) | (self.tight[b] != 0)
        end, of, _, member, S = table
        if tight.any() and kernels.any_open(classes.near(end, of, member, S, tight), *at):
            raise Blurred
        given = *at, g

        def accumulate(c: int) -> None:
            kernels.adjoint_sums(*given, cut[c], cut[c + 1], sums[0, c], sums[1, c])

        def spread(c: int) -> None:
            kernels.adjoint_write(*given, shift, cut[c], cut[c + 1], v)

        each(workers, accumulate)
        nu, shift = self.multipliers(b, *sums.sum(1))
        each(workers, spread)
        return nu

    def multipliers(self, b: int, s: Array, h: Array) -> tuple[Array, Array]:
        """nu and its tilts, from the cell sums of w g / P and of w^2 / P over the free samples."""
        end, of, value = self.tables[b]
        y, tight, meet = self.y[b], self.tight[b], self.fixed.l[b] == self.fixed.u[b]
        m = len(y)
        nu, shift = np.zeros(m), np.zeros(self.K)
        active = (y != 0) | meet
        tied = (tight != 0) & ~active
        if not (active.any() or tied.any()):
            return nu, shift
        G = np.zeros((self.S, self.S))
        classes.gram(self.member, h, G)
        L, least, _ = classes.factorise_classes(G, PLAIN_SQUARE[1])
        if least < PLAIN_SQUARE[0]:
            raise Blurred
        N, length = np.empty((m, L.shape[1])), np.empty(m)
        classes.normals(end, of, value, L, N, length)
        Q, R, W = self.basis(N, active)
        if tied.any():
            outside = self.outside(N, Q, tied)
            if outside.sum() > 1:
                upper, lower = (tight & 1 != 0) | (y > 0), (tight & 2 != 0) | (y < 0)
                among = upper | lower
                z = np.zeros(m)
                z[among] = minimum_norm(
                    *(
                        torch.from_numpy(a).unsqueeze(0)
                        for a in (
                            N[among] * length[among, None],
                            y[among],
                            upper[among],
                            lower[among],
                        )
                    )
                )[0].numpy()
                active = (z != 0) | (meet & active)
                Q, R, W = self.basis(N, active)
        if not len(W):
            return nu, shift

        sums, values = np.empty(self.S), np.empty(m)

        def tilts() -> None:
            classes.row_tilts(end, of, value, nu, sums)
            classes.cell_tilts(self.member, sums, shift)

        # Twice, the second time for what is left: R^T R alone would square the condition.
        triangle = torch.from_numpy(R)
        for _ in range(2):
            combinations.class_sums(self.member, s + h * shift, sums)
            classes.row_values(end, of, value, sums, values)
            right = torch.from_numpy(-values[W] / length[W]).unsqueeze(-1)
            half = torch.linalg.solve_triangular(triangle.mT, right, upper=False)
            whole = torch.linalg.solve_triangular(triangle, half, upper=True)
            nu[W] += whole.squeeze(-1).numpy() / length[W]
            tilts()
        others = active & (length > 0)
        others[W] = False
        if others.any():
            self.shorten(nu, N, length, Q, triangle, W, others)
        return nu, shift

    def basis(self, N: Array, rows: Array) -> tuple[Array, Array, Array]:
        Q, R, W, taken, left = classes.independent(N, np.flatnonzero(rows))
        if taken < PLAIN_LENGTH[0] or left > PLAIN_LENGTH[1]:
            raise Blurred
        return Q, R, W

    def outside(self, N: Array, Q: Array, tied: Array) -> Array:
        """Which of the tied rows are no combination of the active ones."""
        some = N[tied]
        beside = np.linalg.norm(some - (some @ Q.T) @ Q, axis=1)
        beside[np.linalg.norm(some, axis=1) == 0] = 0.0
        if ((beside > PLAIN_LENGTH[1]) & (beside < PLAIN_LENGTH[0])).any():
            raise Blurred
        found: Array = beside > PLAIN_LENGTH[0]
        return found

    def shorten(
        self, nu: Array, N: Array, length: Array, Q: Array, R: Tensor, W: Array, others: Array
    ) -> None:
        """The shortest nu that does the same, on rows of unit length, spread over dependent rows.

        With N_others = B N_W it is M (M^T M)^-1 nu_W, where M stacks the identity on B.
        """
        B = torch.linalg.solve_triangular(R, torch.from_numpy(Q @ N[others].T), upper=True).mT
        given = torch.from_numpy(nu[W] * length[W])
        inner = B.mT @ B
        inner.diagonal().add_(1.0)
        short = torch.cholesky_solve(given.unsqueeze(-1), torch.linalg.cholesky(inner)).squeeze(-1)
        nu[W] = short.numpy() / length[W]
        nu[others] = (B @ short).numpy() / length[others]
