"""Parity notions: one formula, and a choice of event.

Every notion here bounds differences of weighted means over groups,

    | (mean of x over left) - (mean of x over right) - shift |  <=  tolerance,

where *left* and *right* are sets of samples of one event (everyone, the positives, the
negatives) and the shift is zero, or the same difference of the targets. Which sets are compared is
``compare``; a notion is its event and its shift.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations, product
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fairopt.errors import ProblemError

__all__ = [
    "Comparison",
    "Constraint",
    "DemographicParity",
    "EqualOpportunity",
    "EqualizedOdds",
    "MeanResidual",
    "PredictiveEquality",
]

Compare = Literal["pairwise", "overall", "reference"]


@dataclass(frozen=True, eq=False)
class Constraint:
    """A bound on differences of group means; the base of all parity notions.

    A subclass names its event and its shift:

    Attributes of the class:
        events: for each event one set of rows: ``None`` is everyone, 0 and 1 the samples
            with that target.
        residual: whether the targets' own difference is taken off (means of residuals).

    Args:
        tolerance: at least 0; a number, or a tensor with one element, which may require grad.
            Infinite leaves the rows without effect. Required: there is no fair default.
        on: the attribute compared: a name; a tuple of names for their intersections; ``None`` for
            each attribute there is, one at a time (marginally).
        compare: ``"pairwise"``, all pairs of groups; ``"overall"``, each group against everyone in
            the event; ``"reference"``, each group against one of them.
        reference: the code of the reference group, for ``compare="reference"``; a tuple of codes
            for an intersection.

    Raises:
        ProblemError: an argument is outside what is said above.
    """

    tolerance: float | Tensor
    on: str | tuple[str, ...] | None = None
    compare: Compare = "pairwise"
    reference: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    events: ClassVar[tuple[int | None, ...]] = (None,)
    residual: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.tolerance, Tensor):
            if self.tolerance.numel() != 1 or not self.tolerance.is_floating_point():
                raise ProblemError(
                    f"{name}: tolerance: expected a number or a floating-point tensor with one "
                    f"element, got {self.tolerance.dtype} of shape {tuple(self.tolerance.shape)}"
                )
        elif isinstance(self.tolerance, bool) or not isinstance(self.tolerance, (int, float)):
            raise ProblemError(
                f"{name}: tolerance: expected a number, got {type(self.tolerance).__name__}"
            )
        self.check_tolerance()
        names = self.on if isinstance(self.on, tuple) else (self.on,)
        if self.on is not None and (
            not names or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names)
        ):
            raise ProblemError(
                f"{name}: on: expected the name of an attribute, a tuple of different names, or "
                f"None for each attribute, got {self.on!r}"
            )
        if self.compare not in ("pairwise", "overall", "reference"):
            raise ProblemError(
                f"{name}: compare: expected 'pairwise', 'overall' or 'reference', got "
                f"{self.compare!r}"
            )
        if (self.compare == "reference") != (self.reference is not None):
            raise ProblemError(
                f"{name}: reference: give the code of the reference group with "
                f"compare='reference', and only then; got compare={self.compare!r}, "
                f"reference={self.reference!r}"
            )
        codes = self.reference if isinstance(self.reference, tuple) else (self.reference,)
        if self.reference is not None and not all(isinstance(code, int) for code in codes):
            raise ProblemError(
                f"{name}: reference: expected the integer code of a group, or a tuple of codes for "
                f"an intersection, got {self.reference!r}"
            )

    def check_tolerance(self) -> None:
        """Raise unless the tolerance is a number of at least 0; a tensor's value may change."""
        tolerance = self.tolerance
        value = float(tolerance.detach() if isinstance(tolerance, Tensor) else tolerance)
        if math.isnan(value) or value < 0:
            raise ProblemError(
                f"{type(self).__name__}: tolerance: expected a number of at least 0, got {value}; "
                "it bounds an absolute difference; clamp one that is trained"
            )

    @property
    def needs_targets(self) -> bool:
        """Whether the rows depend on targets."""
        return self.residual or self.needs_outcome

    @property
    def needs_outcome(self) -> bool:
        """Whether the rows depend on binary targets."""
        return any(event is not None for event in self.events)


