"""The samples of a call: groups, targets and continuous attributes, read, checked and numbered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt import kernels
from fairopt.errors import ProblemError
from fairopt.formulation.coefficients import MissingGroup, Written, write
from fairopt.formulation.partitioning import classes
from fairopt.formulation.template import MOST_CELLS, Plan, Trace, indicators, plan, trace
from fairopt.notions.catalogue import Constraint
from fairopt.notions.functionals import OUTCOME, TARGET, Axis, Key, attribute_axis
from fairopt.programs.rows.base import Rows
from fairopt.programs.rows.cells import CellRows
from fairopt.programs.rows.dense import DenseRows
from fairopt.programs.rows.partitioned import PartitionedRows
from fairopt.programs.rows.partitions import Partitions
from fairopt.programs.tensors import all_finite, shape_of, to_batch, unchecked

Groups: TypeAlias = Tensor | Mapping[str, Tensor]
GroupCounts: TypeAlias = Mapping[str, int] | int | None

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

# Codes up to this many are used as they are; larger or sparser ones are renumbered.
MOST_CODES = 64

# More attributes than this, of up to this many samples, are looked at one after the other in one
# thread: waking torch's threads for each costs as much as it saves, and far more beside other work.
FEW, MANY = 2, 1_000_000

# Up to this many samples on the CPU, inputs are looked at by the compiled code of kernels.checks.
SMALL = 50_000


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def is_small(tensor: Tensor) -> bool:
    """Whether ``fairopt.kernels.checks`` takes it."""
    return tensor.is_cpu and tensor.numel() <= SMALL and tensor.is_contiguous()


def fit(name: str, tensor: object, scores: Tensor, flat: Tensor) -> Tensor:
    """A companion of the scores as ``(1, n)`` or ``(B, n)``; its shape and device checked."""
    if not isinstance(tensor, Tensor):
        raise ProblemError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.device != scores.device:
        raise ProblemError(
            f"{name}: expected device {scores.device}, where the scores are, got {tensor.device}; "
            "move it with .to(...)"
        )
    batch, n = flat.shape
    if tensor.shape == (n,):
        return tensor.unsqueeze(0)
    if tensor.shape == (batch, n):
        return tensor
    if batch == 1 and tensor.shape == (n, 1):
        return tensor.mT
    raise ProblemError(
        f"{name}: expected shape ({n},) or {shape_of(scores)}, one value for each score, got "
        f"{shape_of(tensor)}"
    )


def read_groups(
    groups: Groups, scores: Tensor, flat: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The attributes: those with groups, and those that are continuous.

    Returns:
        Codes as integers ``(b, n)``, or chances in float64 ``(b, n, G)``; and real numbers in
        float64 ``(b, n)``; b is 1 or the batch.
    """
    bare = isinstance(groups, Tensor) or not isinstance(groups, Mapping)  # the cheap test first
    named: Any = {"group": groups} if bare else groups
    if not named:
        raise ProblemError("groups: expected at least one attribute, got an empty mapping")
    if not all(isinstance(name, str) for name in named):
        raise ProblemError(
            f"groups: expected names of attributes as keys, got {', '.join(map(repr, named))}"
        )
    found: dict[str, Tensor] = {}
    continuous: dict[str, Tensor] = {}
    for name, tensor in named.items():
        label = "groups" if bare else f"groups[{name!r}]"
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            if is_matrix(tensor, flat):
                found[name] = read_chances(label, tensor, scores, flat)
            else:
                codes = fit(label, tensor, scores, flat)
                if bare:
                    refuse_real_groups(label, codes)
                continuous[name] = read_real(label, codes)
            continue
        codes = fit(label, tensor, scores, flat)
        if codes.dtype not in INTEGERS:
            refuse_real_groups(label, codes)
        found[name] = codes.view(torch.uint8) if codes.dtype == torch.bool else codes
    return found, continuous


def refuse_real_groups(label: str, codes: Tensor) -> None:
    raise ProblemError(
        f"{label}: expected integer or bool codes, got {codes.dtype}; convert categories "
        "with .long(), or pass chances of membership as a matrix (n, G)"
    )


