"""What is asked of every call, in one frozen object that was checked when it was made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from torch import Tensor

from fairopt.errors import ProblemError, whole_number
from fairopt.formulation.inputs import (
    Bound,
    Bounds,
    GroupCounts,
    both,
    check_group_counts,
    refuse_negative,
)
from fairopt.formulation.template import MissingGroup, Plans
from fairopt.notions.catalogue import LARGEST, Constraint

Objective: TypeAlias = Literal["l2", "l1", "linf", "utility"]

OBJECTIVES = ("l2", "l1", "linf", "utility")

# A lower bound nearer to zero than this is zero when it is rounded inwards to float16, the dtype of
# scores that is coarsest there.
NEAR_ZERO = 2.0**-24


@dataclass(frozen=True, eq=False, init=False)
class Specification:
    """The options of a layer, or of one call of ``project`` or ``formulate``, known to make sense.

    What a call would refuse whatever its tensors are is refused here. What depends on the tensors
    of a call (their shapes, the values of bounds that are tensors, the names of the attributes) is
    left to the call.

    Args:
        constraints, bounds, objective, missing_group, group_counts, smoothing, classes, elastic:
            as for ``FairnessLayer``.

    Attributes:
        bounds: the lower and the upper one, each ``None`` for none.
        plans: what the constraints need, by the names of the attributes that a call has.

    Raises:
        ProblemError: an option is not what it may be, alone or beside the others.
    """

    constraints: tuple[Constraint, ...]
    bounds: tuple[Bound, Bound]
    objective: Objective
    missing_group: MissingGroup
    group_counts: GroupCounts
    smoothing: float
    classes: int | None
    elastic: bool
    plans: Plans

    def __init__(
        self,
        constraints: Constraint | Sequence[Constraint],
        bounds: Bounds,
        objective: Objective = "l2",
        missing_group: MissingGroup = "skip",
        group_counts: GroupCounts = None,
        smoothing: float = 0.0,
        classes: int | None = None,
        elastic: bool = False,
    ) -> None:
        chosen = as_constraints(constraints)
        check_objective(objective, smoothing)
        if not isinstance(missing_group, str) or missing_group not in ("skip", "raise"):
            raise ProblemError(f"missing_group: expected 'skip' or 'raise', got {missing_group!r}")
        check_group_counts(group_counts)
        if classes is None:
            sides = both(bounds)
            check_sides(sides, chosen)
        else:
            check_classes(classes)
            check_simplex(bounds)
            sides = None, None
            if objective != "l2":
                raise ProblemError(
                    f"objective: expected 'l2' with classes={classes}, got {objective!r}; "
                    "predictions of several classes are moved by the least squares"
                )
        check_elastic(elastic, objective, classes)
        self.__dict__.update(
            constraints=chosen, bounds=sides, objective=objective, missing_group=missing_group,
            group_counts=group_counts, smoothing=smoothing, classes=classes, elastic=elastic,
            plans=Plans(chosen),
        )  # fmt: skip


def as_constraints(constraints: Constraint | Sequence[Constraint]) -> tuple[Constraint, ...]:
    """One or several constraints as a tuple."""
    if isinstance(constraints, Constraint):
        return (constraints,)
    try:
        listed: tuple[object, ...] = tuple(constraints)
    except TypeError:  # nothing that can be listed
        listed = (constraints,)
    for constraint in listed:
        if not isinstance(constraint, Constraint):
            raise ProblemError(
                "constraints: expected parity notions such as DemographicParity(tolerance=0.05), "
                f"got {constraint!r}"
            )
    if not listed:
        raise ProblemError("constraints: expected at least one, got none")
    return cast(tuple[Constraint, ...], listed)


def check_objective(objective: Any, smoothing: Any) -> None:
    """Raise unless the objective is one of ours, and the smoothing one that it can have."""
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise ProblemError(
            f"objective: expected one of {', '.join(map(repr, OBJECTIVES))}, got {objective!r}"
        )
    number = isinstance(smoothing, (int, float)) and not isinstance(smoothing, bool)
    if not number or not 0 <= smoothing <= LARGEST:
        raise ProblemError(
            f"smoothing: expected 0 for none or a positive finite number, got {smoothing!r}"
        )
    if smoothing and objective == "l2":
        raise ProblemError(
            "smoothing: expected 0 with objective='l2', which is a QP and needs none, got "
            f"{smoothing!r}; it is for the linear objectives 'l1', 'linf' and 'utility'"
        )


def check_sides(bounds: tuple[Bound, Bound], constraints: tuple[Constraint, ...]) -> None:
    """Raise if bounds that are numbers leave no room, or some that a notion has no use for.

    Those that are tensors have other values at each call, and their shape is that of the scores.
    """
    for name, value in zip(("lower bound", "upper bound"), bounds, strict=True):
        if isinstance(value, Tensor) and (value.dim() > 2 or not value.numel()):
            raise ProblemError(
                f"{name}: expected a tensor with one element or one for each score, got shape "
                f"{tuple(value.shape)}"
            )
        if isinstance(value, (int, float)) and LARGEST < abs(value) < math.inf:
            raise ProblemError(f"{name}: expected a number that a float can hold, got {value!r}")
    lower, upper = bounds
    low = -math.inf if lower is None or isinstance(lower, Tensor) else float(lower)
    high = math.inf if upper is None or isinstance(upper, Tensor) else float(upper)
    if not (low <= high and low < math.inf and high > -math.inf):
        raise ProblemError(
            f"bounds: expected lower <= upper without NaN for every sample, got lower {low}, upper "
            f"{high}; give the lower one first, and None for none"
        )
    names = tuple([type(each).__name__ for each in constraints if each.nonnegative])
    if names and not isinstance(lower, Tensor) and low <= -NEAR_ZERO:
        refuse_negative(names, low)


def check_classes(classes: int) -> None:
    """Raise unless it is a number of classes."""
    expected = "a whole number of at least 2, or None for one prediction per sample"
    whole_number("classes", classes, 2, expected)


def check_simplex(bounds: Bounds) -> None:
    """Raise unless the bounds are those that the simplex implies."""
    ends = tuple(bounds) if isinstance(bounds, (tuple, list)) else bounds
    if ends is None or (
        isinstance(ends, tuple)
        and all(type(end) in (int, float) for end in ends)
        and ends == (0, 1)
    ):
        return
    raise ProblemError(
        "bounds: with classes=... every prediction is a point of the simplex, so expected (0, 1) "
        f"or None, which mean the same there, got {bounds!r}"
    )


def check_elastic(elastic: object, objective: str, classes: int | None) -> None:
    """Raise unless it is a flag, set only where that has a meaning."""
    if not isinstance(elastic, bool):
        raise ProblemError(f"elastic: expected True or False, got {elastic!r}")
    if elastic and (objective != "l2" or classes is not None):
        other = f"objective={objective!r}" if classes is None else f"classes={classes}"
        raise ProblemError(
            f"elastic: expected False with {other}, got True; some rows there are no constraints "
            "but tell what a prediction is, and may not be exceeded"
        )