class DemographicParity(Constraint):
    """Equal means: |E[x | group a] - E[x | group b]| <= tolerance.

    Also: statistical parity, independence (in expectation), disparate-impact gap. For scores that
    are probabilities this is the expected rate of positive decisions. Source: Dwork et al.,
    "Fairness through awareness", ITCS 2012; Agarwal et al., ICML 2018, section 2.
    """


class EqualOpportunity(Constraint):
    """Equal means among positives: |E[x | a, y = 1] - E[x | b, y = 1]| <= tolerance.

    Also: true-positive-rate parity (expected rates). Needs binary targets. Source: Hardt, Price,
    Srebro, "Equality of opportunity in supervised learning", NeurIPS 2016, definition 2.2.
    """

    events = (1,)


class PredictiveEquality(Constraint):
    """Equal means among negatives: |E[x | a, y = 0] - E[x | b, y = 0]| <= tolerance.

    Also: false-positive-rate parity (expected rates). Needs binary targets. Source:
    Corbett-Davies et al., "Algorithmic decision making and the cost of fairness", KDD 2017.
    """

    events = (0,)


class EqualizedOdds(Constraint):
    """Equal means among positives and among negatives: EqualOpportunity and PredictiveEquality.

    Also: separation (in expectation). Needs binary targets. Source: Hardt, Price, Srebro, NeurIPS
    2016, definition 2.1.
    """

    events = (0, 1)


class MeanResidual(Constraint):
    """Equal mean residuals: |E[y - x | a] - E[y - x | b]| <= tolerance.

    For regression; also: bias parity, balance of the mean error. Needs targets, any real numbers.
    Source: Calders et al., "Controlling attribute effect in linear regression", ICDM 2013; Troxell,
    Montufar, Roemer, ICML 2026.
    """

    residual = True


# ---------------------------------------------------------------------------------------------
# From notions to sets of cells
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """One dimension of the cells: an attribute, or the outcome (targets 0 and 1)."""

    name: str
    labels: tuple[str, ...]
    codes: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """What of a constraint decides its rows, apart from the tolerance: a key for the cache."""

    events: tuple[int | None, ...]
    residual: bool
    attributes: tuple[tuple[str, ...], ...]  # one tuple of names per family of rows
    compare: str
    reference: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """All rows of a list of constraints, as sets of cells.

    Attributes:
        sets: ``(3 m, K)``, float64, 0 or 1: the cells on the left of each row, those on the right,
            and those on the right only.
        signed: ``(2, m, K)``, the cells on the left only, and minus those on the right only.
        both: ``(m, K)``, the cells on both sides.
        nested: whether any left is part of its right ("overall").
        names: m readable names.
        owner: int64 ``(m,)``, the constraint that each row comes from.
        residual: float64 ``(m,)``, 1 where the row's shift is that of the targets.
        shifted: whether any row is.
        alone: what has no rows because there is one group only.
    """

    sets: Tensor
    signed: Tensor
    both: Tensor
    nested: bool
    names: tuple[str, ...]
    owner: Tensor
    residual: Tensor
    shifted: bool
    alone: tuple[str, ...]


@lru_cache(maxsize=256)
def plan(
    constraints: tuple[Constraint, ...], attributes: tuple[str, ...]
) -> tuple[tuple[Recipe, ...], tuple[str, ...]]:
    """The recipes of all constraints, and the attributes that they use."""
    recipes = tuple(recipe(constraint, attributes) for constraint in constraints)
    used = {name for made in recipes for family in made.attributes for name in family}
    return recipes, tuple(name for name in attributes if name in used)


@lru_cache(maxsize=256)
def attribute_axis(name: str, values: tuple[int, ...]) -> Axis:
    """The axis of an attribute with these codes."""
    return Axis(name, tuple(map(str, values)), values)


OUTCOME = Axis("y", ("0", "1"), (0, 1))


