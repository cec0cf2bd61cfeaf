"""audit(): recomputed by hand, and the same as Fairlearn's metrics where both define one."""

from __future__ import annotations

import json
import math
import sys
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
    FairnessLayer,
    FairoptError,
    GroupCalibration,
    ImpactRatio,
    MeanResidual,
    MinimumRate,
    PredictiveEquality,
    ProblemError,
    audit,
    project,
)

SEX = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
RACE = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
Y = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0, 1, 0])
SCORES = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
PEOPLE = {"sex": SEX, "race": RACE}


def test_an_audit_counted_by_hand() -> None:
    found = audit(SCORES, PEOPLE, [EqualOpportunity(0.1, on="sex"), MinimumRate(0.3, on="sex")], Y)
    first, second, third = found.rows
    assert (first.name, first.notion) == ("sex: 0 vs 1 | y = 1", "EqualOpportunity")
    assert first.value == pytest.approx(0.8 - 1 / 3)
    assert (first.lower, first.upper) == (-0.1, 0.1)
    assert first.excess == pytest.approx(0.7 - 1 / 3)
    assert first.samples == 2  # positives of sex 0
    assert not first.holds
    assert (second.value, second.holds, second.excess) == (pytest.approx(0.75), True, 0.0)
    assert (third.value, third.holds, third.samples) == (pytest.approx(0.25), False, 6)
    assert found.groups == {"sex": {"0": 4, "1": 6}}
    assert not found.holds
    assert found.worst is first


def test_values_are_those_of_the_definition_with_their_constants() -> None:
    """A row of a problem leaves constants to its sides; an audit does not."""
    error = (SCORES - Y).abs()
    residual = SCORES - Y
    found = audit(SCORES, {"sex": SEX}, [ErrorParity(0.1), MeanResidual(0.1)], Y)
    for row, value in zip(found.rows, (error, residual), strict=True):
        gap = value[SEX == 0].mean() - value[SEX == 1].mean()
        assert row.value == pytest.approx(float(gap))
        assert (row.lower, row.upper) == (-0.1, 0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_a_layer_returns_holds(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 500
    groups = {
        "sex": torch.randint(0, 2, (n,), generator=generator),
        "race": torch.softmax(torch.randn(n, 3, generator=generator), -1),
        "age": torch.rand(n, generator=generator),
    }
    y = torch.randint(0, 2, (n,), generator=generator)
    w = torch.rand(n, generator=generator)
    scores = torch.rand(n, generator=generator).to(dtype)
    notions = [
        DemographicParity(0.01), EqualizedOdds(0.02, on="sex"), Covariance(0.001, on="age"),
        Budget(mean=(None, 0.45)), ImpactRatio(0.9, on="race"), GroupCalibration(0.3, 4, "sex"),
    ]  # fmt: skip
    layer = FairnessLayer(notions, bounds=(0, 1))
    fair = layer(scores, groups, y, weights=w)
    before = audit(scores, groups, notions, y, weights=w)
    after = audit(fair, groups, notions, y, weights=w, scores=scores)
    assert [row.name for row in after.rows] == list(layer.last.problem.row_names)
    assert not before.holds
    if dtype is torch.bfloat16:  # three digits cannot hold more
        assert max(row.excess for row in after.rows) < 2e-3
    else:
        assert after.holds, str(after)


def test_missing_and_single_groups_are_told() -> None:
    codes = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 2, 2])
    one = torch.zeros(10, dtype=torch.int64)
    found = audit(SCORES, {"a": codes, "b": one}, DemographicParity(0.1))
    assert [row.name for row in found.rows] == ["a: 0 vs 2"]
    assert found.skipped == (
        "b: only one group", "a: 0 vs 1: a group has no samples",
        "a: 1 vs 2: a group has no samples",
    )  # fmt: skip
    assert found.groups == {"a": {"0": 3, "1": 0, "2": 7}, "b": {"0": 10}}
    assert found.rows[0].samples == 3
    nothing = audit(SCORES, one, DemographicParity(0.1))
    assert nothing.rows == () and nothing.holds and nothing.worst is None
    assert "all 0 rows hold" in str(nothing)


def test_soft_groups_are_counted_in_expectation() -> None:
    chance = torch.linspace(0, 1, 10, dtype=torch.float64)
    soft = torch.stack([chance, 1 - chance], -1)
    found = audit(SCORES, {"sex": soft}, DemographicParity(0.1))
    assert found.groups["sex"] == pytest.approx({"0": 5.0, "1": 5.0})
    assert found.rows[0].samples == pytest.approx(5.0)


def test_its_forms() -> None:
    notions = [DemographicParity(0.1, on="sex"), MinimumRate(0.2, on="sex"), Budget(total=4.5)]
    found = audit(SCORES, PEOPLE, notions)
    text = str(found)
    assert text.splitlines()[0] == "10 samples: 1 of 4 rows does not hold"
    assert "sex: 0 vs 1" in text and "NO" in text and "sex: 4 in 0, 6 in 1" in text
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["rows"][1]["upper"] is None
    assert plain["rows"][0]["value"] == pytest.approx(0.5)
    assert plain["groups"] == {"sex": {"0": 4, "1": 6}}


def test_as_a_table() -> None:
    pytest.importorskip("pandas", reason="pandas takes audits")
    table = audit(SCORES, PEOPLE, DemographicParity(0.1)).to_pandas()
    assert table.loc["sex: 0 vs 1", "value"] == pytest.approx(0.5)
    assert table["holds"].tolist() == [False, True, True, True]
    empty = audit(SCORES, torch.zeros(10).long(), DemographicParity(0.1)).to_pandas()
    assert empty.empty and next(iter(empty.columns)) == "notion"


