"""The notions beyond the first ones, on ten people: rows counted by hand, soft labels, bad input.

``value`` recomputes what a row bounds from its definition, in plain Python.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from catalogue_examples import AGE, CHANCE, MIXED, PEOPLE, RACE, SCORES, SEX, WEIGHTS, Y, soft_mean
from torch import Tensor

from fairopt import (
    Budget,
    CellRows,
    ConditionalParity,
    Covariance,
    DemographicParity,
    DenseRows,
    EqualizedOdds,
    EqualOpportunity,
    ErrorParity,
    FairnessLayer,
    GroupCalibration,
    ImpactRatio,
    MeanResidual,
    MinimumRate,
    PredictiveEquality,
    formulate,
    project,
)


def values(
    notion: Any, x: Tensor, groups: Any, y: Tensor | None = None, w: Tensor | None = None,
    scores: Tensor | None = None, bounds: Any = (0, 1),
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """Each row's lower side, value of x and upper side, from the written problem."""
    problem = formulate(notion, SCORES if scores is None else scores, groups, y, bounds=bounds,
                        weights=w)  # fmt: skip
    found = problem.rows.apply(x.reshape(1, -1))[0].tolist()
    sides = zip(problem.l[0].tolist(), found, problem.u[0].tolist(), strict=True)
    return dict(zip(problem.row_names, sides, strict=True))


def check(
    notion: Any, expected: dict[str, tuple[float, float, float]], groups: Any = PEOPLE,
    y: Tensor | None = None, w: Tensor | None = None, bounds: Any = (0, 1), holds: bool = False,
) -> Tensor:  # fmt: skip
    """Rows and sides are as counted by hand, and hold after the projection, one of them tightly."""
    got = values(notion, SCORES, groups, y, w, bounds=bounds)
    assert list(got) == list(expected)
    for name, (lower, value, upper) in got.items():
        assert (lower, value, upper) == pytest.approx(expected[name], abs=1e-12), name
    broken = any(not low - 1e-12 <= v <= up + 1e-12 for low, v, up in got.values())
    assert broken or holds
    fair = project(SCORES, groups, notion, y, bounds=bounds, weights=w)
    after = values(notion, fair, groups, y, w, bounds=bounds)
    for name, (lower, value, upper) in after.items():
        assert lower - 1e-12 <= value <= upper + 1e-12, name
    slack = min(min(v - low, up - v) for low, v, up in after.values())
    assert holds or slack <= 1e-9  # moved no further than asked
    return fair


INF = math.inf


# ---------------------------------------------------------------------------------------------
# Counted by hand
# ---------------------------------------------------------------------------------------------


def test_conditional_parity() -> None:
    # race 0: sex 0 has 0.9, 0.6; sex 1 has 0.3, 0.0; race 1: 0.8 and 0.5, 0.2; race 2: 0.7 and
    # 0.4, 0.1
    fair = check(
        ConditionalParity(tolerance=0.1, on="sex", given="race"),
        {
            "sex: 0 vs 1 | race = 0": (-0.1, 0.75 - 0.15, 0.1),
            "sex: 0 vs 1 | race = 1": (-0.1, 0.8 - 0.35, 0.1),
            "sex: 0 vs 1 | race = 2": (-0.1, 0.7 - 0.25, 0.1),
        },
    )
    for race in range(3):
        gap = fair[(SEX == 0) & (RACE == race)].mean() - fair[(SEX == 1) & (RACE == race)].mean()
        assert abs(gap) <= 0.1 + 1e-12


def test_the_factor_itself_is_not_compared() -> None:
    notion = ConditionalParity(tolerance=0.1, given="race")
    problem = formulate(notion, SCORES, PEOPLE, bounds=None)
    assert problem.row_names == tuple(f"sex: 0 vs 1 | race = {v}" for v in range(3))
    # Another notion beside it may well compare it.
    both = formulate([notion, DemographicParity(0.1)], SCORES, PEOPLE, bounds=None)
    assert both.row_names[3:] == ("sex: 0 vs 1", "race: 0 vs 1", "race: 0 vs 2", "race: 1 vs 2")


