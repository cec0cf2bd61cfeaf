"""Parity notions on rigged data: rows counted by hand, and recomputed without fairopt.

The judge in this file, ``gaps``, is plain Python: it loops over samples and never sees a cell, a
coefficient or a projection. ``expected_rows`` says which comparisons a notion must make, and under
which names, from its definition alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fairopt import (
    Constraint,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    FairnessLayer,
    MeanResidual,
    PredictiveEquality,
    formulate,
    project,
)

EVENTS = {
    DemographicParity: (None,),
    EqualOpportunity: (1,),
    PredictiveEquality: (0,),
    EqualizedOdds: (0, 1),
    MeanResidual: (None,),
}
NOTIONS = list(EVENTS)


# ---------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------


def mean(values: Sequence[float], weights: Sequence[float], chosen: Sequence[bool]) -> float | None:
    """Weighted mean over the chosen samples; None if they weigh nothing."""
    mass = math.fsum(w for w, c in zip(weights, chosen, strict=True) if c)
    if mass == 0:
        return None
    return math.fsum(v * w for v, w, c in zip(values, weights, chosen, strict=True) if c) / mass


def gaps(
    notion: Constraint,
    x: Sequence[float],
    groups: Mapping[str, Sequence[int]],
    y: Sequence[float] | None,
    w: Sequence[float] | None = None,
) -> dict[str, float | None]:
    """Each row's difference of means by name; None where a side has no samples.

    Groups are compared in the order of their codes, for all codes that occur in the data.
    """
    n = len(x)
    w = [1.0] * n if w is None else w
    residual = type(notion) is MeanResidual
    values = [a - b for a, b in zip(x, y, strict=True)] if residual else x
    families = [(a,) for a in groups] if notion.on is None else [notion.on]
    families = [(f,) if isinstance(f, str) else f for f in families]
    out: dict[str, float | None] = {}
    for family, event in itertools.product(families, EVENTS[type(notion)]):
        codes = [tuple(groups[a][i] for a in family) for i in range(n)]
        present = [sorted({groups[a][i] for i in range(n)}) for a in family]
        every = list(itertools.product(*present))
        inside = [event is None or y[i] == event for i in range(n)]

        def name(code: tuple[int, ...]) -> str:
            return str(code[0]) if len(code) == 1 else f"({', '.join(map(str, code))})"

        def average(
            code: tuple[int, ...] | None,
            codes: list[tuple[int, ...]] = codes,
            inside: list[bool] = inside,
        ) -> float | None:
            return mean(
                values, w, [inside[i] and (code is None or codes[i] == code) for i in range(n)]
            )

        if notion.compare == "overall":
            pairs = [(a, None) for a in every]
        elif notion.compare == "reference":
            base = notion.reference if isinstance(notion.reference, tuple) else (notion.reference,)
            pairs = [(a, base) for a in every if a != base]
        else:
            pairs = list(itertools.combinations(every, 2))
        for a, b in pairs:
            label = f"{' x '.join(family)}: {name(a)} vs {'all' if b is None else name(b)}"
            label += "" if event is None else f" | y = {event}"
            label += " | residual" if residual else ""
            left, right = average(a), average(b)
            out[label] = None if left is None or right is None else left - right
    return out


def row_gaps(problem, x: Tensor) -> dict[str, float]:
    """What the rows of a written problem say of x: value less the shift of the row, problem 0."""
    value = problem.rows.apply(x.detach().reshape(1, -1))[0]
    centre = torch.where(
        torch.isfinite(problem.u[0]), (problem.l[0] + problem.u[0]) / 2, torch.zeros(())
    )
    return dict(zip(problem.row_names, (value - centre).tolist(), strict=True))


def check(
    notion: Constraint,
    scores: Tensor,
    groups: Mapping[str, Tensor],
    y: Tensor | None,
    w: Tensor | None = None,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> dict[str, float | None]:
    """Rows equal the judge's numbers for the scores; the projection holds the tolerance."""
    plain = {name: codes.tolist() for name, codes in groups.items()}
    ys, ws = None if y is None else y.tolist(), None if w is None else w.tolist()
    want = gaps(notion, scores.tolist(), plain, ys, ws)
    problem = formulate(notion, scores, groups, y, bounds=bounds, weights=w)
    kept = {name: gap for name, gap in want.items() if gap is not None}
    assert list(problem.row_names) == list(kept)
    assert list(problem.skipped) == [
        f"{name}: a group has no samples" for name, gap in want.items() if gap is None
    ]
    assert row_gaps(problem, scores) == pytest.approx(kept, rel=1e-12, abs=1e-14)
    fair = project(scores, groups, notion, y, bounds=bounds, weights=w)
    after = gaps(notion, fair.tolist(), plain, ys, ws)
    tolerance = float(notion.tolerance)
    worst = max(abs(gap) for gap in after.values() if gap is not None)
    assert worst <= tolerance + 1e-12
    before = max(abs(gap) for gap in kept.values())
    assert before > tolerance  # or the projection had nothing to do, and this showed nothing
    assert worst >= tolerance - 1e-9  # moved no further than the tolerance asks
    if bounds is not None:
        assert bounds[0] <= fair.min()
        assert fair.max() <= bounds[1]
    return kept


