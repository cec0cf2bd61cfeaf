"""Every notion, by every backend that can: the same predictions and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fairopt import (
    Budget,
    ConditionalParity,
    Covariance,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    ErrorParity,
    GroupCalibration,
    ImpactRatio,
    MeanResidual,
    MinimumRate,
    PredictiveEquality,
    cross_validate,
    formulate,
    solve,
)

NOTIONS = [
    DemographicParity(0.03), EqualOpportunity(0.03), PredictiveEquality(0.03), EqualizedOdds(0.03),
    MeanResidual(0.03), ConditionalParity(0.03, on="sex", given="job"), ErrorParity(0.01),
    ImpactRatio(0.9), MinimumRate(0.55), Covariance(0.3, on="age"), GroupCalibration(0.1, bins=3),
    Budget(mean=0.4),
    (DemographicParity(0.03, on="sex"), Budget(mean=(None, 0.4)), Covariance(0.3, on="age")),
]  # fmt: skip


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("notion", NOTIONS, ids=lambda n: type(n).__name__)
def test_all_capable_backends_agree(notion: Any, soft: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    n = 60
    job = torch.arange(n) % 3
    sex = torch.randint(0, 2, (n,), generator=generator)
    age = 20 + 50 * torch.rand(n, generator=generator, dtype=torch.float64)
    scores = 0.6 * torch.rand(n, generator=generator, dtype=torch.float64) + 0.3 * sex + 0.05 * job
    scores = (scores + (age - 45) / 100).requires_grad_()
    y = (torch.rand(n, generator=generator) < 0.3 + 0.3 * sex).double()
    groups: dict[str, Any] = {"sex": sex, "job": job}
    if soft:
        one_hot = torch.nn.functional.one_hot(sex).double()
        groups["sex"] = 0.8 * one_hot + 0.1
        y = 0.8 * y + 0.1
    if any(isinstance(c, Covariance) for c in (notion if isinstance(notion, tuple) else (notion,))):
        groups["age"] = age
    weights = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    problem = formulate(notion, scores, groups, y, bounds=(0, 1), weights=weights)
    agreement = cross_validate(problem, inputs={"scores": scores}, repeats=0)
    assert agreement.agree, str(agreement)
    moved = solve(problem).x[0].detach() - scores.detach().clamp(0, 1)
    assert moved.abs().max() > 1e-3  # or there was nothing to agree about
