"""Rows of problems whose variables come in blocks that each have a given sum.

The variables are n blocks of C, block by block: x_{iC + c} is the c-th of block i. There are m rows
in cell form, over pairs of a cell of blocks and a place within the block, and behind them n rows
that are the sums of the blocks. So a point that is on the simplex block by block is what bounds of
0 and sums of 1 describe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fairopt.errors import ProblemError, UnsupportedProblemError
from fairopt.programs.rows.cells import CellStructured
from fairopt.programs.rows.sparse import SparseRows
from fairopt.programs.tensors import shape_of, unchecked

MOST_DENSE = 2**27  # elements of a dense matrix: 1 GiB


@dataclass(frozen=True, eq=False)
class BlockRows(CellStructured):
    """Cell-structured rows over blocks of C variables, and behind them the sums of the blocks.

        A[b, r, iC + c] = coefficient[b, r, cell[b, i], c] * weight[b, i]    for r < m
        A[b, m + i, iC + c] = 1                                              for i < n

    With K cells every product costs O(n C + m K C); no ``(m + n, n C)`` matrix is formed.

    Attributes:
        coefficient: ``(B, m, K, C)``; ``(m, K, C)`` is taken as a batch of one.
        cell: integers in 0..K-1, ``(B, n)``; ``(n,)`` is taken as a batch of one.
        weight: ``(B, n)``; ``(n,)`` is taken as a batch of one.
    """

    name: ClassVar[str] = "blocks"
    stored: ClassVar[dict[str, int]] = {"coefficient": 4, "weight": 2}
    dimensions: ClassVar[str] = "mKC"
    is_sparse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficient.shape[-1] == 0:
            raise ProblemError(
                "rows.coefficient: expected C >= 1 variables in each block, got "
                f"{shape_of(self.coefficient)}"
            )

    @property
    def blocks(self) -> tuple[int, int, int]:
        """m, n and C."""
        return self.coefficient.shape[1], self.cell.shape[1], self.coefficient.shape[3]

    @property
    def shape(self) -> tuple[int, int, int]:
        m, n, C = self.blocks
        return len(self.coefficient), m + n, n * C

    def in_blocks(self, values: Tensor) -> Tensor:
        """``(B, n C)`` as ``(B, n, C)``, float64."""
        _, n, C = self.blocks
        return values.double().reshape(len(values), n, C)

    def dual_shift(self, y: Tensor) -> Tensor:
        """The cell rows' A^T y before weights: ``(B, m)`` to ``(B, K, C)``."""
        return torch.einsum("bm,bmkc->bkc", y.double(), self.coefficient.double())

    def apply(self, x: Tensor) -> Tensor:
        blocks = self.in_blocks(x)
        sums = self.sum_cells(self.weight.double().unsqueeze(-1) * blocks)
        return torch.cat(
            [torch.einsum("bmkc,bkc->bm", self.coefficient.double(), sums), blocks.sum(-1)], -1
        )

    def transpose_apply(self, y: Tensor) -> Tensor:
        m, n, C = self.blocks
        each = self.spread(self.dual_shift(y[:, :m])) * self.weight.double().unsqueeze(-1)
        return (each + y[:, m:].double().unsqueeze(-1)).reshape(len(y), n * C)

    def factor(self, d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        batch, m, n = self.shape
        if batch * m * n > MOST_DENSE:
            raise UnsupportedProblemError(
                f"rows in blocks form: what is asked for needs a dense matrix of {batch} x {m} x "
                f"{n}; gradients of the linear part by a backend that takes blocks as they are do "
                "not, those of sides and rows do: take them from smaller batches"
            )
        return super().factor(d, g)

    def norms(self, d: Tensor) -> Tensor:
        d = self.in_blocks(d)
        mass = self.sum_cells(self.weight.double().square().unsqueeze(-1) * d)
        squares = torch.einsum("bmkc,bkc->bm", self.coefficient.double().square(), mass)
        return torch.cat([squares, d.sum(-1)], -1).sqrt()

    def pull_back(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        m, _, _ = self.blocks
        y, nu = y[:, :m].double(), nu[:, :m].double()
        v, x = self.in_blocks(v), self.in_blocks(x)
        weight = self.weight.double().unsqueeze(-1)
        coefficient = torch.einsum("bm,bkc->bmkc", y, self.sum_cells(weight * v))
        coefficient = coefficient + torch.einsum("bm,bkc->bmkc", nu, self.sum_cells(weight * x))
        each = v * self.spread(self.dual_shift(y)) + x * self.spread(self.dual_shift(nu))
        return coefficient, each.sum(-1)

    def cell_rows(self) -> Tensor:
        """The rows in cell form, ``(B, m, n C)``."""
        m, n, C = self.blocks
        batch = len(self.coefficient)
        index = self.cell.long().view(batch, 1, n, 1).expand(batch, m, n, C)
        cells = self.coefficient.gather(2, index) * self.weight.view(batch, 1, n, 1)
        return cells.reshape(batch, m, n * C)

    def to_tensor(self) -> Tensor:
        _, n, C = self.blocks
        cells = self.cell_rows()
        sums = torch.eye(n, dtype=cells.dtype, device=cells.device).repeat_interleave(C, dim=1)
        return torch.cat([cells, sums.expand(len(cells), n, n * C)], 1)

    def to_sparse(self) -> SparseRows:
        """Row by row of the cells' part, where some problem of the batch has an entry; the sums."""
        m, n, C = self.blocks
        cells = self.cell_rows()
        row, column = (cells.detach() != 0).any(0).nonzero(as_tuple=True)
        every = torch.arange(n * C, device=cells.device)
        return unchecked(
            SparseRows,
            row=torch.cat([row, m + torch.div(every, C, rounding_mode="floor")]),
            column=torch.cat([column, every]),
            values=torch.cat([cells[:, row, column], cells.new_ones(len(cells), n * C)], 1),
            m=m + n,
            n=n * C,
        )
