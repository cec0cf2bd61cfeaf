"""Predictions of several classes: (n, C) probabilities, one notion for each class, one projection.

With C classes a sample's prediction is a point x_i of the simplex, and each notion is asked of each
class c, with x_c in the place of the prediction and, where it needs targets, y = [target is c]:
expected one-vs-rest rates. All classes are one problem:

    minimise   1/2 sum_i w_i |x_i - scores_i|^2
    subject to the rows of all constraints for every class,   x_i >= 0,   sum_c x_ic = 1

Its variables are x_11, ..., x_1C, x_21, ...; its rows are ``fairopt.BlockRows``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fairopt.errors import ProblemError, whole_number
from fairopt.formulation.coefficients import MissingGroup, Written
from fairopt.formulation.inputs import SCORES, Bounds, check_finite, distance, read_weights
from fairopt.formulation.result import Formulated, only_one, put_together
from fairopt.formulation.samples import Data, GroupCounts, Groups, fit, gather
from fairopt.formulation.template import plan
from fairopt.kernels.memory import negative
from fairopt.notions.catalogue import Constraint
from fairopt.programs.rows.blocks import BlockRows
from fairopt.programs.tensors import shape_of, to_batch, unchecked

INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# Numbers of joint cells up to this many are looked up in a table; beyond, they are sorted.
MOST_JOINT = 65_536


def formulate_classes(
    constraints: tuple[Constraint, ...],
    scores: Tensor,
    groups: Groups,
    targets: Tensor | None,
    *,
    classes: int,
    bounds: Bounds,
    weights: Tensor | None,
    missing_group: MissingGroup,
    group_counts: GroupCounts,
) -> Formulated:
    """What ``formulate_around`` does, for predictions of several classes.

    Args:
        scores: ``(n, C)`` or ``(B, n, C)``.
        targets: classes, integers ``(n,)`` or ``(B, n)``; or the chance of each, of the shape of
            the scores.
        classes: C.
    """
    check_simplex(bounds)
    center = read_class_scores(scores, classes)
    detached = center.detach()
    flat = detached if center.dim() == 3 else detached.unsqueeze(0)
    check_finite(scores, flat)
    batch, n, _ = flat.shape
    like = flat[..., 0] if center.dim() == 3 else detached[..., 0]
    outcomes = read_class_targets(targets, scores, flat)
    parts = each_class(constraints, like, flat, groups, outcomes, group_counts)
    alone = parts[0].rows.alone
    if alone and missing_group == "raise":
        raise ProblemError(
            f"groups: expected at least two groups to compare in {', '.join(alone)}, got one; "
            'use larger or stratified batches, or missing_group="skip"'
        )
    weight = read_weights(weights, flat[..., 0])
    P, _ = distance(flat[..., 0], weight)
    written = [data.write(weight, batch, missing_group) for data in dict.fromkeys(parts)]
    written = written * classes if len(written) == 1 else written
    matrix, cell = joined(parts, written, outcomes, flat, weight)
    whole = flat.reshape(batch, n * classes)
    if weight is None:
        linear, quadratic = negative(whole), P.to(flat.dtype)
    else:
        each = P.unsqueeze(-1).expand(len(P), n, classes)
        quadratic = each.reshape(len(P), n * classes)
        scored = center if center.dim() == 3 else center.unsqueeze(0)  # with its history
        linear = -(each * scored.double()).reshape(batch, n * classes)
    by_cells = parts[0].cells is not None
    one = torch.ones((), dtype=torch.float64, device=flat.device)
    entering = weight if weight is not None and by_cells else one
    m, K = matrix.shape[1:3]
    rows = unchecked(
        BlockRows,
        coefficient=to_batch(matrix, batch, m, K, classes),
        cell=to_batch(cell, batch, n),
        weight=to_batch(entering, batch, n),
    )
    lower, upper = (
        torch.cat(
            [*(w.sides[i].expand(batch, -1) for w in written), one.expand(batch, n)], -1
        )
        for i in (0, 1)
    )  # fmt: skip
    names = [f"class {c} | {name}" for c, w in enumerate(written) for name in w.names]
    skipped = [f"class {c} | {name}" for c, w in enumerate(written) for name in w.skipped]
    problem = put_together(
        quadratic, linear, rows, lower, upper,
        flat.new_zeros(()), flat.new_full((), torch.inf),
        (*names, *sum_names(n)), (*only_one(parts[0].rows), *skipped),
    )  # fmt: skip
    return Formulated(problem, None if weight is not None else center)


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


def check_simplex(bounds: Bounds) -> None:
    """Raise unless the bounds are those that the simplex implies."""
    ends = (None, None) if bounds is None else bounds
    if bounds is None or (
        isinstance(ends, (tuple, list))
        and len(ends) == 2
        and all(type(end) in (int, float) for end in ends)
        and tuple(ends) == (0, 1)
    ):
        return
    raise ProblemError(
        "bounds: with classes=... every prediction is a point of the simplex, so expected (0, 1) "
        f"or None, which mean the same there, got {bounds!r}"
    )


def read_class_scores(scores: Tensor, classes: int, name: str = "scores") -> Tensor:
    """Scores in float32 or float64, contiguous, of a shape that fits the number of classes."""
    expected = "a whole number of at least 2, or None for one prediction per sample"
    whole_number("classes", classes, 2, expected)
    if not isinstance(scores, Tensor):
        raise ProblemError(f"{name}: expected a tensor, got {type(scores).__name__}")
    if scores.dtype not in SCORES:
        raise ProblemError(
            f"{name}: expected a floating-point tensor, got {scores.dtype}; convert with .float()"
        )
    if scores.dim() not in (2, 3) or scores.shape[-1] != classes:
        raise ProblemError(
            f"{name}: expected shape (n, {classes}) or (B, n, {classes}) with "
            f"classes={classes}, got {shape_of(scores)}"
        )
    if scores.numel() == 0:
        raise ProblemError(
            f"{name}: expected at least one sample, got shape {shape_of(scores)}; skip "
            "empty batches"
        )
    return (
        scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    ).contiguous()


class Outcomes(NamedTuple):
    """Targets of several classes.

    Attributes:
        codes: the class of each sample, int64 ``(b, n)``; ``None`` where they are chances.
        chances: float64 ``(b, n, C)``; ``None`` where they are classes.
    """

    codes: Tensor | None
    chances: Tensor | None

    def of(self, c: int) -> Tensor:
        """1 where the target is class c, else 0; or the chance that it is: ``(b, n)``."""
        if self.chances is not None:
            return self.chances[..., c]
        assert self.codes is not None
        return (self.codes == c).double()


def read_class_targets(targets: Tensor | None, scores: Tensor, flat: Tensor) -> Outcomes | None:
    """Targets, checked; ``None`` if there are none."""
    if targets is None:
        return None
    batch, n, classes = flat.shape
    if not isinstance(targets, Tensor):
        raise ProblemError(f"targets: expected a tensor, got {type(targets).__name__}")
    if targets.shape in (scores.shape, flat.shape[1:]):
        if targets.device != scores.device:
            raise ProblemError(
                f"targets: expected device {scores.device}, where the scores are, got "
                f"{targets.device}; move it with .to(...)"
            )
        chances = (targets if targets.dim() == 3 else targets.unsqueeze(0)).double()
        plain = chances.detach()
        allowed = 1e-6
        if targets.is_floating_point():
            allowed = max(allowed, 4 * torch.finfo(targets.dtype).eps)
        if not bool(((plain >= 0) & (plain <= 1)).all()):
            raise ProblemError(
                "targets: expected the chance of each class, from 0 to 1, got values from "
                f"{float(plain.min())} to {float(plain.max())}; pass classes as integers ({n},)"
            )
        off = float((plain.sum(-1) - 1).abs().max())
        if off > allowed:
            raise ProblemError(
                "targets: expected chances of the classes that sum to 1 for each sample, got a sum "
                f"that is {off:.3g} off; normalise the rows"
            )
        if not chances.requires_grad and bool((plain.amax(-1) == 1).all()):
            return Outcomes(plain.argmax(-1), None)  # one-hot: classes
        return Outcomes(None, chances)
    if targets.dtype not in INDICES:
        raise ProblemError(
            f"targets: expected classes, integers of shape ({n},)"
            + (f" or ({batch}, {n})" if batch > 1 else "")
            + f", or the chance of each, of shape {shape_of(scores)}; got {targets.dtype} of "
            f"shape {shape_of(targets)}"
        )
    index = fit("targets", targets, scores[..., 0], flat[..., 0]).long()
    low, high = (int(end) for end in torch.aminmax(index))
    if low < 0 or high >= classes:
        raise ProblemError(
            f"targets: expected classes from 0 to {classes - 1}, got {low if low < 0 else high}; "
            "leave out samples without a class"
        )
    return Outcomes(index, None)


def each_class(
    constraints: tuple[Constraint, ...],
    like: Tensor,
    flat: Tensor,
    groups: Groups,
    outcomes: Outcomes | None,
    group_counts: GroupCounts,
) -> list[Data]:
    """What the rows of each class are made of; one object for all where they do not differ.

    Args:
        like: the scores of one class, in the shape that companions have.
    """

    def of(c: int) -> Data:
        one = flat[..., c]
        targets = torch.zeros_like(one[:1]) if outcomes is None else outcomes.of(c)
        if len(targets) == 1:
            targets = targets[0]
        data = gather(constraints, like, one, groups, targets, group_counts)
        if data.cells is not None:
            data.cells.partitions = None  # ``BlockRows`` takes a number for each cell
        return data

    first = of(0)
    if outcomes is None and first.targets is not None:
        named = plan(
            constraints,
            tuple(a.key[1] for a in first.axes if a.key[0] == "attribute"),
            tuple(first.continuous),
        ).targeted
        raise ProblemError(
            f"targets: {', '.join(named)} needs them, got none; pass the class of each sample, "
            f"integers of shape {shape_of(like)}"
        )
    same = first.targets is None and all(axis.key[0] == "attribute" for axis in first.axes)
    return [first] * flat.shape[-1] if same else [first, *map(of, range(1, flat.shape[-1]))]


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


def joined(
    parts: Sequence[Data],
    written: Sequence[Written],
    outcomes: Outcomes | None,
    flat: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The coefficients of all classes' rows, ``(b, m, K, C)``, and the cells, ``(b, n)``.

    The cells are the combinations of all classes' cells that occur. Where samples of one cell may
    differ, each sample is its own cell, and its weight is in the coefficients.
    """
    matrices = [w.matrix for w in written]
    if parts[0].cells is None:
        n = flat.shape[1]
        cell = torch.arange(n, device=flat.device).unsqueeze(0)
        if weight is not None:
            matrices = [matrix * weight.unsqueeze(1) for matrix in matrices]
    elif parts[0] is parts[-1]:
        cell = parts[0].cells.index
    else:
        cell, tables = joint_cells(parts, outcomes)
        matrices = [matrix[..., table] for matrix, table in zip(matrices, tables, strict=True)]
    b = max(map(len, matrices))
    placed = []
    for c, matrix in enumerate(matrices):
        matrix = matrix.expand(b, *matrix.shape[1:]).unsqueeze(-1)
        placed.append(torch.nn.functional.pad(matrix, (c, len(matrices) - 1 - c)))
    return torch.cat(placed, 1), cell


