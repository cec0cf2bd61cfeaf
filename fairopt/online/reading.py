"""The samples of a call to a stream: read and checked before anything of the state changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.formulation.inputs import (
    GroupCounts,
    Groups,
    as_batch,
    check_finite,
    counted,
    outcome_and_targets,
    read_groups,
    read_scores,
    read_weights,
)
from fairopt.formulation.template import RowPlan, plan_rows
from fairopt.kernels.stream_records import Floats, Integers, Samples
from fairopt.notions.catalogue import Constraint
from fairopt.notions.functionals import OUTCOME, Axis
from fairopt.online.layout import Layout, Programme, programme
from fairopt.tolerances import MOST, MOST_WEIGHT

UnknownGroup = Literal["add", "raise"]


class Declared(NamedTuple):
    """What a stream was made with that says how its samples are read."""

    constraints: tuple[Constraint, ...]
    group_counts: GroupCounts
    unknown_group: UnknownGroup


def read(
    declared: Declared,
    known: Programme | None,
    scores: Tensor,
    groups: Groups,
    targets: Tensor | None,
    weights: Tensor | None,
    several: bool = False,
) -> tuple[Programme, Samples]:
    """The samples in numbers, with a programme that knows all their groups.

    Args:
        several: whether scores may be ``(B, n)``; then there are B n samples, row by row.

    Raises:
        ProblemError: something of the input is not what ``formulate`` takes, or does not fit to the
            calls before.
    """
    constraints, group_counts, unknown_group = declared
    flat = as_batch(read_scores(scores).detach())
    check_finite(scores, flat)
    if len(flat) != 1 and not several:
        raise ProblemError(
            f"scores: expected shape (n,) or (n, 1), got {tuple(scores.shape)}; a stream has no "
            "batch of problems"
        )
    attributes, continuous = read_groups(groups, scores, flat)
    soft = frozenset(name for name, codes in attributes.items() if codes.is_floating_point())
    if known is not None:
        check_same(known.layout, attributes, continuous, soft)
    made = plan_rows(constraints, tuple(attributes), tuple(continuous))
    for name in continuous:
        if name not in made.continuous:
            raise ProblemError(
                f"groups[{name!r}]: expected integer or bool codes, got {continuous[name].dtype}; "
                "convert categories with .long(), or pass chances of membership as a matrix (n, G)"
            )
    counts = counted(group_counts, groups, made.attributes) or {}
    layout = seen(known, attributes, tuple(continuous), soft, made, counts, unknown_group)
    expected = bool(made.targeted) and targets is None
    if expected:
        targets = forecast(made, flat)
    outcome, values = outcome_and_targets(made, targets, scores, flat)
    weight = read_weights(weights, flat)
    if known is not None and layout == known.layout and made.stays:
        ready = known
    else:
        ready = programme(constraints, layout)
    parts = [attributes[name] for name, _ in layout.codes]
    edges = [torch.tensor(a.key[1], dtype=torch.float64, device=flat.device) for a in made.scores]
    parts += [torch.bucketize(flat.double().contiguous(), each, right=True) for each in edges]
    if outcome is not None:
        parts.append(outcome)
    n, problems = flat.numel(), len(flat)
    arrays = [in_order(part, problems) for part in parts]
    cell, chances = np.zeros(0, np.int64), np.zeros((0, 0))
    if any(array.ndim == 2 for array in arrays):
        chances = joint_chances(ready.axes, arrays, n)
        cell = np.zeros(n, np.int64)
    else:
        cell = cells(ready.axes, arrays, n)
    features = [in_order(continuous[name], problems) for name in ready.features]
    found = Samples(
        in_order(flat.double(), problems).astype(np.float64),
        cell,
        chances,
        np.ones(1) if weight is None else in_order(weight, problems).astype(np.float64),
        np.zeros(0) if values is None else in_order(values, problems).astype(np.float64),
        np.stack(features, 1) if features else np.zeros((n, 0)),
        expected,
    )
    check_summable("weights", found.weight, MOST_WEIGHT)
    check_summable("scores", found.scores)
    check_summable("targets", found.y)
    for f, name in enumerate(ready.features):
        check_summable(f"groups[{name!r}]", found.v[:, f])
    return ready, found


def check_summable(name: str, values: Floats, most: float = MOST) -> None:
    """Raise where squares could run over when a stream of them is summed."""
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= most:
        raise ProblemError(
            f"{name}: expected magnitudes of at most {most:g}, so that their squares can be summed "
            f"without end, got {largest:g}; take other units"
        )


def in_order(tensor: Tensor, problems: int) -> np.ndarray:
    """``(b, n, ...)``, b being 1 or ``problems``, as ``(problems * n, ...)``."""
    whole = tensor[0] if problems == 1 else tensor.expand(problems, *tensor.shape[1:]).flatten(0, 1)
    return whole.detach().cpu().numpy()


def forecast(made: RowPlan, flat: Tensor) -> Tensor:
    """What stands for targets that are not known; ``flat`` are the scores as a batch."""
    return flat.double().clamp(0.0, 1.0) if made.binary else flat


def forecasts(constraints: tuple[Constraint, ...], scores: Tensor, groups: Groups) -> Tensor | None:
    """What ``read`` puts in the place of targets; ``None`` where no notion needs any."""
    flat = as_batch(read_scores(scores).detach())
    attributes, continuous = read_groups(groups, scores, flat)
    made = plan_rows(constraints, tuple(attributes), tuple(continuous))
    return forecast(made, flat) if made.targeted else None


def read_predictions(predictions: Tensor, scores: Tensor) -> Floats:
    """Predictions that were served for scores, row by row.

    Raises:
        ProblemError: they are no finite numbers, or not as many as the scores.
    """
    if not isinstance(predictions, Tensor) or not predictions.is_floating_point():
        got = predictions.dtype if isinstance(predictions, Tensor) else type(predictions).__name__
        raise ProblemError(f"predictions: expected a floating-point tensor, got {got}")
    if predictions.shape != scores.shape:
        raise ProblemError(
            f"predictions: expected the shape of the scores, {tuple(scores.shape)}, got "
            f"{tuple(predictions.shape)}"
        )
    values: Floats = predictions.detach().double().cpu().flatten().numpy().copy()
    if not np.isfinite(values).all():
        raise ProblemError(
            "predictions: expected finite values, got NaN or infinity; what was served must be "
            "known to be counted"
        )
    check_summable("predictions", values)
    return values


def check_same(
    layout: Layout,
    attributes: Mapping[str, Tensor],
    continuous: Mapping[str, Tensor],
    soft: frozenset[str],
) -> None:
    """Raise unless the attributes are those of the calls before."""
    if set(attributes) != set(layout.names) or set(continuous) != set(layout.continuous):
        before = ", ".join(map(repr, (*layout.names, *layout.continuous)))
        got = ", ".join(map(repr, (*attributes, *continuous)))
        raise ProblemError(
            f"groups: expected the attributes that the stream began with, {before}, got {got}; "
            "begin another stream for others"
        )
    for name, codes in layout.codes:
        if (name in soft) != (name in layout.soft):
            came = "chances" if name in soft else "codes"
            raise ProblemError(
                f"groups[{name!r}]: expected {'codes' if name in soft else 'chances'}, as the "
                f"stream began with, got {came}"
            )
        if name in soft and attributes[name].shape[-1] != len(codes):
            raise ProblemError(
                f"groups[{name!r}]: expected chances of {len(codes)} groups, as in the calls "
                f"before, got {attributes[name].shape[-1]} columns"
            )


def seen(
    known: Programme | None,
    attributes: Mapping[str, Tensor],
    continuous: tuple[str, ...],
    soft: frozenset[str],
    made: RowPlan,
    declared: Mapping[str, int],
    unknown_group: UnknownGroup,
) -> Layout:
    """The layout with the groups of this call."""
    before = {} if known is None else dict(known.layout.codes)
    new: dict[str, tuple[int, ...]] = {}
    for name in made.attributes:
        if name in soft:
            new[name] = tuple(range(attributes[name].shape[-1]))
            continue
        codes = torch.unique(attributes[name].long()).tolist()
        if codes[0] < 0:
            raise ProblemError(
                f"groups[{name!r}]: expected codes of at least 0, got {codes[0]}; give unknown "
                "members a code of their own, or leave them out"
            )
        count = declared.get(name)
        if unknown_group == "raise" and count is None:
            raise ProblemError(
                f"unknown_group='raise': expected the number of groups of {name!r} in "
                "group_counts, got none; declare it, or take unknown_group='add'"
            )
        if unknown_group == "raise" and count is not None and codes[-1] >= count:
            raise ProblemError(
                f"groups[{name!r}]: expected codes below {count}, the number of groups declared, "
                f"got {codes[-1]}; correct the code or group_counts, or take unknown_group='add'"
            )
        new[name] = (*range(count or 0), *codes)
    if known is None:
        codes_of = tuple((name, tuple(sorted(set(new[name])))) for name in made.attributes)
        return Layout(tuple(attributes), codes_of, soft, continuous)
    if all(set(new[name]) <= set(before[name]) for name in made.attributes):
        return known.layout
    return known.layout.with_codes(new)


def cells(axes: tuple[Axis, ...], arrays: list[np.ndarray], n: int) -> Integers:
    """The cell of each sample, where groups and outcomes are certain."""
    index = np.zeros(n, np.int64)
    for axis, codes in zip(axes, arrays, strict=True):
        index = index * len(axis.codes) + place(axis, codes)
    return index


def place(axis: Axis, codes: np.ndarray) -> Integers:
    """The place of each code on its axis."""
    if axis.key[0] != "attribute":
        return codes.astype(np.int64)
    found: Integers = np.searchsorted(np.array(axis.codes, np.int64), codes.astype(np.int64))
    return found


def joint_chances(axes: tuple[Axis, ...], arrays: list[np.ndarray], n: int) -> Floats:
    """The chance of each cell for each sample, ``(n, K)``: products of those of the axes."""
    joint = np.ones((n, 1))
    for axis, each in zip(axes, arrays, strict=True):
        size = len(axis.codes) if axis.key != OUTCOME.key else 2
        chances = each if each.ndim == 2 else np.eye(size)[place(axis, each)]
        joint = (joint[:, :, None] * chances[:, None, :]).reshape(n, -1)
    return np.ascontiguousarray(joint, np.float64)
