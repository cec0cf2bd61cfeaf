"""Rows over partitions: what many attributes at once make of cell-structured rows.

With twenty attributes the occupied combinations, the cells, are thousands, but a row looks at one
attribute only, or at a few together. These *partition* the cells into *classes*, and row r, which
looks at partition p(r), weighs every cell of a class alike:

    C[r, k] = table[r, member[p(r), k]].

So K m numbers are a function of m G, with G the number of classes of a partition. Let S be the
number of classes of all F partitions together. What one needs of the rows is then

    C s        sums over classes, then the table             O(F K + m G)
    C^T y      one number for each class, looked up          O(m G + F K)
    C D C^T    through the S x S matrix of the classes       O(F^2 K + S^2 m)

where the dense C would cost m K, m K and m^2 K.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from fairopt.programs.problem import CellRows, cell_factor, chosen, unchecked


@dataclass(frozen=True, eq=False)
class Partitions:
    """How each of several partitions divides the K cells.

    Attributes:
        sizes: number of classes of each of the F partitions.
        member: int32 ``(K, F)``, in which class each cell is; the classes are numbered through,
            those of the first partition first.
        of_row: int64 ``(m,)``, the partition that each row looks at.
    """

    sizes: tuple[int, ...]
    member: Tensor
    of_row: Tensor

    @property
    def total(self) -> int:
        """S, the number of all classes."""
        return sum(self.sizes)

    @cached_property
    def starts(self) -> Tensor:
        """The number of the first class of each partition, int64 ``(F,)``."""
        sizes = torch.tensor([0, *self.sizes], dtype=torch.int64)
        return sizes.cumsum(0)[:-1].to(self.member.device)

    @cached_property
    def place(self) -> Tensor:
        """The member classes of each partition, counted from its first: int64 ``(F, K)``."""
        return self.member.long().mT - self.starts.unsqueeze(-1)

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the classes: ``(B, K)`` to ``(B, S)``, float64."""
        if values.is_cpu and not values.requires_grad:
            return self.compiled_sum(values)
        K, F = self.member.shape
        out = values.new_zeros(len(values), self.total, dtype=torch.float64)
        each = values.double().unsqueeze(-1).expand(-1, K, F).reshape(len(values), -1)
        return out.index_add(1, self.member.reshape(-1).long(), each)

    def compiled_sum(self, values: Tensor) -> Tensor:
        add = import_module("fairopt.kernels.combinations").class_sums
        out = np.empty((len(values), self.total))
        member = self.member.numpy().view(np.uint32)
        for each, sums in zip(values.double().contiguous().numpy(), out, strict=True):
            add(member, each, sums)
        return torch.from_numpy(out)

    def spread(self, values: Tensor) -> Tensor:
        """Give each cell the sum of its classes' values: ``(B, S)`` to ``(B, K)``."""
        return values[:, self.member.long()].sum(-1)

    def kept(self, rows: Tensor | None) -> Partitions:
        """The same for some of the rows."""
        if rows is None:
            return self
        return Partitions(self.sizes, self.member, self.of_row[rows])


