"""What the tests of linear objectives share."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fairopt import Budget, DemographicParity

Linear: TypeAlias = Literal["l1", "linf", "utility"]
LINEAR: tuple[Linear, ...] = ("l1", "linf", "utility")
INF = math.inf
PARITY = DemographicParity(tolerance=0.1)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SCORES = numbers(0.9, 0.7, 0.3, 0.1)  # means 0.8 and 0.2
PAIR = torch.tensor([0, 0, 1, 1])


class Case(NamedTuple):
    scores: Tensor
    groups: Tensor
    weights: Tensor | None
    bounds: Any
    tolerance: float
    mean: tuple[float, float]


def value(case: Case, objective: Linear, x: Tensor) -> Tensor:
    """Of the objective at x, as its definition says: ``(B,)``."""
    w = torch.ones_like(case.scores) if case.weights is None else case.weights.expand_as(x)
    change = (x - case.scores).abs()
    if objective == "utility":
        return -(w * case.scores * x).sum(-1)
    if objective == "l1":
        return (w * change).sum(-1)
    return torch.where(w > 0, change, 0.0).amax(-1)


def notions(case: Case, objective: Linear) -> list[Any]:
    limit = tuple(None if math.isinf(side) else side for side in case.mean)
    bounded = objective == "utility" and limit != (None, None)
    also = [Budget(mean=limit)] if bounded else []
    return [DemographicParity(tolerance=case.tolerance), *also]
