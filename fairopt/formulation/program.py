"""formulate(): scores, groups and constraints become a problem, in differentiable torch code."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, overload

import torch
from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.formulation.coefficients import MissingGroup, write
from fairopt.formulation.inputs import (
    NUMBERS,
    Bounds,
    as_batch,
    as_constraints,
    both,
    check_finite,
    distance,
    inward_bounds,
    read_weights,
    wide,
)
from fairopt.formulation.multiclass import formulate_classes
from fairopt.formulation.objectives import Objective, Stated, check_objective, linear_program
from fairopt.formulation.result import Formulated, check_nonnegative, only_one, put_together
from fairopt.formulation.samples import GroupCounts, Groups, cell_rows, gather
from fairopt.formulation.template import Trace
from fairopt.kernels.memory import negative
from fairopt.notions.catalogue import Constraint
from fairopt.programs.problem import LP, QP
from fairopt.programs.tensors import to_batch, unchecked

# Rows of up to this many cells are remembered by the cells' counts.
MOST_COUNTS = 256


@overload
def formulate(
    constraints: Constraint | Sequence[Constraint],
    scores: Tensor,
    groups: Groups,
    targets: Tensor | None = None,
    *,
    bounds: Bounds,
    objective: Literal["l2"] = "l2",
    weights: Tensor | None = None,
    missing_group: MissingGroup = "skip",
    group_counts: GroupCounts = None,
    classes: int | None = None,
) -> QP: ...


@overload
def formulate(
    constraints: Constraint | Sequence[Constraint],
    scores: Tensor,
    groups: Groups,
    targets: Tensor | None = None,
    *,
    bounds: Bounds,
    objective: Literal["l1", "linf", "utility"],
    weights: Tensor | None = None,
    missing_group: MissingGroup = "skip",
    group_counts: GroupCounts = None,
    classes: None = None,
) -> LP: ...


def formulate(
    constraints: Constraint | Sequence[Constraint],
    scores: Tensor,
    groups: Groups,
    targets: Tensor | None = None,
    *,
    bounds: Bounds,
    objective: Objective = "l2",
    weights: Tensor | None = None,
    missing_group: MissingGroup = "skip",
    group_counts: GroupCounts = None,
    classes: int | None = None,
) -> QP | LP:
    """Write the projection of scores onto parity constraints as a QP; other objectives as an LP.

        minimise   1/2 sum_i w_i (x_i - scores_i)^2
        subject to  the rows of all constraints,   lower <= x <= upper

    so that P = diag(w), q = -w * scores, and row r weighs sample i by ``C[r, cell(i)] * w_i``.
    Gradients reach scores, tolerances, targets, bounds and weights by autograd.

    With c the scores clipped to the bounds, the other objectives and the variables of their LPs::

        "l1"       minimise sum_i w_i |x_i - scores_i|            (p, m),  x = c + p - m
        "linf"     minimise max_{w_i > 0} |x_i - scores_i|        (d, t),  x = c + d
        "utility"  maximise sum_i w_i scores_i x_i                x

    Args:
        constraints: one or several; all hold at once, each with its own tolerance.
        scores: ``(n,)``, ``(n, 1)`` or ``(B, n)``; float64, float32, bfloat16 or float16 (the last
            two are widened to float32).
        groups: group codes, integers >= 0 or bool, ``(n,)`` or ``(B, n)``; or a mapping of
            attribute name to such a tensor. A bare tensor is the attribute ``"group"``.
        targets: shape of ``scores``; 0 and 1 where a notion conditions on the outcome.
        bounds: ``(lower, upper)``, each a number, a tensor (scalar, ``(n,)`` or ``(B, n)``) or
            ``None``; ``None`` for no bounds at all. A bound that the dtype of the scores cannot
            hold is rounded inwards.
        objective: ``"l2"``, ``"l1"``, ``"linf"`` or ``"utility"``.
        weights: ``(n,)`` or ``(B, n)``, at least 0; they weigh the change and the means alike. A
            sample of weight 0 is only clipped to the bounds (with ``"utility"``, it may be any
            point within them).
        missing_group: ``"skip"`` leaves out rows that compare a group of which the batch holds
            nothing (``problem.skipped`` names them); ``"raise"`` refuses the batch.
        group_counts: how many groups each attribute has, by name (or one number for all): codes run
            from 0 to one less. Without it they run to the largest code of the call, so that a batch
            lacking the LAST groups cannot be told from one in which they do not exist. Bool
            groups have two.
        classes: the number C of classes: scores are then ``(n, C)`` or ``(B, n, C)``, predictions
            points of the simplex, targets classes ``(n,)`` or ``(B, n)`` or chances of the shape
            of the scores, and each notion holds for each class; see ``formulation.multiclass``.

    Raises:
        ProblemError: an argument is outside what is said above.
    """
    problem, center, _ = formulate_around(
        constraints, scores, groups, targets, bounds=bounds, weights=weights,
        missing_group=missing_group, group_counts=group_counts, objective=objective,
        classes=classes,
    )  # fmt: skip
    if center is None or not center.requires_grad:
        return problem
    assert isinstance(problem, QP)
    return unchecked(QP, **{**problem.__dict__, "q": -center.view(problem.q.shape)})


def formulate_around(
    constraints: Constraint | Sequence[Constraint],
    scores: Tensor,
    groups: Groups,
    targets: Tensor | None,
    *,
    bounds: Bounds,
    weights: Tensor | None,
    missing_group: MissingGroup,
    group_counts: GroupCounts,
    objective: Objective = "l2",
    classes: int | None = None,
) -> Formulated:
    """What ``formulate`` does, for the layer."""
    constraints = as_constraints(constraints)
    quadratic = objective == "l2"
    if not quadratic:
        check_objective(objective)
    if missing_group not in ("skip", "raise"):
        raise ProblemError(f"missing_group: expected 'skip' or 'raise', got {missing_group!r}")
    if classes is not None:
        if not quadratic:
            raise ProblemError(
                f"objective: expected 'l2' with classes={classes}, got {objective!r}; predictions "
                "of several classes are moved by the least squares"
            )
        return formulate_classes(
            constraints, scores, groups, targets, classes=classes, bounds=bounds, weights=weights,
            missing_group=missing_group, group_counts=group_counts,
        )  # fmt: skip
    center = wide(scores)
    flat = as_batch(center.detach())
    check_finite(scores, flat)
    batch, n = flat.shape
    data = gather(constraints, scores, flat, groups, targets, group_counts)
    rows, cells = data.rows, data.cells
    if rows.alone and missing_group == "raise":
        raise ProblemError(
            f"groups: expected at least two groups to compare in {', '.join(rows.alone)}, got one; "
            'use larger or stratified batches, or missing_group="skip"'
        )
    sides = both(bounds)
    if (
        weights is None
        and cells is not None
        and len(cells.index) == 1
        and cells.size <= MOST_COUNTS
        and type(sides[0]) in NUMBERS
        and type(sides[1]) in NUMBERS
        and rows.repeats
        and quadratic
    ):
        same = remembered(
            rows, cells.counts(), sides, data.nonnegative, missing_group, scores.dtype, flat.dtype,
            flat.device, batch, n,
        )  # fmt: skip
        template, index = same.rows, to_batch(cells.index, batch, n)
        over = unchecked(type(template), **{**template.__dict__, "cell": index})
        fields = {**same.__dict__, "q": negative(flat), "rows": over}
        return Formulated(unchecked(QP, **fields), center)

    if weights is not None or not quadratic:
        flat = as_batch(center)  # with its history
    weight = read_weights(weights, flat)
    written = data.write(weight, batch, missing_group)
    lower, upper = inward_bounds(sides, scores, flat)
    check_nonnegative(data.nonnegative, lower)
    form = data.in_form(written, weight, flat)
    skipped = only_one(rows) + written.skipped
    if not quadratic:
        stated = Stated(flat, weight, form, *written.sides, lower, upper, written.names, skipped)
        program, read = linear_program(objective, stated)
        return Formulated(program, None, read)
    problem = put_together(
        *distance(flat, weight), form, *written.sides, lower, upper, written.names, skipped
    )
    return Formulated(problem, None if weights is not None else center)


@lru_cache(maxsize=512)
@torch.inference_mode(False)  # what is kept serves training, too
def remembered(
    rows: Trace,
    counts: tuple[int, ...],
    bounds: tuple[float | None, float | None],
    nonnegative: tuple[str, ...],
    missing_group: MissingGroup,
    dtype: torch.dtype,
    kept: torch.dtype,
    device: torch.device,
    batch: int,
    n: int,
) -> QP:
    """Everything of a problem but q and the cells, where it is a function of cell counts.

    That is so without weights; stratified batches repeat their counts. Its q and cells are
    placeholders.

    Args:
        dtype, kept: dtypes of the scores and of the solution.
    """
    mass = torch.tensor([counts], dtype=torch.float64, device=device)
    assert rows.grid is not None
    written = write(rows, rows.grid, mass, {}, missing_group)
    like = torch.zeros((), dtype=dtype, device=device)
    lower, upper = inward_bounds(bounds, like, like.to(kept))
    check_nonnegative(nonnegative, lower)
    one = torch.ones((), dtype=kept, device=device)
    index = torch.zeros(1, n, dtype=torch.uint8, device=device)
    problem = put_together(
        one, one.expand(batch, n), cell_rows(written.matrix, index, one, batch), *written.sides,
        lower, upper, written.names, only_one(rows) + written.skipped,
    )  # fmt: skip
    return problem.replace(memo={})
