"""Bad input: every case has its own error, which says what was expected, what came, what to do.

An input that is refused leaves a layer as it was.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from refusals import GROUPS, INF, META, NAN, PARITY, SCORES, TARGETS, refused
from torch import Tensor, nn

from fairopt import (
    Constraint,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    FairnessLayer,
    MeanResidual,
    PredictiveEquality,
    ProblemError,
    backends,
    formulate,
    project,
)


def changed(tensor: Tensor, value: float) -> Tensor:
    """A copy whose third value is another."""
    out = tensor.clone()
    out[2] = value
    return out


# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_scores_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    refused(
        r"scores: expected finite values, got 1 NaN or infinite ones, first at index \(2,\); look",
        changed(SCORES, value).to(dtype),
    )


def test_infinities_of_both_signs_do_not_cancel() -> None:
    refused("got 2 NaN or infinite ones", torch.tensor([0.5, INF, -INF, 0.5]))


def test_scores_so_large_that_their_sum_overflows_are_finite() -> None:
    scores = torch.tensor([1e308, 1.7e308, 1e308, 0.0], dtype=torch.float64)
    fair = project(scores, GROUPS, PARITY, bounds=(0, 1))
    assert 0 <= fair.min()
    assert fair.max() <= 1
    half = torch.tensor([6e4, 6e4, 6e4, 0.0], dtype=torch.float16)
    assert project(half, GROUPS, PARITY, bounds=(0, 1)).dtype == torch.float16


def test_batched_scores_say_where() -> None:
    scores = SCORES.repeat(3, 1)
    scores[1, 3] = NAN
    refused(r"first at index \(1, 3\)", scores)


def test_empty_batch() -> None:
    refused(
        r"scores: expected at least one sample, got shape \(0,\); skip empty",
        torch.empty(0),
        torch.empty(0, dtype=torch.int64),
    )
    refused(r"got shape \(0, 4\)", torch.empty(0, 4))
    refused(r"got shape \(3, 0\)", torch.empty(3, 0), torch.empty(3, 0, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_scores_of_a_wrong_dtype(dtype: torch.dtype) -> None:
    refused(
        rf"scores: expected a floating-point tensor, got {dtype}; convert with .float\(\)",
        torch.ones(4).to(dtype),
    )


@pytest.mark.parametrize("shape", [(), (2, 2, 1)])
def test_scores_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    refused(r"scores: expected shape \(n,\), \(n, 1\) or \(B, n\), got", torch.ones(shape))


def test_scores_that_are_no_tensor() -> None:
    refused("scores: expected a tensor, got list", [0.1, 0.9, 0.4, 0.6])


# ---------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups",
    [GROUPS[:3], torch.zeros(5, dtype=torch.int64), GROUPS.repeat(2, 1), torch.tensor(1)],
    ids=lambda g: str(tuple(g.shape)),
)
def test_groups_of_a_wrong_shape(groups: Tensor) -> None:
    refused(
        r"groups: expected shape \(4,\) or \(4,\), one value for each score, got", SCORES, groups
    )
    refused(r"groups\['sex'\]: expected shape", SCORES, {"sex": groups})


def test_groups_of_a_wrong_batch() -> None:
    refused(
        r"groups: expected shape \(4,\) or \(3, 4\), one value for each score, got \(2, 4\)",
        SCORES.repeat(3, 1),
        GROUPS.repeat(2, 1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_groups_that_are_not_integers(dtype: torch.dtype) -> None:
    refused(
        rf"groups: expected integer or bool codes, got {dtype}; convert categories with .long\(\)",
        SCORES,
        GROUPS.to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8], ids=str)
def test_negative_codes(dtype: torch.dtype) -> None:
    refused(
        r"groups\['sex'\]: expected codes of at least 0, got -1; give unknown members a code",
        SCORES,
        {"sex": torch.tensor([0, 1, -1, 1], dtype=dtype)},
    )


def test_groups_on_another_device() -> None:
    refused(
        r"groups: expected device cpu, where the scores are, got meta; move it with .to\(...\)",
        SCORES,
        GROUPS.to(META),
    )


@pytest.mark.parametrize("groups", [[0, 1, 0, 1], None, "sex"], ids=repr)
def test_groups_that_are_no_tensor(groups: object) -> None:
    refused("groups: expected a tensor, got", SCORES, groups)


def test_an_attribute_that_is_no_tensor() -> None:
    refused(r"groups\['sex'\]: expected a tensor, got list", SCORES, {"sex": [0, 1, 0, 1]})


def test_no_attributes() -> None:
    refused("groups: expected at least one attribute, got an empty mapping", SCORES, {})


def test_attributes_without_names() -> None:
    refused("groups: expected names of attributes as keys, got 0", SCORES, {0: GROUPS})


@pytest.mark.parametrize("on", ["race", ("sex", "race")], ids=repr)
def test_a_missing_attribute(on: str | tuple[str, ...]) -> None:
    refused(
        r"DemographicParity: on=.*: expected attributes among 'sex', 'age'; groups has no 'race'. "
        "Pass groups as a mapping",
        SCORES,
        {"sex": GROUPS, "age": GROUPS},
        constraints=DemographicParity(tolerance=0.1, on=on),
    )


def test_a_named_attribute_with_bare_groups() -> None:
    refused(
        "expected attributes among 'group'; groups has no 'sex'",
        constraints=DemographicParity(tolerance=0.1, on="sex"),
    )


# ---------------------------------------------------------------------------------------------
# Missing groups
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compare", ["pairwise", "overall"])
@pytest.mark.parametrize("code", [0, 3])
def test_one_group_only_is_clipped_and_said(code: int, compare: str) -> None:
    layer = FairnessLayer(DemographicParity(tolerance=0.05, compare=compare), bounds=(0, 1))
    scores = torch.tensor([-0.2, 0.3, 1.4, 0.6])
    fair = layer(scores, torch.full((4,), code))
    assert fair.tolist() == scores.clamp(0, 1).tolist()
    assert layer.last.problem.row_names == ()
    assert layer.last.skipped
    if code == 0:
        assert layer.last.skipped == ("group: only one group",)


def test_one_group_only_is_refused_if_asked() -> None:
    for compare in ("pairwise", "overall"):
        refused(
            "groups: expected at least two groups to compare in group, got one; use larger or "
            'stratified batches, or missing_group="skip"',
            SCORES,
            torch.zeros(4, dtype=torch.int64),
            constraints=DemographicParity(tolerance=0.05, compare=compare),
            missing_group="raise",
        )


def test_one_group_in_one_of_several_attributes_is_refused_if_asked() -> None:
    refused(
        "expected at least two groups to compare in race, got one",
        SCORES,
        {"sex": GROUPS, "race": torch.zeros(4, dtype=torch.int64)},
        missing_group="raise",
    )


def test_one_sample() -> None:
    layer = FairnessLayer(PARITY, bounds=(0, 1))
    assert layer(torch.tensor([1.5]), torch.tensor([0])).tolist() == [1.0]
    assert layer.last.skipped == ("group: only one group",)


def test_a_missing_group_is_refused_if_asked() -> None:
    refused(
        "groups: the batch lacks a group, so that these rows compare nothing: group: 0 vs 1, "
        'group: 1 vs 2; use larger or stratified batches, or missing_group="skip"',
        SCORES,
        torch.tensor([0, 0, 2, 2]),
        missing_group="raise",
    )


def test_a_missing_group_is_skipped_and_named_by_default() -> None:
    layer = FairnessLayer(PARITY, bounds=(0, 1))
    layer(SCORES, torch.tensor([0, 0, 2, 2]))
    assert layer.last.skipped == (
        "group: 0 vs 1: a group has no samples",
        "group: 1 vs 2: a group has no samples",
    )


def test_a_group_missing_from_one_problem_of_a_batch_is_refused_if_asked() -> None:
    refused(
        r"these rows compare nothing: group: 0 vs 1 \(in 1 of 2 problems\);",
        SCORES.repeat(2, 1),
        torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]]),
        missing_group="raise",
    )


def test_an_absent_reference_is_refused_if_asked() -> None:
    refused(
        "these rows compare nothing: group: 0 vs 7, group: 1 vs 7;",
        constraints=DemographicParity(tolerance=0.1, compare="reference", reference=7),
        missing_group="raise",
    )


def test_a_missing_group_with_the_highest_code_is_refused_if_declared_and_asked() -> None:
    project(SCORES, GROUPS, PARITY, bounds=(0, 1), missing_group="raise")  # not known to be missing
    for counts in (3, {"group": 3}):
        refused(
            "these rows compare nothing: group: 0 vs 2, group: 1 vs 2; use larger or stratified",
            missing_group="raise",
            group_counts=counts,
        )


def test_boolean_groups_of_one_value_are_refused_if_asked() -> None:
    refused(
        "these rows compare nothing: group: 0 vs 1;",
        groups=torch.zeros(4, dtype=torch.bool),
        missing_group="raise",
    )


@pytest.mark.parametrize("counts", [2, {"race": 2}, {"sex": 2, "race": 2}], ids=repr)
def test_codes_beyond_the_declared_count(counts: Any) -> None:
    refused(
        r"groups\['race'\]: expected codes below 2, the number of groups declared, got 2; correct "
        "the code, or group_counts",
        groups={"sex": GROUPS, "race": torch.tensor([0, 2, 1, 2])},
        group_counts=counts,
    )


def test_true_beyond_the_declared_count() -> None:
    refused("expected codes below 1, .* got 1", groups=GROUPS.bool(), group_counts=1)


def test_a_declared_count_of_an_unknown_attribute_is_refused() -> None:
    refused("group_counts: expected names among 'group', got 'gender'", group_counts={"gender": 2})


@pytest.mark.parametrize("count", [0, -1, 2.0, NAN, True, "2", torch.tensor(2), [2]], ids=repr)
def test_counts_that_are_no_counts(count: Any) -> None:
    match = "group_counts: expected a whole number of at least 1"
    refused(f"{match}, or a mapping of attribute name to such, got", group_counts=count)
    refused(f"{match} for 'group', got", group_counts={"group": count})


def test_an_unknown_way_with_missing_groups() -> None:
    refused("missing_group: expected 'skip' or 'raise', got 'drop'", missing_group="drop")


# ---------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "notion", [EqualOpportunity, PredictiveEquality, EqualizedOdds, MeanResidual]
)
def test_targets_that_are_needed(notion: type[Constraint]) -> None:
    refused(
        f"targets: {notion.__name__} needs them, got none; pass targets with the shape",
        constraints=[PARITY, notion(tolerance=0.1)],
    )


@pytest.mark.parametrize("notion", [EqualOpportunity, PredictiveEquality, EqualizedOdds])
@pytest.mark.parametrize("value", [2.0, -1.0, -1e-9, 1.5, 256.0, 1e30])
def test_targets_that_must_be_binary_or_chances(notion: type[Constraint], value: float) -> None:
    refused(
        rf"targets: {notion.__name__} needs targets that are 0 or 1, or chances from 0 to 1, got "
        rf"{value!r}".replace("+", r"\+")
        + "; threshold them, or use MeanResidual",
        targets=changed(TARGETS.double(), value),
        constraints=notion(tolerance=0.1),
    )


@pytest.mark.parametrize("notion", [EqualOpportunity, MeanResidual])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_targets_that_are_not_finite(notion: type[Constraint], value: float) -> None:
    refused(
        "targets: expected finite values, got NaN or infinity",
        targets=changed(TARGETS.double(), value),
        constraints=notion(tolerance=0.1),
    )


def test_targets_of_a_wrong_kind() -> None:
    notion = MeanResidual(tolerance=0.1)
    refused("targets: expected a tensor, got list", targets=[0, 1, 0, 1], constraints=notion)
    refused(
        r"targets: expected shape \(4,\).*, got \(3,\)", targets=TARGETS[:3], constraints=notion
    )
    refused(
        "targets: expected device cpu, where the scores are, got meta; move it",
        targets=TARGETS.to(META),
        constraints=notion,
    )
    refused(
        "targets: expected real numbers, got torch.complex64",
        targets=TARGETS.to(torch.complex64),
        constraints=notion,
    )


def test_targets_that_nobody_needs_are_not_looked_at() -> None:
    project(SCORES, GROUPS, PARITY, torch.full((4,), NAN), bounds=(0, 1))


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, -1e-30, NAN, INF])
def test_weights_out_of_range(value: float) -> None:
    refused(
        "weights: expected finite numbers of at least 0; drop or correct the samples",
        weights=changed(torch.ones(4), value),
    )


def test_weights_of_a_wrong_kind() -> None:
    refused(r"weights: expected shape \(4,\).*, got \(3,\)", weights=torch.ones(3))
    refused("weights: expected a tensor, got float", weights=1.0)
    refused("weights: expected floating-point numbers, got torch.int64", weights=GROUPS)
    refused(
        "weights: expected device cpu, where the scores are, got meta",
        weights=torch.ones(4, device=META),
    )


# ---------------------------------------------------------------------------------------------
# Bounds
# ---------------------------------------------------------------------------------------------


def test_crossed_bounds() -> None:
    match = r"bounds: expected lower <= upper without NaN for every sample"
    refused(match + r".*got lower 1.0, upper 0.0", bounds=(1, 0))
    refused(match, bounds=(torch.tensor(0.7), 0.5))
    refused(match, bounds=(0.5, torch.tensor(0.2)))
    refused(match, bounds=(torch.tensor([0, 0, 0.6, 0]), torch.full((4,), 0.5)))
    refused(match + ".*got lower from 0.0 to 0.6", bounds=(torch.tensor([0, 0, 0.6, 0]), 0.5))
    refused(match, SCORES.repeat(2, 1), bounds=(torch.tensor([[0.0] * 4, [0, 0, 0.6, 0]]), 0.5))


def test_bounds_that_leave_nothing() -> None:
    match = "bounds: expected lower <= upper"
    refused(match, bounds=(INF, None))
    refused(match, bounds=(None, -INF))
    refused(match, bounds=(INF, INF))
    refused(match + r".*after rounding to what torch.bfloat16 can hold", SCORES.bfloat16(),
            bounds=(0.1001, 0.1002))  # fmt: skip


@pytest.mark.parametrize(
    "bounds",
    [(NAN, 1), (0, NAN), (torch.tensor(NAN), 1), (0, changed(torch.ones(4), NAN)), (None, NAN)],
    ids=["lower", "upper", "tensor", "one sample", "one side"],
)
def test_bounds_with_nan(bounds: object) -> None:
    refused("bounds: expected lower <= upper without NaN", bounds=bounds)


@pytest.mark.parametrize("bounds", [1.0, (0,), (0, 0.5, 1), "01", {0: 1}, torch.zeros(2)], ids=repr)
def test_bounds_that_are_no_pair(bounds: object) -> None:
    refused(r"bounds: expected \(lower, upper\), or None for none, got", bounds=bounds)


@pytest.mark.parametrize("value", ["0", True, [0.0], 1j, torch.tensor(0), torch.tensor(True)])
def test_a_bound_that_is_no_number(value: object) -> None:
    match = "bound: expected a number, a floating-point tensor or None, got"
    refused("lower " + match, bounds=(value, 1))
    refused("upper " + match, bounds=(0, value))


def test_bounds_of_a_wrong_shape_or_device() -> None:
    refused(r"lower bound: expected shape \(4,\).*, got \(3,\)", bounds=(torch.zeros(3), 1))
    refused("upper bound: expected device cpu.*, got meta", bounds=(0, torch.ones(4, device=META)))


# ---------------------------------------------------------------------------------------------
# Constraints
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, -1, NAN, -INF, torch.tensor(-0.1), torch.tensor(NAN)])
def test_a_tolerance_out_of_range(value: Any) -> None:
    with pytest.raises(
        ProblemError, match="EqualizedOdds: tolerance: expected a number of at least 0, got"
    ):
        EqualizedOdds(tolerance=value)


@pytest.mark.parametrize("value", [True, "0.1", None, [0.1], 0.1j], ids=repr)
def test_a_tolerance_that_is_no_number(value: Any) -> None:
    with pytest.raises(ProblemError, match="tolerance: expected a number, got") as caught:
        DemographicParity(tolerance=value)
    assert str(caught.value).endswith(type(value).__name__)


@pytest.mark.parametrize(
    "value", [torch.zeros(2), torch.zeros(0), torch.tensor(1), torch.tensor(True)], ids=repr
)
def test_a_tolerance_tensor_of_a_wrong_shape_or_dtype(value: Tensor) -> None:
    with pytest.raises(
        ProblemError,
        match="tolerance: expected a number or a floating-point tensor with one element, got torch",
    ):
        DemographicParity(tolerance=value)


def test_a_tolerance_is_required() -> None:
    with pytest.raises(TypeError, match="tolerance"):
        DemographicParity()  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [-0.1, NAN])
def test_a_tolerance_that_training_moved_out_of_range(value: float) -> None:
    """Not the raw scores, and not a solver's complaint."""
    tolerance = nn.Parameter(torch.tensor(0.1))
    notion = DemographicParity(tolerance=tolerance)
    project(SCORES, GROUPS, notion, bounds=(0, 1))
    with torch.no_grad():
        tolerance.fill_(value)
    refused(
        r"DemographicParity: tolerance: expected a number of at least 0, got .*; clamp one that",
        constraints=notion,
    )


