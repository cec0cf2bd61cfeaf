"""Problem data: QP and LP in one canonical form, and three forms of rows.

    minimise   1/2 x^T P x + q^T x        (LP: c^T x)
    subject to l <= A x <= u              (rows)
               lb <= x <= ub              (bounds)

Everything is batched: B problems of one shape. Data shared over the batch are *expanded*, never
copied. A fourth form of rows is in ``fairopt.programs.block_rows``. Nothing in this module knows of
fairness, of solvers or of autograd functions; it is data, conversions and checks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from fairopt.errors import ProblemError

Kind = TypeVar("Kind")
AnyProblem = TypeVar("AnyProblem", bound="QP | LP")

FLOATS = (torch.float32, torch.float64)


def is_uniform(tensor: Tensor) -> bool:
    """Whether all elements are one expanded value, by construction (strides), not by looking."""
    if not any(tensor.stride()):
        return tensor.numel() > 0
    return tensor.numel() == 1


def compact(tensor: Tensor) -> Tensor:
    """The same values with every expanded dimension cut to size 1; for checks and copies."""
    for dim, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def without_history(tensor: Tensor) -> Tensor:
    """The tensor, detached if it has a history."""
    return tensor.detach() if tensor.requires_grad else tensor


def to_batch(tensor: Tensor, *shape: int) -> Tensor:
    """``tensor.expand(shape)``, at no cost where it has that shape."""
    return tensor if tensor.shape == shape else tensor.expand(shape)


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite: one reduction in the usual case, two passes otherwise."""
    tensor = tensor.detach()
    if math.isfinite(tensor.sum().item()):
        return True  # a NaN or an infinity anywhere would have made the sum one
    return bool(torch.isfinite(tensor).all())


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


class Rows(ABC):
    """The matrix A of a problem, shape ``(B, m, n)``, in whatever form is cheapest.

    All products are computed and returned in float64.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """``(B, m, n)``."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The floating-point tensors that define A: what gradients are taken with respect to."""

    @property
    def structure(self) -> tuple[Tensor, ...]:
        """The integer tensors that say where the values stand."""
        return ()

    @abstractmethod
    def with_tensors(self, *tensors: Tensor) -> Rows:
        """The same structure with other values, in the order of ``tensors``."""

    @abstractmethod
    def expand(self, batch: int) -> Rows:
        """The same rows for each of ``batch`` problems, without a copy."""

    def select(self, index: Tensor) -> Rows:
        """The rows of those problems of the batch only, whose numbers are in ``index``, int64."""
        return self.with_tensors(*(chosen(tensor, index) for tensor in self.tensors))

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """A x: ``(B, n)`` to ``(B, m)``."""

    @abstractmethod
    def transpose_apply(self, y: Tensor) -> Tensor:
        """A^T y: ``(B, m)`` to ``(B, n)``."""

    @abstractmethod
    def factor(self, d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, c)`` with N N^T = A D A^T and N c = A D g, for D = diag(d), d >= 0.

        N is ``(B, m, k)`` with the smallest k the structure offers, c is ``(B, k)``.
        """

    @abstractmethod
    def pull_back(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ``tensors`` when that of A is y v^T + nu x^T; never forms it if it can."""

    @abstractmethod
    def absolute(self) -> Rows:
        """|A|, element by element."""

    @abstractmethod
    def to_dense(self) -> DenseRows:
        """The same matrix, dense."""

    def to_sparse(self) -> SparseRows:
        """The same matrix, sparse; the pattern is shared by the batch."""
        dense = self.to_dense().matrix
        row, column = (dense.detach() != 0).any(0).nonzero(as_tuple=True)
        return SparseRows(row, column, dense[:, row, column], dense.shape[1], dense.shape[2])

    def gram(self, d: Tensor) -> Tensor:
        """A diag(d) A^T: ``(B, n)`` to ``(B, m, m)``."""
        factor, _ = self.factor(d, d)
        return factor @ factor.mT

    def norms(self, d: Tensor) -> Tensor:
        """sqrt of the diagonal of A diag(d) A^T: ``(B, n)`` to ``(B, m)``."""
        factor, _ = self.factor(d, d)
        norms: Tensor = torch.linalg.vector_norm(factor, dim=-1)
        return norms

    def detach(self) -> Rows:
        """The same rows without their history."""
        return self.with_tensors(*map(without_history, self.tensors))

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        return self.with_tensors(*(tensor.to(device) for tensor in self.tensors))