def test_conditional_parity_within_two_factors_and_against_everyone() -> None:
    groups = {**PEOPLE, "old": torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 1, 1])}
    notion = ConditionalParity(0.1, on="sex", given=("race", "old"), compare="overall")
    problem = formulate(notion, SCORES, groups, bounds=None)
    assert problem.row_names[0] == "sex: 0 vs all | race x old = (0, 0)"
    # race 0 and young: 0.9 of sex 0, 0.3 of sex 1
    assert problem.rows.apply(SCORES[None])[0, 0].item() == pytest.approx(0.9 - 0.6)


def test_error_parity() -> None:
    # |y - x|: sex 0 has 0.1, 0.8, 0.3, 0.6, mean 0.45; sex 1 has 0.5, 0.6, 0.3, 0.2, 0.9, 0.0,
    # mean 2.5 / 6. Without the constant: (-0.9 + 0.8 - 0.7 + 0.6) / 4 = -0.05 and
    # (-0.5 - 0.4 + 0.3 + 0.2 - 0.1 + 0.0) / 6 = -0.5 / 6; shares of positives 1/2 in both.
    fair = check(
        ErrorParity(tolerance=0.01, on="sex"),
        {"sex: 0 vs 1 | error": (-0.01, -0.05 + 0.5 / 6, 0.01)},
        y=Y,
    )
    error = (fair - Y).abs()
    assert abs(error[SEX == 0].mean() - error[SEX == 1].mean()) == pytest.approx(0.01, abs=1e-12)


def test_error_parity_with_weights_and_unequal_shares() -> None:
    y = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0, 1])
    fair = project(SCORES, SEX, ErrorParity(0.0), y, bounds=(0, 1), weights=WEIGHTS)
    error = (fair - y).abs() * WEIGHTS
    a, b = (error[SEX == g].sum() / WEIGHTS[SEX == g].sum() for g in (0, 1))
    assert abs(a - b) <= 1e-14
    before = (SCORES - y).abs() * WEIGHTS
    a, b = (before[SEX == g].sum() / WEIGHTS[SEX == g].sum() for g in (0, 1))
    assert abs(a - b) > 0.01


def test_impact_ratio() -> None:
    # means 0.75 and 0.25
    fair = check(
        ImpactRatio(threshold=0.8, on="sex"),
        {
            "sex: 0 vs 1 | ratio": (0.0, 0.75 - 0.8 * 0.25, INF),
            "sex: 1 vs 0 | ratio": (0.0, 0.25 - 0.8 * 0.75, INF),
        },
    )
    assert fair[SEX == 1].mean() / fair[SEX == 0].mean() == pytest.approx(0.8, abs=1e-12)


def test_impact_ratio_holds_for_the_lowest_and_the_highest() -> None:
    fair = project(SCORES, PEOPLE, ImpactRatio(0.95, on=("sex", "race")), bounds=(0, None))
    means = [fair[(SEX == a) & (RACE == b)].mean().item() for a in range(2) for b in range(3)]
    assert min(means) >= 0.95 * max(means) - 1e-12


def test_minimum_rate() -> None:
    fair = check(
        MinimumRate(rate=0.4, on="sex"),
        {"sex: 0 | minimum": (0.4, 0.75, INF), "sex: 1 | minimum": (0.4, 0.25, INF)},
    )
    assert fair[:4].tolist() == SCORES[:4].tolist()  # levelled up, not down
    assert fair[4:].mean().item() == pytest.approx(0.4, abs=1e-12)
    one = formulate(MinimumRate(0.4), SCORES, torch.zeros(10, dtype=torch.int64), bounds=None)
    assert one.row_names == ("group: 0 | minimum",)  # one group is enough


