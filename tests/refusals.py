"""What the tests of refusals share: small inputs, and a check of what a refusal says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fairopt import DemographicParity, FairnessLayer, FairoptError, ProblemError, project

SCORES = torch.tensor([0.1, 0.9, 0.4, 0.6])
GROUPS = torch.tensor([0, 1, 0, 1])
TARGETS = torch.tensor([0, 0, 1, 1])
PARITY = DemographicParity(tolerance=0.05)
META = torch.device("meta")
NAN, INF = math.nan, math.inf


def refused(
    match: str,
    scores: Any = SCORES,
    groups: Any = GROUPS,
    targets: Any = None,
    *,
    constraints: Any = PARITY,
    bounds: Any = (0, 1),
    weights: Any = None,
    error: type[FairoptError] = ProblemError,
    **options: Any,
) -> FairoptError:
    """The layer refuses the input with this message, and keeps what it knew; so does project.

    An option that no call could take is refused when the layer is made.
    """
    before, made = object(), []

    def call() -> None:
        made.append(FairnessLayer(constraints, bounds=bounds, **options))
        made[0].__dict__["last"] = before
        made[0](scores, groups, targets, weights=weights)

    with pytest.raises(error, match=match) as caught:
        call()
    assert all(layer.last is before for layer in made)
    with pytest.raises(error, match=match):
        project(scores, groups, constraints, targets, bounds=bounds, weights=weights, **options)
    return caught.value