# ---------------------------------------------------------------------------------------------
# Rigged data: ten people
# ---------------------------------------------------------------------------------------------

SEX = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
RACE = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
Y = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0, 1, 0])
SCORES = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
WEIGHTS = torch.tensor([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], dtype=torch.float64)
PEOPLE = {"sex": SEX, "race": RACE}


def test_demographic_parity_counted_by_hand() -> None:
    # sex 0: (0.9 + 0.8 + 0.7 + 0.6) / 4 = 0.75; sex 1: 1.5 / 6 = 0.25
    kept = check(DemographicParity(tolerance=0.1), SCORES, {"sex": SEX}, None)
    assert kept == pytest.approx({"sex: 0 vs 1": 0.5})


def test_equal_opportunity_counted_by_hand() -> None:
    # positives: sex 0 has 0.9 and 0.7, mean 0.8; sex 1 has 0.5, 0.4 and 0.1, mean 1/3
    kept = check(EqualOpportunity(tolerance=0.1), SCORES, {"sex": SEX}, Y)
    assert kept == pytest.approx({"sex: 0 vs 1 | y = 1": 0.8 - 1 / 3})


def test_predictive_equality_counted_by_hand() -> None:
    # negatives: sex 0 has 0.8 and 0.6, mean 0.7; sex 1 has 0.3, 0.2 and 0.0, mean 1/6
    kept = check(PredictiveEquality(tolerance=0.1), SCORES, {"sex": SEX}, Y)
    assert kept == pytest.approx({"sex: 0 vs 1 | y = 0": 0.7 - 1 / 6})


def test_equalized_odds_counted_by_hand() -> None:
    kept = check(EqualizedOdds(tolerance=0.1), SCORES, {"sex": SEX}, Y)
    assert kept == pytest.approx(
        {"sex: 0 vs 1 | y = 0": 0.7 - 1 / 6, "sex: 0 vs 1 | y = 1": 0.8 - 1 / 3}
    )


def test_mean_residual_counted_by_hand() -> None:
    # x - y: sex 0 has 0.75 - 0.5 = 0.25, sex 1 has 0.25 - 0.5 = -0.25
    kept = check(MeanResidual(tolerance=0.1), SCORES, {"sex": SEX}, Y)
    assert kept == pytest.approx({"sex: 0 vs 1 | residual": 0.5})


def test_mean_residual_takes_real_targets() -> None:
    y = torch.tensor([3.0, -1, 2, 0.5, 10, -4, 2.5, 0, 1, 7], dtype=torch.float64)
    # x - y: sex 0 has (3 - 4.5) / 4 = -0.375, sex 1 has (1.5 - 16.5) / 6 = -2.5
    kept = check(MeanResidual(tolerance=0.25), SCORES, {"sex": SEX}, y, bounds=None)
    assert kept == pytest.approx({"sex: 0 vs 1 | residual": 2.125})


def test_weights_weigh_the_means() -> None:
    # sex 0: (0.9 + 1.6 + 2.1 + 2.4) / 10 = 0.7; sex 1: (2.5 + 0.4 + 0.6 + 0.6 + 0.4) / 20 = 0.225
    kept = check(DemographicParity(tolerance=0.1), SCORES, {"sex": SEX}, None, WEIGHTS)
    assert kept == pytest.approx({"sex: 0 vs 1": 0.475})


