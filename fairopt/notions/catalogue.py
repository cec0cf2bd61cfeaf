"""Parity notions: each names the functionals of the predictions that it bounds.

A notion is a frozen dataclass with one method, ``rows``, which builds named rows from means over
groups, events and strata. Most compare one value between groups: they derive from ``Parity`` and
say only which value, and within which events.

In the formulas, E is the mean over samples, with weights where there are any; x are predictions, y
targets, a and b groups. Where groups or targets are soft, each sample counts by its chance.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.notions.functionals import Batch, Compare, Functional, Row, Samples

Number: TypeAlias = float | Tensor
Limits: TypeAlias = Number | tuple[Number | None, Number | None]

LARGEST = sys.float_info.max


@dataclass(frozen=True, eq=False)
class Constraint:
    """Bounds on affine functionals of the predictions; the base of all notions.

    A notion of your own is a frozen dataclass (``@dataclass(frozen=True, eq=False)``) that derives
    from this, or from ``Parity``, and defines ``rows``. Its parameters are fields: numbers, names,
    or tensors with one element, which may require grad. Two notions are equal if they are of one
    class and have the same parameters; tensors are the same only if they are one object.

    Attributes of the class:
        nonnegative: whether it means something for predictions of at least 0 only; the layer then
            insists on a lower bound that says so.
    """

    nonnegative: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.check()

    def rows(self, batch: Batch) -> Iterable[Row]:
        """The rows, in symbols.

        Called when a layer meets groups that it has not met before, not on each call. So it must
        depend on ``batch`` and the fields only, and never on the value of a tensor.
        """
        raise NotImplementedError(f"{type(self).__name__}: define rows(self, batch)")

    def check(self) -> None:
        """Raise ``ProblemError`` unless the parameters are in range.

        Called when the notion is made; and again on each call where a parameter is a tensor, for
        training may have moved it.
        """

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters that are tensors."""
        values = [getattr(self, each.name) for each in fields(self)]
        flat = [part for v in values for part in (v if isinstance(v, tuple) else (v,))]
        return tuple([value for value in flat if isinstance(value, Tensor)])

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Constraint) and identity(self) == identity(other)
        )

    def __hash__(self) -> int:
        found: int | None = self.__dict__.get("_hash")  # layers ask on every call
        if found is None:
            found = hash(identity(self))
            self.__dict__["_hash"] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}


def identity(notion: Constraint) -> tuple[object, ...]:
    """What makes two notions equal."""

    def key(value: object) -> object:
        if isinstance(value, (tuple, list)):
            return tuple([key(part) for part in value])
        return ("tensor", id(value)) if isinstance(value, Tensor) else (type(value), value)

    return (type(notion), *(key(getattr(notion, each.name)) for each in fields(notion)))


def check_number(
    notion: Constraint,
    name: str,
    value: object,
    expected: str = "a number of at least 0",
    reason: str = "",
    *,
    least: float = 0.0,
    most: float = math.inf,
) -> float:
    """The value of a parameter, in a range; a tensor's value may change later.

    Raises:
        ProblemError: it is no number, or outside ``least`` to ``most``; the message says what was
            ``expected``, and the ``reason``.
    """
    owner = type(notion).__name__
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ProblemError(
                f"{owner}: {name}: expected a number or a floating-point tensor with one element, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ProblemError(f"{owner}: {name}: expected a number, got {type(value).__name__}")
    number = float(value.detach() if isinstance(value, Tensor) else value)
    if not least <= number <= most:
        raise ProblemError(f"{owner}: {name}: expected {expected}, got {number}{reason}")
    return number


def check_tolerance(notion: Constraint, value: object) -> None:
    """Raise unless a tolerance is a number of at least 0."""
    reason = "; it bounds an absolute difference; clamp one that is trained"
    check_number(notion, "tolerance", value, reason=reason)


def check_on(notion: Constraint, name: str, on: object) -> None:
    """Raise unless ``on`` is a name, a tuple of different names, or ``None``."""
    names = on if isinstance(on, tuple) else (on,)
    if on is not None and (
        not names or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names)
    ):
        raise ProblemError(
            f"{type(notion).__name__}: {name}: expected the name of an attribute, a tuple of "
            f"different names, or None for each attribute, got {on!r}"
        )


