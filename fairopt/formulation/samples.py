"""The samples of a call, numbered by their cells, and what the rows are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt import kernels
from fairopt.formulation.coefficients import RowCoefficients, assemble
from fairopt.formulation.inputs import (
    MOST_CODES,
    GroupCounts,
    Groups,
    counted,
    encode,
    outcome_and_targets,
    read_groups,
    refuse_real_groups,
)
from fairopt.formulation.template import (
    MOST_CELLS,
    MissingGroup,
    Plans,
    RowTemplate,
    indicators,
    new_template,
    partition,
    row_template,
)
from fairopt.notions.functionals import OUTCOME, TARGET, Axis, Key
from fairopt.programs.rows.base import Rows
from fairopt.programs.rows.cells import CellRows
from fairopt.programs.rows.dense import DenseRows
from fairopt.programs.rows.partitioned import PartitionedRows
from fairopt.programs.rows.partitions import Partitions
from fairopt.programs.tensors import to_batch, unchecked


@dataclass(eq=False)
class Cells:
    """The combinations of attributes (and outcome, and bins) as one integer per sample.

    Attributes:
        index: ``(1, n)`` or ``(B, n)``.
        size: how many there are, K.
        found: number of samples in each cell (and zeros behind), if already counted.
        table: for each axis the position of each cell, ``(1, K)``, if the cells are not the product
            of the axes but those combinations that occur.
        combinations: the same on the CPU, int32 ``(K, axes)``.
        partitions: the parts that the rows look at, where these are not too many.
    """

    index: Tensor
    size: int
    found: NDArray[np.int64] | None = None
    table: dict[Key, Tensor] | None = None
    combinations: Tensor | None = None
    partitions: Partitions | None = None

    def sum(self, values: Tensor, batch: int) -> Tensor:
        """Sum of values ``(1, n)`` or ``(B, n)`` over each cell: ``(batch, K)``, float64."""
        index = self.index.long().expand(batch, -1)
        out = values.new_zeros(batch, self.size, dtype=torch.float64)
        return out.scatter_add(1, index, values.double().expand(batch, -1))

    def counts(self) -> tuple[int, ...]:
        """Number of samples in each cell, of groups that the whole batch shares."""
        if self.found is not None:
            return tuple(self.found[: self.size].tolist())
        n = self.index.shape[1]
        if self.size == 2 and n > 1_000:
            second = int(torch.count_nonzero(self.index))  # ten times faster than a count
            return n - second, second
        return tuple(torch.bincount(self.index[0], minlength=self.size).tolist())

    def mass(self, weight: Tensor | None, batch: int) -> Tensor:
        """Total weight, or number, of the samples in each cell: ``(batch, K)``, float64."""
        if weight is not None:
            return self.sum(weight, batch)
        if self.found is not None:
            return torch.from_numpy(self.found[: self.size]).double().unsqueeze(0)
        if len(self.index) == 1:
            return torch.tensor([self.counts()], dtype=torch.float64).to(self.index.device)
        ones = torch.ones((), dtype=torch.float64, device=self.index.device)
        return self.sum(ones.expand(self.index.shape), batch)


@dataclass(eq=False)
class Data:
    """What the rows are made of: their template, and the samples.

    Attributes:
        rows: the template.
        cells: the cells; ``None`` where samples of one cell may differ (continuous attributes, soft
            groups, soft targets), so that each sample is a column of its own.
        axes: what samples are told apart by.
        parts: for each axis codes ``(b, n)`` or chances ``(b, n, G)``.
        continuous: the continuous attributes, ``(b, n)``.
        targets: float64 ``(b, n)``, if needed.
    """

    rows: RowTemplate
    cells: Cells | None
    axes: list[Axis]
    parts: list[Tensor]
    continuous: dict[str, Tensor]
    targets: Tensor | None

    def assemble(
        self, weight: Tensor | None, batch: int, missing_group: MissingGroup
    ) -> RowCoefficients:
        """The rows in numbers; where they are functions of parts, the matrix is their table."""
        rows, cells = self.rows, self.cells
        values: dict[object, Tensor] = dict(self.continuous.items())
        if self.targets is not None:
            values[TARGET] = self.targets
        values = {key: values[key] for key in rows.constant_features}
        weighted = {k: v if weight is None else v * weight for k, v in values.items()}
        if cells is None:
            mass = self.ones() if weight is None else weight.double()
            columns = {key: (v, v.detach().abs()) for key, v in weighted.items()}
            return assemble(rows, self.indicators(), mass, columns, missing_group, self.continuous)
        shared, partitions = len(cells.index), cells.partitions

        def sums(v: Tensor) -> Tensor:
            found = cells.sum(v, max(len(v), shared))
            return found if partitions is None else partitions.sum(found)

        known = {key: (sums(v), sums(v.abs())) for key, v in weighted.items()}
        mass = cells.mass(weight, batch if weight is not None else shared)
        if partitions is None:
            return assemble(rows, self.indicators(), mass, known, missing_group)
        parts = partition(rows, tuple(self.axes))
        assert parts is not None
        mass = partitions.sum(mass)
        return assemble(rows, parts.home, mass, known, missing_group, parts=parts)

    def ones(self) -> Tensor:
        """1 for each sample: ``(1, n)``."""
        n = next(iter((*self.parts, *self.continuous.values()))).shape[1]
        return torch.ones(1, n, dtype=torch.float64, device=self.rows.sides.device)

    def indicators(self) -> Tensor:
        """Which set of the rows holds which cell, or which sample: ``(b, S, C)``."""
        rows, cells = self.rows, self.cells
        if cells is None:
            parts = {axis.key: part for axis, part in zip(self.axes, self.parts, strict=True)}
            return indicators(rows.sets, parts, self.ones())
        if cells.table is None:
            assert rows.grid is not None
            return rows.grid
        return indicators(rows.sets, cells.table, next(iter(cells.table.values())))

    def sizes(self) -> Tensor:
        """How many samples, in expectation, are in each set of the rows: ``(b, S)``."""
        mass = self.ones() if self.cells is None else self.cells.mass(None, len(self.cells.index))
        return (self.indicators() @ mass.unsqueeze(-1)).squeeze(-1)

    def in_form(self, assembled: RowCoefficients, weight: Tensor | None, flat: Tensor) -> Rows:
        """Assembled rows as rows over the samples."""
        batch, n = flat.shape
        matrix = assembled.matrix
        if self.cells is not None:
            each = flat.new_ones(()) if weight is None else weight
            if self.cells.partitions is not None:
                return PartitionedRows(
                    to_batch(matrix, batch, *matrix.shape[1:]),
                    self.cells.partitions.kept(assembled.kept),
                    to_batch(self.cells.index, batch, n),
                    to_batch(each, batch, n),
                )
            return cell_rows(matrix, self.cells.index, each, batch)
        full = matrix if weight is None else matrix * weight.unsqueeze(1)
        return unchecked(DenseRows, matrix=to_batch(full, batch, matrix.shape[1], n))


def gather(
    plans: Plans,
    scores: Tensor,
    flat: Tensor,
    groups: Groups,
    targets: Tensor | None,
    group_counts: GroupCounts,
) -> Data:
    """Read and check groups and targets, and find the rows' template."""
    attributes, continuous = read_groups(groups, scores, flat)
    plan = plans[tuple(attributes), tuple(continuous)]
    outcome, values = outcome_and_targets(plan, targets, scores, flat)
    counts = counted(group_counts, groups, plan.attributes)
    axes, parts, found = encode(attributes, plan, flat, counts)
    if outcome is not None:
        axes.append(OUTCOME)
        parts.append(outcome)
    cells = None
    if not plan.continuous and not any([part.is_floating_point() for part in parts]):  # noqa: C419
        cells = combine(axes, parts, flat, found if outcome is None else None)
    for name in continuous:
        if name not in plan.continuous:
            assert isinstance(groups, Mapping)
            refuse_real_groups(f"groups[{name!r}]", groups[name])
    made = row_template if plan.stays else new_template
    rows = made(plan, tuple(axes), flat.device)
    if cells is not None and cells.combinations is not None:
        looked_at = partition(rows, tuple(axes))
        if looked_at is not None:
            cells.partitions = looked_at.partitions(tuple(axes), cells.combinations)
    return Data(rows, cells, axes, parts, continuous, values)