def test_overall_compares_with_everyone_not_with_the_rest() -> None:
    # everyone: 4.5 / 10 = 0.45
    kept = check(DemographicParity(tolerance=0.1, compare="overall"), SCORES, {"sex": SEX}, None)
    assert kept == pytest.approx({"sex: 0 vs all": 0.3, "sex: 1 vs all": -0.2})


def test_overall_stays_within_its_event() -> None:
    # positives: 0.8 and 1/3 against (0.9 + 0.7 + 0.5 + 0.4 + 0.1) / 5 = 0.52
    kept = check(EqualOpportunity(tolerance=0.1, compare="overall"), SCORES, {"sex": SEX}, Y)
    assert kept == pytest.approx(
        {"sex: 0 vs all | y = 1": 0.28, "sex: 1 vs all | y = 1": 1 / 3 - 0.52}
    )


def test_reference_compares_each_group_with_it() -> None:
    # race 0: 1.8 / 4 = 0.45; race 1: 1.5 / 3 = 0.5; race 2: 1.2 / 3 = 0.4
    notion = DemographicParity(tolerance=0.01, compare="reference", reference=1)
    kept = check(notion, SCORES, {"race": RACE}, None)
    assert kept == pytest.approx({"race: 0 vs 1": -0.05, "race: 2 vs 1": -0.1})


def test_pairwise_compares_all_pairs() -> None:
    kept = check(DemographicParity(tolerance=0.01), SCORES, {"race": RACE}, None)
    assert kept == pytest.approx({"race: 0 vs 1": -0.05, "race: 0 vs 2": 0.05, "race: 1 vs 2": 0.1})


def test_several_attributes_are_compared_one_at_a_time() -> None:
    kept = check(DemographicParity(tolerance=0.02), SCORES, PEOPLE, None)
    assert kept == pytest.approx(
        {"sex: 0 vs 1": 0.5, "race: 0 vs 1": -0.05, "race: 0 vs 2": 0.05, "race: 1 vs 2": 0.1}
    )


def test_on_picks_one_attribute() -> None:
    notion = DemographicParity(tolerance=0.02, on="race")
    plain = {name: codes.tolist() for name, codes in PEOPLE.items()}
    fair = project(SCORES, PEOPLE, notion, bounds=(0, 1))
    after = gaps(DemographicParity(tolerance=0.02), fair.tolist(), plain, None)
    assert formulate(notion, SCORES, PEOPLE, bounds=None).row_names == (
        "race: 0 vs 1", "race: 0 vs 2", "race: 1 vs 2",
    )  # fmt: skip
    assert max(abs(after[r]) for r in after if r.startswith("race")) <= 0.02 + 1e-12
    assert after["sex: 0 vs 1"] > 0.4  # not asked for, and not done


def test_intersections_counted_by_hand() -> None:
    sex = torch.tensor([0, 0, 0, 1, 1, 1])
    race = torch.tensor([0, 1, 1, 0, 0, 1])
    scores = torch.tensor([0.9, 0.6, 0.8, 0.2, 0.4, 0.1], dtype=torch.float64)
    notion = DemographicParity(tolerance=0.05, on=("sex", "race"))
    kept = check(notion, scores, {"sex": sex, "race": race}, None)
    # (0, 0): 0.9, (0, 1): 0.7, (1, 0): 0.3, (1, 1): 0.1
    assert kept == pytest.approx(
        {
            "sex x race: (0, 0) vs (0, 1)": 0.2,
            "sex x race: (0, 0) vs (1, 0)": 0.6,
            "sex x race: (0, 0) vs (1, 1)": 0.8,
            "sex x race: (0, 1) vs (1, 0)": 0.4,
            "sex x race: (0, 1) vs (1, 1)": 0.6,
            "sex x race: (1, 0) vs (1, 1)": 0.2,
        }
    )


def test_the_order_of_an_intersection_is_the_order_of_on() -> None:
    notion = DemographicParity(tolerance=0.01, on=("race", "sex"), compare="overall")
    kept = check(notion, SCORES, PEOPLE, None)
    assert list(kept)[:3] == [
        "race x sex: (0, 0) vs all", "race x sex: (0, 1) vs all", "race x sex: (1, 0) vs all",
    ]  # fmt: skip


