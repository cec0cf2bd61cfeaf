"""Cell-structured rows: what parity rows are, where all samples of a cell are weighed alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.programs.rows.base import Rows
from fairopt.programs.tensors import check_float, check_tensor, shape_of

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class CellStructured(Rows):
    """What ``CellRows`` and ``BlockRows`` share: coefficients for each cell, times weights.

    Attributes:
        dimensions: a letter for each dimension of ``coefficient`` after B: m, K, and perhaps more.
    """

    pattern: ClassVar[dict[str, int]] = {"cell": 2}
    dimensions: ClassVar[str]

    coefficient: Tensor
    cell: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        self.__dict__.update(
            batched_cells(self.coefficient, self.cell, self.weight, self.dimensions)
        )

    def place(self, parameter: str, index: tuple[int, ...]) -> tuple[int | None, list[str]]:
        if parameter != "rows.coefficient":
            return super().place(parameter, index)
        words = zip(("cell", "place"), index[1:], strict=False)
        return index[0], [f"{word} {i}" for word, i in words]

    def absolute(self) -> Self:
        return self.with_tensors(*(tensor.abs() for tensor in self.tensors))

    def inner(self) -> tuple[int, ...]:
        """K, and C where a sample has several variables."""
        return tuple(self.coefficient.shape[2:])

    def sum_cells(self, values: Tensor) -> Tensor:
        """Sum of ``(B, n)`` values over each cell: ``(B, K)``, float64; or ``(B, n, C)`` values."""
        out = values.new_zeros(len(values), *self.inner(), dtype=torch.float64)
        return out.scatter_add(1, self.index_of(values), values.double())

    def spread(self, shift: Tensor) -> Tensor:
        """Give each sample its cell's value: ``(B, K)`` to ``(B, n)``, ``(B, K, C)`` likewise."""
        return shift.gather(1, self.index_of(shift))

    def index_of(self, like: Tensor) -> Tensor:
        """The cells as an index of the first dimension after B of such values."""
        index = self.cell.long()
        return index if like.dim() == 2 else index.unsqueeze(-1).expand(-1, -1, like.shape[-1])


def batched_cells(
    coefficient: Tensor, cell: Tensor, weight: Tensor, dimensions: str
) -> dict[str, Tensor]:
    """The tensors that rows in cell form consist of, checked and expanded to one batch."""
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
    K = coefficient.shape[2]
    if n and not 0 <= int(cell.min()) <= int(cell.max()) < K:
        raise ProblemError(
            f"rows.cell: expected values in 0..{K - 1}, one for each cell of coefficient; got "
            f"{int(cell.min())}..{int(cell.max())}"
        )
    return {
        "coefficient": coefficient.expand(batch, *coefficient.shape[1:]),
        "cell": cell.expand(batch, -1),
        "weight": weight.expand(batch, -1),
    }


@dataclass(frozen=True, eq=False)
class CellRows(CellStructured):
    """Cell-structured A: ``A[b, r, i] = coefficient[b, r, cell[b, i]] * weight[b, i]``.

    The structure of parity rows: a *cell* is a combination of group, outcome and stratum. With K
    cells every product costs O(n + m K) and no ``(m, n)`` matrix is formed.

    Attributes:
        coefficient: ``(B, m, K)``; ``(m, K)`` is taken as a batch of one.
        cell: integers in 0..K-1, ``(B, n)``; ``(n,)`` is taken as a batch of one.
        weight: ``(B, n)``; ``(n,)`` is taken as a batch of one.
    """

    name: ClassVar[str] = "cells"
    stored: ClassVar[dict[str, int]] = {"coefficient": 3, "weight": 2}
    dimensions: ClassVar[str] = "mK"

    @property
    def shape(self) -> tuple[int, int, int]:
        batch, m, _ = self.coefficient.shape
        return batch, m, self.cell.shape[1]

    @property
    def cell_data(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return self.weight, self.cell, self.coefficient

    def values(self, sums: Tensor) -> Tensor:
        """C s: ``(B, K)`` to ``(B, m)``."""
        return (self.coefficient.double() @ sums.unsqueeze(-1)).squeeze(-1)

    def dual_shift(self, y: Tensor) -> Tensor:
        """C^T y: ``(B, m)`` to ``(B, K)``."""
        return (y.double().unsqueeze(-2) @ self.coefficient.double()).squeeze(-2)

    def apply(self, x: Tensor) -> Tensor:
        return self.values(self.sum_cells(self.weight.double() * x.double()))

    def transpose_apply(self, y: Tensor) -> Tensor:
        return self.spread(self.dual_shift(y)) * self.weight.double()

    def factor(self, d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight.double()
        step = d.double() * weight
        return self.cell_factor(self.sum_cells(step * weight), self.sum_cells(step * g))

    def cell_factor(self, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """``factor`` from the cell sums of d w^2 and of d w g, ``(B, K)``."""
        return cell_factor(self.coefficient.double(), h, g)

    def pull_back(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        weight = self.weight.double()
        inner = self.pull_back_cells(y, self.sum_cells(weight * v), nu, self.sum_cells(weight * x))
        return inner, v * self.spread(self.dual_shift(y)) + x * self.spread(self.dual_shift(nu))

    def pull_back_cells(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> Tensor:
        """The gradient of what defines C when that of C is y v^T + nu x^T."""
        return y.unsqueeze(-1) * v.unsqueeze(-2) + nu.unsqueeze(-1) * x.unsqueeze(-2)

    def mirrored(self) -> Rows:
        cell, weight = torch.cat([self.cell, self.cell], -1), [self.weight, -self.weight]
        return self.plain().replace(cell=cell, weight=torch.cat(weight, -1))

    def means(self, lb: Tensor, ub: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = self.weight.double()
        mass = self.sum_cells(w.abs())
        ends = [torch.where(w == 0, 0.0, w * end) for end in (lb, ub)]
        per = torch.where(mass > 0, 1 / mass, 0.0)
        low = self.sum_cells(torch.minimum(*ends))
        high = self.sum_cells(torch.maximum(*ends))
        low, high = (torch.where(mass > 0, end * per, 0.0) for end in (low, high))
        return self.coefficient.double() * mass.unsqueeze(-2), low, high

    @property
    def mean_entries(self) -> int:
        return self.shape[1] * self.inner()[0]

    def sign_conditions(
        self, b: int, side: Tensor, room: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One row for each cell and direction: the one with the least room."""
        weight = self.weight[b].double() * side
        cell, C = self.cell[b].long(), self.coefficient[b].double().mT
        for sign in (1.0, -1.0):
            some = weight * sign > 0
            least = torch.full((len(C),), torch.inf, dtype=torch.float64, device=room.device)
            share = room[some].clamp(min=0) / weight[some].abs()
            least = least.scatter_reduce(0, cell[some], share, "amin")
            bounded = torch.isfinite(least)
            yield sign * C[bounded], least[bounded]

    def to_tensor(self) -> Tensor:
        index = self.cell.long().unsqueeze(-2).expand(self.shape)
        return self.coefficient.gather(2, index) * self.weight.unsqueeze(-2)


def cell_factor(coefficient: Tensor, h: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``Rows.factor`` from the cell sums of d w^2 and of d w g: ``(B, m, K)`` and ``(B, K)``."""
    root = h.sqrt()
    return coefficient * root.unsqueeze(-2), torch.where(h > 0, g / root, 0.0)