@dataclass(frozen=True, eq=False)
class DenseRows(Rows):
    """A as a tensor ``(B, m, n)``; ``(m, n)`` is taken as a batch of one."""

    matrix: Tensor

    def __post_init__(self) -> None:
        check_float("rows", self.matrix)
        if self.matrix.dim() == 2:
            object.__setattr__(self, "matrix", self.matrix.unsqueeze(0))
        if self.matrix.dim() != 3:
            raise ProblemError(
                f"rows: expected a matrix (m, n) or (B, m, n), got shape {shape_of(self.matrix)}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, m, n = self.matrix.shape
        return batch, m, n

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.matrix,)

    def with_tensors(self, *tensors: Tensor) -> DenseRows:
        return DenseRows(*tensors)

    def expand(self, batch: int) -> DenseRows:
        return DenseRows(self.matrix.expand(batch, -1, -1))

    def apply(self, x: Tensor) -> Tensor:
        return (self.matrix.double() @ x.double().unsqueeze(-1)).squeeze(-1)

    def transpose_apply(self, y: Tensor) -> Tensor:
        return (self.matrix.double().mT @ y.double().unsqueeze(-1)).squeeze(-1)

    def factor(self, d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        root = d.double().sqrt()
        return self.matrix.double() * root.unsqueeze(-2), root * g.double()

    def pull_back(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (y.unsqueeze(-1) * v.unsqueeze(-2) + nu.unsqueeze(-1) * x.unsqueeze(-2),)

    def absolute(self) -> DenseRows:
        return DenseRows(self.matrix.abs())

    def to_dense(self) -> DenseRows:
        return self


@dataclass(frozen=True, eq=False)
class SparseRows(Rows):
    """A by coordinates: ``A[b, row[e], column[e]] = values[b, e]``; repeated entries add up.

    Attributes:
        row, column: int64 ``(E,)``, the pattern, shared by the batch.
        values: ``(B, E)``; ``(E,)`` is taken as a batch of one.
        m, n: the size of one matrix.
    """

    row: Tensor
    column: Tensor
    values: Tensor
    m: int
    n: int

    def __post_init__(self) -> None:
        check_float("rows.values", self.values)
        if self.values.dim() == 1:
            object.__setattr__(self, "values", self.values.unsqueeze(0))
        entries = self.values.shape[-1]
        if self.values.dim() != 2:
            raise ProblemError(
                f"rows.values: expected shape (E,) or (B, E), got {shape_of(self.values)}"
            )
        for name, index, size in (("row", self.row, self.m), ("column", self.column, self.n)):
            check_tensor(f"rows.{name}", index)
            if index.dtype != torch.int64 or index.shape != (entries,):
                raise ProblemError(
                    f"rows.{name}: expected an int64 tensor of shape ({entries},), one entry per "
                    f"value; got {index.dtype} of shape {shape_of(index)}"
                )
            if entries and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise ProblemError(
                    f"rows.{name}: expected indices in 0..{size - 1}, got "
                    f"{int(index.min())}..{int(index.max())}"
                )

    @staticmethod
    def from_tensor(matrix: Tensor) -> SparseRows:
        """From a torch sparse (COO, CSR, CSC) or dense matrix ``(m, n)``."""
        coo = matrix.to_sparse_coo().coalesce() if matrix.layout != torch.strided else None
        if coo is None:
            return DenseRows(matrix).to_sparse()
        row, column = coo.indices()
        return SparseRows(row, column, coo.values(), matrix.shape[0], matrix.shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.values.shape[0], self.m, self.n

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    @property
    def structure(self) -> tuple[Tensor, ...]:
        return self.row, self.column

    def with_tensors(self, *tensors: Tensor) -> SparseRows:
        (values,) = tensors
        return unchecked(
            SparseRows, row=self.row, column=self.column, values=values, m=self.m, n=self.n
        )

    def expand(self, batch: int) -> SparseRows:
        return self.with_tensors(self.values.expand(batch, -1))

    def apply(self, x: Tensor) -> Tensor:
        products = self.values.double() * x.double()[:, self.column]
        return products.new_zeros(len(products), self.m).index_add(1, self.row, products)

    def transpose_apply(self, y: Tensor) -> Tensor:
        products = self.values.double() * y.double()[:, self.row]
        return products.new_zeros(len(products), self.n).index_add(1, self.column, products)

    def factor(self, d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_dense().factor(d, g)

    def pull_back(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (y[:, self.row] * v[:, self.column] + nu[:, self.row] * x[:, self.column],)

    def norms(self, d: Tensor) -> Tensor:
        rows = self.coalesced()
        return rows.with_tensors(rows.values.double().square()).apply(d).sqrt()  # no (m, n) matrix

    def absolute(self) -> SparseRows:
        rows = self.coalesced()
        return rows.with_tensors(rows.values.abs())

    @cached_property
    def _repeats(self) -> tuple[Tensor, Tensor] | None:
        """The distinct places and which of them each entry belongs to; None if all are distinct."""
        place, found = torch.unique(self.row * self.n + self.column, return_inverse=True)
        return None if len(place) == len(self.row) else (place, found)

    def coalesced(self) -> SparseRows:
        """The same matrix without repeated coordinates; itself if it has none."""
        if self._repeats is None:
            return self
        place, found = self._repeats
        values = self.values.new_zeros(len(self.values), len(place))
        return unchecked(
            SparseRows, row=place // self.n, column=place % self.n,
            values=values.index_add(1, found, self.values), m=self.m, n=self.n,
        )  # fmt: skip

    def to_dense(self) -> DenseRows:
        flat = self.values.new_zeros(len(self.values), self.m * self.n)
        flat = flat.index_add(1, self.row * self.n + self.column, self.values)
        return DenseRows(flat.view(len(flat), self.m, self.n))

    def to_sparse(self) -> SparseRows:
        return self

    def to(self, device: torch.device) -> SparseRows:
        return SparseRows(
            self.row.to(device), self.column.to(device), self.values.to(device), self.m, self.n
        )


def batched_cells(
    coefficient: Tensor, cell: Tensor, weight: Tensor, dimensions: str, cells: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What rows in cell form consist of, checked and expanded to one batch.

    Args:
        coefficient: ``(B, *dimensions)``, or without the B.
        cell, weight: ``(B, n)`` or ``(n,)``.
        dimensions: a letter for each.
        cells: at which dimension of ``(B, *dimensions)`` the cells are counted.
    """
    check_float("rows.coefficient", coefficient)
    check_float("rows.weight", weight)
    check_tensor("rows.cell", cell)
    if cell.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise ProblemError(
            f"rows.cell: expected int64, int32 or uint8, got {cell.dtype}; convert with .long()"
        )
    if coefficient.dim() == len(dimensions):
        coefficient = coefficient.unsqueeze(0)
    cell, weight = (t.unsqueeze(0) if t.dim() == 1 else t for t in (cell, weight))
    batch = max(len(coefficient), len(cell), len(weight))
    n = cell.shape[-1]
    if (
        coefficient.dim() != 1 + len(dimensions)
        or cell.shape not in ((1, n), (batch, n))
        or weight.shape not in ((1, n), (batch, n))
        or len(coefficient) not in (1, batch)
    ):
        raise ProblemError(
            f"rows: expected coefficient (B, {', '.join(dimensions)}), cell (B, n) and weight "
            f"(B, n) with one B and one n; got {shape_of(coefficient)}, {shape_of(cell)} and "
            f"{shape_of(weight)}"
        )
    K = coefficient.shape[cells]
    if n and not 0 <= int(cell.min()) <= int(cell.max()) < K:
        raise ProblemError(
            f"rows.cell: expected values in 0..{K - 1}, one for each cell of coefficient; got "
            f"{int(cell.min())}..{int(cell.max())}"
        )
    return (
        coefficient.expand(batch, *coefficient.shape[1:]),
        cell.expand(batch, -1),
        weight.expand(batch, -1),
    )


@dataclass(frozen=True, eq=False)
class CellRows(Rows):
    """Cell-structured A: ``A[b, r, i] = coefficient[b, r, cell[b, i]] * weight[b, i]``.

    The structure of parity rows: a *cell* is a combination of group, outcome and stratum. With K
    cells every product costs O(n + m K) and no ``(m, n)`` matrix is formed.

    Attributes:
        coefficient: ``(B, m, K)``; ``(m, K)`` is taken as a batch of one.
        cell: integers in 0..K-1, ``(B, n)``; ``(n,)`` is taken as a batch of one.
        weight: ``(B, n)``; ``(n,)`` is taken as a batch of one.
    """

    coefficient: Tensor
    cell: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        batched = batched_cells(self.coefficient, self.cell, self.weight, "mK", 2)
        for name, tensor in zip(("coefficient", "cell", "weight"), batched, strict=True):
            object.__setattr__(self, name, tensor)

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, m, _ = self.coefficient.shape
        return batch, m, self.cell.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.coefficient, self.weight

    @property
    def structure(self) -> tuple[Tensor, ...]:
        return (self.cell,)

    def with_tensors(self, *tensors: Tensor) -> CellRows:
        coefficient, weight = tensors
        return unchecked(CellRows, coefficient=coefficient, cell=self.cell, weight=weight)

    def select(self, index: Tensor) -> CellRows:
        return unchecked(
            CellRows,
            coefficient=chosen(self.coefficient, index),
            cell=chosen(self.cell, index),
            weight=chosen(self.weight, index),
        )

    def expand(self, batch: int) -> CellRows:
        return unchecked(
            CellRows,
            coefficient=self.coefficient.expand(batch, -1, -1),
            cell=self.cell.expand(batch, -1),
            weight=self.weight.expand(batch, -1),
        )

    def sum_cells(self, values: Tensor) -> Tensor:
        """Sum of ``(B, n)`` values over each cell: ``(B, K)``, float64."""
        out = values.new_zeros(len(values), self.coefficient.shape[-1], dtype=torch.float64)
        return out.scatter_add(1, self.cell.long(), values.double())

    def spread(self, tilt: Tensor) -> Tensor:
        """Give each sample its cell's value: ``(B, K)`` to ``(B, n)``."""
        return tilt.gather(1, self.cell.long())

    def tilt(self, y: Tensor) -> Tensor:
        """C^T y: ``(B, m)`` to ``(B, K)``."""
        return (y.double().unsqueeze(-2) @ self.coefficient.double()).squeeze(-2)

    def apply(self, x: Tensor) -> Tensor:
        sums = self.sum_cells(self.weight.double() * x.double())
        return (self.coefficient.double() @ sums.unsqueeze(-1)).squeeze(-1)

    def transpose_apply(self, y: Tensor) -> Tensor:
        return self.spread(self.tilt(y)) * self.weight.double()

    def factor(self, d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight.double()
        step = d.double() * weight
        return cell_factor(
            self.coefficient.double(), self.sum_cells(step * weight), self.sum_cells(step * g)
        )

    def pull_back(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        weight = self.weight.double()
        v_sums, x_sums = self.sum_cells(weight * v), self.sum_cells(weight * x)
        coefficient = y.unsqueeze(-1) * v_sums.unsqueeze(-2) + nu.unsqueeze(-1) * x_sums.unsqueeze(
            -2
        )
        return coefficient, v * self.spread(self.tilt(y)) + x * self.spread(self.tilt(nu))

    def absolute(self) -> CellRows:
        return self.with_tensors(self.coefficient.abs(), self.weight.abs())

    def to_dense(self) -> DenseRows:
        index = self.cell.long().unsqueeze(-2).expand(self.shape)
        return DenseRows(self.coefficient.gather(2, index) * self.weight.unsqueeze(-2))

    def to(self, device: torch.device) -> CellRows:
        return unchecked(
            CellRows,
            coefficient=self.coefficient.to(device),
            cell=self.cell.to(device),
            weight=self.weight.to(device),
        )


def cell_factor(coefficient: Tensor, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``Rows.factor`` from the cell sums of d w^2 and of d w g: ``(B, m, K)`` and ``(B, K)``."""
    root = h.sqrt()
    return coefficient * root.unsqueeze(-2), torch.where(h > 0, g / root, 0.0)


# ---------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class QP:
    """A batch of quadratic programs; see the top of this module for the form.

    Attributes:
        P: ``(B, n)``, the diagonal; ``(B, n, n)``, dense symmetric; or ``SparseRows``. Positive
            semidefinite. ``(n,)`` and, beside a ``q`` of shape ``(n,)``, ``(n, n)`` are taken as
            shared; so is a sparse torch matrix.
        q: ``(B, n)`` or ``(n,)``.
        rows: ``Rows`` of shape ``(B, m, n)``; a plain tensor is taken as dense.
        l, u: ``(B, m)`` or ``(m,)``, lower and upper sides; infinite for none.
        lb, ub: ``(B, n)``, ``(n,)`` or scalar, bounds; ``None`` or infinite for none.
        row_names: m readable names, used by errors and reports.
        skipped: names of rows that were left out when the problem was written, with the reason.

    Raises:
        ProblemError: shapes, dtypes or devices disagree, a value is NaN, P or q is infinite, or
            sides or bounds cross.
    """

    P: Tensor | SparseRows
    q: Tensor
    rows: Rows
    l: Tensor
    u: Tensor
    lb: Tensor
    ub: Tensor
    row_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    # What was derived from the data other than q and the cells. Whoever writes many problems that
    # share those, and no history with them, gives all of them one dictionary.
    memo: dict[Any, Any] | None = field(default=None, repr=False)

    def __init__(
        self,
        P: Tensor | SparseRows,
        q: Tensor,
        rows: Rows | Tensor,
        l: Tensor,
        u: Tensor,
        lb: Tensor | float | None = None,
        ub: Tensor | float | None = None,
        *,
        row_names: Sequence[str] = (),
        skipped: Sequence[str] = (),
    ) -> None:
        check_float("q", q)
        if isinstance(P, Tensor) and P.layout != torch.strided:
            P = SparseRows.from_tensor(P)
        if not isinstance(P, SparseRows):
            check_float("P", P)
            if P.dim() == 2 and q.dim() == 1:
                P = P.unsqueeze(0)
        common = canonical(q, rows, l, u, lb, ub, row_names, "q")
        linear = common["q"]
        assert isinstance(linear, Tensor)
        batch, n = linear.shape
        quadratic = batched_quadratic(
            P, max(batch, len(P)) if isinstance(P, Tensor) and P.dim() == 3 else batch, n
        )
        if isinstance(quadratic, Tensor) and len(quadratic) != batch:
            raise ProblemError(
                f"P: expected a batch of {batch} like the other data, got {len(quadratic)}"
            )
        for name, value in common.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "P", quadratic)
        object.__setattr__(self, "skipped", tuple(skipped))
        object.__setattr__(self, "memo", None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, m, n)``."""
        return self.rows.shape

    @property
    def is_diagonal(self) -> bool:
        """Whether P is held as its diagonal."""
        return isinstance(self.P, Tensor) and self.P.dim() == 2

    @property
    def is_definite_diagonal(self) -> bool:
        """Whether P is held as its diagonal, and all of it is positive."""
        if not self.is_diagonal:
            return False
        memo = {} if self.memo is None else self.memo
        if "definite" not in memo:
            assert isinstance(self.P, Tensor)
            memo["definite"] = bool((compact(self.P) > 0).all())
        return bool(memo["definite"])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """P, q, the tensors of the rows, l, u, lb, ub: all that gradients can reach."""
        quadratic = self.P if isinstance(self.P, Tensor) else self.P.values
        return quadratic, self.q, *self.rows.tensors, self.l, self.u, self.lb, self.ub

    def with_tensors(self, *tensors: Tensor) -> QP:
        """The same structure with other values, in the order of ``tensors``."""
        P, q, *rows, l, u, lb, ub = tensors
        quadratic = P if isinstance(self.P, Tensor) else self.P.with_tensors(P)
        return unchecked(
            QP, P=quadratic, q=q, rows=self.rows.with_tensors(*rows), l=l, u=u, lb=lb, ub=ub,
            row_names=self.row_names, skipped=self.skipped,
        )  # fmt: skip

    def detach(self) -> QP:
        """The same problem without its history."""
        q = without_history(self.q)
        if self.memo is None and any(t.requires_grad for t in self.tensors if t is not self.q):
            return self.with_tensors(*map(without_history, self.tensors))
        return unchecked(QP, **{**self.__dict__, "q": q})

    def diagonal(self) -> Tensor:
        """The diagonal of P, ``(B, n)``, float64; 1 where it is zero. A metric, not a matrix."""
        P = self.P
        if isinstance(P, SparseRows):
            d = P.with_tensors(torch.where(P.row == P.column, P.values, 0.0)).apply(
                P.values.new_ones(()).expand(len(P.values), P.n)
            )
        else:
            d = (P if P.dim() == 2 else P.diagonal(dim1=-2, dim2=-1)).double()
        return torch.where(d > 0, d, 1.0)

    def apply_quadratic(self, x: Tensor) -> Tensor:
        """P x in float64: ``(B, n)`` to ``(B, n)``."""
        if isinstance(self.P, SparseRows):
            return self.P.apply(x)
        if self.P.dim() == 2:
            return self.P.double() * x.double()
        return (self.P.double() @ x.double().unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class LP:
    """A batch of linear programs: minimise c^T x under the rows and bounds of ``QP``."""

    c: Tensor
    rows: Rows
    l: Tensor
    u: Tensor
    lb: Tensor
    ub: Tensor
    row_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __init__(
        self,
        c: Tensor,
        rows: Rows | Tensor,
        l: Tensor,
        u: Tensor,
        lb: Tensor | float | None = None,
        ub: Tensor | float | None = None,
        *,
        row_names: Sequence[str] = (),
        skipped: Sequence[str] = (),
    ) -> None:
        check_float("c", c)
        common = canonical(c, rows, l, u, lb, ub, row_names, "c")
        for name, value in common.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "skipped", tuple(skipped))

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, m, n)``."""
        return self.rows.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """c, the tensors of the rows, l, u, lb, ub."""
        return self.c, *self.rows.tensors, self.l, self.u, self.lb, self.ub

    def detach(self) -> LP:
        """The same problem without its history."""
        if not any(tensor.requires_grad for tensor in self.tensors):
            return self
        c, *rows, l, u, lb, ub = map(without_history, self.tensors)
        return unchecked(
            LP, c=c, rows=self.rows.with_tensors(*rows), l=l, u=u, lb=lb, ub=ub,
            row_names=self.row_names, skipped=self.skipped,
        )  # fmt: skip

    def smoothed(self, smoothing: float) -> QP:
        """The QP with the same constraints and smoothing/2 |x|^2 added to the objective."""
        if not smoothing > 0 or not math.isfinite(smoothing):
            raise ProblemError(f"smoothing: expected a positive number, got {smoothing}")
        return unchecked(
            QP, P=torch.full_like(self.c[:1, :1], smoothing).expand_as(self.c), q=self.c,
            rows=self.rows, l=self.l, u=self.u, lb=self.lb, ub=self.ub,
            row_names=self.row_names, skipped=self.skipped,
        )  # fmt: skip


Problem: TypeAlias = QP | LP


# ---------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------


def unchecked(kind: type[Kind], **fields: object) -> Kind:
    """A frozen instance from fields already in canonical form: for internal conversions only."""
    instance = object.__new__(kind)
    instance.__dict__.update(fields)
    return instance


def row_name(problem: Problem, row: int) -> str:
    """The name of a row, or its number where none was given."""
    return problem.row_names[row] if problem.row_names else f"row {row}"


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ProblemError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def check_float(name: str, tensor: object) -> None:
    check_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.dtype not in FLOATS:
        raise ProblemError(
            f"{name}: expected float32 or float64, got {tensor.dtype}; convert with .float() or "
            ".double()"
        )


def symmetric(P: SparseRows) -> bool:
    """Whether a sparse matrix equals its transpose, to the precision asked of a dense one."""
    index = torch.cat([torch.stack([P.row, P.column]), torch.stack([P.column, P.row])], 1)
    whole = compact(P.values.detach()).double()
    _, place = torch.unique(index, dim=1, return_inverse=True)
    difference = torch.zeros(len(whole), index.shape[1], dtype=torch.float64, device=whole.device)
    difference.index_add_(1, place, torch.cat([whole, -whole], 1))
    return not whole.numel() or bool(difference.abs().max() <= 1e-10 * whole.abs().max())


def batched_quadratic(P: Tensor | SparseRows, batch: int, n: int) -> Tensor | SparseRows:
    if isinstance(P, SparseRows):
        if P.shape[1:] != (n, n) or P.shape[0] not in (1, batch):
            raise ProblemError(f"P: expected shape ({batch}, {n}, {n}), got {P.shape}")
        if not all_finite(P.values):
            raise ProblemError("P: expected finite values, got NaN or infinity")
        if not symmetric(P):
            raise ProblemError("P: expected a symmetric matrix; pass (P + P.mT) / 2")
        return P.expand(batch)
    if P.dim() <= 2 and P.shape[-1:] == (n,) and (P.dim() == 1 or len(P) in (1, batch)):
        diagonal = compact(P.detach())
        if not all_finite(diagonal) or bool((diagonal < 0).any()):
            raise ProblemError(
                "P: expected a finite diagonal without negative entries (a convex problem)"
            )
        return P.expand(batch, n)
    if P.dim() == 3 and P.shape[1:] == (n, n) and len(P) in (1, batch):
        whole = compact(P.detach())
        if not all_finite(whole):
            raise ProblemError("P: expected finite values, got NaN or infinity")
        if not torch.allclose(whole, whole.mT, rtol=1e-10, atol=1e-12 * float(whole.abs().max())):
            raise ProblemError("P: expected a symmetric matrix; pass (P + P.mT) / 2")
        return P.expand(batch, n, n)
    raise ProblemError(
        f"P: expected ({batch}, {n}) for a diagonal or ({batch}, {n}, {n}) for a matrix, where a "
        f"leading 1 means shared by the batch; got {shape_of(P)}"
    )


def chosen(tensor: Tensor, index: Tensor) -> Tensor:
    """Some problems' part of a tensor, with its history; what they share stays shared."""
    if tensor.stride(0) == 0:
        return tensor[:1].expand(len(index), *tensor.shape[1:])
    return tensor[index.to(tensor.device)]


def select(problem: AnyProblem, index: Tensor) -> AnyProblem:
    """Only those problems of the batch, whose numbers are in ``index``, int64."""
    fields: dict[str, Any] = {
        name: chosen(value, index) if isinstance(value, Tensor) else value
        for name, value in problem.__dict__.items()
    }
    fields["rows"] = problem.rows.select(index)
    if isinstance(problem, QP):
        fields["memo"] = None
        if isinstance(problem.P, SparseRows):
            fields["P"] = problem.P.select(index)
    return unchecked(type(problem), **fields)


def canonical(
    q: Tensor,
    rows: Rows | Tensor,
    l: Tensor,
    u: Tensor,
    lb: Tensor | float | None,
    ub: Tensor | float | None,
    row_names: Sequence[str],
    linear: str,
) -> dict[str, object]:
    """The fields that QP and LP share, checked and expanded to one batch.

    Args:
        linear: what messages call q, and its name among the fields.
    """
    if isinstance(rows, Tensor):
        rows = SparseRows.from_tensor(rows) if rows.layout != torch.strided else DenseRows(rows)
    elif not isinstance(rows, Rows):
        raise ProblemError(f"rows: expected Rows or a tensor, got {type(rows).__name__}")
    check_float("l", l)
    check_float("u", u)
    if q.dim() not in (1, 2) or q.shape[-1] == 0:
        raise ProblemError(
            f"{linear}: expected shape (n,) or (B, n) with n >= 1, got {shape_of(q)}"
        )
    row_batch, m, n = rows.shape
    if q.shape[-1] != n:
        raise ProblemError(f"rows: expected {q.shape[-1]} columns, one per variable, got {n}")
    lower = bound("lb", lb, -math.inf, q)
    upper = bound("ub", ub, math.inf, q)
    named = {linear: q, "l": l, "u": u, "lb": lower, "ub": upper}
    batch = max([row_batch] + [len(t) for t in named.values() if t.dim() == 2])
    fields: dict[str, object] = {}
    for name, tensor in named.items():
        size = m if name in ("l", "u") else n
        if (
            tensor.dim() > 2
            or tensor.shape[-1:] not in ((size,), ())
            or (tensor.dim() == 2 and len(tensor) not in (1, batch))
        ):
            raise ProblemError(
                f"{name}: expected shape ({batch}, {size}) or ({size},), got {shape_of(tensor)}"
            )
        if tensor.device != q.device:
            raise ProblemError(
                f"{name}: expected device {q.device}, where {linear} is, got {tensor.device}; move "
                "it with .to(...)"
            )
        fields[name] = tensor.expand(batch, size)
    if row_batch not in (1, batch):
        raise ProblemError(f"rows: expected a batch of 1 or {batch}, got {row_batch}")
    if rows.tensors[0].device != q.device:
        raise ProblemError(f"rows: expected device {q.device}, got {rows.tensors[0].device}")
    if not all_finite(q):
        raise ProblemError(f"{linear}: expected finite values, got NaN or infinity")
    for tensor in rows.tensors:
        if not all_finite(tensor):
            raise ProblemError("rows: expected finite values, got NaN or infinity")
    check_ordered("l", l, "u", u)
    check_ordered("lb", lower, "ub", upper)
    if row_names and len(row_names) != m:
        raise ProblemError(f"row_names: expected {m} names, one per row, got {len(row_names)}")
    fields["rows"] = rows.expand(batch)
    fields["row_names"] = tuple(row_names)
    return fields


def bound(name: str, value: Tensor | float | None, default: float, like: Tensor) -> Tensor:
    if value is None:
        return like.new_full((), default)
    if isinstance(value, Tensor):
        check_float(name, value)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ProblemError(f"{name}: expected a number, a tensor or None, got {value!r}")
    return like.new_full((), value)


def check_ordered(low_name: str, low: Tensor, high_name: str, high: Tensor) -> None:
    """Raise unless low <= high everywhere, low < inf and high > -inf; NaN fails all three."""
    low, high = compact(low.detach()), compact(high.detach())
    good = (low <= high) & (low < math.inf) & (high > -math.inf)
    if not bool(good.all()):
        where = tuple(int(i) for i in (~good).nonzero()[0])
        raise ProblemError(
            f"{low_name}, {high_name}: expected {low_name} <= {high_name} without NaN, and no side "
            f"infinite on the wrong end; it fails first at index {where}"
        )
