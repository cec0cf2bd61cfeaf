"""formulate(): scores, groups and constraints become a problem, in differentiable torch code."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import NoneType
from typing import Literal, overload

import torch
from torch import Tensor

from fairopt.formulation.coefficients import assemble
from fairopt.formulation.inputs import (
    HALVES,
    Bound,
    Bounds,
    GroupCounts,
    Groups,
    as_batch,
    check_finite,
    check_nonnegative,
    inward_bounds,
    read_scores,
    read_weights,
)
from fairopt.formulation.objectives import Formulated, Stated, linear_program, quadratic_program
from fairopt.formulation.samples import cell_rows, gather
from fairopt.formulation.specification import Objective, Specification
from fairopt.formulation.template import MissingGroup, RowTemplate
from fairopt.kernels.memory import negative
from fairopt.notions.catalogue import Constraint
from fairopt.programs.problem import LP, QP
from fairopt.programs.tensors import to_batch, unchecked

# Rows of up to this many cells are remembered by the cells' counts.
MOST_COUNTS = 256

# Of bounds that are the same for all samples and calls.
NUMBERS = (float, int, NoneType)


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


def formulate(  # noqa: PLR0913
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
    specification = Specification(
        constraints, bounds, objective, missing_group, group_counts, classes=classes
    )
    problem, center, _ = formulate_around(specification, scores, groups, targets, weights)
    if center is None or not center.requires_grad:
        return problem
    assert isinstance(problem, QP)
    return unchecked(QP, **{**problem.__dict__, "q": -center.view(problem.q.shape)})


def formulate_around(
    specification: Specification,
    scores: Tensor,
    groups: Groups,
    targets: Tensor | None,
    weights: Tensor | None,
) -> Formulated:
    """What ``formulate`` does, for the layer."""
    if specification.classes is not None:
        from fairopt.formulation.multiclass import formulate_classes  # code that few need

        return formulate_classes(specification, scores, groups, targets, weights)
    center = read_scores(scores)
    flat = as_batch(center.detach())
    check_finite(scores, flat)
    batch, n = flat.shape
    data = gather(specification.plans, scores, flat, groups, targets, specification.group_counts)
    template, cells, bounds = data.rows, data.cells, specification.bounds
    missing_group, quadratic = specification.missing_group, specification.objective == "l2"
    if (
        weights is None
        and cells is not None
        and len(cells.index) == 1
        and cells.size <= MOST_COUNTS
        and type(bounds[0]) in NUMBERS
        and type(bounds[1]) in NUMBERS
        and template.repeats
        and quadratic
    ):
        same = remembered(template, cells.counts(), bounds, missing_group, scores.dtype, batch, n)
        held, index = same.rows, to_batch(cells.index, batch, n)
        over = unchecked(type(held), **{**held.__dict__, "cell": index})
        fields = {**same.__dict__, "q": negative(flat), "rows": over}
        return Formulated(unchecked(QP, **fields), center)

    if weights is not None or not quadratic:
        flat = as_batch(center)  # with its history
    weight = read_weights(weights, flat)
    found = data.assemble(weight, batch, missing_group)
    lower, upper = inward_bounds(bounds, scores, flat)
    check_nonnegative(template.plan.nonnegative, lower)
    form = data.in_form(found, weight, flat)
    skipped = template.uncompared + found.skipped
    stated = Stated(flat, weight, form, *found.sides, lower, upper, found.names, skipped)
    if specification.objective != "l2":
        program, read = linear_program(specification.objective, stated)
        return Formulated(program, None, read)
    return Formulated(quadratic_program(stated), None if weights is not None else center)


@lru_cache(maxsize=512)
@torch.inference_mode(False)  # what is kept serves training, too
def remembered(
    template: RowTemplate,
    counts: tuple[int, ...],
    bounds: tuple[Bound, Bound],
    missing_group: MissingGroup,
    dtype: torch.dtype,
    batch: int,
    n: int,
) -> QP:
    """Everything of a problem but q and the cells, where it is a function of cell counts.

    That is so without weights; stratified batches repeat their counts. Its q and cells are
    placeholders.

    Args:
        dtype: of the scores.
    """
    device = template.sides.device
    mass = torch.tensor([counts], dtype=torch.float64, device=device)
    assert template.grid is not None
    found = assemble(template, template.grid, mass, {}, missing_group)
    scores = torch.zeros((), dtype=dtype, device=device)
    one = torch.ones((), dtype=torch.float32 if dtype in HALVES else dtype, device=device)
    lower, upper = inward_bounds(bounds, scores, one)
    check_nonnegative(template.plan.nonnegative, lower)
    index = torch.zeros(1, n, dtype=torch.uint8, device=device)
    form = cell_rows(found.matrix, index, one, batch)
    ones = one.expand(batch, n)
    skipped = template.uncompared + found.skipped
    stated = Stated(ones, None, form, *found.sides, lower, upper, found.names, skipped)
    return unchecked(QP, P=ones, q=ones, memo={}, **stated.fields(n))