def combine(
    axes: Sequence[Axis], parts: Sequence[Tensor], flat: Tensor, found: NDArray[np.int64] | None
) -> Cells:
    """Number the combinations of all codes, in row-major order.

    Args:
        found: the number of samples of each code, of the only axis.
    """
    sizes = [len(axis.codes) for axis in axes]
    size = math.prod(sizes)
    if size > MOST_CELLS:
        return occupied(axes, parts)
    if not parts:
        return Cells(flat.new_zeros(1, flat.shape[1], dtype=torch.uint8), 1)
    if size > 256:
        parts = [codes.long() for codes in parts]
        found = None
    else:  # a byte per sample: every pass of every solver reads the cells
        parts = [c if c.dtype == torch.uint8 else c.to(torch.uint8) for c in parts]
        if size > MOST_CODES:
            found = None
    index = parts[0]
    for count, codes in zip(sizes[1:], parts[1:], strict=True):
        index = index * count + codes
    return Cells(index, size, found)


def occupied(axes: Sequence[Axis], parts: Sequence[Tensor]) -> Cells:
    """Number the combinations that occur, where those that could are too many."""
    shape = torch.broadcast_shapes(*(part.shape for part in parts))
    if parts[0].is_cpu:
        return hashed(axes, [part.expand(shape).reshape(-1) for part in parts], shape)
    flat = [part.long().expand(shape).flatten() for part in parts]
    index = torch.zeros_like(flat[0])
    reach = 1
    for axis, codes in zip(axes, flat, strict=True):
        if reach * len(axis.codes) >= 2**62:
            distinct, index = torch.unique(index, return_inverse=True)
            reach = len(distinct)
        index = index * len(axis.codes) + codes
        reach *= len(axis.codes)
    distinct, index = torch.unique(index, return_inverse=True)
    # Some sample of each cell: whichever is assembled last, all have the same codes.
    one = torch.zeros_like(distinct).scatter_(
        0, index, torch.arange(len(index), device=index.device)
    )
    table = {axis.key: codes[one].unsqueeze(0) for axis, codes in zip(axes, flat, strict=True)}
    return Cells(index.view(shape), len(distinct), None, table)


def hashed(axes: Sequence[Axis], flat: Sequence[Tensor], shape: torch.Size) -> Cells:
    """``occupied`` on the CPU, without sorting."""
    index, codes, counts = kernels.combinations.number(
        [part.numpy() for part in flat], [len(a.codes) for a in axes]
    )
    each = torch.from_numpy(codes)
    table = {axis.key: each[:, i].unsqueeze(0) for i, axis in enumerate(axes)}
    found = counts if shape[0] == 1 else None
    return Cells(torch.from_numpy(index).view(shape), len(codes), found, table, each)


def cell_rows(coefficient: Tensor, index: Tensor, weight: Tensor, batch: int) -> CellRows:
    """Rows of data that were checked, each expanded to the batch."""
    m, K = coefficient.shape[-2:]
    n = index.shape[1]
    return unchecked(
        CellRows,
        coefficient=to_batch(coefficient, batch, m, K),
        cell=to_batch(index, batch, n),
        weight=to_batch(weight, batch, n),
    )