def recipe(constraint: Constraint, attributes: tuple[str, ...]) -> Recipe:
    """The recipe of a constraint, given the names of the attributes at hand.

    Raises:
        ProblemError: an attribute is missing, or the reference does not fit it.
    """
    name = type(constraint).__name__
    on = constraint.on
    families = (
        tuple((a,) for a in attributes) if on is None else ((on,) if isinstance(on, str) else on,)
    )
    for family in families:
        missing = [a for a in family if a not in attributes]
        if missing or not family:
            raise ProblemError(
                f"{name}: on={on!r}: expected attributes among {', '.join(map(repr, attributes))}"
                f"; groups has no {', '.join(map(repr, missing))}. Pass groups as a mapping of "
                "attribute name to tensor"
            )
    reference = constraint.reference
    if reference is not None:
        reference = reference if isinstance(reference, tuple) else (reference,)
        for family in families:
            if len(reference) != len(family):
                raise ProblemError(
                    f"{name}: reference: expected {len(family)} code(s) for "
                    f"{' x '.join(family)}, got {len(reference)}"
                )
    return Recipe(
        constraint.events,
        constraint.residual,
        families,
        constraint.compare,
        tuple(int(code) for code in reference) if reference is not None else None,
    )


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept serves training, too
def comparison(
    recipes: tuple[Recipe, ...], axes: tuple[Axis, ...], outcome: int | None, device: torch.device
) -> Comparison:
    """Rows of all recipes over the cells, which are the product of the axes in row-major order.

    Args:
        outcome: the axis of the targets' values, if there is one.
    """
    K = math.prod(len(axis.codes) for axis in axes)
    grid = torch.arange(K).view([len(axis.codes) for axis in axes])
    position = {axis.name: i for i, axis in enumerate(axes) if i != outcome}
    left: list[Tensor] = []
    right: list[Tensor] = []
    names: list[str] = []
    owner: list[int] = []
    residual: list[bool] = []
    alone: list[str] = []
    for number, made in enumerate(recipes):
        for family, event in product(made.attributes, made.events):
            members: dict[tuple[int, ...], Tensor] = {}
            labels: dict[tuple[int, ...], str] = {}
            everyone = torch.zeros(K, dtype=torch.float64)
            where = [slice(None)] * len(axes)
            if event is not None:
                assert outcome is not None
                where[outcome] = slice(event, event + 1)
            everyone[grid[tuple(where)].flatten()] = 1.0
            places = [position[a] for a in family]
            for values in product(*(range(len(axes[p].codes)) for p in places)):
                inside = list(where)
                for p, value in zip(places, values, strict=True):
                    inside[p] = slice(value, value + 1)
                code = tuple(axes[p].codes[v] for p, v in zip(places, values, strict=True))
                member = torch.zeros(K, dtype=torch.float64)
                member[grid[tuple(inside)].flatten()] = 1.0
                members[code] = member
                words = [axes[p].labels[v] for p, v in zip(places, values, strict=True)]
                labels[code] = words[0] if len(words) == 1 else f"({', '.join(words)})"
            prefix = " x ".join(family)
            suffix = "" if event is None else f" | y = {event}"
            suffix += " | residual" if made.residual else ""
            pairs: list[tuple[Tensor, Tensor, str]] = []
            if made.compare == "overall":
                pairs = [(members[a], everyone, f"{labels[a]} vs all") for a in members]
            elif made.compare == "pairwise":
                pairs = [
                    (members[a], members[b], f"{labels[a]} vs {labels[b]}")
                    for a, b in combinations(members, 2)
                ]
            elif made.reference is not None:
                base = made.reference
                # Without samples its rows are left out below, and named.
                samples = members.get(base, torch.zeros(K, dtype=torch.float64))
                label = ", ".join(map(str, base))
                label = label if len(base) == 1 else f"({label})"
                pairs = [
                    (members[a], samples, f"{labels[a]} vs {label}") for a in members if a != base
                ]
            if len(members) == 1 and not (pairs and made.compare == "reference"):
                pairs = []
                alone.append(f"{prefix}{suffix}")
            for a, b, words_ in pairs:
                left.append(a)
                right.append(b)
                names.append(f"{prefix}: {words_}{suffix}")
                owner.append(number)
                residual.append(made.residual)
    empty = torch.zeros(0, K, dtype=torch.float64)
    lefts = torch.stack(left) if left else empty
    rights = torch.stack(right) if right else empty
    both = lefts * rights
    return Comparison(
        torch.cat([lefts, rights, rights - both]).to(device),
        torch.stack([lefts - both, both - rights]).to(device),
        both.to(device),
        bool(both.any()),
        tuple(names),
        torch.tensor(owner, dtype=torch.int64).to(device),
        torch.tensor(residual, dtype=torch.float64).to(device),
        any(residual),
        tuple(dict.fromkeys(alone)),
    )