def test_a_comparison_that_does_not_exist() -> None:
    with pytest.raises(
        ProblemError, match="compare: expected 'pairwise', 'overall' or 'reference', got 'all'"
    ):
        DemographicParity(tolerance=0.1, compare="all")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("compare", "reference"), [("reference", None), ("pairwise", 0), ("overall", 1)]
)
def test_a_reference_without_its_comparison_and_the_reverse(
    compare: Any, reference: int | None
) -> None:
    with pytest.raises(
        ProblemError,
        match="reference: give the code of the reference group with compare='reference', and only "
        f"then; got compare='{compare}', reference={reference}",
    ):
        DemographicParity(tolerance=0.1, compare=compare, reference=reference)


@pytest.mark.parametrize("reference", ["male", 0.5, (0, "x"), [0]], ids=repr)
def test_a_reference_that_is_no_code(reference: Any) -> None:
    with pytest.raises(ProblemError, match="reference: expected the integer code of a group, or a"):
        DemographicParity(tolerance=0.1, compare="reference", reference=reference)


@pytest.mark.parametrize(
    ("on", "reference", "expected"),
    [(("sex", "race"), 0, "2 code"), ("sex", (0, 1), "1 code"), (None, (0, 1), "1 code")],
)
def test_a_reference_that_does_not_fit_the_attributes(
    on: Any, reference: Any, expected: str
) -> None:
    refused(
        rf"reference: expected {expected}\(s\) for sex.*, got",
        SCORES,
        {"sex": GROUPS, "race": TARGETS},
        constraints=DemographicParity(
            tolerance=0.1, on=on, compare="reference", reference=reference
        ),
    )


