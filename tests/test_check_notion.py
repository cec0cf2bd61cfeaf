"""check_notion: our notions pass, and each way to be wrong is caught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
    Parity,
    PredictiveEquality,
    Row,
)
from fairopt.testing import check_notion

GENERATOR = torch.Generator().manual_seed(5)
N = 36
SEX = torch.arange(N) % 2
JOB = torch.arange(N) // 2 % 3
AGE = 2 + 5 * torch.rand(N, generator=GENERATOR, dtype=torch.float64)
Y = (torch.rand(N, generator=GENERATOR) < 0.3 + 0.3 * SEX).double()
SCORES = 0.6 * torch.rand(N, generator=GENERATOR, dtype=torch.float64) + 0.3 * SEX + 0.08 * JOB
SCORES = SCORES + (AGE - 4.5) / 10
WEIGHTS = 0.5 + torch.rand(N, generator=GENERATOR, dtype=torch.float64)
SOFT = 0.8 * torch.nn.functional.one_hot(SEX).double() + 0.1

OURS = [
    DemographicParity(0.03), EqualOpportunity(0.03), PredictiveEquality(0.03), EqualizedOdds(0.03),
    MeanResidual(0.03), ErrorParity(0.01), ConditionalParity(0.03, "sex", given="job"),
    ImpactRatio(0.9, "sex"), MinimumRate(0.6, "sex"), Covariance(0.05, "age"),
    GroupCalibration(0.15, bins=2), Budget(mean=0.4), Budget(total=(None, 12.0)),
]  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("notion", OURS, ids=repr)
def test_ours_pass(notion: Any, soft: bool, weighted: bool) -> None:
    groups = {"sex": SOFT if soft else SEX, "job": JOB}
    if isinstance(notion, Covariance):
        groups["age"] = AGE
    y = 0.8 * Y + 0.1 if soft else Y
    check_notion(notion, SCORES, groups, y, weights=WEIGHTS if weighted else None)


@dataclass(frozen=True, eq=False)
class Mine(Parity):
    """A parity notion with something wrong."""

    factor: float = 2.0

    extra: ClassVar[Any] = None


class OneName(Mine):
    def rows(self, batch: Any) -> Any:
        for group in batch.groups(None):
            yield Row.within("mean", group.mean(), self.tolerance)


class NoRows(Mine):
    def rows(self, batch: Any) -> Any:
        return []


class ReadsAValue(Mine):
    def value(self, samples: Any) -> Any:
        return float(self.factor) * samples.mean()


@pytest.mark.parametrize(
    ("notion", "match"),
    [
        (OneName(0.01), "OneName: rows need different names, got several of 'mean'"),
        (NoRows(0.01), "NoRows: no rows for these data; skipped: nothing"),
        (ReadsAValue(0.01), "ReadsAValue: the gradient for factor is wrong: rows must use the par"),
        (DemographicParity(5.0), "DemographicParity: it holds for these scores, so that nothing"),
        (MinimumRate(1.5), "MinimumRate: it cannot hold for these data; take others"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_caught(notion: Any, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        check_notion(notion, SCORES, SEX)


def test_a_field_with_an_entry_per_sample_is_not_a_parameter() -> None:
    with pytest.raises(AssertionError, match=r"DemographicParity: scores: expected shape \(n,\)"):
        check_notion(DemographicParity(0.01), SCORES.expand(2, -1), SEX)


def test_parameters_can_be_named() -> None:
    check_notion(ReadsAValue(0.01), SCORES, SEX, parameters=["tolerance"])
    check_notion(DemographicParity(torch.tensor(0.01)), SCORES, SEX)