class PartitionedRows(CellRows):
    """Cell-structured rows whose coefficients are a function of classes; see the top of the file.

    Attributes:
        table: ``(B, m, G)``, G at least the largest partition's number of classes; what is beyond
            the number of classes of a row's partition does not count.
        partitions: the classes.
        cell, weight: as in ``CellRows``.
        coefficient: that of ``CellRows``, made when first asked for.
    """

    table: Tensor
    partitions: Partitions

    def __init__(self, table: Tensor, partitions: Partitions, cell: Tensor, weight: Tensor) -> None:
        self.__dict__.update(table=table, partitions=partitions, cell=cell, weight=weight)

    @cached_property
    def coefficient(self) -> Tensor:
        parts = self.partitions
        at = parts.place[parts.of_row]  # (m, K)
        return self.table.gather(2, at.expand(len(self.table), -1, -1))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.table.shape[0], self.table.shape[1], self.cell.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.table, self.weight

    @property
    def structure(self) -> tuple[Tensor, ...]:
        return self.cell, self.partitions.member

    def with_tensors(self, *tensors: Tensor) -> PartitionedRows:
        table, weight = tensors
        return PartitionedRows(table, self.partitions, self.cell, weight)

    def expand(self, batch: int) -> PartitionedRows:
        return PartitionedRows(
            self.table.expand(batch, -1, -1), self.partitions, self.cell.expand(batch, -1),
            self.weight.expand(batch, -1),
        )  # fmt: skip

    def select(self, index: Tensor) -> PartitionedRows:
        table, cell, weight = (chosen(t, index) for t in (self.table, self.cell, self.weight))
        return PartitionedRows(table, self.partitions, cell, weight)

    def plain(self) -> CellRows:
        """The same rows without the partitions."""
        return unchecked(CellRows, coefficient=self.coefficient, cell=self.cell, weight=self.weight)

    @property
    def cells(self) -> int:
        """K."""
        return len(self.partitions.member)

    @cached_property
    def _classes(self) -> tuple[Tensor, Tensor]:
        """The class of each column of the table, ``(m, G)``, and whether there is one."""
        parts = self.partitions
        column = torch.arange(self.table.shape[2], device=self.table.device)
        sizes = torch.tensor(parts.sizes, device=self.table.device)[parts.of_row]
        there = column < sizes.unsqueeze(-1)
        of = parts.starts[parts.of_row].unsqueeze(-1) + column
        return torch.where(there, of, 0), there

    def by_class(self) -> Tensor:
        """The table over all classes, ``(B, m, S)``, float64."""
        of, there = self._classes
        batch, m, _ = self.table.shape
        out = self.table.new_zeros(batch, m, self.partitions.total, dtype=torch.float64)
        return out.scatter_add(
            2, of.expand(batch, -1, -1), torch.where(there, self.table.double(), 0.0)
        )

    def sum_cells(self, values: Tensor) -> Tensor:
        out = values.new_zeros(len(values), self.cells, dtype=torch.float64)
        return out.scatter_add(1, self.cell.long(), values.double())

    def values(self, sums: Tensor) -> Tensor:
        """C s: ``(B, K)`` to ``(B, m)``."""
        of, there = self._classes
        found = self.partitions.sum(sums)[:, of]
        return (torch.where(there, self.table.double(), 0.0) * found).sum(-1)

    def tilt(self, y: Tensor) -> Tensor:
        of, there = self._classes
        pull = torch.where(there, self.table.double() * y.double().unsqueeze(-1), 0.0)
        classes = pull.new_zeros(len(pull), self.partitions.total)
        classes = classes.index_add(1, of.reshape(-1), pull.reshape(len(pull), -1))
        return self.partitions.spread(classes)

    def absolute(self) -> PartitionedRows:
        return self.with_tensors(self.table.abs(), self.weight.abs())

    def apply(self, x: Tensor) -> Tensor:
        return self.values(self.sum_cells(self.weight.double() * x.double()))

    def norms(self, d: Tensor) -> Tensor:
        # Of one row the classes are disjoint: no product of two of them.
        weight = self.weight.double()
        squares = self.with_tensors(self.table.double().square(), weight)
        return squares.values(self.sum_cells(d.double() * weight * weight)).sqrt()

    def factor(self, d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.partitions
        weight = self.weight.double()
        step = d.double() * weight
        h, sums = self.sum_cells(step * weight), self.sum_cells(step * g)
        if self.cells <= parts.total:
            return cell_factor(self.coefficient.double(), h, sums)
        # With V D^1/2 = R^T Q^T, N = E R^T has S columns instead of K; nothing is squared.
        root = h.sqrt()
        wide = h.new_zeros(len(h), self.cells, parts.total)
        at = parts.member.long().expand(len(h), -1, -1)
        Q, R = torch.linalg.qr(wide.scatter_(2, at, root.unsqueeze(-1).expand(at.shape)))
        c = torch.where(h > 0, sums / root, 0.0)
        return self.by_class() @ R.mT, (c.unsqueeze(-2) @ Q).squeeze(-2)

    def pull_back(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        weight = self.weight.double()
        of, there = self._classes
        v_sums, x_sums = (
            self.partitions.sum(self.sum_cells(weight * each))[:, of] for each in (v, x)
        )
        table = torch.where(there, y.unsqueeze(-1) * v_sums + nu.unsqueeze(-1) * x_sums, 0.0)
        return table, v * self.spread(self.tilt(y)) + x * self.spread(self.tilt(nu))

    def to(self, device: torch.device) -> PartitionedRows:
        parts = self.partitions
        moved = Partitions(parts.sizes, parts.member.to(device), parts.of_row.to(device))
        return PartitionedRows(
            self.table.to(device), moved, self.cell.to(device), self.weight.to(device)
        )