def joint_cells(parts: Sequence[Data], outcomes: Outcomes | None) -> tuple[Tensor, list[Tensor]]:
    """Cells that tell apart what some class tells apart: ``(b, n)``; and of each its cell by class.

    Where only the outcome differs between classes, the first class's cells and the target do.
    """
    cells = []
    for data in parts:
        assert data.cells is not None
        cells.append(data.cells)
    keys = [(each.index.long(), each.size) for each in cells]
    if outcomes is not None and outcomes.codes is not None:
        binned = any(axis.key[0] == "score" for axis in parts[0].axes)
        keys = keys if binned else keys[:1]
        keys.append((outcomes.codes, len(parts)))
    joint, reach = keys[0]
    for index, size in keys[1:]:
        if reach * size >= 2**62:
            joint, reach = renumbered(joint, reach)
        joint, reach = joint * size + index, reach * size
    joint, K = renumbered(joint, reach)
    tables = [
        joint.new_zeros(K).scatter_(
            0, joint.flatten(), each.index.long().expand(joint.shape).flatten()
        )
        for each in cells
    ]
    return joint, tables


def renumbered(index: Tensor, reach: int) -> tuple[Tensor, int]:
    """The same partition with numbers from 0 without gaps, and how many there are."""
    if reach > MOST_JOINT:
        distinct, index = torch.unique(index, return_inverse=True)
        return index, len(distinct)
    there = torch.zeros(reach, dtype=torch.bool, device=index.device)
    there[index.flatten()] = True
    number = there.cumsum(0) - 1
    return number[index], int(number[-1]) + 1


@lru_cache(maxsize=16)
def sum_names(n: int) -> tuple[str, ...]:
    """The names of the rows that keep each sample on the simplex."""
    return tuple([f"sample {i}: the classes sum to 1" for i in range(n)])