def check_given(notion: Constraint, given: object) -> None:
    """Raise unless ``given`` is a name or a tuple of different names."""
    if given is None:
        raise ProblemError(
            f"{type(notion).__name__}: given: expected the name of the factor within which groups "
            "are compared, or a tuple of names, got None"
        )
    check_on(notion, "given", given)


# ---------------------------------------------------------------------------------------------
# One value, compared between groups
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Parity(Constraint):
    """One value, nearly equal for all groups: |value(group a) - value(group b)| <= tolerance.

    A subclass says which ``value``, by default the mean prediction, and within which ``events`` the
    groups are compared, by default everyone.

    Args:
        tolerance: at least 0; a number, or a tensor with one element, which may require grad.
            Infinite leaves the rows without effect. Required: there is no fair default.
        on: the attribute compared: a name; a tuple of names for their intersections; ``None`` for
            each attribute there is, one at a time (marginally).
        compare: ``"pairwise"``, all pairs of groups; ``"overall"``, each group against everyone in
            the event; ``"reference"``, each group against one of them.
        reference: the code of the reference group, for ``compare="reference"``; a tuple of codes
            for an intersection.

    Attributes of the class:
        label: put behind the names of the rows, where the value is not the mean prediction.

    Raises:
        ProblemError: an argument is outside what is said above.
    """

    tolerance: Number
    on: str | tuple[str, ...] | None = None
    compare: Compare = "pairwise"
    reference: int | tuple[int, ...] | None = field(default=None, kw_only=True)

    label: ClassVar[str] = ""

    def events(self, batch: Batch) -> Sequence[Samples]:
        """Within which samples the groups are compared, one set of rows for each."""
        return (batch.everyone,)

    def value(self, samples: Samples) -> Functional:
        """What is compared."""
        return samples.mean()

    def rows(self, batch: Batch) -> Iterator[Row]:
        for name, a, b in batch.pairs(
            self.on,
            *self.events(batch),
            compare=self.compare,
            reference=self.reference,
            label=self.label,
        ):
            yield Row.within(name, self.value(a) - self.value(b), self.tolerance)

    def check(self) -> None:
        check_tolerance(self, self.tolerance)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_on(self, "on", self.on)
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


class DemographicParity(Parity):
    """Equal means: |E[x | group a] - E[x | group b]| <= tolerance.

    Also: statistical parity, independence (in expectation), disparate-impact gap. For scores that
    are probabilities this is the expected rate of positive decisions. Source: Dwork et al.,
    "Fairness through awareness", ITCS 2012; Agarwal et al., ICML 2018, section 2.
    """


class EqualOpportunity(Parity):
    """Equal means among positives: |E[x | a, y = 1] - E[x | b, y = 1]| <= tolerance.

    Also: true-positive-rate parity (expected rates). Needs targets that are 0 or 1, or chances of
    1. Source: Hardt, Price, Srebro, "Equality of opportunity in supervised learning", NeurIPS 2016,
    definition 2.2.
    """

    def events(self, batch: Batch) -> Sequence[Samples]:
        return (batch.positives,)


class PredictiveEquality(Parity):
    """Equal means among negatives: |E[x | a, y = 0] - E[x | b, y = 0]| <= tolerance.

    Also: false-positive-rate parity (expected rates). Needs targets that are 0 or 1, or chances of
    1. Source: Corbett-Davies et al., "Algorithmic decision making and the cost of fairness", KDD
    2017.
    """

    def events(self, batch: Batch) -> Sequence[Samples]:
        return (batch.negatives,)


