"""A layer with a stream: what the two must have in common, and which of them a batch is for."""

from __future__ import annotations

import math

from torch import Tensor

from fairopt.errors import ProblemError, whole_number
from fairopt.formulation.inputs import as_batch, read_scores
from fairopt.formulation.specification import Specification
from fairopt.online.module import OnlineParity, described, numbers
from fairopt.online.reading import forecasts as forecasts


def check_stream(
    online: OnlineParity | None, minimum_batch: int | None, specification: Specification
) -> None:
    """Raise unless a layer of this specification can serve by this stream, or has none.

    Raises:
        ProblemError: the message says what differs.
    """
    if online is None:
        if minimum_batch is not None:
            raise ProblemError(
                f"minimum_batch: expected None without online, got {minimum_batch!r}; it says "
                "which batches are too small for the projection and go to the stream: pass "
                "online=OnlineParity(...) as well"
            )
        return
    if not isinstance(online, OnlineParity):
        raise ProblemError(f"online: expected an OnlineParity, got {type(online).__name__}")
    whole_number(
        "minimum_batch", minimum_batch, 1, "a whole number of at least 1 with online",
        "; in eval mode smaller batches are served by the stream",
    )  # fmt: skip
    if specification.classes is not None:
        raise ProblemError(
            f"online: expected None with classes={specification.classes}, got a stream, which has "
            "one number for each sample"
        )
    if specification.objective != "l2":
        raise ProblemError(
            f"online: expected objective='l2', got {specification.objective!r}; a stream minimises "
            "the squared change"
        )
    remedy = "; make the layer with constraints=online.constraints and bounds=online.bounds"
    constraints = specification.constraints
    if constraints != online.constraints:
        mine, theirs = (", ".join(map(described, c)) for c in (constraints, online.constraints))
        if mine == theirs:
            theirs += " with other tensors, of the same values now"
        raise ProblemError(
            f"online: expected the constraints of the layer, {mine}, got {theirs}{remedy}"
        )
    lower, upper = specification.bounds
    if isinstance(lower, Tensor) or isinstance(upper, Tensor):
        raise ProblemError(
            "bounds: expected numbers with online, got a tensor; the stream holds its bounds as "
            f"numbers, and would not follow{remedy}"
        )
    ends = numbers((lower, upper))
    if ends != online.bounds:
        here, there = (tuple(map(number, pair)) for pair in (ends, online.bounds))
        raise ProblemError(f"online: expected the bounds of the layer, {here}, got {there}{remedy}")


def number(end: float) -> float | None:
    return None if math.isinf(end) else end


def is_for_stream(scores: Tensor, minimum_batch: int) -> bool:
    """Whether a batch is smaller than ``minimum_batch``.

    Raises:
        ProblemError: it is several small problems.
    """
    problems, size = as_batch(read_scores(scores)).shape
    if size >= minimum_batch:
        return False
    if problems > 1:
        raise ProblemError(
            f"scores: expected problems of at least minimum_batch={minimum_batch} samples, or one "
            f"batch of any size, got {problems} problems of {size}; a stream has no batch of "
            "problems: pass them one after the other"
        )
    return True
