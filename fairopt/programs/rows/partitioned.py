"""Rows over partitions: what many attributes at once make of cell-structured rows.

With twenty attributes the occupied combinations, the cells, are thousands, but a row looks at one
attribute only, or at a few together. These *partition* the cells into *parts*, and row r, which
looks at partition p(r), weighs every cell of a part alike:

    C[r, k] = table[r, member[p(r), k]].

So K m numbers are a function of m G, with G the number of parts of a partition. Let S be the
number of parts of all F partitions together. What one needs of the rows is then

    C s        sums over parts, then the table               O(F K + m G)
    C^T y      one number for each part, looked up           O(m G + F K)
    C D C^T    through the S x S matrix of the parts         O(F^2 K + S^2 m)

where the dense C would cost m K, m K and m^2 K.
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from fairopt.programs.rows.cells import CellRows
from fairopt.programs.rows.partitions import Partitions
from fairopt.programs.tensors import unchecked


class PartitionedRows(CellRows):
    """Cell-structured rows whose coefficients are a function of parts; see the top of the file.

    They go by the name of ``CellRows``, which they are to whoever asks for ``coefficient``.

    Attributes:
        table: ``(B, m, G)``, G at least the largest partition's number of parts; what is beyond
            the number of parts of a row's partition does not count.
        partitions: the parts.
        cell, weight: as in ``CellRows``.
        coefficient: that of ``CellRows``, made when first asked for.
    """

    stored: ClassVar[dict[str, int]] = {"table": 3, "weight": 2}
    given: ClassVar[tuple[str, ...]] = ("partitions",)

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
    def structure(self) -> tuple[Tensor, ...]:
        return self.cell, self.partitions.member

    def plain(self) -> CellRows:
        return unchecked(CellRows, coefficient=self.coefficient, cell=self.cell, weight=self.weight)

    @property
    def cells(self) -> int:
        """K."""
        return len(self.partitions.member)

    def inner(self) -> tuple[int, ...]:
        return (self.cells,)

    @property
    def cell_data(self) -> None:
        return None

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor]:
        """The part of each column of the table, ``(m, G)``, and whether there is one."""
        parts = self.partitions
        column = torch.arange(self.table.shape[2], device=self.table.device)
        sizes = torch.tensor(parts.sizes, device=self.table.device)[parts.of_row]
        there = column < sizes.unsqueeze(-1)
        of = parts.starts[parts.of_row].unsqueeze(-1) + column
        return torch.where(there, of, 0), there

    def by_part(self) -> Tensor:
        """The table over all parts, ``(B, m, S)``, float64."""
        of, there = self._parts
        batch, m, _ = self.table.shape
        out = self.table.new_zeros(batch, m, self.partitions.total, dtype=torch.float64)
        return out.scatter_add(
            2, of.expand(batch, -1, -1), torch.where(there, self.table.double(), 0.0)
        )

    def values(self, sums: Tensor) -> Tensor:
        of, there = self._parts
        found = self.partitions.sum(sums)[:, of]
        return (torch.where(there, self.table.double(), 0.0) * found).sum(-1)

    def dual_shift(self, y: Tensor) -> Tensor:
        of, there = self._parts
        pull = torch.where(there, self.table.double() * y.double().unsqueeze(-1), 0.0)
        sums = pull.new_zeros(len(pull), self.partitions.total)
        sums = sums.index_add(1, of.reshape(-1), pull.reshape(len(pull), -1))
        return self.partitions.spread(sums)

    def norms(self, d: Tensor) -> Tensor:
        # Of one row the parts are disjoint: no product of two of them.
        weight = self.weight.double()
        squares = self.replace(table=self.table.double().square())
        return squares.values(self.sum_cells(d.double() * weight * weight)).sqrt()

    def cell_factor(self, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.partitions
        if self.cells <= parts.total:
            return super().cell_factor(h, g)
        # With V D^1/2 = R^T Q^T, N = E R^T has S columns instead of K; nothing is squared.
        root = h.sqrt()
        wide = h.new_zeros(len(h), self.cells, parts.total)
        at = parts.member.long().expand(len(h), -1, -1)
        Q, R = torch.linalg.qr(wide.scatter_(2, at, root.unsqueeze(-1).expand(at.shape)))
        c = torch.where(h > 0, g / root, 0.0)
        return self.by_part() @ R.mT, (c.unsqueeze(-2) @ Q).squeeze(-2)

    def pull_back_cells(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> Tensor:
        of, there = self._parts
        v, x = (self.partitions.sum(sums)[:, of] for sums in (v, x))
        return torch.where(there, y.unsqueeze(-1) * v + nu.unsqueeze(-1) * x, 0.0)

    def to(self, device: torch.device) -> PartitionedRows:
        parts = self.partitions
        moved = Partitions(parts.sizes, parts.member.to(device), parts.of_row.to(device))
        return unchecked(PartitionedRows, **{**vars(super().to(device)), "partitions": moved})