def test_without_pandas_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(FairoptError, match=r"to_pandas: expected pandas .* pip install pandas, or"):
        audit(SCORES, SEX, DemographicParity(0.1)).to_pandas()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((SCORES.repeat(2, 1), SEX, DemographicParity(0.1)), r"predictions: expected shape \(n,\)"),
        ((-SCORES, SEX, ImpactRatio(0.8)), "predictions: ImpactRatio needs predictions of at"),
        ((SCORES * math.nan, SEX, DemographicParity(0.1)), "scores: expected finite values"),
        ((SCORES, SEX, EqualizedOdds(0.1)), "targets: EqualizedOdds needs them, got none"),
        ((SCORES, SEX[:5], DemographicParity(0.1)), "groups: expected shape"),
    ],
)  # fmt: skip
def test_bad_input(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ProblemError, match=match):
        audit(*arguments)


def test_scores_that_do_not_fit() -> None:
    with pytest.raises(ProblemError, match="scores: expected shape"):
        audit(SCORES, SEX, GroupCalibration(0.1, 2), Y, scores=SCORES[:3])


# ---------------------------------------------------------------------------------------------
# Fairlearn
# ---------------------------------------------------------------------------------------------


def largest(found: Any) -> float:
    return max(abs(row.value) for row in found.rows)


@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("groups", [2, 5])
def test_the_same_as_fairlearn_s_metrics(groups: int, weighted: bool) -> None:
    metrics = pytest.importorskip("fairlearn.metrics", reason="fairlearn is an independent judge")
    from sklearn.metrics import mean_absolute_error, zero_one_loss

    generator = torch.Generator().manual_seed(groups)
    n = 400
    codes = torch.randint(0, groups, (n,), generator=generator)
    y = torch.randint(0, 2, (n,), generator=generator)
    chance = 0.3 + 0.3 * y + 0.05 * codes
    decision = (torch.rand(n, generator=generator) < chance).double()
    score = torch.rand(n, generator=generator, dtype=torch.float64)
    w = torch.rand(n, generator=generator, dtype=torch.float64) if weighted else None
    options: dict[str, Any] = {"sensitive_features": codes.numpy()}
    frame: dict[str, Any] = dict(options)
    if w is not None:
        options["sample_weight"] = w.numpy()
        frame["sample_params"] = {"sample_weight": w.numpy()}
    truth, said = y.numpy(), decision.numpy()

    def ours(notion: Any, x: torch.Tensor = decision) -> Any:
        return audit(x, codes, notion, y, weights=w)

    for notion, name, arguments in (
        (DemographicParity(0.0), "demographic_parity_difference", {}),
        (EqualizedOdds(0.0), "equalized_odds_difference", {}),
        (EqualOpportunity(0.0), "equal_opportunity_difference", {}),
        (DemographicParity(0.0, compare="overall"), "demographic_parity_difference",
         {"method": "to_overall"}),
    ):  # fmt: skip
        if hasattr(metrics, name):
            theirs = getattr(metrics, name)(truth, said, **options, **arguments)
            assert largest(ours(notion)) == pytest.approx(theirs, abs=1e-12), name
    frames = {
        PredictiveEquality: metrics.MetricFrame(
            metrics=metrics.false_positive_rate, y_true=truth, y_pred=said, **frame
        ),
        ErrorParity: metrics.MetricFrame(metrics=zero_one_loss, y_true=truth, y_pred=said, **frame),
    }
    for kind, found in frames.items():
        assert largest(ours(kind(0.0))) == pytest.approx(found.difference(), abs=1e-12)
    ratio = metrics.demographic_parity_ratio(truth, said, **options)
    assert ours(ImpactRatio(ratio - 1e-12)).holds
    assert not ours(ImpactRatio(ratio + 1e-9)).holds
    # scores, not decisions
    mean = metrics.MetricFrame(
        metrics=metrics.mean_prediction, y_true=truth, y_pred=score.numpy(), **frame
    )
    assert largest(ours(DemographicParity(0.0), score)) == pytest.approx(mean.difference())
    rates = [row.value for row in ours(MinimumRate(0.0), score).rows]
    assert rates == pytest.approx(mean.by_group.tolist())
    error = metrics.MetricFrame(
        metrics=mean_absolute_error, y_true=truth, y_pred=score.numpy(), **frame
    )
    assert largest(ours(ErrorParity(0.0), score)) == pytest.approx(error.difference())


def test_conditional_gaps_are_fairlearn_s_with_control_features() -> None:
    metrics = pytest.importorskip("fairlearn.metrics", reason="fairlearn is an independent judge")
    frame = metrics.MetricFrame(
        metrics=metrics.mean_prediction, y_true=Y.numpy(), y_pred=SCORES.numpy(),
        sensitive_features=SEX.numpy(), control_features=RACE.numpy(),
    )  # fmt: skip
    found = audit(SCORES, PEOPLE, ConditionalParity(0.0, on="sex", given="race"))
    gaps = [abs(row.value) for row in found.rows]
    assert gaps == pytest.approx(frame.difference().tolist())
    fair = project(SCORES, PEOPLE, ConditionalParity(0.1, on="sex", given="race"), bounds=(0, 1))
    frame = metrics.MetricFrame(
        metrics=metrics.mean_prediction, y_true=Y.numpy(), y_pred=fair.numpy(),
        sensitive_features=SEX.numpy(), control_features=RACE.numpy(),
    )  # fmt: skip
    assert (frame.difference() <= 0.1 + 1e-12).all()
