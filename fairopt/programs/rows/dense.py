"""Dense rows: for problems that are small, or have no structure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.programs.rows.base import Rows
from fairopt.programs.tensors import check_float, shape_of


@dataclass(frozen=True, eq=False)
class DenseRows(Rows):
    """A as a tensor ``(B, m, n)``; ``(m, n)`` is taken as a batch of one."""

    name: ClassVar[str] = "dense"
    stored: ClassVar[dict[str, int]] = {"matrix": 3}

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
    def parameters(self) -> dict[str, Tensor]:
        return {"rows": self.matrix}

    def place(self, parameter: str, index: tuple[int, ...]) -> tuple[int | None, list[str]]:
        return index[0], [str(index[1])]

    def to_tensor(self) -> Tensor:
        return self.matrix

    def to_dense(self) -> DenseRows:
        return self

    def pull_back(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return (y.unsqueeze(-1) * v.unsqueeze(-2) + nu.unsqueeze(-1) * x.unsqueeze(-2),)

    def absolute(self) -> DenseRows:
        return self.replace(matrix=self.matrix.abs())

    @property
    def mean_entries(self) -> int:
        return self.matrix.numel()