def test_covariance() -> None:
    # ages have mean 40; (s - 40) x: -18 - 8 + 0 + 6 + 10 - 8 - 3 + 0 + 1 + 0 = -20, over 10
    fair = check(Covariance(tolerance=0.5, on="age"), {"age: covariance": (-0.5, -2.0, 0.5)},
                 groups={"age": AGE})  # fmt: skip
    covariance = ((AGE - AGE.mean()) * fair).mean()
    assert covariance.item() == pytest.approx(-0.5, abs=1e-12)
    assert torch.cov(torch.stack([AGE, fair]), correction=0)[0, 1].item() == pytest.approx(-0.5)


def test_weighted_covariance_of_several_attributes_within_strata() -> None:
    income = torch.arange(10, dtype=torch.float32) ** 2
    groups = {"sex": SEX, "age": AGE, "income": income}
    notion = Covariance(0.1, on=("age", "income"), given="sex")
    fair = project(SCORES, groups, notion, bounds=(0, 1), weights=WEIGHTS)
    names = formulate(notion, SCORES, groups, bounds=None).row_names
    assert names == (
        "age: covariance | sex = 0", "age: covariance | sex = 1",
        "income: covariance | sex = 0", "income: covariance | sex = 1",
    )  # fmt: skip
    for s in (AGE, income.double()):
        for g in (0, 1):
            w = WEIGHTS * (SEX == g)
            mean = (w * s).sum() / w.sum()
            before, after = ((w * (s - mean) * x).sum() / w.sum() for x in (SCORES, fair))
            assert abs(before) > 0.1
            assert abs(after) <= 0.1 + 1e-12


def test_a_constant_attribute_has_no_covariance() -> None:
    for value in (0.1, 1e9 / 3):
        groups = {"age": torch.full((10,), value, dtype=torch.float64)}
        fair = project(SCORES, groups, Covariance(0.0, on="age"), bounds=(0, 1))
        assert fair.tolist() == SCORES.tolist()


def test_group_calibration() -> None:
    # scores below 0.5 and from there on. x - y below: sex 1 only, 0.4 - 1, 0.3, 0.2, 0.1 - 1, 0;
    # above: sex 0 has 0.9 - 1, 0.8, 0.7 - 1, 0.6, mean 0.25; sex 1 has 0.5 - 1
    notion = GroupCalibration(tolerance=0.05, bins=[0.5], on="sex")
    fair = check(
        notion,
        {
            "sex: 1 | score < 0.5 | residual": (0.35, 0.2, 0.45),
            "sex: 0 | score >= 0.5 | residual": (0.45, 0.75, 0.55),
            "sex: 1 | score >= 0.5 | residual": (0.95, 0.5, 1.05),
        },
        y=Y,
    )
    assert abs((fair - Y)[:4].mean()) == pytest.approx(0.05, abs=1e-12)
    skipped = formulate(notion, SCORES, PEOPLE, Y, bounds=None).skipped
    assert skipped == ("sex: 0 | score < 0.5 | residual: a group has no samples",)


def test_bins_of_equal_width_and_their_edges() -> None:
    scores = torch.tensor([-1.0, 0.0, 0.25, 0.4999, 0.5, 0.75, 1.0, 7.0], dtype=torch.float64)
    problem = formulate(
        GroupCalibration(0.1, bins=4), scores, torch.zeros(8).long(), torch.ones(8), bounds=None
    )
    assert problem.row_names == (
        "group: 0 | score < 0.25 | residual",
        "group: 0 | 0.25 <= score < 0.5 | residual",
        "group: 0 | 0.5 <= score < 0.75 | residual",
        "group: 0 | score >= 0.75 | residual",
    )
    members = (problem.rows.to_dense().matrix[0] != 0).int().argmax(0)
    assert members.tolist() == [0, 0, 1, 1, 2, 3, 3, 3]


