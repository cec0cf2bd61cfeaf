"""What parity notions are written in: samples, affine functionals of the predictions, and rows.

Nothing here holds data. A notion says once, in symbols, which means of which samples it bounds;
``formulation.template`` keeps that, and ``formulation.coefficients`` puts numbers in, for all rows
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations, pairwise, permutations, product
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fairopt.errors import ProblemError

Compare = Literal["pairwise", "overall", "reference"]
Key = tuple[str, Any]

TARGET = object()  # in the place of an attribute's name: the targets


class Axis(NamedTuple):
    """One dimension of the cells: an attribute, the outcome (targets 0 and 1), bins of scores."""

    key: Key
    labels: tuple[str, ...]
    codes: tuple[int, ...]


@lru_cache(maxsize=256)
def attribute_axis(name: str, values: tuple[int, ...]) -> Axis:
    """The axis of an attribute with these codes."""
    return Axis(("attribute", name), tuple(map(str, values)), values)


@lru_cache(maxsize=64)
def score_axis(edges: tuple[float, ...]) -> Axis:
    """The axis of the bins between these edges, the first and the last one without end."""
    inner = [f"{a:g} <= score < {b:g}" for a, b in pairwise(edges)]
    labels = (f"score < {edges[0]:g}", *inner, f"score >= {edges[-1]:g}")
    return Axis(("score", edges), labels, tuple(range(len(labels))))


OUTCOME = Axis(("outcome", None), ("y = 0", "y = 1"), (0, 1))


class Condition(NamedTuple):
    """Having one value: the position among the axis's codes, or -1 for a code that nobody has."""

    axis: Key
    position: int


class Members(NamedTuple):
    """Who meets all conditions; where ``less`` is not empty, without those who meet all of that."""

    conditions: frozenset[Condition]
    less: frozenset[Condition] = frozenset()


EVERYONE = Members(frozenset())


class Scaled(NamedTuple):
    """A number: a factor times, if there is one, a tensor of one element."""

    factor: float
    tensor: Tensor | None = None


