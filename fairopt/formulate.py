"""formulate(): scores, groups and constraints become a problem, in differentiable torch code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from types import NoneType
from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from fairopt.assembly import MissingGroup, write
from fairopt.constraints import Constraint
from fairopt.errors import ProblemError
from fairopt.memory import negative
from fairopt.objectives import Objective, Read, Stated, check_objective, linear_program
from fairopt.problem import (
    LP,
    QP,
    CellRows,
    Rows,
    all_finite,
    compact,
    shape_of,
    to_batch,
    trusted,
)
from fairopt.samples import GroupCounts, Groups, cell_rows, fit, gather, is_small, scan
from fairopt.tracing import Trace

__all__ = ["Bounds", "GroupCounts", "Groups", "MissingGroup", "Objective", "formulate"]

Bound: TypeAlias = Tensor | float | None
Bounds: TypeAlias = tuple[Bound, Bound] | None

SCORES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

NUMBERS = (float, int, NoneType)

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

    With c the scores clipped to the bounds, the other objectives and the variables of their LPs are

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
            of the scores, and each notion holds for each class; see ``fairopt.classes``.

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
    return trusted(QP, **{**problem.__dict__, "q": -center.view(problem.q.shape)})


class Formulated(NamedTuple):
    """A problem, and what the layer needs besides.

    Attributes:
        problem: without the history of ``center``.
        center: the scores with their history, where q = -center; ``solve`` then pulls gradients
            back to the center itself, which spares a small layer three steps of autograd and a
            large one the memory of two negations. ``None``: the problem carries all its history.
        read: the predictions ``(B, n)``, with their history, from the solution's x, in the dtype
            of the scores (float32 for narrower ones); ``None`` where they are that x.
    """

    problem: QP | LP
    center: Tensor | None
    read: Read | None = None


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
        from fairopt.classes import formulate_classes  # which is written in terms of this module

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
        template = same.rows
        assert isinstance(template, CellRows)
        fields = {
            **same.__dict__,
            "q": negative(flat),
            "rows": trusted(
                CellRows,
                coefficient=template.coefficient,
                cell=to_batch(cells.index, batch, n),
                weight=template.weight,
            ),
        }
        return Formulated(trusted(QP, **fields), center)

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


def put_together(
    P: Tensor,
    q: Tensor,
    rows: Rows,
    l: Tensor,
    u: Tensor,
    lower: Tensor,
    upper: Tensor,
    names: tuple[str, ...],
    skipped: tuple[str, ...],
) -> QP:
    """The QP of data that were checked: each expanded to ``q``'s batch."""
    batch, n = q.shape
    m = rows.shape[1]
    return trusted(
        QP,
        P=to_batch(P, batch, n),
        q=q,
        rows=rows,
        l=to_batch(l, batch, m),
        u=to_batch(u, batch, m),
        lb=to_batch(lower, batch, n),
        ub=to_batch(upper, batch, n),
        row_names=names,
        skipped=skipped,
    )


def only_one(rows: Trace) -> tuple[str, ...]:
    """What is not compared because there is one group only, as problems report it."""
    return tuple([f"{name}: only one group" for name in rows.alone])


def check_nonnegative(names: tuple[str, ...], lower: Tensor) -> None:
    """Raise unless predictions cannot be negative, where a notion needs that."""
    if names and not bool((compact(lower.detach()) >= 0).all()):
        raise ProblemError(
            f"bounds: {', '.join(names)} needs a lower bound of at least 0, got "
            f"{describe(compact(lower.detach()))}; a ratio of means says nothing where they can be "
            "negative"
        )


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
    return trusted(QP, **{**problem.__dict__, "memo": {}})


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


def as_constraints(constraints: Constraint | Sequence[Constraint]) -> tuple[Constraint, ...]:
    """One or several constraints as a tuple."""
    if isinstance(constraints, Constraint):
        return (constraints,)
    listed = tuple(constraints) if isinstance(constraints, Iterable) else (constraints,)
    for constraint in listed:
        if not isinstance(constraint, Constraint):
            raise ProblemError(
                "constraints: expected parity notions such as DemographicParity(tolerance=0.05), "
                f"got {constraint!r}"
            )
    if not listed:
        raise ProblemError("constraints: expected at least one, got none")
    return listed


def wide(scores: Tensor) -> Tensor:
    """Scores in float32 or float64, of a shape that they may have."""
    if not isinstance(scores, Tensor):
        raise ProblemError(f"scores: expected a tensor, got {type(scores).__name__}")
    if scores.dtype not in SCORES:
        raise ProblemError(
            f"scores: expected a floating-point tensor, got {scores.dtype}; convert with .float()"
        )
    if scores.dim() not in (1, 2):
        raise ProblemError(f"scores: expected shape (n,), (n, 1) or (B, n), got {shape_of(scores)}")
    if scores.numel() == 0:
        raise ProblemError(
            f"scores: expected at least one sample, got shape {shape_of(scores)}; skip "
            "empty batches"
        )
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def as_batch(scores: Tensor) -> Tensor:
    """``(n,)`` and ``(n, 1)`` as ``(1, n)``; ``(B, n)`` as it is."""
    if scores.dim() == 1:
        return scores.unsqueeze(0)
    return scores.mT if scores.shape[1] == 1 else scores