def is_matrix(tensor: Tensor, flat: Tensor) -> bool:
    """Whether real numbers are chances ``(n, G)`` or ``(B, n, G)``, not one for each sample."""
    batch, n = flat.shape
    if tensor.dim() == 3:
        return True
    return tensor.dim() == 2 and len(tensor) == n and tensor.shape not in ((batch, n), (n, 1))


def read_chances(label: str, tensor: Tensor, scores: Tensor, flat: Tensor) -> Tensor:
    """Chances of membership, float64 ``(b, n, G)``, checked."""
    batch, n = flat.shape
    if tensor.device != scores.device:
        raise ProblemError(
            f"{label}: expected device {scores.device}, where the scores are, got "
            f"{tensor.device}; move it with .to(...)"
        )
    chances = tensor.unsqueeze(0) if tensor.dim() == 2 else tensor
    if chances.shape[:2] not in ((1, n), (batch, n)) or chances.shape[2] == 0:
        raise ProblemError(
            f"{label}: expected chances of membership of shape ({n}, G)"
            + (f" or ({batch}, {n}, G)" if batch > 1 else "")
            + f", got {shape_of(tensor)}"
        )
    wide_chances = chances.double()
    plain = wide_chances.detach()
    if not bool(((plain >= 0) & (plain <= 1)).all()):
        raise ProblemError(
            f"{label}: expected chances of membership from 0 to 1, got values from "
            f"{float(plain.min())} to {float(plain.max())}"
        )
    allowed = max(1e-6, 4 * torch.finfo(tensor.dtype).eps)
    off = float((plain.sum(-1) - 1).abs().max())
    if off > allowed:
        raise ProblemError(
            f"{label}: expected chances of membership that sum to 1 for each sample, got a sum "
            f"that is {off:.3g} off; normalise the rows, and give unknown membership a column"
        )
    return wide_chances


def read_real(label: str, tensor: Tensor) -> Tensor:
    """A continuous attribute, float64, checked."""
    values = tensor.double()
    if not all_finite(values):
        raise ProblemError(f"{label}: expected finite values, got NaN or infinity")
    return values


def counted(
    group_counts: GroupCounts, groups: Groups, used: tuple[str, ...]
) -> dict[str, int] | None:
    """The declared number of groups of each attribute in use; ``None`` if none is declared."""
    if isinstance(groups, Tensor):
        boolean = {"group": 2} if groups.dtype == torch.bool and used else {}
    else:
        boolean = {name: 2 for name in used if groups[name].dtype == torch.bool}
    if group_counts is None:
        return boolean or None
    named = group_counts if isinstance(group_counts, Mapping) else dict.fromkeys(used, group_counts)
    known = ("group",) if isinstance(groups, Tensor) else tuple(groups)
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ProblemError(
            f"group_counts: expected names among {', '.join(map(repr, known))}, got "
            f"{', '.join(map(repr, unknown))}"
        )
    for name, count in named.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ProblemError(
                f"group_counts: expected a whole number of at least 1 for {name!r}, got {count!r}"
            )
    return boolean | {name: named[name] for name in used if name in named}


def check_columns(name: str, chances: Tensor, counts: Mapping[str, int] | None) -> None:
    """Raise unless there are as many columns of chances as groups were declared."""
    declared = counts.get(name) if counts else None
    if declared is not None and declared != chances.shape[-1]:
        raise ProblemError(
            f"groups[{name!r}]: expected chances of {declared} groups, the number declared, got "
            f"{chances.shape[-1]} columns; correct the matrix, or group_counts"
        )