def test_bins_are_taken_from_scores_without_history_and_per_problem() -> None:
    scores = torch.stack([SCORES, SCORES.flip(0)]).requires_grad_()
    layer = FairnessLayer(GroupCalibration(0.1, bins=2), bounds=(0, 1))
    fair = layer(scores, SEX, Y)
    fair.square().sum().backward()
    assert torch.isfinite(scores.grad).all()
    for row, one in zip(fair.detach(), scores.detach(), strict=True):
        alone = project(one, SEX, GroupCalibration(0.1, bins=2), Y, bounds=(0, 1))
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_budget_of_everyone(weighted: bool) -> None:
    w = WEIGHTS if weighted else None
    total = float((SCORES if w is None else SCORES * w).sum())
    mass = float(10 if w is None else w.sum())
    check(Budget(total=total - 1), {"budget: total": (total - 1, total, total - 1)}, w=w)
    check(Budget(total=(None, 3.0)), {"budget: total": (-INF, total, 3.0)}, w=w)
    check(Budget(mean=(0.6, 0.7)), {"budget: mean": (0.6, total / mass, 0.7)}, w=w)


def test_budget_of_each_group() -> None:
    check(
        Budget(total=(None, 2.0), on="sex"),
        {"sex: 0 | total": (-INF, 3.0, 2.0), "sex: 1 | total": (-INF, 1.5, 2.0)},
    )


def test_a_budget_needs_no_groups_that_mean_something() -> None:
    fair = project(SCORES, torch.zeros(10).long(), Budget(mean=0.3), bounds=(0, 1))
    assert fair.mean().item() == pytest.approx(0.3, abs=1e-15)


def test_a_tensor_limit_of_a_budget() -> None:
    limit = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    project(SCORES, SEX, Budget(total=(None, limit)), bounds=(0, 1)).sum().backward()
    assert limit.grad.item() == pytest.approx(1.0)


def test_everything_at_once_on_different_attributes() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 300
    sex = torch.randint(0, 2, (n,), generator=generator)
    job = torch.randint(0, 3, (n,), generator=generator)
    age = 20 + 50 * torch.rand(n, generator=generator, dtype=torch.float64)
    race = torch.softmax(torch.randn(n, 3, generator=generator, dtype=torch.float64), -1)
    y = (torch.rand(n, generator=generator) < 0.4 + 0.2 * sex).double()
    scores = 0.6 * torch.rand(n, generator=generator, dtype=torch.float64) + 0.2 * sex + 0.1 * job
    notions = [
        ConditionalParity(0.02, on="sex", given="job"), ErrorParity(0.05, on="sex"),
        ImpactRatio(0.8, on="job"), MinimumRate(0.3, on="sex"), Covariance(0.1, on="age"),
        GroupCalibration(0.4, bins=3, on="sex"), Budget(total=(None, 150.0)),
        DemographicParity(0.01, on="race"), EqualizedOdds(0.04, on="sex"),
    ]  # fmt: skip
    groups = {"sex": sex, "job": job, "age": age, "race": race}
    layer = FairnessLayer(notions, bounds=(0, 1))
    x = layer(scores.requires_grad_(), groups, y)
    x.square().sum().backward()
    assert torch.isfinite(scores.grad).all()
    x = x.detach()
    for v in range(3):
        means = [x[(sex == g) & (job == v)].mean() for g in (0, 1)]
        assert abs(means[0] - means[1]) <= 0.02 + 1e-12
    means = torch.stack([x[job == v].mean() for v in range(3)])
    assert means.min() >= 0.8 * means.max() - 1e-12
    assert min(x[sex == g].mean() for g in (0, 1)) >= 0.3 - 1e-12
    assert abs(((age - age.mean()) * x).mean()) <= 0.1 + 1e-11
    assert x.sum() <= 150 + 1e-9
    soft = (race * x.unsqueeze(-1)).sum(0) / race.sum(0)
    assert soft.max() - soft.min() <= 0.01 + 1e-12
    errors = [(x - y).abs()[sex == g].mean() for g in (0, 1)]
    assert abs(errors[0] - errors[1]) <= 0.05 + 1e-12


# ---------------------------------------------------------------------------------------------
# Soft targets and soft groups
# ---------------------------------------------------------------------------------------------


