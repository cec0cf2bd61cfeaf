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

import torch
from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.formulation.coefficients import RowCoefficients
from fairopt.formulation.inputs import (
    Groups,
    Outcomes,
    check_finite,
    read_class_targets,
    read_scores,
    read_weights,
)
from fairopt.formulation.objectives import Formulated, Stated, quadratic_program
from fairopt.formulation.samples import Data, gather
from fairopt.formulation.specification import Specification
from fairopt.programs.rows.blocks import BlockRows
from fairopt.programs.tensors import shape_of, to_batch, unchecked

# Numbers of joint cells up to this many are looked up in a table; beyond, they are sorted.
MOST_JOINT = 65_536


def formulate_classes(
    specification: Specification,
    scores: Tensor,
    groups: Groups,
    targets: Tensor | None,
    weights: Tensor | None,
) -> Formulated:
    """What ``formulate_around`` does, for predictions of several classes.

    Args:
        scores: ``(n, C)`` or ``(B, n, C)``.
        targets: classes, integers ``(n,)`` or ``(B, n)``; or the chance of each, of the shape of
            the scores.
    """
    center = read_scores(scores, specification.classes).contiguous()
    detached = center.detach()
    flat = detached if center.dim() == 3 else detached.unsqueeze(0)
    check_finite(scores, flat)
    batch, n, classes = flat.shape
    outcomes = read_class_targets(targets, scores, flat)
    data = each_class(specification, detached[..., 0], flat, groups, outcomes)
    weight = read_weights(weights, flat[..., 0])
    found = [
        each.assemble(weight, batch, specification.missing_group) for each in dict.fromkeys(data)
    ]
    found = found * classes if len(found) == 1 else found
    matrix, cell = joined(data, found, outcomes, flat, weight)
    one = torch.ones((), dtype=torch.float64, device=flat.device)
    entering = weight if weight is not None and data[0].cells is not None else one
    m, K = matrix.shape[1:3]
    rows = unchecked(
        BlockRows,
        coefficient=to_batch(matrix, batch, m, K, classes),
        cell=to_batch(cell, batch, n),
        weight=to_batch(entering, batch, n),
    )
    lower, upper = (
        torch.cat(
            [*(each.sides[i].expand(batch, -1) for each in found), one.expand(batch, n)], -1
        )
        for i in (0, 1)
    )  # fmt: skip
    names = [f"class {c} | {name}" for c, each in enumerate(found) for name in each.names]
    skipped = [f"class {c} | {name}" for c, each in enumerate(found) for name in each.skipped]
    whole = flat if weight is None else center  # with its history
    every = None
    if weight is not None:
        every = weight.unsqueeze(-1).expand(*weight.shape, classes).reshape(len(weight), -1)
    problem = quadratic_program(
        Stated(
            whole.reshape(batch, n * classes), every, rows, lower, upper, flat.new_zeros(()),
            flat.new_full((), torch.inf), (*names, *sum_names(n)),
            (*data[0].rows.uncompared, *skipped),
        )
    )  # fmt: skip
    return Formulated(problem, None if weight is not None else center)


def each_class(
    specification: Specification,
    like: Tensor,
    flat: Tensor,
    groups: Groups,
    outcomes: Outcomes | None,
) -> list[Data]:
    """What the rows of each class are made of; one object for all where they do not differ.

    Args:
        like: the scores of one class, in the shape that companions have.
    """
    plans, counts = specification.plans, specification.group_counts

    def of(c: int) -> Data:
        one = flat[..., c]
        targets = torch.zeros_like(one[:1]) if outcomes is None else outcomes.of(c)
        if len(targets) == 1:
            targets = targets[0]
        data = gather(plans, like, one, groups, targets, counts)
        if data.cells is not None:
            data.cells.partitions = None  # ``BlockRows`` takes a number for each cell
        return data

    first = of(0)
    if outcomes is None and first.targets is not None:
        raise ProblemError(
            f"targets: {', '.join(first.rows.plan.targeted)} needs them, got none; pass the class "
            f"of each sample, integers of shape {shape_of(like)}"
        )
    same = first.targets is None and all(axis.key[0] == "attribute" for axis in first.axes)
    return [first] * flat.shape[-1] if same else [first, *map(of, range(1, flat.shape[-1]))]


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


def joined(
    data: Sequence[Data],
    found: Sequence[RowCoefficients],
    outcomes: Outcomes | None,
    flat: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The coefficients of all classes' rows, ``(b, m, K, C)``, and the cells, ``(b, n)``.

    The cells are the combinations of all classes' cells that occur. Where samples of one cell may
    differ, each sample is its own cell, and its weight is in the coefficients.
    """
    matrices = [each.matrix for each in found]
    if data[0].cells is None:
        n = flat.shape[1]
        cell = torch.arange(n, device=flat.device).unsqueeze(0)
        if weight is not None:
            matrices = [matrix * weight.unsqueeze(1) for matrix in matrices]
    elif data[0] is data[-1]:
        cell = data[0].cells.index
    else:
        cell, tables = joint_cells(data, outcomes)
        matrices = [matrix[..., table] for matrix, table in zip(matrices, tables, strict=True)]
    b = max(map(len, matrices))
    placed = []
    for c, matrix in enumerate(matrices):
        matrix = matrix.expand(b, *matrix.shape[1:]).unsqueeze(-1)
        placed.append(torch.nn.functional.pad(matrix, (c, len(matrices) - 1 - c)))
    return torch.cat(placed, 1), cell


def joint_cells(data: Sequence[Data], outcomes: Outcomes | None) -> tuple[Tensor, list[Tensor]]:
    """Cells that tell apart what some class tells apart: ``(b, n)``; and of each its cell by class.

    Where only the outcome differs between classes, the first class's cells and the target do.
    """
    cells = []
    for each in data:
        assert each.cells is not None
        cells.append(each.cells)
    keys = [(each.index.long(), each.size) for each in cells]
    if outcomes is not None and outcomes.codes is not None:
        binned = any(axis.key[0] == "score" for axis in data[0].axes)
        keys = keys if binned else keys[:1]
        keys.append((outcomes.codes, len(data)))
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
