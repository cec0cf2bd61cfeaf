"""One problem of a batch as a sparse one without bounds, in units in which it is about 1:

    minimise 1/2 z^T P z + q^T z    subject to    l <= A z <= u,

the bounds being the last rows of A. With d the diagonal of P (1 where that is zero), x = s z and
s_i = unit / sqrt(d_i), P has a unit diagonal and the objective is divided by unit^2; rows are of
unit length. Unit is the size of what the problem asks for: of the minimum without constraints and
of the distances from zero to the sides. A tolerance for z then means the same whatever the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from fairopt.kernels.sparse_columns import cell_entries, columns, priced
from fairopt.programs.problem import QP
from fairopt.programs.rows.cells import CellRows
from fairopt.programs.rows.sparse import SparseRows

Array = NDArray[Any]


@dataclass(frozen=True)
class Pattern:
    """Where the entries of a matrix stand, by columns; as bytes, which compare and hash."""

    shape: tuple[int, int]
    start: bytes
    row: bytes

    @staticmethod
    def of(shape: tuple[int, int], start: Array, row: Array) -> Pattern:
        return Pattern(shape, start.astype(np.int32).tobytes(), row.astype(np.int32).tobytes())

    @property
    def arrays(self) -> tuple[Array, Array]:
        """Start of each column, and the row of each entry; read-only."""
        return np.frombuffer(self.start, np.int32), np.frombuffer(self.row, np.int32)

    def matrix(self, values: Array) -> Any:
        """The SciPy matrix with these values."""
        start, row = self.arrays
        return sparse.csc_matrix((values, row.copy(), start.copy()), shape=self.shape)


@dataclass(frozen=True)
class Scaled:
    """The problem above, and the way back.

    Attributes:
        P, A: the values that stand in the patterns; of P the upper triangle.
        s: x = s z, ``(n,)``.
        t: a row's multiplier is t times that of the scaled row, ``(m,)``.
        is_diagonal: whether P is, which is then 1.
    """

    P_pattern: Pattern
    P: Array
    q: Array
    A_pattern: Pattern
    A: Array
    l: Array
    u: Array
    s: Array
    t: Array
    is_diagonal: bool

    def start(self, multipliers: Array) -> tuple[Array, Array]:
        """x and y that follow from the multipliers ``(m,)`` of the rows, in the problem's units."""
        assert self.is_diagonal
        found: tuple[Array, Array] = priced(
            *self.A_pattern.arrays, self.A, self.q, self.l, self.u, multipliers / self.t
        )
        return found


class Standard:
    """A batch, ready to be taken apart."""

    def __init__(self, problem: QP) -> None:
        self.problem = problem
        self.m, self.n = problem.shape[1:]
        self.root = np.sqrt(problem.diagonal().numpy())
        # Contiguous, so that what reads them is compiled once.
        self.vectors = [
            np.ascontiguousarray(each.numpy(), np.float64)
            for each in (problem.q, problem.l, problem.u, problem.lb, problem.ub)
        ]

    def scaled(self, b: int) -> Scaled:
        """Problem b of the batch."""
        root, n = self.root[b], self.n
        start, rows, A, q, l, u, length, unit = columns(
            *map(np.ascontiguousarray, self.entries(b)), root, *(each[b] for each in self.vectors)
        )
        inverse = 1 / root
        return Scaled(
            *self.quadratic(b, inverse), q, Pattern.of((len(l), n), start, rows), A, l, u,
            inverse * unit, unit / length, self.problem.is_diagonal,
        )  # fmt: skip

    def entries(self, b: int) -> tuple[Array, Array, Array]:
        """Row, column and value of all entries of A that are not zero, column by column."""
        rows = self.problem.rows
        if isinstance(rows, CellRows):
            found: tuple[Array, Array, Array] = cell_entries(
                np.ascontiguousarray(rows.coefficient[b].numpy(), np.float64),
                np.ascontiguousarray(rows.cell[b].numpy(), np.int64),
                np.ascontiguousarray(rows.weight[b].numpy(), np.float64),
            )
            return found
        if rows.is_sparse:
            row, column, order = self.order
            return row, column, self.sparse.values[b].double().numpy()[order]
        A = rows.to_tensor()[b].double().numpy()
        column, row = A.T.nonzero()
        return row, column, A[row, column]

    @cached_property
    def sparse(self) -> SparseRows:
        return self.problem.rows.to_sparse().coalesced()

    @cached_property
    def order(self) -> tuple[Array, Array, Array]:
        """Row and column of the entries of sparse rows by columns, and the order that does it."""
        return by_columns(self.sparse.row, self.sparse.column)

    @cached_property
    def upper(self) -> tuple[SparseRows, Array, Array, Array]:
        """The same for the upper triangle of a sparse P, with the matrix that it is taken from."""
        P = self.problem.P
        assert isinstance(P, SparseRows)
        P = P.coalesced()
        row, column, order = by_columns(P.row, P.column)
        kept = row <= column
        return P, row[kept], column[kept], order[kept]

    def quadratic(self, b: int, inverse: Array) -> tuple[Pattern, Array]:
        """The upper triangle of P, scaled by ``inverse`` from both sides."""
        P, n = self.problem.P, self.n
        if isinstance(P, SparseRows):
            matrix, row, column, order = self.upper
            values = matrix.values[b].double().numpy()[order]
        elif P.dim() == 2:
            values = P[b].double().numpy()
            return self.diagonal_pattern, values * inverse * inverse
        else:
            one = np.triu(P[b].double().numpy())
            column, row = one.T.nonzero()
            values = one[row, column]
        start = np.zeros(n + 1, np.int64)
        np.cumsum(np.bincount(column, minlength=n), out=start[1:])
        return Pattern.of((n, n), start, row), values * inverse[row] * inverse[column]

    @cached_property
    def diagonal_pattern(self) -> Pattern:
        return Pattern.of((self.n, self.n), np.arange(self.n + 1), np.arange(self.n))


def by_columns(row: Tensor, column: Tensor) -> tuple[Array, Array, Array]:
    order = np.lexsort((row.numpy(), column.numpy()))
    return row.numpy()[order], column.numpy()[order], order