def test_an_intersection_against_a_reference() -> None:
    notion = DemographicParity(
        tolerance=0.05, on=("sex", "race"), compare="reference", reference=(1, 2)
    )
    kept = check(notion, SCORES, PEOPLE, None)
    assert len(kept) == 5
    assert all(name.endswith(" vs (1, 2)") for name in kept)


def test_marginal_parity_is_not_intersectional_parity() -> None:
    """The classic: both margins even, all four intersections uneven."""
    a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    scores = torch.tensor([0.9, 0.1, 0.1, 0.9], dtype=torch.float64)
    groups = {"a": a, "b": b}
    untouched = project(scores, groups, DemographicParity(tolerance=0.0), bounds=(0, 1))
    torch.testing.assert_close(untouched, scores, rtol=0, atol=1e-15)
    moved = project(scores, groups, DemographicParity(tolerance=0.0, on=("a", "b")), bounds=(0, 1))
    torch.testing.assert_close(moved, torch.full_like(scores, 0.5), rtol=0, atol=1e-15)


@pytest.mark.parametrize("compare", ["pairwise", "overall", "reference"])
@pytest.mark.parametrize("on", [None, "race", ("sex", "race")], ids=["each", "one", "cross"])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("notion", NOTIONS, ids=lambda kind: kind.__name__)
def test_every_notion_in_every_comparison(
    notion: type[Constraint], weighted: bool, on: str | tuple[str, ...] | None, compare: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    n = 60
    sex = torch.arange(n) % 2
    race = torch.randint(0, 3, (n,), generator=generator)
    y = torch.randint(0, 2, (n,), generator=generator)
    scores = torch.rand(n, dtype=torch.float64, generator=generator) * 0.6 + 0.2 * sex + 0.1 * race
    weights = torch.rand(n, dtype=torch.float64, generator=generator) + 0.1 if weighted else None
    reference = None
    if compare == "reference":
        reference = (1, 2) if isinstance(on, tuple) else 1
    made = notion(tolerance=0.02, on=on, compare=compare, reference=reference)
    check(made, scores, {"sex": sex, "race": race}, y, weights)


def test_a_bare_tensor_is_the_attribute_group() -> None:
    problem = formulate(DemographicParity(tolerance=0.1), SCORES, SEX, bounds=None)
    assert problem.row_names == ("group: 0 vs 1",)


def test_boolean_groups_are_the_groups_0_and_1() -> None:
    notion = DemographicParity(tolerance=0.1)
    torch.testing.assert_close(
        project(SCORES, SEX == 1, notion, bounds=(0, 1)),
        project(SCORES, SEX, notion, bounds=(0, 1)),
        rtol=0, atol=0,
    )  # fmt: skip
    problem = formulate(notion, SCORES, {"old": SEX == 1}, bounds=None)
    assert problem.row_names == ("old: 0 vs 1",)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str
)
def test_every_integer_dtype_of_groups_is_the_same(dtype: torch.dtype) -> None:
    notion = EqualizedOdds(tolerance=0.05)
    got = project(SCORES, RACE.to(dtype), notion, Y, bounds=(0, 1))
    torch.testing.assert_close(got, project(SCORES, RACE, notion, Y, bounds=(0, 1)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "y", [Y.bool(), Y.float(), Y.double(), Y.to(torch.uint8), Y.half()], ids=lambda y: str(y.dtype)
)
def test_targets_of_any_dtype_are_the_same(y: Tensor) -> None:
    notions = [EqualizedOdds(tolerance=0.1), MeanResidual(tolerance=0.1)]
    got = project(SCORES, SEX, notions, y, bounds=(0, 1))
    torch.testing.assert_close(got, project(SCORES, SEX, notions, Y, bounds=(0, 1)), rtol=0, atol=0)


def test_large_sparse_codes_keep_their_names() -> None:
    codes = torch.tensor([0, 7, 10**9])[RACE]
    kept = check(DemographicParity(tolerance=0.01), SCORES, {"zip": codes}, None)
    assert kept == pytest.approx(
        {"zip: 0 vs 7": -0.05, "zip: 0 vs 1000000000": 0.05, "zip: 7 vs 1000000000": 0.1}
    )


def test_large_codes_work_as_reference_and_in_intersections() -> None:
    codes = torch.tensor([5, 7, 2**62])[RACE]
    notion = EqualOpportunity(
        tolerance=0.05, on=("sex", "zip"), compare="reference", reference=(0, 2**62)
    )
    kept = check(notion, SCORES, {"sex": SEX, "zip": codes}, Y)
    base = "(0, 4611686018427387904) | y = 1"  # the positive of sex 0 and race 2: 0.7
    assert kept == pytest.approx(
        {
            f"sex x zip: (0, 5) vs {base}": 0.9 - 0.7,
            f"sex x zip: (1, 7) vs {base}": 0.5 - 0.7,
            f"sex x zip: (1, 4611686018427387904) vs {base}": 0.25 - 0.7,
        }
    )


def test_300_groups_of_a_byte_too_many() -> None:
    """More cells than a byte can number."""
    n, g = 900, 300
    codes = torch.arange(n) % g
    scores = torch.linspace(0, 1, n, dtype=torch.float64) * (codes / g)
    check(DemographicParity(tolerance=0.05, compare="overall"), scores, {"school": codes}, None)


def test_several_notions_hold_at_once_each_with_its_own_tolerance() -> None:
    notions = [
        DemographicParity(tolerance=0.2, on="sex"),
        EqualOpportunity(tolerance=0.05, on="sex"),
        DemographicParity(tolerance=0.01, on="race", compare="overall"),
        MeanResidual(tolerance=0.12, on="sex", compare="reference", reference=1),
    ]
    layer = FairnessLayer(notions, bounds=(0, 1))
    fair = layer(SCORES, PEOPLE, Y).tolist()
    plain = {name: codes.tolist() for name, codes in PEOPLE.items()}
    names: list[str] = []
    for notion in notions:
        after = gaps(notion, fair, plain, Y.tolist())
        names += after
        assert max(abs(v) for v in after.values()) <= float(notion.tolerance) + 1e-12
    assert layer.last.problem.row_names == tuple(names)
    assert layer.last.problem.u[0, :2].tolist() == [0.2, 0.05]


def test_the_stricter_of_two_tolerances_holds() -> None:
    loose, strict = DemographicParity(tolerance=0.3), DemographicParity(tolerance=0.1)
    both = project(SCORES, SEX, [loose, strict], bounds=(0, 1))
    torch.testing.assert_close(
        both, project(SCORES, SEX, strict, bounds=(0, 1)), rtol=0, atol=1e-14
    )


def test_an_infinite_tolerance_only_clips() -> None:
    scores = torch.tensor([-0.5, 0.3, 1.5, 0.2], dtype=torch.float64)
    fair = project(scores, SEX[2:6], DemographicParity(tolerance=math.inf), bounds=(0, 1))
    torch.testing.assert_close(fair, scores.clamp(0, 1), rtol=0, atol=0)


def test_one_tolerance_tensor_for_several_notions() -> None:
    shared = torch.tensor(0.1, dtype=torch.float64)
    notions = [DemographicParity(tolerance=shared), EqualOpportunity(tolerance=shared)]
    fair = project(SCORES, SEX, notions, Y, bounds=(0, 1)).tolist()
    for notion in notions:
        after = gaps(notion, fair, {"group": SEX.tolist()}, Y.tolist())
        assert max(abs(v) for v in after.values()) <= 0.1 + 1e-12


# ---------------------------------------------------------------------------------------------
# Missing groups
# ---------------------------------------------------------------------------------------------


def test_rows_of_a_missing_group_are_left_out_and_named() -> None:
    groups = torch.tensor([0, 0, 2, 2])
    scores = torch.tensor([0.9, 0.7, 0.3, 0.1], dtype=torch.float64)
    layer = FairnessLayer(DemographicParity(tolerance=0.1), bounds=(0, 1))
    fair = layer(scores, groups)
    assert layer.last.problem.row_names == ("group: 0 vs 2",)
    assert layer.last.skipped == (
        "group: 0 vs 1: a group has no samples",
        "group: 1 vs 2: a group has no samples",
    )
    assert fair[:2].mean() - fair[2:].mean() == pytest.approx(0.1, abs=1e-12)


def test_a_group_can_be_missing_from_one_event_only() -> None:
    groups = torch.tensor([0, 0, 1, 1])
    y = torch.tensor([0, 1, 0, 0])
    scores = torch.tensor([0.9, 0.7, 0.3, 0.1], dtype=torch.float64)
    layer = FairnessLayer(EqualizedOdds(tolerance=0.1), bounds=(0, 1))
    fair = layer(scores, groups, y)
    assert layer.last.problem.row_names == ("group: 0 vs 1 | y = 0",)
    assert layer.last.skipped == ("group: 0 vs 1 | y = 1: a group has no samples",)
    assert fair[1] == 0.7  # nothing constrains the only positive
    assert fair[0] - fair[2:].mean() == pytest.approx(0.1, abs=1e-12)


def test_a_group_that_weighs_nothing_is_missing() -> None:
    weights = torch.where(RACE == 1, 0.0, 1.0).double()
    problem = formulate(
        DemographicParity(tolerance=0.1), SCORES, {"race": RACE}, bounds=None, weights=weights
    )
    assert problem.row_names == ("race: 0 vs 2",)
    assert len(problem.skipped) == 2


def test_an_absent_reference_is_named_not_forgotten() -> None:
    notions = [
        DemographicParity(tolerance=0.1),
        DemographicParity(tolerance=0.1, compare="reference", reference=7),
    ]
    problem = formulate(notions, SCORES, {"sex": SEX}, bounds=None)
    assert problem.row_names == ("sex: 0 vs 1",)
    assert problem.skipped == (
        "sex: 0 vs 7: a group has no samples",
        "sex: 1 vs 7: a group has no samples",
    )


def test_a_lone_group_is_named_beside_attributes_that_can_be_compared() -> None:
    groups = {"sex": SEX, "race": torch.zeros(10, dtype=torch.int64)}
    problem = formulate(DemographicParity(tolerance=0.1), SCORES, groups, bounds=None)
    assert problem.row_names == ("sex: 0 vs 1",)
    assert problem.skipped == ("race: only one group",)


def test_a_missing_group_with_the_highest_code_is_named_where_counts_are_declared() -> None:
    groups = torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([0.9, 0.7, 0.3, 0.1], dtype=torch.float64)
    layer = FairnessLayer(DemographicParity(tolerance=0.1), bounds=(0, 1))
    fair = layer(scores, groups)
    assert layer.last.skipped == ()  # nothing says that there is a group 2
    for counts in (3, {"group": 3}):
        declared = FairnessLayer(
            DemographicParity(tolerance=0.1), bounds=(0, 1), group_counts=counts
        )
        assert declared(scores, groups).tolist() == fair.tolist()
        assert declared.last.problem.row_names == ("group: 0 vs 1",)
        assert declared.last.skipped == (
            "group: 0 vs 2: a group has no samples",
            "group: 1 vs 2: a group has no samples",
        )
        alone = declared(scores, torch.zeros(4, dtype=torch.int64))
        assert alone.tolist() == scores.tolist()
        assert len(declared.last.skipped) == 3  # 0 vs 1, 0 vs 2, 1 vs 2


def test_counts_name_missing_groups_of_intersections_and_events() -> None:
    notion = EqualOpportunity(tolerance=0.1, on=("sex", "race"), compare="overall")
    counts = {"sex": 2, "race": 4}
    problem = formulate(notion, SCORES, PEOPLE, Y, bounds=None, group_counts=counts)
    lacking = formulate(notion, SCORES, PEOPLE, Y, bounds=None)
    assert problem.row_names == lacking.row_names
    new = {f"sex x race: ({sex}, 3) vs all | y = 1: a group has no samples" for sex in (0, 1)}
    assert set(problem.skipped) == set(lacking.skipped) | new
    partly = formulate(notion, SCORES, PEOPLE, Y, bounds=None, group_counts={"race": 4})
    assert partly.skipped == problem.skipped  # sex has the groups of the call


@pytest.mark.parametrize("compare", ["pairwise", "overall"])
def test_counts_that_the_data_fill_change_nothing(compare: str) -> None:
    notion = DemographicParity(tolerance=0.02, compare=compare)
    counts = {"sex": 2, "race": 3}
    fair = project(SCORES, PEOPLE, notion, bounds=(0, 1), group_counts=counts)
    assert fair.tolist() == project(SCORES, PEOPLE, notion, bounds=(0, 1)).tolist()
    problem = formulate(notion, SCORES, PEOPLE, bounds=None, group_counts=counts)
    assert problem.skipped == ()
    assert problem.row_names == formulate(notion, SCORES, PEOPLE, bounds=None).row_names


def test_many_declared_groups_keep_their_codes() -> None:
    """More than are numbered without a declaration."""
    notion = DemographicParity(tolerance=0.05, compare="reference", reference=99)
    codes = torch.tensor([0, 50, 99])[RACE]
    problem = formulate(notion, SCORES, {"school": codes}, bounds=None, group_counts=100)
    assert problem.row_names == ("school: 0 vs 99", "school: 50 vs 99")
    assert len(problem.skipped) == 97


@pytest.mark.parametrize("present", [False, True], ids=str)
def test_boolean_groups_are_two_without_a_declaration(present: bool) -> None:
    groups = torch.full((10,), present)
    problem = formulate(DemographicParity(tolerance=0.1), SCORES, groups, bounds=None)
    assert problem.row_names == ()
    assert problem.skipped == ("group: 0 vs 1: a group has no samples",)


def test_different_groups_missing_in_different_problems() -> None:
    groups = torch.tensor([[0, 0, 1, 1], [0, 0, 2, 2], [0, 1, 2, 2], [1, 1, 1, 1]])
    scores = torch.tensor([[0.9, 0.7, 0.3, 0.1]], dtype=torch.float64).repeat(4, 1)
    notion = DemographicParity(tolerance=0.05)
    layer = FairnessLayer(notion, bounds=(0, 1))
    fair = layer(scores, groups)
    assert layer.last.problem.row_names == ("group: 0 vs 1", "group: 0 vs 2", "group: 1 vs 2")
    assert layer.last.skipped == (
        "group: 0 vs 1 (in 2 of 4 problems): a group has no samples",
        "group: 0 vs 2 (in 2 of 4 problems): a group has no samples",
        "group: 1 vs 2 (in 3 of 4 problems): a group has no samples",
    )
    for b in range(4):
        after = gaps(notion, fair[b].tolist(), {"group": groups[b].tolist()}, None)
        assert all(abs(v) <= 0.05 + 1e-12 for v in after.values())
        alone = project(scores[b], groups[b], notion, bounds=(0, 1))
        torch.testing.assert_close(fair[b], alone, rtol=0, atol=1e-14)
    torch.testing.assert_close(fair[3], scores[3], rtol=0, atol=0)  # one group: left as it is


def test_batched_groups_targets_and_weights_belong_to_their_problem() -> None:
    generator = torch.Generator().manual_seed(1)
    batch, n = 3, 24
    scores = torch.rand(batch, n, dtype=torch.float64, generator=generator)
    groups = torch.randint(0, 3, (batch, n), generator=generator)
    y = torch.randint(0, 2, (batch, n), generator=generator)
    w = torch.rand(batch, n, dtype=torch.float64, generator=generator) + 0.1
    for notion in (EqualizedOdds(tolerance=0.02), MeanResidual(tolerance=0.02)):
        fair = project(scores, groups, notion, y, bounds=(0, 1), weights=w)
        for b in range(batch):
            after = gaps(
                notion, fair[b].tolist(), {"g": groups[b].tolist()}, y[b].tolist(), w[b].tolist()
            )
            assert max(abs(v) for v in after.values()) <= 0.02 + 1e-12
            alone = project(scores[b], groups[b], notion, y[b], bounds=(0, 1), weights=w[b])
            torch.testing.assert_close(fair[b], alone, rtol=0, atol=1e-13)


def test_groups_shared_by_a_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(3, 10, dtype=torch.float64, generator=generator)
    notion = DemographicParity(tolerance=0.01)
    fair = project(scores, PEOPLE, notion, bounds=(0, 1))
    plain = {name: codes.tolist() for name, codes in PEOPLE.items()}
    for b in range(3):
        after = gaps(notion, fair[b].tolist(), plain, None)
        assert max(abs(v) for v in after.values()) <= 0.01 + 1e-12


def test_a_named_attribute_may_be_called_y() -> None:
    """The outcome's own axis is called y as well."""
    kept = check(EqualOpportunity(tolerance=0.1), SCORES, {"y": SEX}, Y)
    assert list(kept) == ["y: 0 vs 1 | y = 1"]