def scaled(value: object, what: str) -> Scaled:
    """A number or a tensor with one element as ``Scaled``."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        return Scaled(1.0, value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Scaled(float(value))
    got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
    raise ProblemError(
        f"{what}: expected a number or a floating-point tensor with one element, got {got!r}"
    )


class Term(NamedTuple):
    """A sum over samples, as one part of a functional.

    factor * tensor * mass(share) / (mass(per) * mass(again)) * sum of w_i * v_i over ``inside``,

    where v is the prediction times the attribute ``of`` (linear terms) or the attribute or target
    alone (constant terms), and whatever is ``None`` is 1. ``centred`` takes the attribute's mean
    over ``inside`` off first.
    """

    inside: Members
    per: Members | None
    factor: float = 1.0
    tensor: Tensor | None = None
    of: Any = None
    centred: bool = False
    share: Members | None = None
    again: Members | None = None

    @property
    def masses(self) -> tuple[Members, ...]:
        """The sets whose mass enters: none of them may be empty."""
        return tuple([s for s in (self.share, self.per, self.again) if s is not None])

    def times(self, by: Scaled) -> Term:
        tensor = self.tensor
        if by.tensor is not None:
            tensor = by.tensor if tensor is None else tensor * by.tensor
        return self._replace(factor=self.factor * by.factor, tensor=tensor)


@dataclass(frozen=True, eq=False)
class Functional:
    """An affine functional of the predictions: a sum of weighted sums over samples.

    Add and subtract functionals and numbers, multiply and divide by numbers. A number is a float or
    a tensor with one element, which may require grad.

    Attributes:
        linear: the terms with predictions.
        constant: the terms without. A number is that number of times everyone's share of everyone.
    """

    linear: tuple[Term, ...] = ()
    constant: tuple[Term, ...] = ()

    def __add__(self, other: object) -> Functional:
        if not isinstance(other, Functional):
            number = Term(EVERYONE, EVERYONE).times(scaled(other, "what is added"))
            return Functional(self.linear, (*self.constant, number))
        return Functional(self.linear + other.linear, self.constant + other.constant)

    __radd__ = __add__

    def __mul__(self, by: object) -> Functional:
        if isinstance(by, Functional):
            raise ProblemError(
                "functional: expected a number to multiply with, got another functional; a product "
                "of two is not affine in the predictions"
            )
        number = scaled(by, "what is multiplied with")
        return Functional(
            tuple([term.times(number) for term in self.linear]),
            tuple([term.times(number) for term in self.constant]),
        )

    __rmul__ = __mul__

    def __neg__(self) -> Functional:
        return self * -1.0

    def __sub__(self, other: Any) -> Functional:
        negative: Functional | float | Tensor = other * -1.0
        return self + negative

    def __rsub__(self, other: object) -> Functional:
        return self * -1.0 + other

    def __truediv__(self, by: Any) -> Functional:
        if isinstance(by, Functional):
            raise ProblemError(
                "functional: expected a number to divide by, got another functional; a ratio of "
                "two is not affine in the predictions: bound a.mean() - ratio * b.mean() instead"
            )
        inverse: float | Tensor = 1.0 / by
        return self * inverse


@dataclass(frozen=True)
class Samples:
    """Some of the samples: a group, an event, a stratum, or what several of them have in common.

    With weights every sample counts by its weight w. With soft groups or soft targets it counts by
    w times its chance p of belonging (chances of different attributes, and of the target, are
    multiplied). ``mass`` is the sum of these.

    Attributes:
        label: what it is among its like, such as ``"0"``.
        name: what it is in full, such as ``"sex: 0 | y = 1"``.
    """

    label: str
    name: str
    conditions: frozenset[Condition] = field(default=frozenset(), repr=False)

    def __and__(self, other: Samples) -> Samples:
        """The samples in both."""
        name = " | ".join(filter(None, (self.name, other.name)))
        return Samples(self.label, name, self.conditions | other.conditions)

    @property
    def members(self) -> Members:
        return Members(self.conditions)

    def mean(self, *, times: str | None = None, per: Samples | None = None) -> Functional:
        """sum_i w_i p_i x_i / mass: the mean prediction.

        Args:
            times: the name of a continuous attribute v in ``groups``: the mean of v_i x_i.
            per: divide by the mass of these samples instead.
        """
        over = self.members if per is None else per.members
        return Functional((Term(self.members, over, of=times),))

    def sum(self, *, times: str | None = None) -> Functional:
        """sum_i w_i p_i x_i, or of v_i x_i for a continuous attribute v."""
        return Functional((Term(self.members, None, of=times),))

    def covariance(self, attribute: str) -> Functional:
        """sum_i w_i p_i (v_i - mean of v) x_i / mass, for a continuous attribute v."""
        return Functional((Term(self.members, self.members, of=attribute, centred=True),))

    def mean_target(self) -> Functional:
        """sum_i w_i p_i y_i / mass: a constant."""
        return Functional(constant=(Term(self.members, self.members, of=TARGET),))

    def mean_residual(self) -> Functional:
        """The mean of x - y."""
        return self.mean() - self.mean_target()

    def mean_of(self, attribute: str) -> Functional:
        """The mean of a continuous attribute: a constant."""
        return Functional(constant=(Term(self.members, self.members, of=attribute),))

    def share(self, per: Samples) -> Functional:
        """mass / mass of ``per``: a constant."""
        return Functional(constant=(Term(self.members, per.members),))


class Row:
    """lower <= value <= upper, by name.

    Args:
        name: what errors and reports call it.
        value: an affine functional of the predictions.
        lower, upper: numbers, or tensors with one element; infinite for none.
    """

    __slots__ = ("lower", "name", "upper", "value")

    def __init__(
        self,
        name: str,
        value: Functional,
        lower: float | Tensor = -math.inf,
        upper: float | Tensor = math.inf,
    ) -> None:
        if not isinstance(value, Functional) or not value.linear:
            got = "a constant" if isinstance(value, Functional) else repr(value)
            raise ProblemError(
                f"row {name!r}: expected a functional of the predictions, made of such as "
                f"samples.mean(), got {got}"
            )
        self.name = name
        self.value = value
        self.lower = scaled(lower, f"row {name!r}: lower")
        self.upper = scaled(upper, f"row {name!r}: upper")

    @classmethod
    def within(cls, name: str, value: Functional, tolerance: float | Tensor) -> Row:
        """-tolerance <= value <= tolerance."""
        row = cls(name, value, upper=tolerance)
        row.lower = Scaled(-row.upper.factor, row.upper.tensor)
        return row


# ---------------------------------------------------------------------------------------------
# The batch, as a notion sees it
# ---------------------------------------------------------------------------------------------


class Batch:
    """The samples of a call, without their values: what ``Constraint.rows`` builds rows from.

    Attributes:
        attributes: names of the attributes in ``groups`` that hold group codes or soft groups.
        continuous: names of those that hold real numbers.
        everyone: all samples.
    """

    everyone = Samples("all", "")

    def __init__(
        self,
        notion: str,
        attributes: tuple[str, ...],
        continuous: tuple[str, ...],
        axes: Mapping[Key, Axis] | None,
    ) -> None:
        self.notion = notion
        self.attributes = attributes
        self.continuous = continuous
        self.axes = axes
        self.keys: dict[Key, None] = {}  # the axes that were asked for
        self.one_group: list[str] = []
        self.factors: tuple[str, ...] = ()

    @property
    def positives(self) -> Samples:
        """The samples with y = 1; where targets are chances, every sample by its own."""
        return self.event(1)

    @property
    def negatives(self) -> Samples:
        """The samples with y = 0; where targets are chances, every sample by one minus its own."""
        return self.event(0)

    def event(self, outcome: int) -> Samples:
        """The samples with this target."""
        return self.values(OUTCOME.key)[outcome]

    def groups(self, on: str | tuple[str, ...] | None, *within: Samples) -> list[Samples]:
        """The groups of an attribute; of an intersection; of each attribute, one after another.

        Args:
            on: a name; a tuple of names for their intersections; ``None`` for each attribute.
            within: events or strata; each gives all groups once more, within it.
        """
        return [
            samples
            for family in self.families(on)
            for part in within or (self.everyone,)
            for _, samples in self.family(family, part)
        ]

    def pairs(
        self,
        on: str | tuple[str, ...] | None,
        *within: Samples,
        compare: Compare = "pairwise",
        reference: int | tuple[int, ...] | None = None,
        ordered: bool = False,
        label: str = "",
    ) -> Iterator[tuple[str, Samples, Samples]]:
        """Pairs of groups to compare, each with the name of its row.

        Args:
            on, within: as for ``groups``.
            compare: ``"pairwise"``, all pairs of groups; ``"overall"``, each group and everyone in
                the event; ``"reference"``, each group and one of them.
            reference: the code of that group, one per attribute of an intersection.
            ordered: with ``"pairwise"``, each pair in both orders.
            label: put behind the names.
        """
        base = reference if isinstance(reference, tuple) or reference is None else (reference,)
        for family in self.families(on):
            if base is not None and len(base) != len(family):
                raise ProblemError(
                    f"{self.notion}: reference: expected {len(family)} code(s) for "
                    f"{' x '.join(family)}, got {len(base)}"
                )
            for part in within or (self.everyone,):
                prefix = " x ".join(family)
                suffix = "".join(f" | {word}" for word in (part.name, label) if word)
                groups = self.family(family, part)
                if compare == "overall":
                    pairs = [(group, part, "all") for _, group in groups]
                elif compare == "pairwise":
                    chosen = permutations(groups, 2) if ordered else combinations(groups, 2)
                    pairs = [(a, b, b.label) for (_, a), (_, b) in chosen]
                else:
                    assert base is not None
                    other = self.group(family, part, base)
                    pairs = [(a, other, other.label) for code, a in groups if code != base]
                if len(groups) == 1 and not (pairs and compare == "reference"):
                    self.one_group.append(f"{prefix}{suffix}")
                    continue
                for a, b, word in pairs:
                    yield f"{prefix}: {a.label} vs {word}{suffix}", a, b

    def strata(self, given: str | tuple[str, ...]) -> list[Samples]:
        """The strata of a factor, or of the combinations of several.

        What makes strata is not among "each attribute" when groups are asked for afterwards.
        """
        (family,) = self.families(given)
        self.factors += family
        return [
            Samples(s.label, f"{' x '.join(family)} = {s.label}", s.conditions)
            for _, s in self.family(family, self.everyone)
        ]

    def score_bins(self, edges: tuple[float, ...]) -> list[Samples]:
        """The samples by their scores, in bins between increasing edges; the ends are open.

        The scores are what the layer is given, without history: which bin a sample is in has no
        derivative.
        """
        return self.values(score_axis(edges).key)

    # -----------------------------------------------------------------------------------------

    def families(self, on: str | tuple[str, ...] | None) -> tuple[tuple[str, ...], ...]:
        """The attributes of each family of groups, known to exist."""
        if on is None:
            if not self.attributes and self.continuous:
                raise ProblemError(
                    f"{self.notion}: on=None: expected at least one attribute with group codes, "
                    f"got continuous ones only: {', '.join(map(repr, self.continuous))}"
                )
            return tuple((name,) for name in self.attributes if name not in self.factors)
        family = on if isinstance(on, tuple) else (on,)
        missing = [name for name in family if name not in self.attributes]
        if missing and missing[0] in self.continuous:
            raise ProblemError(
                f"{self.notion}: {missing[0]!r}: expected integer or bool codes of groups, got "
                "real numbers; convert categories with .long(), or bound their Covariance"
            )
        if missing or not family:
            raise ProblemError(
                f"{self.notion}: on={on!r}: expected attributes among "
                f"{', '.join(map(repr, self.attributes))}; groups has no "
                f"{', '.join(map(repr, missing))}. Pass groups as a mapping of attribute name to "
                "tensor"
            )
        return (family,)

    def axis(self, key: Key) -> Axis:
        """The axis; before the data are known, one with two values."""
        self.keys[key] = None
        if key == OUTCOME.key:
            return OUTCOME
        if key[0] == "score":
            return score_axis(key[1])
        if self.axes is None:
            return attribute_axis(key[1], (0, 1))
        return self.axes[key]

    def values(self, key: Key) -> list[Samples]:
        """The samples with each value of an axis."""
        return [
            Samples(label, label, frozenset([Condition(key, position)]))
            for position, label in enumerate(self.axis(key).labels)
        ]

    def family(
        self, family: tuple[str, ...], part: Samples
    ) -> list[tuple[tuple[int, ...], Samples]]:
        """All groups of a family within ``part``, with their codes."""
        axes = [self.axis(("attribute", name)) for name in family]
        return [
            (codes, self.group(family, part, codes)) for codes in product(*(a.codes for a in axes))
        ]

    def group(self, family: tuple[str, ...], part: Samples, code: tuple[int, ...]) -> Samples:
        """The group with this code; a code that nobody has makes a group without samples."""
        words, conditions = [], set(part.conditions)
        for attribute, value in zip(family, code, strict=True):
            axis = self.axis(("attribute", attribute))
            position = axis.codes.index(value) if value in axis.codes else -1
            words.append(axis.labels[position] if position >= 0 else str(value))
            conditions.add(Condition(axis.key, position))
        label = words[0] if len(words) == 1 else f"({', '.join(words)})"
        name = f"{' x '.join(family)}: {label}" + (f" | {part.name}" if part.name else "")
        return Samples(label, name, frozenset(conditions))
