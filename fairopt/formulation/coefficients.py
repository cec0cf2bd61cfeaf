"""Numbers for row templates: coefficients and sides of all rows at once, in differentiable torch.

Columns are cells, each with its mass, or samples, each with its weight. The mathematics is that of
``notions.functionals.Term``; here its letters are V for the indicators ``(b, S, C)``, which set
holds which column, and w for the masses of the columns ``(B, C)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.formulation.template import MissingGroup, Parts, RowTemplate, Terms
from fairopt.tolerances import ROUNDING_OF_SUM


@dataclass(frozen=True, eq=False)
class RowCoefficients:
    """Rows in numbers: lower <= matrix @ (w * x) + constant <= upper.

    Attributes:
        names: of the rows that are left.
        kept: their numbers in the template; ``None`` for all.
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


def assemble(
    template: RowTemplate,
    V: Tensor,
    w: Tensor,
    known: Mapping[object, tuple[Tensor, ...]],
    missing_group: MissingGroup,
    values: Mapping[str, Tensor] | None = None,
    parts: Parts | None = None,
) -> RowCoefficients:
    """All rows of a template, for a batch.

    Args:
        known: for each of ``template.constant_features`` the sums per column of w times it, and of
            w times its magnitude: ``(B, C)`` both.
        values: the continuous attributes, ``(b, C)``; needed for ``template.linear_features``.
        parts: where the columns are the parts of several partitions, each of which holds all
            samples. V is then ``parts.home``, and the matrix ``(B, m, G)``, for each row the parts
            of its own partition.

    Raises:
        ProblemError: parameters are out of range; a row compares nothing and ``missing_group`` is
            ``"raise"``; no prediction can change a row that does not hold.
    """
    if template.one_group and missing_group == "raise":
        raise ProblemError(
            "groups: expected at least two groups to compare in "
            f"{', '.join(template.one_group)}, got one; use larger or stratified batches, or "
            'missing_group="skip"'
        )
    if template.numbers:
        for constraint in template.plan.constraints:
            if constraint.tensors:
                constraint.check()  # again: the optimizer may have moved them
    numbers = numbers_of(template, w.device)
    masses = (V @ w.unsqueeze(-1)).squeeze(-1)
    masses = torch.nn.functional.pad(masses, (0, 1), value=1.0)  # the last one stands for 1
    here, empty = None, not masses.detach().min().item() > 0
    if empty:
        whole = (masses.detach()[:, template.needs] > 0).all(-1)  # (B, m)
        here = None if bool(whole.all()) else whole
        masses = torch.where(masses > 0, masses, 1.0)
    scale = scales(template.linear, masses, numbers)
    terms_grid = template.terms_grid if V is template.grid else None
    if parts is not None:
        terms_grid = parts.terms_grid
    if terms_grid is not None:
        matrix = (scale.unsqueeze(-1) * terms_grid).sum(-2)
    else:
        matrix = sum_of_terms(template, scale, V, w, masses, values)
    constant = None
    if template.constant is not None:
        constant = constants(template, template.constant, V, w, masses, numbers, known)
    sides = template.sides
    if template.side_numbers is not None:
        assert numbers is not None
        sides = sides * numbers[template.side_numbers]
        check_order(template, sides)
    lower, upper = (side.unsqueeze(0) for side in sides.unbind(-1))
    if here is None:
        rows = RowCoefficients(template.names, None, (), matrix, constant, lower, upper)
    else:
        rows = leave_out(template, here, matrix, constant, lower, upper, missing_group)
    if template.vanishing or empty:
        nothing = w.detach() == 0
        nothing = nothing.unsqueeze(-2) if parts is None else nothing[:, parts.columns]
        refuse_the_impossible(rows, nothing)
    return rows


def numbers_of(template: RowTemplate, device: torch.device) -> Tensor | None:
    """1 and the tensors among the parameters, with their history; ``None`` without tensors."""
    if not template.numbers:
        return None
    one = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([one, *(t.reshape(()).to(device, torch.float64) for t in template.numbers)])


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
    template: RowTemplate,
    scale: Tensor,
    V: Tensor,
    w: Tensor,
    masses: Tensor,
    values: Mapping[str, Tensor] | None,
) -> Tensor:
    """The coefficients of all rows: ``(B, m, C)``, term by term to spare memory."""
    terms, features = template.linear, None
    if terms.of is not None:
        assert values is not None
        features = feature_values(template, V, w, masses, values)
    matrix = scale.new_zeros(())
    size = scale.new_zeros(())
    for j in range(scale.shape[-1]):
        part = V.index_select(1, terms.inside[:, j])
        if features is not None and terms.of is not None:
            part = part * features.index_select(1, terms.of[:, j])
        part = scale[..., j].unsqueeze(-1) * part
        matrix = matrix + part
        size = torch.maximum(size, part.detach().abs())
    if V is template.grid:
        return matrix
    # Chances that say the same of two groups cancel but for rounding, and a row of nothing but
    # rounding would ask for the impossible.
    value = matrix.detach()
    return matrix - torch.where(
        value.abs() <= ROUNDING_OF_SUM * size, value, 0.0
    )  # keeps its history


