"""The closed-form projection for rows over partitions: hundreds of rows, thousands of cells.

The algebra between passes over the samples is that of ``fairopt.kernels.partitions``.

The backward needs the rank of the active rows, which squaring blurs. It is taken from the parts
only where it is plain: where pivots and lengths are either far above rounding or at rounding.
Otherwise ``adjoint`` returns None, and the dense coefficients are decomposed.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.backends.numba.data import Answer, Data, Shares, as_numpy, solve_large
from fairopt.kernels import partitions as kernels
from fairopt.kernels.active_set import independent
from fairopt.kernels.adjoint import any_open
from fairopt.kernels.combinations import class_sums
from fairopt.kernels.memory import empty
from fairopt.kernels.projection import STATUS
from fairopt.kernels.state import CONVERGED, INFEASIBLE
from fairopt.optimality.derivative import Adjoint
from fairopt.optimality.minimum_norm import minimum_norm
from fairopt.programs.problem import QP
from fairopt.programs.rows.partitioned import PartitionedRows

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
        parts = rows.partitions
        self.member: Array = np.ascontiguousarray(parts.member.numpy()).view(np.uint32)
        first, size = np.array([0, *parts.sizes]).cumsum(), np.array(parts.sizes)
        of_row = parts.of_row.numpy()
        self.tables = [
            kernels.compress(table, first[of_row], size[of_row]) for table in self.data.constants.C
        ]
        self.K, self.S = len(self.member), parts.total
        self.workers = workers(1, self.data.q.shape[1])
        self.answer = Answer(self.data, self.K)

    @cached_property
    def dense(self) -> QP:
        """The same problem with dense coefficients."""
        return self.problem.replace(rows=self.rows.plain().replace(cell=self.rows.cell.long()))

    def plain(self) -> Answer:
        """The answer as if it came from the dense coefficients."""
        answer = copy(self.answer)
        answer.data = Data(self.dense)
        return answer

    def coefficients(self, b: int) -> kernels.PartRows:
        S = self.S
        kept = np.zeros(self.K), np.zeros((S, S)), np.zeros(S)
        end, column, value = self.tables[b]
        return kernels.PartRows(end, column, value, self.member, *kept)

    def solve(self) -> bool:
        """Solve all; False if one needs the dense coefficients."""
        for b in range(len(self.answer.y)):
            solve_large(self.coefficients(b), self.data, b, self.workers, self.answer)
            if self.answer.outcome[b, STATUS] not in (CONVERGED, INFEASIBLE):
                return False
        return True

    # -----------------------------------------------------------------------------------------

    def adjoint(self, grad_x: Tensor) -> Adjoint | None:
        """v and nu of the adjoint; None where the rank of the active rows is not plain."""
        g = as_numpy(grad_x.detach() if grad_x.requires_grad else grad_x, self.data.q.dtype)
        step, v = empty(g.shape, self.data.constants.dtype)
        nu = np.zeros_like(self.answer.y)
        try:
            for b in range(len(g)):
                nu[b] = self.adjoint_of(b, g[b], v[b])
        except Blurred:
            return None
        return Adjoint(step, torch.from_numpy(nu))

    def adjoint_of(self, b: int, g: Array, v: Array) -> Array:
        """nu of one problem; v is written."""
        answer, fixed = self.answer, self.data.constants
        y, T = answer.y[b], answer.T[b]
        end, column, value = self.tables[b]
        reach = float(self.shifts(end, column, np.abs(value), np.abs(y)).max())
        looked = (y != 0) | (fixed.l[b] == fixed.u[b]) | (answer.tight[b] != 0)
        if looked.any():
            near = kernels.looked_at(end, column, self.member, self.S, looked)
            if any_open(near, *self.data.samples(b), *T, reach):
                raise Blurred
        shares = Shares(self.data, b, self.workers, self.K)
        nu, change = self.multipliers(b, *shares.adjoint_sums(T, reach, g))
        shares.adjoint_write(T, reach, g, change, v)
        return nu

    def shifts(self, end: Array, column: Array, value: Array, y: Array) -> Array:
        """The dual shifts of multipliers."""
        sums, out = np.empty(self.S), np.empty(self.K)
        kernels.row_shifts(end, column, value, y, sums)
        kernels.cell_shifts(self.member, sums, out)
        return out

    def multipliers(self, b: int, s: Array, h: Array) -> tuple[Array, Array]:
        """nu and its dual shifts, from what ``adjoint_sums`` finds."""
        end, column, value = self.tables[b]
        y, tight = self.answer.y[b], self.answer.tight[b]
        equality = self.data.constants.l[b] == self.data.constants.u[b]
        m = len(y)
        nu, shift = np.zeros(m), np.zeros(self.K)
        active = (y != 0) | equality
        tied = (tight != 0) & ~active
        if not (active.any() or tied.any()):
            return nu, shift
        G = np.zeros((self.S, self.S))
        kernels.gram(self.member, h, G)
        L, least, _ = kernels.factorise_parts(G, PLAIN_SQUARE[1])
        if least < PLAIN_SQUARE[0]:
            raise Blurred
        N, length = np.empty((m, L.shape[1])), np.empty(m)
        kernels.normals(end, column, value, L, N, length)
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
                active = (z != 0) | (equality & active)
                Q, R, W = self.basis(N, active)
        if not len(W):
            return nu, shift

        sums, values = np.empty(self.S), np.empty(m)
        # Twice, the second time for what is left: R^T R alone would square the condition.
        triangle = torch.from_numpy(R)
        for _ in range(2):
            class_sums(self.member, s + h * shift, sums)
            kernels.row_values(end, column, value, sums, values)
            right = torch.from_numpy(-values[W] / length[W]).unsqueeze(-1)
            half = torch.linalg.solve_triangular(triangle.mT, right, upper=False)
            whole = torch.linalg.solve_triangular(triangle, half, upper=True)
            nu[W] += whole.squeeze(-1).numpy() / length[W]
            shift = self.shifts(end, column, value, nu)
        others = active & (length > 0)
        others[W] = False
        if others.any():
            self.spread_evenly(nu, N, length, Q, triangle, W, others)
        return nu, shift

    def basis(self, N: Array, rows: Array) -> tuple[Array, Array, Array]:
        Q, R, W, taken, left = independent(N, np.flatnonzero(rows), True)
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

    def spread_evenly(
        self, nu: Array, N: Array, length: Array, Q: Array, R: Tensor, W: Array, others: Array
    ) -> None:
        """The minimum-norm nu that does the same, on rows of unit length, over dependent rows, too.

        With N_others = B N_W it is M (M^T M)^-1 nu_W, where M stacks the identity on B.
        """
        B = torch.linalg.solve_triangular(R, torch.from_numpy(Q @ N[others].T), upper=True).mT
        given = torch.from_numpy(nu[W] * length[W])
        inner = B.mT @ B
        inner.diagonal().add_(1.0)
        short = torch.cholesky_solve(given.unsqueeze(-1), torch.linalg.cholesky(inner)).squeeze(-1)
        nu[W] = short.numpy() / length[W]
        nu[others] = (B @ short).numpy() / length[others]