class EqualizedOdds(Parity):
    """Equal means among positives and among negatives: EqualOpportunity and PredictiveEquality.

    Also: separation (in expectation). Needs targets that are 0 or 1, or chances of 1. Source:
    Hardt, Price, Srebro, NeurIPS 2016, definition 2.1.
    """

    def events(self, batch: Batch) -> Sequence[Samples]:
        return (batch.negatives, batch.positives)


@dataclass(frozen=True, eq=False)
class ConditionalParity(Parity):
    """Equal means within strata: |E[x | a, factor = v] - E[x | b, factor = v]| <= tolerance, all v.

    Also: conditional statistical parity, conditional demographic parity. The factor is one that may
    legitimately explain differences, such as the department applied to. Source: Kamiran,
    Zliobaite, Calders, "Quantifying explainable discrimination", KAIS 2013; Corbett-Davies et al.,
    KDD 2017.

    Args:
        tolerance, on, compare, reference: as for ``Parity``. With ``on=None`` the factor is not
            compared itself.
        given: the factor, an attribute in ``groups``; a tuple of names for all combinations.
    """

    given: str | tuple[str, ...] = field(kw_only=True)

    def events(self, batch: Batch) -> Sequence[Samples]:
        return batch.strata(self.given)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_given(self, self.given)


class MeanResidual(Parity):
    """Equal mean residuals: |E[y - x | a] - E[y - x | b]| <= tolerance.

    For regression; also: bias parity, balance of the mean error. Needs targets, any real numbers.
    Source: Calders et al., "Controlling attribute effect in linear regression", ICDM 2013; Troxell,
    Montufar, Roemer, ICML 2026.
    """

    label = "residual"

    def value(self, samples: Samples) -> Functional:
        return samples.mean_residual()


class ErrorParity(Parity):
    """Equal expected errors: |E[|y - x| | a] - E[|y - x| | b]| <= tolerance, for y in {0, 1}.

    Affine, because |y - x| = y (1 - x) + (1 - y) x for x from 0 to 1. It is the chance of a wrong
    decision when x is the chance of a positive one; with soft targets, the same over y, too. Also:
    overall accuracy equality, equal misclassification rates (in expectation). Needs targets that
    are 0 or 1, or chances of 1; bounds of (0, 1) make it what it says. Source: Berk et al.,
    "Fairness in criminal justice risk assessments", Sociological Methods & Research 2021 ("overall
    accuracy equality"); Zafar et al., "Fairness beyond disparate treatment", WWW 2017.
    """

    label = "error"

    def rows(self, batch: Batch) -> Iterator[Row]:
        outcome = batch.negatives, batch.positives

        def error(group: Samples) -> Functional:
            negative, positive = (group & event for event in outcome)
            missed = positive.share(per=group) - positive.mean(per=group)
            return negative.mean(per=group) + missed

        for name, a, b in batch.pairs(
            self.on, compare=self.compare, reference=self.reference, label=self.label
        ):
            yield Row.within(name, error(a) - error(b), self.tolerance)