def feature_values(
    template: RowTemplate, V: Tensor, w: Tensor, masses: Tensor, values: Mapping[str, Tensor]
) -> Tensor:
    """1 and the features by which predictions are multiplied: ``(b, T, C)``."""
    found = [torch.ones_like(V[:, 0])]
    for name, over in template.linear_features:
        value = values[name]
        if over is not None:
            center = (V[:, over] * w * value).sum(-1) / masses[:, over]
            moved = value - center.unsqueeze(-1)
            # A constant attribute differs from its mean by rounding, and has no covariance.
            size = value.detach().abs().amax(-1, keepdim=True)
            value = torch.where(moved.detach().abs() <= ROUNDING_OF_SUM * size, 0.0 * moved, moved)
        found.append(value)
    return torch.stack(torch.broadcast_tensors(*found), 1)


def constants(
    template: RowTemplate,
    terms: Terms,
    V: Tensor,
    w: Tensor,
    masses: Tensor,
    numbers: Tensor | None,
    known: Mapping[object, tuple[Tensor, ...]],
) -> Tensor:
    """The constant part of each row: ``(B, m)``."""
    kinds = [(w, w), *(known[feature] for feature in template.constant_features)]
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
    return torch.where(constant.detach().abs() <= ROUNDING_OF_SUM * size, 0.0 * constant, constant)


def same_batch(tensors: list[Tensor]) -> list[Tensor]:
    """Each ``(1, ...)`` or ``(B, ...)``, all expanded to one batch."""
    batch = max(map(len, tensors))
    return [tensor.expand(batch, -1) for tensor in tensors]


def leave_out(
    template: RowTemplate,
    here: Tensor,
    matrix: Tensor,
    constant: Tensor | None,
    lower: Tensor,
    upper: Tensor,
    missing_group: MissingGroup,
) -> RowCoefficients:
    """Drop rows that mean something in no problem; make them void in problems where they do not.

    Args:
        here: ``(B, m)``, where all that a row needs is there.
    """
    batch = len(here)
    absent = []
    for name, some in zip(template.names, here.sum(0).tolist(), strict=True):
        if some < batch:
            where = "" if some == 0 else f" (in {batch - some} of {batch} problems)"
            absent.append(f"{name}{where}")
    if missing_group == "raise":
        raise ProblemError(
            "groups: the batch lacks a group, so that these rows compare nothing: "
            f'{", ".join(absent)}; use larger or stratified batches, or missing_group="skip"'
        )
    kept = here.any(0).nonzero().squeeze(1)
    return RowCoefficients(
        tuple([template.names[i] for i in kept.tolist()]),
        kept,
        tuple([f"{name}: a group has no samples" for name in absent]),
        (matrix * here.unsqueeze(-1))[:, kept],
        None if constant is None else (constant * here)[:, kept],
        torch.where(here, lower, -math.inf)[:, kept],
        torch.where(here, upper, math.inf)[:, kept],
    )


def check_order(template: RowTemplate, sides: Tensor) -> None:
    """Raise unless lower <= upper for every row."""
    wrong = ~(sides[:, 0] <= sides[:, 1])
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        lower, upper = sides[first].tolist()
        raise ProblemError(
            f"row {template.names[first]!r}: expected lower <= upper, got lower {lower}, upper "
            f"{upper}"
        )


def refuse_the_impossible(rows: RowCoefficients, nothing: Tensor) -> None:
    """Raise if no prediction can change a row, and it does not hold as it is.

    So it is where all samples of a row have weight zero and it is no mean: a total, say.

    Args:
        nothing: where the columns of the matrix have no weight, for all rows of the template or one
            for all.
    """
    if rows.kept is not None and nothing.shape[-2] > 1:
        nothing = nothing[:, rows.kept]
    zero = ((rows.matrix.detach() == 0) | nothing).all(-1)
    if not bool(zero.any()):
        return
    lower, upper = rows.sides
    never = (zero & ((lower > 0) | (upper < 0))).any(0).nonzero().squeeze(1).tolist()
    if never:
        raise ProblemError(
            f"rows {', '.join(repr(rows.names[i]) for i in never)}: no prediction has any "
            "weight in them, and zero is outside their sides; leave them out, or give their "
            "samples weight"
        )