def test_soft_targets_weigh_each_sample_by_its_chance() -> None:
    expected = {}
    for y, chance in ((0, 1 - CHANCE), (1, CHANCE)):
        a, b = (soft_mean(SCORES, chance * (SEX == g)) for g in (0, 1))
        expected[f"sex: 0 vs 1 | y = {y}"] = (-0.1, a - b, 0.1)
    check(EqualizedOdds(0.1, on="sex"), expected, y=CHANCE)
    problem = formulate(EqualizedOdds(0.1, on="sex"), SCORES, PEOPLE, CHANCE, bounds=(0, 1))
    assert isinstance(problem.rows, DenseRows)


def test_soft_groups_weigh_each_sample_by_its_chance() -> None:
    a, b = (soft_mean(SCORES, MIXED[:, g]) for g in (0, 1))
    check(DemographicParity(0.1), {"race: 0 vs 1": (-0.1, a - b, 0.1)}, groups={"race": MIXED})
    got = values(DemographicParity(0.1), SCORES, MIXED)  # a bare matrix
    assert list(got) == ["group: 0 vs 1"]


@pytest.mark.parametrize("weighted", [False, True])
def test_soft_groups_against_everyone_and_soft_errors(weighted: bool) -> None:
    w = WEIGHTS if weighted else torch.ones_like(WEIGHTS)
    everyone = soft_mean(SCORES, w)
    expected = {
        f"race: {g} vs all": (-0.01, soft_mean(SCORES, w * MIXED[:, g]) - everyone, 0.01)
        for g in (0, 1)
    }
    given = WEIGHTS if weighted else None
    check(DemographicParity(0.01, compare="overall"), expected, groups={"race": MIXED}, w=given)
    error = CHANCE * (1 - SCORES) + (1 - CHANCE) * SCORES
    gap = soft_mean(error, w * (SEX == 0)) - soft_mean(error, w * (SEX == 1))
    got = values(ErrorParity(0.01, on="sex"), SCORES, PEOPLE, CHANCE, given)
    lower, value, upper = got["sex: 0 vs 1 | error"]
    assert upper - lower == pytest.approx(0.02)
    assert value - (lower + upper) / 2 == pytest.approx(gap, abs=1e-14)


def test_soft_and_hard_attributes_intersect() -> None:
    notion = DemographicParity(0.05, on=("sex", "race"), compare="reference", reference=(0, 0))
    got = values(notion, SCORES, {"sex": SEX, "race": MIXED})
    for (a, b), (_, value, _) in zip(((0, 1), (1, 0), (1, 1)), got.values(), strict=True):
        left = soft_mean(SCORES, MIXED[:, b] * (SEX == a))
        assert value == pytest.approx(left - soft_mean(SCORES, MIXED[:, 0] * (SEX == 0)))


SIMPLE = [
    DemographicParity, EqualOpportunity, PredictiveEquality, EqualizedOdds, MeanResidual,
    ErrorParity,
]  # fmt: skip


@pytest.mark.parametrize("compare", ["pairwise", "overall"])
@pytest.mark.parametrize("notion", SIMPLE)
def test_hard_targets_of_any_dtype_are_the_same_to_the_last_bit(notion: Any, compare: Any) -> None:
    made = notion(0.03, compare=compare)
    want = project(SCORES, PEOPLE, made, Y, bounds=(0, 1))
    problem = formulate(made, SCORES, PEOPLE, Y.double(), bounds=(0, 1))
    assert isinstance(problem.rows, CellRows)
    assert project(SCORES, PEOPLE, made, Y.double(), bounds=(0, 1)).tolist() == want.tolist()
    assert project(SCORES, PEOPLE, made, Y.bool(), bounds=(0, 1)).tolist() == want.tolist()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("compare", ["pairwise", "overall"])