@pytest.mark.parametrize("on", [5, ["sex"], (), ("sex", "sex"), ("sex", 1)], ids=repr)
def test_on_that_names_no_attributes(on: Any) -> None:
    with pytest.raises(
        ProblemError,
        match="on: expected the name of an attribute, a tuple of different names, or None for each",
    ):
        DemographicParity(tolerance=0.1, on=on)


def test_no_constraints() -> None:
    with pytest.raises(ProblemError, match="constraints: expected at least one, got none"):
        FairnessLayer([], bounds=(0, 1))
    with pytest.raises(ProblemError, match="constraints: expected at least one, got none"):
        project(SCORES, GROUPS, (), bounds=(0, 1))


@pytest.mark.parametrize("value", [0.05, None, "parity", DemographicParity, [PARITY, 0.05]])
def test_a_constraint_that_is_none(value: Any) -> None:
    with pytest.raises(
        ProblemError, match=r"constraints: expected parity notions such as DemographicParity\(tol"
    ):
        FairnessLayer(value, bounds=(0, 1))


def test_bounds_are_required() -> None:
    with pytest.raises(TypeError, match="bounds"):
        FairnessLayer(PARITY)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="bounds"):
        project(SCORES, GROUPS, PARITY)  # type: ignore[call-arg]


# ---------------------------------------------------------------------------------------------
# After a refusal
# ---------------------------------------------------------------------------------------------


def test_a_layer_works_after_it_refused() -> None:
    layer = FairnessLayer(PARITY, bounds=(0, 1))
    first = layer(SCORES, GROUPS)
    solution = layer.last
    for scores, groups in ((changed(SCORES, NAN), GROUPS), (SCORES, GROUPS.float())):
        with pytest.raises(ProblemError):
            layer(scores, groups)
        assert layer.last is solution
    assert layer(SCORES, GROUPS).tolist() == first.tolist()


def test_problem_errors_are_value_errors() -> None:
    """So that code which knows nothing of fairopt catches them as Python's own."""
    with pytest.raises(ValueError, match="tolerance"):
        DemographicParity(tolerance=-1)
    with pytest.raises(LookupError, match="backend"):
        backends.get("none such")


def test_formulate_refuses_what_the_layer_refuses() -> None:
    with pytest.raises(ProblemError, match="scores: expected finite"):
        formulate(PARITY, changed(SCORES, NAN), GROUPS, bounds=(0, 1))