def check_finite(scores: Tensor, flat: Tensor) -> None:
    if not (scan().finite(flat.numpy()) if is_small(flat) else all_finite(flat)):
        bad = (~torch.isfinite(scores.detach())).nonzero()
        raise ProblemError(
            f"scores: expected finite values, got {len(bad)} NaN or infinite ones, first at index "
            f"{tuple(bad[0].tolist())}; look for a diverged model or a log of zero"
        )


def distance(flat: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The diagonal P and q of the weighted distance to the scores."""
    if weight is None:
        return flat.new_ones(()), negative(flat)
    # Weight 0: the sample counts for nothing, and is moved to nothing but the bounds.
    P = torch.where(weight.detach() > 0, weight, 1.0)
    return P, -(P * flat.double()).expand(len(flat), -1)


def read_weights(weights: Tensor | None, flat: Tensor) -> Tensor | None:
    """Weights in float64, checked."""
    if weights is None:
        return None
    weight = fit("weights", weights, flat, flat)
    if not weight.is_floating_point():
        raise ProblemError(f"weights: expected floating-point numbers, got {weight.dtype}")
    weight = weight.double()
    plain = weight.detach()
    if not all_finite(plain) or bool((plain < 0).any()):
        raise ProblemError(
            "weights: expected finite numbers of at least 0; drop or correct the samples that have "
            "others"
        )
    return weight


def both(bounds: Bounds) -> tuple[Bound, Bound]:
    """The two bounds, each of a type that a bound may have."""
    if bounds is None:
        return None, None
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ProblemError(f"bounds: expected (lower, upper), or None for none, got {bounds!r}")
    for name, value in zip(("lower bound", "upper bound"), bounds, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor, NoneType)):
            raise ProblemError(
                f"{name}: expected a number, a floating-point tensor or None, got {value!r}"
            )
    return bounds[0], bounds[1]


def inward_bounds(
    bounds: tuple[Bound, Bound], scores: Tensor, flat: Tensor
) -> tuple[Tensor, Tensor]:
    """Both bounds in a dtype of the solution, each at values that the scores' dtype can hold."""
    lower = one_bound("lower bound", bounds[0], -math.inf, scores, flat)
    upper = one_bound("upper bound", bounds[1], math.inf, scores, flat)
    check_bounds(lower, upper, scores.dtype)
    return lower, upper


def check_bounds(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> None:
    """Raise unless lower <= upper everywhere, each finite or infinite on its own end."""
    low, high = compact(lower.detach()), compact(upper.detach())
    if not bool(((low <= high) & (low < math.inf) & (high > -math.inf)).all()):
        raise ProblemError(
            "bounds: expected lower <= upper without NaN for every sample (after rounding to what "
            f"{dtype} can hold), got lower {describe(low)}, upper {describe(high)}"
        )


def describe(tensor: Tensor) -> str:
    low, high = float(tensor.min()), float(tensor.max())
    return f"{low}" if low == high else f"from {low} to {high}"


def one_bound(name: str, value: Bound, default: float, scores: Tensor, flat: Tensor) -> Tensor:
    """One bound; ``default`` tells its side. Rounded inwards to the dtype of the scores."""
    if value is None:
        return flat.new_full((), default)
    if not isinstance(value, Tensor):
        exact = torch.tensor(float(value), dtype=torch.float64)
        return rounded_inwards(exact, scores.dtype, default).to(flat.device, flat.dtype)
    if not value.is_floating_point():
        raise ProblemError(
            f"{name}: expected a number, a floating-point tensor or None, got {value.dtype}"
        )
    bound = value if value.dim() == 0 else fit(name, value, scores, flat)
    if bound.device != flat.device:
        bound = bound.to(flat.device) if bound.dim() == 0 else bound
    inside = rounded_inwards(bound.detach().double(), scores.dtype, default)
    moved = inside - bound.detach().double()
    wide = bound.double() + torch.where(torch.isfinite(moved), moved, 0.0)
    return wide.to(flat.dtype)


def rounded_inwards(exact: Tensor, dtype: torch.dtype, side: float) -> Tensor:
    """float64 values moved to the nearest ones that ``dtype`` holds, not outwards."""
    near = exact.to(dtype)
    wide = near.double()
    outside = wide > exact if side > 0 else wide < exact
    if not bool(outside.any()):
        return wide
    step = torch.nextafter(near, torch.tensor(-side, dtype=dtype, device=near.device)).double()
    return torch.where(outside, step, wide)