@pytest.mark.parametrize("notion", [*SIMPLE, ImpactRatio, MinimumRate])
def test_one_hot_groups_are_hard_groups_to_rounding(
    notion: Any, compare: Any, weighted: bool
) -> None:
    made = notion(0.5) if notion in (ImpactRatio, MinimumRate) else notion(0.03, compare=compare)
    one_hot = {name: torch.nn.functional.one_hot(c).double() for name, c in PEOPLE.items()}
    w = WEIGHTS if weighted else None
    hard = formulate(made, SCORES, PEOPLE, Y, bounds=(0, 1), weights=w)
    soft = formulate(made, SCORES, one_hot, Y, bounds=(0, 1), weights=w)
    assert soft.row_names == hard.row_names
    torch.testing.assert_close(
        soft.rows.to_dense().matrix, hard.rows.to_dense().matrix, rtol=1e-14, atol=0
    )
    torch.testing.assert_close(soft.u, hard.u, rtol=1e-14, atol=1e-15)
    got = project(SCORES, one_hot, made, Y, bounds=(0, 1), weights=w)
    want = project(SCORES, PEOPLE, made, Y, bounds=(0, 1), weights=w)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_targets_that_are_chances_of_0_and_1_are_hard_to_rounding() -> None:
    """The dense way of targets, taken when they have a history, against the way of cells."""
    soft = Y.double().requires_grad_()
    for notion in SIMPLE:
        got = formulate(notion(0.03), SCORES, PEOPLE, soft, bounds=(0, 1))
        want = formulate(notion(0.03), SCORES, PEOPLE, Y, bounds=(0, 1))
        torch.testing.assert_close(
            got.rows.to_dense().matrix.detach(), want.rows.to_dense().matrix, rtol=1e-14, atol=0
        )
        torch.testing.assert_close(got.u.detach(), want.u, rtol=1e-14, atol=1e-15)


def test_a_soft_group_that_nobody_can_be_in_is_missing() -> None:
    chances = torch.stack([MIXED[:, 0], torch.zeros(10).double(), MIXED[:, 1]], -1)
    problem = formulate(DemographicParity(0.1), SCORES, chances, bounds=None)
    assert problem.row_names == ("group: 0 vs 2",)
    assert len(problem.skipped) == 2


def test_nearly_everyone_in_one_soft_group_loses_no_digits() -> None:
    """group minus everyone is a small difference of large numbers."""
    chances = torch.full((10, 2), 1e-13, dtype=torch.float64)
    chances[:, 0] = 1 - 1e-13
    chances[0] = torch.tensor([1 - 1e-9, 1e-9], dtype=torch.float64)
    problem = formulate(DemographicParity(0.1, compare="overall"), SCORES, chances, bounds=None)
    first, second = problem.rows.to_dense().matrix[0]
    # g0 mass0 + g1 mass1 = everyone: the rows are proportional, with the other's mass as factor
    mass = chances.sum(0)
    torch.testing.assert_close(first * mass[0], -second * mass[1], rtol=1e-3, atol=0)


def test_batches_of_soft_groups_continuous_attributes_and_targets() -> None:
    generator = torch.Generator().manual_seed(4)
    batch, n = 3, 30
    scores = torch.rand(batch, n, generator=generator, dtype=torch.float64)
    race = torch.softmax(torch.randn(batch, n, 3, generator=generator), -1)
    age = torch.rand(batch, n, generator=generator)
    y = torch.rand(batch, n, generator=generator)
    notions = [EqualOpportunity(0.001, on="race"), Covariance(0.001, on="age")]
    fair = project(scores, {"race": race, "age": age}, notions, y, bounds=(0, 1))
    for b in range(batch):
        alone = project(scores[b], {"race": race[b], "age": age[b]}, notions, y[b], bounds=(0, 1))
        torch.testing.assert_close(fair[b], alone, rtol=0, atol=1e-12)
    shared = project(scores, {"race": race[0], "age": age[0]}, notions, y[0], bounds=(0, 1))
    torch.testing.assert_close(shared[0], fair[0], rtol=0, atol=1e-12)
