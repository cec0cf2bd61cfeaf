"""Numbers for traced rows: coefficients and sides of all rows at once, in differentiable torch.

Columns are cells, each with its mass, or samples, each with its weight. The mathematics is that of
``notions.functionals.Term``; here its letters are V for the indicators ``(b, S, C)``, which set
holds which column, and w for the masses of the columns ``(B, C)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.formulation.partitioning import Classes
from fairopt.formulation.template import Terms, Trace

MissingGroup: TypeAlias = Literal["skip", "raise"]

# What is zero but for rounding, as a share of the size of what was added up.
ROUNDING = 4e-15


@dataclass(frozen=True, eq=False)
class Written:
    """Rows in numbers: lower <= matrix @ (w * x) + constant <= upper.

    Attributes:
        names: of the rows that are left.
        kept: their numbers in the trace; ``None`` for all.
        skipped: names of those that compare nothing, with the reason.
        matrix: ``(B, m, C)``, without the weights w of the columns.
        constant: ``(B, m)``, or ``None`` for zero.
        lower, upper: ``(B, m)``, of the value with its constant.
    """

    names: tuple[str, ...]
    kept: Tensor | None
    skipped: tuple[str, ...]
    matrix: Tensor
    constant: Tensor | None
    lower: Tensor
    upper: Tensor

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Of the value without its constant, as problems have it."""
        if self.constant is None:
            return self.lower, self.upper
        return self.lower - self.constant, self.upper - self.constant


def write(
    trace: Trace,
    V: Tensor,
    w: Tensor,
    known: Mapping[object, tuple[Tensor, ...]],
    missing_group: MissingGroup,
    values: Mapping[str, Tensor] | None = None,
    classes: Classes | None = None,
) -> Written:
    """All rows of a trace, for a batch.

    Args:
        known: for ``TARGET`` and each attribute in ``trace.constant_features`` the sums per column
            of w times it, and of w times its magnitude: ``(B, C)`` both.
        values: the continuous attributes, ``(b, C)``; needed for ``trace.linear_features``.
        classes: where the columns are the classes of several partitions, each of which holds all
            samples. V is then ``classes.home``, and the matrix ``(B, m, G)``, for each row the
            classes of its own partition.

    Raises:
        ProblemError: parameters are out of range; a row compares nothing and ``missing_group`` is
            ``"raise"``; no prediction can change a row that does not hold.
    """
    if trace.numbers:
        for constraint in trace.constraints:
            if constraint.tensors:
                constraint.check()  # again: the optimizer may have moved them
    numbers = numbers_of(trace, w.device)
    masses = (V @ w.unsqueeze(-1)).squeeze(-1)
    masses = torch.nn.functional.pad(masses, (0, 1), value=1.0)  # the last one stands for 1
    here, empty = None, not masses.detach().min().item() > 0
    if empty:
        whole = (masses.detach()[:, trace.needs] > 0).all(-1)  # (B, m)
        here = None if bool(whole.all()) else whole
        masses = torch.where(masses > 0, masses, 1.0)
    scale = scales(trace.linear, masses, numbers)
    terms_grid = trace.terms_grid if V is trace.grid else None
    if classes is not None:
        terms_grid = classes.terms_grid
    if terms_grid is not None:
        matrix = (scale.unsqueeze(-1) * terms_grid).sum(-2)
    else:
        matrix = sum_of_terms(trace, scale, V, w, masses, values)
    constant = None
    if trace.constant is not None:
        constant = constants(trace, trace.constant, V, w, masses, numbers, known)
    sides = trace.sides
    if trace.side_numbers is not None:
        assert numbers is not None
        sides = sides * numbers[trace.side_numbers]
        check_order(trace, sides)
    lower, upper = (side.unsqueeze(0) for side in sides.unbind(-1))
    if here is None:
        written = Written(trace.names, None, (), matrix, constant, lower, upper)
    else:
        written = leave_out(trace, here, matrix, constant, lower, upper, missing_group)
    if trace.vanishing or empty:
        nothing = w.detach() == 0
        nothing = nothing.unsqueeze(-2) if classes is None else nothing[:, classes.columns]
        refuse_the_impossible(written, nothing)
    return written


def numbers_of(trace: Trace, device: torch.device) -> Tensor | None:
    """1 and the tensors among the parameters, with their history; ``None`` without tensors."""
    if not trace.numbers:
        return None
    one = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([one, *(t.reshape(()).to(device, torch.float64) for t in trace.numbers)])


def scales(terms: Terms, masses: Tensor, numbers: Tensor | None) -> Tensor:
    """What each term's sum is multiplied with: ``(B, m, J)``."""
    scale = terms.factor / masses[:, terms.per]
    if not terms.simple:
        scale = scale * (masses[:, terms.share] / masses[:, terms.again])
    if terms.number is not None:
        assert numbers is not None
        scale = scale * numbers[terms.number]
    return scale