# ---------------------------------------------------------------------------------------------
# Others
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImpactRatio(Constraint):
    """Every group's mean at least threshold times every other's: E[x | a] >= threshold * E[x | b].

    For all ordered pairs: the lowest mean is at least ``threshold`` times the highest. Also: the
    four-fifths rule (threshold 0.8), disparate impact, p%-rule. Needs a lower bound of at least 0:
    a ratio says nothing where means can be negative. Source: Uniform Guidelines on Employee
    Selection Procedures, 29 CFR 1607.4(D), 1978; Feldman et al., "Certifying and removing disparate
    impact", KDD 2015.

    Args:
        threshold: from 0 to 1; a number, or a tensor with one element, which may require grad.
        on: as for ``Parity``.
    """

    threshold: Number
    on: str | tuple[str, ...] | None = None

    nonnegative = True

    def rows(self, batch: Batch) -> Iterator[Row]:
        for name, a, b in batch.pairs(self.on, ordered=True, label="ratio"):
            yield Row(name, a.mean() - self.threshold * b.mean(), lower=0.0)

    def check(self) -> None:
        check_number(
            self, "threshold", self.threshold, "a number from 0 to 1",
            "; it is the least ratio of two means; 0.8 for the four-fifths rule", most=1.0,
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_on(self, "on", self.on)


@dataclass(frozen=True, eq=False)
class MinimumRate(Constraint):
    """Every group's mean is at least rate: E[x | a] >= rate.

    Also: levelling up, minimum acceptance rate, a floor for every group (sufficientarian
    fairness). Groups may differ above it. Source: Mittelstadt, Wachter, Russell, "The unfairness of
    fair machine learning", 2023 (minimum rate constraints).

    Args:
        rate: a number, or a tensor with one element, which may require grad.
        on: as for ``Parity``.
    """

    rate: Number
    on: str | tuple[str, ...] | None = None

    def rows(self, batch: Batch) -> Iterator[Row]:
        for group in batch.groups(self.on):
            yield Row(f"{group.name} | minimum", group.mean(), lower=self.rate)

    def check(self) -> None:
        check_number(self, "rate", self.rate, "a finite number", least=-LARGEST, most=LARGEST)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_on(self, "on", self.on)


@dataclass(frozen=True, eq=False)
class Covariance(Constraint):
    """Little covariance with a continuous attribute s: |E[(s - E[s]) x]| <= tolerance.

    E[(s - E[s]) x] = cov(s, x), with the mass of the samples as its divisor (not one less). Bounds
    linear dependence only. Also: decorrelation, covariance-based fairness. Source: Zafar et al.,
    "Fairness constraints: mechanisms for fair classification", AISTATS 2017 (there between s and
    the distance to the decision boundary).

    Args:
        tolerance: at least 0, in units of s times units of x.
        on: a continuous attribute, a floating-point tensor ``(n,)`` or ``(B, n)`` in ``groups``;
            a tuple of names for several, one row each.
        given: a factor (group codes, in ``groups``): the covariance within each of its strata.
    """

    tolerance: Number
    on: str | tuple[str, ...]
    given: str | tuple[str, ...] | None = None

    def rows(self, batch: Batch) -> Iterator[Row]:
        strata = [batch.everyone] if self.given is None else batch.strata(self.given)
        for attribute in self.on if isinstance(self.on, tuple) else (self.on,):
            for samples in strata:
                name = f"{attribute}: covariance" + (f" | {samples.name}" if samples.name else "")
                yield Row.within(name, samples.covariance(attribute), self.tolerance)

    def check(self) -> None:
        check_tolerance(self, self.tolerance)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on is None:
            raise ProblemError(
                "Covariance: on: expected the name of a continuous attribute, or a tuple of names, "
                "got None"
            )
        check_on(self, "on", self.on)
        if self.given is not None:
            check_given(self, self.given)


@dataclass(frozen=True, eq=False)
class GroupCalibration(Constraint):
    """Small mean residuals per group and bin of scores: |E[x - y | a, score in bin]| <= tolerance.

    The bins are those of the scores that come in, not of the predictions that go out: which bin a
    sample is in is decided before, without a derivative, and so the rows are affine. Also:
    calibration within groups, sufficiency (binned, in expectation), multicalibration on one set of
    groups. Needs targets: 0 and 1, chances, or any real numbers. Source: Kleinberg, Mullainathan,
    Raghavan, "Inherent trade-offs in the fair determination of risk scores", ITCS 2017 (condition
    A); Pleiss et al., "On fairness and calibration", NeurIPS 2017.

    Args:
        tolerance: as for ``Parity``.
        bins: how many bins of equal width from 0 to 1; or the increasing edges between bins. The
            first and the last one are open: [0.5] makes two bins, below 0.5 and from there on.
        on: as for ``Parity``.
    """

    tolerance: Number
    bins: int | Sequence[float]
    on: str | tuple[str, ...] | None = None

    def rows(self, batch: Batch) -> Iterator[Row]:
        for group in batch.groups(self.on, *batch.score_bins(self.edges)):
            yield Row.within(f"{group.name} | residual", group.mean_residual(), self.tolerance)

    @property
    def edges(self) -> tuple[float, ...]:
        """The edges between the bins, without those at the ends."""
        if isinstance(self.bins, int):
            return tuple([k / self.bins for k in range(1, self.bins)])
        return tuple([float(edge) for edge in self.bins])

    def check(self) -> None:
        check_tolerance(self, self.tolerance)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_on(self, "on", self.on)
        bins = self.bins
        if isinstance(bins, int):
            good = not isinstance(bins, bool) and bins >= 2
        else:
            good = isinstance(bins, (list, tuple)) and len(bins) > 0
            good = good and all(isinstance(e, (int, float)) and math.isfinite(e) for e in bins)
            good = good and all(a < b for a, b in pairwise(bins))
        if not good:
            raise ProblemError(
                "GroupCalibration: bins: expected a whole number of at least 2, or a list of "
                f"increasing finite edges, got {bins!r}"
            )


@dataclass(frozen=True, eq=False)
class Budget(Constraint):
    """The total or the mean of the predictions, fixed or bounded: lower <= sum_i x_i <= upper.

    With weights, sum_i w_i x_i and its mean. Also: capacity, quota, allocation under a budget;
    with ``on``, a budget for each group. Source: any allocation problem; for instance Elzayn et
    al., "Fair algorithms for learning in allocation problems", FAT* 2019.

    Args:
        total: a number, or a tensor with one element, which the total must equal; or a pair of
            limits ``(lower, upper)``, each a number, a tensor or ``None`` for none.
        mean: the same for the mean. Give one of the two.
        on: as for ``Parity``, but ``None`` means everyone together.
    """

    total: Limits | None = None
    mean: Limits | None = None
    on: str | tuple[str, ...] | None = None

    @property
    def limits(self) -> tuple[Number | None, Number | None]:
        """The lower and the upper one."""
        chosen = self.mean if self.total is None else self.total
        return chosen if isinstance(chosen, tuple) else (chosen, chosen)

    def rows(self, batch: Batch) -> Iterator[Row]:
        word = "total" if self.mean is None else "mean"
        lower, upper = self.limits
        for samples in [batch.everyone] if self.on is None else batch.groups(self.on):
            value = samples.sum() if word == "total" else samples.mean()
            yield Row(
                f"{samples.name} | {word}" if samples.name else f"budget: {word}",
                value,
                -math.inf if lower is None else lower,
                math.inf if upper is None else upper,
            )

    def check(self) -> None:
        word = "total" if self.mean is None else "mean"
        lower, upper = (
            end
            if limit is None
            else check_number(self, word, limit, "a finite number", least=-LARGEST, most=LARGEST)
            for limit, end in zip(self.limits, (-math.inf, math.inf), strict=True)
        )
        if lower > upper:
            raise ProblemError(
                f"Budget: {word}: expected lower <= upper, got lower {lower}, upper {upper}"
            )

    def __post_init__(self) -> None:
        if (self.total is None) == (self.mean is None):
            raise ProblemError(
                "Budget: expected a total or a mean, one of the two, got "
                f"total={self.total!r}, mean={self.mean!r}"
            )
        chosen = self.mean if self.total is None else self.total
        if isinstance(chosen, (tuple, list)) and (
            not isinstance(chosen, tuple) or len(chosen) != 2 or chosen == (None, None)
        ):
            word = "total" if self.mean is None else "mean"
            raise ProblemError(
                f"Budget: {word}: expected a number or a pair (lower, upper), one of them at "
                f"least, got {chosen!r}"
            )
        super().__post_init__()
        check_on(self, "on", self.on)