def outcome_and_targets(
    made: Plan, targets: Tensor | None, scores: Tensor, flat: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What notions need of the targets.

    Returns:
        Binary targets: codes, uint8 ``(b, n)``; or, where they are no numbers but chances, or have
        a history, chances of 0 and of 1, float64 ``(b, n, 2)``. And targets as they are, float64.
    """
    if not made.targeted:
        return None, None
    if targets is None:
        raise ProblemError(
            f"targets: {', '.join(made.targeted)} needs them, got none; pass targets with the "
            "shape of the scores"
        )
    fitted = fit("targets", targets, scores, flat)
    if fitted.is_complex():
        raise ProblemError(f"targets: expected real numbers, got {fitted.dtype}")
    values = fitted.double()
    if not all_finite(values):
        raise ProblemError("targets: expected finite values, got NaN or infinity")
    if not made.binary:
        return None, values
    plain = values.detach()
    outcome = plain.to(torch.uint8)
    if not bool((plain != outcome).any() | (outcome > 1).any()) and not values.requires_grad:
        return outcome, values
    wrong = ~((plain >= 0) & (plain <= 1))
    if bool(wrong.any()):
        raise ProblemError(
            f"targets: {', '.join(made.binary)} needs targets that are 0 or 1, or chances from 0 "
            f"to 1, got {plain[wrong][0].item()}; threshold them, or use MeanResidual for real "
            "targets"
        )
    return torch.stack([1.0 - values, values], -1), values


# ---------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------


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
        partitions: the classes that the rows look at, where these are not too many.
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
    """What the rows are made of: their trace, and the samples.

    Attributes:
        rows: the traced rows.
        cells: the cells; ``None`` where samples of one cell may differ (continuous attributes, soft
            groups, soft targets), so that each sample is a column of its own.
        axes: what samples are told apart by.
        parts: for each axis codes ``(b, n)`` or chances ``(b, n, G)``.
        continuous: the continuous attributes, ``(b, n)``.
        targets: float64 ``(b, n)``, if needed.
        nonnegative: names of notions that need predictions of at least 0.
    """

    rows: Trace
    cells: Cells | None
    axes: list[Axis]
    parts: list[Tensor]
    continuous: dict[str, Tensor]
    targets: Tensor | None
    nonnegative: tuple[str, ...]

    def write(self, weight: Tensor | None, batch: int, missing_group: MissingGroup) -> Written:
        """The rows in numbers."""
        rows, cells = self.rows, self.cells
        values: dict[object, Tensor] = dict(self.continuous.items())
        if self.targets is not None:
            values[TARGET] = self.targets
        values = {key: values[key] for key in rows.constant_features}
        weighted = {k: v if weight is None else v * weight for k, v in values.items()}
        if cells is not None and cells.partitions is not None:
            return self.write_classes(cells, weighted, weight, batch, missing_group)
        if cells is not None:
            sums = {
                key: tuple(cells.sum(each, max(len(v), len(cells.index))) for each in (v, v.abs()))
                for key, v in weighted.items()
            }
            mass = cells.mass(weight, batch if weight is not None else len(cells.index))
            return write(rows, self.indicators(), mass, sums, missing_group)
        mass = self.ones() if weight is None else weight.double()
        columns = {key: (v, v.detach().abs()) for key, v in weighted.items()}
        return write(rows, self.indicators(), mass, columns, missing_group, self.continuous)

    def write_classes(
        self,
        cells: Cells,
        weighted: Mapping[object, Tensor],
        weight: Tensor | None,
        batch: int,
        missing_group: MissingGroup,
    ) -> Written:
        """The rows in numbers, where they are functions of classes: the matrix is their table."""
        made = classes(self.rows, tuple(self.axes))
        parts = cells.partitions
        assert made is not None
        assert parts is not None
        sums = {
            key: tuple(
                parts.sum(cells.sum(each, max(len(v), len(cells.index)))) for each in (v, v.abs())
            )
            for key, v in weighted.items()
        }
        mass = parts.sum(cells.mass(weight, batch if weight is not None else len(cells.index)))
        return write(self.rows, made.home, mass, sums, missing_group, classes=made)

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

    def in_form(self, written: Written, weight: Tensor | None, flat: Tensor) -> Rows:
        """What was written as rows over the samples."""
        batch, n = flat.shape
        matrix = written.matrix
        if self.cells is not None:
            each = flat.new_ones(()) if weight is None else weight
            if self.cells.partitions is not None:
                return PartitionedRows(
                    to_batch(matrix, batch, *matrix.shape[1:]),
                    self.cells.partitions.kept(written.kept),
                    to_batch(self.cells.index, batch, n),
                    to_batch(each, batch, n),
                )
            return cell_rows(matrix, self.cells.index, each, batch)
        full = matrix if weight is None else matrix * weight.unsqueeze(1)
        return unchecked(DenseRows, matrix=to_batch(full, batch, matrix.shape[1], n))


def gather(
    constraints: tuple[Constraint, ...],
    scores: Tensor,
    flat: Tensor,
    groups: Groups,
    targets: Tensor | None,
    group_counts: GroupCounts,
) -> Data:
    """Read and check groups and targets, and trace the rows."""
    attributes, continuous = read_groups(groups, scores, flat)
    names, real = tuple(attributes), tuple(continuous)
    made = plan(constraints, names, real)
    outcome, values = outcome_and_targets(made, targets, scores, flat)
    counts = counted(group_counts, groups, made.attributes)
    axes, parts, found = encode(attributes, made, flat, counts)
    if outcome is not None:
        axes.append(OUTCOME)
        parts.append(outcome)
    cells = None
    if not made.continuous and not any([part.is_floating_point() for part in parts]):  # noqa: C419
        cells = combine(axes, parts, flat, found if outcome is None else None)
    for name in continuous:
        if name not in made.continuous:
            assert isinstance(groups, Mapping)
            refuse_real_groups(f"groups[{name!r}]", groups[name])
    traced = trace if made.stays else trace.__wrapped__
    rows = traced(constraints, names, real, tuple(axes), flat.device)
    if cells is not None and cells.combinations is not None:
        looked_at = classes(rows, tuple(axes))
        if looked_at is not None:
            cells.partitions = looked_at.partitions(tuple(axes), cells.combinations)
    return Data(rows, cells, axes, parts, continuous, values, made.nonnegative)


def encode(
    attributes: Mapping[str, Tensor], made: Plan, flat: Tensor, counts: Mapping[str, int] | None
) -> tuple[list[Axis], list[Tensor], NDArray[np.int64] | None]:
    """The axes of all attributes and bins in use, and the place of each sample on them.

    Returns:
        The axes; codes ``(b, n)`` or chances ``(b, n, G)`` for each; and the number of samples of
        each code, if there is one axis only and its codes were counted on the way.
    """
    axes: list[Axis] = []
    parts: list[Tensor] = []
    found = None  # counts, as long as all parts are small
    for name in made.attributes:
        codes = attributes[name]
        if codes.is_floating_point():
            check_columns(name, codes, counts)
            axes.append(attribute_axis(name, codes_below(codes.shape[-1])))
            parts.append(codes)
            continue
        if is_small(codes) and len(codes) == 1:
            array, found = np.empty(codes.shape, np.uint8), np.zeros(MOST_CODES, np.int64)
            low, high = kernels.checks.encode(codes.numpy(), array, found)
            part = torch.from_numpy(array)
        else:
            part, found = codes, None
            if len(made.attributes) > FEW and codes.is_cpu and codes.numel() <= MANY:
                low, high = kernels.combinations.ends(codes.reshape(-1).numpy())
            else:
                low, high = (int(end) for end in torch.aminmax(codes))
        if low < 0:
            raise ProblemError(
                f"groups[{name!r}]: expected codes of at least 0, got {low}; give unknown members "
                "a code of their own, or leave them out"
            )
        declared = counts.get(name) if counts else None
        if declared is not None:
            if high >= declared:
                raise ProblemError(
                    f"groups[{name!r}]: expected codes below {declared}, the number of groups "
                    f"declared, got {high}; correct the code, or group_counts"
                )
            values = codes_below(declared)
        elif high < MOST_CODES:
            values = codes_below(high + 1)
        else:
            distinct, codes = torch.unique(codes, return_inverse=True)
            values = tuple(distinct.tolist())
        if high >= MOST_CODES:
            part, found = codes, None
        axes.append(attribute_axis(name, values))
        parts.append(part)
    for axis in made.scores:
        edges = torch.tensor(axis.key[1], dtype=torch.float64, device=flat.device)
        axes.append(axis)
        parts.append(torch.bucketize(flat.detach().double().contiguous(), edges, right=True))
    return axes, parts, found if len(axes) == 1 else None


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
    # Some sample of each cell: whichever is written last, all have the same codes.
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


@lru_cache(maxsize=256)
def codes_below(count: int) -> tuple[int, ...]:
    """0, 1, ..., count - 1."""
    return tuple(range(count))


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
