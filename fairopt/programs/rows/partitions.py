"""How several partitions divide the cells into parts, and sums over these."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fairopt import kernels


@dataclass(frozen=True, eq=False)
class Partitions:
    """How each of several partitions divides the K cells.

    Attributes:
        sizes: number of parts of each of the F partitions.
        member: int32 ``(K, F)``, in which part each cell is; the parts are numbered through,
            those of the first partition first.
        of_row: int64 ``(m,)``, the partition that each row looks at.
    """

    sizes: tuple[int, ...]
    member: Tensor
    of_row: Tensor

    @property
    def total(self) -> int:
        """S, the number of all parts."""
        return sum(self.sizes)

    @cached_property
    def starts(self) -> Tensor:
        """The number of the first part of each partition, int64 ``(F,)``."""
        sizes = torch.tensor([0, *self.sizes], dtype=torch.int64)
        return sizes.cumsum(0)[:-1].to(self.member.device)

    @cached_property
    def place(self) -> Tensor:
        """The cells' parts of each partition, counted from its first: int64 ``(F, K)``."""
        return self.member.long().mT - self.starts.unsqueeze(-1)

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the parts: ``(B, K)`` to ``(B, S)``, float64."""
        if values.is_cpu and not values.requires_grad:
            return self.compiled_sum(values)
        K, F = self.member.shape
        out = values.new_zeros(len(values), self.total, dtype=torch.float64)
        each = values.double().unsqueeze(-1).expand(-1, K, F).reshape(len(values), -1)
        return out.index_add(1, self.member.reshape(-1).long(), each)

    def compiled_sum(self, values: Tensor) -> Tensor:
        add = kernels.combinations.class_sums
        out = np.empty((len(values), self.total))
        member = self.member.numpy().view(np.uint32)
        for each, sums in zip(values.double().contiguous().numpy(), out, strict=True):
            add(member, each, sums)
        return torch.from_numpy(out)

    def spread(self, values: Tensor) -> Tensor:
        """Give each cell the sum of its parts' values: ``(B, S)`` to ``(B, K)``."""
        return values[:, self.member.long()].sum(-1)

    def kept(self, rows: Tensor | None) -> Partitions:
        """The same for some of the rows."""
        if rows is None:
            return self
        return Partitions(self.sizes, self.member, self.of_row[rows])