def sum_of_terms(
    trace: Trace,
    scale: Tensor,
    V: Tensor,
    w: Tensor,
    masses: Tensor,
    values: Mapping[str, Tensor] | None,
) -> Tensor:
    """The coefficients of all rows: ``(B, m, C)``, term by term to spare memory."""
    terms, features = trace.linear, None
    if terms.of is not None:
        assert values is not None
        features = feature_values(trace, V, w, masses, values)
    matrix = scale.new_zeros(())
    size = scale.new_zeros(())
    for j in range(scale.shape[-1]):
        part = V.index_select(1, terms.inside[:, j])
        if features is not None and terms.of is not None:
            part = part * features.index_select(1, terms.of[:, j])
        part = scale[..., j].unsqueeze(-1) * part
        matrix = matrix + part
        size = torch.maximum(size, part.detach().abs())
    if V is trace.grid:
        return matrix
    # Chances that say the same of two groups cancel but for rounding, and a row of nothing but
    # rounding would ask for the impossible.
    value = matrix.detach()
    return matrix - torch.where(value.abs() <= ROUNDING * size, value, 0.0)  # keeps its history


def feature_values(
    trace: Trace, V: Tensor, w: Tensor, masses: Tensor, values: Mapping[str, Tensor]
) -> Tensor:
    """1 and the features by which predictions are multiplied: ``(b, T, C)``."""
    found = [torch.ones_like(V[:, 0])]
    for name, over in trace.linear_features:
        value = values[name]
        if over is not None:
            center = (V[:, over] * w * value).sum(-1) / masses[:, over]
            moved = value - center.unsqueeze(-1)
            # A constant attribute differs from its mean by rounding, and has no covariance.
            size = value.detach().abs().amax(-1, keepdim=True)
            value = torch.where(moved.detach().abs() <= ROUNDING * size, 0.0 * moved, moved)
        found.append(value)
    return torch.stack(torch.broadcast_tensors(*found), 1)


def constants(
    trace: Trace,
    terms: Terms,
    V: Tensor,
    w: Tensor,
    masses: Tensor,
    numbers: Tensor | None,
    known: Mapping[object, tuple[Tensor, ...]],
) -> Tensor:
    """The constant part of each row: ``(B, m)``."""
    kinds = [(w, w), *(known[feature] for feature in trace.constant_features)]
    sums, magnitudes = (
        torch.cat(same_batch([(V @ kind[i].unsqueeze(-1)).squeeze(-1) for kind in kinds]), 1)
        for i in (0, 1)
    )
    place = terms.inside
    if terms.of is not None:
        place = place + terms.of * V.shape[1]
    scale = scales(terms, masses, numbers)
    constant = (scale * sums[:, place]).sum(-1)
    # Equal means of targets differ by rounding; as a side that would ask for the impossible where
    # every prediction sits at a bound.
    size = (scale.detach().abs() * magnitudes.detach()[:, place]).sum(-1)
    return torch.where(constant.detach().abs() <= ROUNDING * size, 0.0 * constant, constant)


def same_batch(tensors: list[Tensor]) -> list[Tensor]:
    """Each ``(1, ...)`` or ``(B, ...)``, all expanded to one batch."""
    batch = max(map(len, tensors))
    return [tensor.expand(batch, -1) for tensor in tensors]


def leave_out(
    trace: Trace,
    here: Tensor,
    matrix: Tensor,
    constant: Tensor | None,
    lower: Tensor,
    upper: Tensor,
    missing_group: MissingGroup,
) -> Written:
    """Drop rows that mean something in no problem; make them void in problems where they do not.

    Args:
        here: ``(B, m)``, where all that a row needs is there.
    """
    batch = len(here)
    absent = []
    for name, some in zip(trace.names, here.sum(0).tolist(), strict=True):
        if some < batch:
            where = "" if some == 0 else f" (in {batch - some} of {batch} problems)"
            absent.append(f"{name}{where}")
    if missing_group == "raise":
        raise ProblemError(
            "groups: the batch lacks a group, so that these rows compare nothing: "
            f'{", ".join(absent)}; use larger or stratified batches, or missing_group="skip"'
        )
    kept = here.any(0).nonzero().squeeze(1)
    return Written(
        tuple([trace.names[i] for i in kept.tolist()]),
        kept,
        tuple([f"{name}: a group has no samples" for name in absent]),
        (matrix * here.unsqueeze(-1))[:, kept],
        None if constant is None else (constant * here)[:, kept],
        torch.where(here, lower, -math.inf)[:, kept],
        torch.where(here, upper, math.inf)[:, kept],
    )


def check_order(trace: Trace, sides: Tensor) -> None:
    """Raise unless lower <= upper for every row."""
    wrong = ~(sides[:, 0] <= sides[:, 1])
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        lower, upper = sides[first].tolist()
        raise ProblemError(
            f"row {trace.names[first]!r}: expected lower <= upper, got lower {lower}, upper {upper}"
        )


def refuse_the_impossible(written: Written, nothing: Tensor) -> None:
    """Raise if no prediction can change a row, and it does not hold as it is.

    So it is where all samples of a row have weight zero and it is no mean: a total, say.

    Args:
        nothing: where the columns of the matrix have no weight, for all rows of the trace or one
            for all.
    """
    if written.kept is not None and nothing.shape[-2] > 1:
        nothing = nothing[:, written.kept]
    zero = ((written.matrix.detach() == 0) | nothing).all(-1)
    if not bool(zero.any()):
        return
    lower, upper = written.sides
    never = (zero & ((lower > 0) | (upper < 0))).any(0).nonzero().squeeze(1).tolist()
    if never:
        raise ProblemError(
            f"rows {', '.join(repr(written.names[i]) for i in never)}: no prediction has any "
            "weight in them, and zero is outside their sides; leave them out, or give their "
            "samples weight"
        )
