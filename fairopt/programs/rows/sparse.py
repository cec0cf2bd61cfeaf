"""Sparse rows by coordinates: for many rows, each over few variables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.programs.rows.base import Rows
from fairopt.programs.tensors import check_float, check_tensor, shape_of


@dataclass(frozen=True, eq=False)
class SparseRows(Rows):
    """A by coordinates: ``A[b, row[e], column[e]] = values[b, e]``; repeated entries add up.

    Attributes:
        row, column: int64 ``(E,)``, the pattern, shared by the batch.
        values: ``(B, E)``; ``(E,)`` is taken as a batch of one.
        m, n: the size of one matrix.
    """

    name: ClassVar[str] = "sparse"
    stored: ClassVar[dict[str, int]] = {"values": 2}
    pattern: ClassVar[dict[str, int]] = {"row": 1, "column": 1}
    given: ClassVar[tuple[str, ...]] = ("m", "n")
    is_sparse: ClassVar[bool] = True

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
        if matrix.layout == torch.strided:
            from fairopt.programs.rows.dense import DenseRows

            return DenseRows(matrix).to_sparse()
        coo = matrix.to_sparse_coo().coalesce()
        row, column = coo.indices()
        return SparseRows(row, column, coo.values(), matrix.shape[0], matrix.shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.values.shape[0], self.m, self.n

    def place(self, parameter: str, index: tuple[int, ...]) -> tuple[int | None, list[str]]:
        return int(self.row[index[0]]), [str(int(self.column[index[0]]))]

    def apply(self, x: Tensor) -> Tensor:
        products = self.values.double() * x.double()[:, self.column]
        return products.new_zeros(len(products), self.m).index_add(1, self.row, products)

    def transpose_apply(self, y: Tensor) -> Tensor:
        products = self.values.double() * y.double()[:, self.row]
        return products.new_zeros(len(products), self.n).index_add(1, self.column, products)

    def pull_back(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (y[:, self.row] * v[:, self.column] + nu[:, self.row] * x[:, self.column],)

    def norms(self, d: Tensor) -> Tensor:
        rows = self.coalesced()
        return rows.replace(values=rows.values.double().square()).apply(d).sqrt()  # no (m, n)

    def absolute(self) -> SparseRows:
        rows = self.coalesced()
        return rows.replace(values=rows.values.abs())

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
        return self.replace(
            row=place // self.n, column=place % self.n,
            values=values.index_add(1, found, self.values),
        )  # fmt: skip

    def to_tensor(self) -> Tensor:
        flat = self.values.new_zeros(len(self.values), self.m * self.n)
        flat = flat.index_add(1, self.row * self.n + self.column, self.values)
        return flat.view(len(flat), self.m, self.n)

    def to_sparse(self) -> SparseRows:
        return self
