"""What an InfeasibleError says: the smallest set in conflict, and the smallest tolerance."""

from __future__ import annotations

import copy
import pickle
import re
from collections import Counter
from importlib import import_module
from itertools import combinations
from typing import Any

import pytest
import torch
from agreeing import LINEAR, capable
from conflicting import can_hold, conflicting_cases, least_addition, least_factor
from hypothesis import assume, given, settings
from problems import Case

import fairopt.solving.cell_means
from fairopt import (
    LP,
    QP,
    Budget,
    ConvergenceError,
    DemographicParity,
    FairnessLayer,
    ImpactRatio,
    InfeasibleError,
    MinimumRate,
    ProblemError,
    SparseRows,
    formulate,
    project,
    solve,
)
from fairopt.solving.autograd import attempt
from fairopt.solving.conflicts import explain

seen: Counter[str] = Counter()
# Below this, in units of predictions near 1, HiGHS and rounding may see it differently.
CLEAR = 1e-6


def error_of(problem: QP | LP, backend: str = "auto") -> InfeasibleError:
    with pytest.raises(InfeasibleError) as caught:
        solve(problem, backend=backend)
    return caught.value


@settings(max_examples=300)
@given(conflicting_cases(20))
def test_smallest_set_and_smallest_tolerance(case: Case) -> None:
    try:
        problem = formulate(
            case.constraints, case.scores, case.groups, case.targets, bounds=case.bounds,
            weights=case.weights,
        )  # fmt: skip
    except ProblemError:
        assume(False)
    try:
        solve(problem, backend="numba")
    except InfeasibleError as raised:
        error = raised
    else:
        return
    addition = least_addition(problem)
    assume(addition > CLEAR)
    # By number: two rows may have one name.
    names = tuple(map(str, range(problem.shape[1])))
    problem = QP(
        problem.P, problem.q, problem.rows, problem.l, problem.u, problem.lb, problem.ub,
        row_names=names,
    )  # fmt: skip
    seen["infeasible"] += 1
    found = error_of(problem, "numba").conflict
    assert found is not None and error.conflict is not None
    rows = [int(name) for name in found.rows]

    # In conflict, and without any one of them not.
    assert not can_hold(problem, rows)
    for left_out in rows:
        assert can_hold(problem, [r for r in rows if r != left_out])
    if len(names) <= 12:
        assert found.smallest
    if found.smallest and len(rows) <= 3:  # HiGHS, asked for each smaller set
        seen[f"sets of {len(rows)}"] += 1
        for size in range(1, len(rows)):
            if len(names) <= 12:
                assert all(
                    can_hold(problem, some) for some in combinations(range(len(names)), size)
                )

    # The tolerance: right to 1e-6, and a step below it there is no point.
    assert abs(found.addition - addition) <= 1e-6 * addition
    factor = least_factor(problem)
    if factor is None:
        seen["no factor"] += 1
        assert found.factor is None
    else:
        seen["factor"] += 1
        assert found.factor is not None
        assert abs(found.factor - factor) <= 1e-6 * factor
        everything = range(len(names))
        assert can_hold(problem, everything, factor=found.factor * (1 + 1e-6))
        assert not can_hold(problem, everything, factor=found.factor * (1 - 1e-5))


def test_the_draws_above_are_of_all_kinds() -> None:
    assert seen["infeasible"] >= 60, seen
    assert seen["factor"] >= 10 and seen["no factor"] >= 10, seen
    assert seen["sets of 1"] >= 10 and seen["sets of 2"] >= 5, seen


def rigged(apart: float = 0.1) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
    """Half of the samples may not go below 0.5, the others not above 0.5 - apart."""
    n = 24
    sex = torch.arange(n) % 2
    lower = 0.5 * (1 - sex).double()
    upper = 1 - sex.double() * (0.5 + apart)
    groups = {"sex": sex, "race": torch.arange(n) % 3}
    return torch.linspace(0, 1, n, dtype=torch.float64), groups, (lower, upper)


def refusal(constraints: Any, bounds: Any = (0, 1), apart: float = 0.1) -> InfeasibleError:
    scores, groups, within = rigged(apart)
    with pytest.raises(InfeasibleError) as caught:
        project(
            scores, groups, constraints, torch.arange(24).div(2, rounding_mode="floor") % 2,
            bounds=within if bounds == "apart" else bounds,
        )  # fmt: skip
    return caught.value


def test_the_message_is_advice() -> None:
    error = refusal(
        [DemographicParity(0.04, on="race"), DemographicParity(0.02, on="sex")], "apart"
    )
    assert str(error) == (
        "backend 'numba', problem 0 of the batch: no point satisfies all rows within the bounds; "
        "loosen a tolerance or widen the bounds; the rows in conflict are 'sex: 0 vs 1'; 5 times "
        "the tolerances would do (0.02 becomes 0.1)"
    )
    assert error.rows == ("sex: 0 vs 1",)
    assert error.factor == pytest.approx(5, rel=1e-12)
    assert error.addition == pytest.approx(0.08, rel=1e-12)
    assert error.conflict is not None and error.conflict.smallest
    assert error.conflict.tolerances == (0.02,)


def test_what_is_advised_suffices() -> None:
    """Numbers are rounded up, so that whoever types them in gets predictions."""
    error = refusal([DemographicParity(0.03, on="sex")], "apart", apart=0.1 + 1 / 7000)
    shown = float(str(error).split("becomes ")[1].rstrip(")"))
    scores, groups, bounds = rigged(0.1 + 1 / 7000)
    project(scores, groups, DemographicParity(shown, on="sex"), bounds=bounds)
    with pytest.raises(InfeasibleError):
        project(scores, groups, DemographicParity(shown - 1e-4, on="sex"), bounds=bounds)


def test_the_smallest_tolerance_is_enough_and_a_step_below_is_not() -> None:
    error = refusal([DemographicParity(0.02, on="sex"), MinimumRate(0.4)], "apart")
    assert error.factor is not None
    scores, groups, bounds = rigged()
    for step, holds in ((1 + 1e-9, True), (1 - 1e-9, False)):
        notions = [DemographicParity(0.02 * error.factor * step, on="sex"), MinimumRate(0.4)]
        try:
            project(scores, groups, notions, bounds=bounds)
        except InfeasibleError:
            assert not holds
        else:
            assert holds


def test_no_factor_helps_rows_without_a_tolerance() -> None:
    error = refusal([Budget(mean=0.3), Budget(mean=0.6), DemographicParity(0.1, on="sex")])
    assert error.factor is None
    assert error.addition == pytest.approx(0.15, rel=1e-12)
    assert str(error).endswith(
        "the rows in conflict are 'budget: mean', 'budget: mean'; no multiple of the tolerances "
        "would do, but 0.15 added to every side would"
    )


def test_a_budget_beyond_what_the_bounds_allow() -> None:
    error = refusal([DemographicParity(0.1, on="sex"), Budget(mean=(1.2, 1.4))])
    assert error.rows == ("budget: mean",)
    assert error.factor == pytest.approx(3, rel=1e-12)  # 1.3 -+ 0.1 becomes 1.3 -+ 0.3
    assert error.addition == pytest.approx(0.2, rel=1e-12)


def test_ratio_and_rate_in_conflict() -> None:
    """Means at least 0.6 for all, where group 1 stays below 0.4; and 0.9 of group 0's 0.5."""
    error = refusal([ImpactRatio(0.9, on="sex"), MinimumRate(0.3, on="sex")], "apart")
    assert len(error.rows) == 1 and "sex" in error.rows[0]
    assert error.factor is None  # both have one side
    assert error.addition is not None
    error = refusal([MinimumRate(0.6, on="sex"), ImpactRatio(0.5, on="sex")], "apart")
    assert len(error.rows) == 1
    assert error.addition == pytest.approx(0.2, rel=1e-12)


def test_the_smallest_set_is_found_where_dropping_rows_would_keep_a_larger_one() -> None:
    """x0 <= x1 <= x2 <= x3, x3 <= x0 - 1: four rows; x4 = 0 and x4 = 1: two."""
    eye = torch.eye(5, dtype=torch.float64)
    A = torch.stack([eye[1] - eye[0], eye[2] - eye[1], eye[3] - eye[2], eye[0] - eye[3],
                     eye[4], eye[4]])  # fmt: skip
    inf = torch.inf
    l = torch.tensor([0.0, 0, 0, 1, 0, 1], dtype=torch.float64)
    u = torch.tensor([inf, inf, inf, inf, 0, 1], dtype=torch.float64)
    problem = QP(torch.ones(5).double(), torch.zeros(5).double(), A, l, u)
    found = explain(problem, 0, (0, 1, 2, 3), attempt)
    assert found is not None and found.rows == ("row 4", "row 5") and found.smallest
    four = QP(torch.ones(5).double(), torch.zeros(5).double(), A[:4], l[:4], u[:4])
    found = explain(four, 0, (), attempt)
    assert found is not None and found.rows == ("row 0", "row 1", "row 2", "row 3")
    assert found.smallest and found.factor is None
    assert found.addition == pytest.approx(0.25, rel=1e-12)


def test_many_rows_keep_an_irreducible_set_and_say_so() -> None:
    """A cycle of 30 rows among 40: too many sets to try them all."""
    n = 30
    eye = torch.eye(n + 10, dtype=torch.float64)
    cycle = [eye[(i + 1) % n] - eye[i] for i in range(n)]
    A = torch.stack([*cycle, *(eye[n + i] for i in range(10))])
    l = torch.full((n + 10,), 0.1, dtype=torch.float64)
    problem = QP(
        torch.ones(n + 10).double(), torch.zeros(n + 10).double(), A, l,
        torch.full_like(l, torch.inf), -1.0, 5.0,
    )  # fmt: skip
    found = error_of(problem).conflict
    assert found is not None and not found.smallest
    assert set(found.rows) == {f"row {i}" for i in range(n)}
    assert found.addition == pytest.approx(0.1, rel=1e-9)


def test_every_backend_says_the_same() -> None:
    scores, groups, bounds = rigged()
    problem = formulate(
        [DemographicParity(0.02, on="sex"), DemographicParity(0.04, on="race")], scores, groups,
        bounds=bounds,
    )  # fmt: skip
    said = {name: error_of(problem, name).conflict for name in capable(problem)}
    assert "numba" in said
    assert all(found == said["numba"] for found in said.values()), said
    dense = QP(
        problem.P, problem.q, problem.rows.to_sparse(), problem.l, problem.u, problem.lb,
        problem.ub, row_names=problem.row_names,
    )  # fmt: skip
    for name in capable(dense):
        found = error_of(dense, name).conflict
        assert found is not None and found.rows == ("sex: 0 vs 1",)
        assert found.factor == pytest.approx(5, rel=1e-9)


def test_linear_programs_are_told_alike() -> None:
    A = torch.tensor([[1.0, -1.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    l = torch.tensor([-1.0, 1.4, 0.0], dtype=torch.float64)
    u = torch.tensor([1.0, 1.6, 1.0], dtype=torch.float64)
    problem = LP(torch.ones(2).double(), A, l, u, 0.0, 1.0)
    names = capable(problem, LINEAR)
    if not names:
        pytest.skip("no backend for linear programs is installed")
    for name in names:
        error = error_of(problem, name)
        assert set(error.rows) == {"row 1", "row 2"}
        assert error.factor == pytest.approx(5 / 3, rel=1e-9)
        assert error.addition == pytest.approx(0.2, rel=1e-9)


def test_the_problem_of_a_batch_that_cannot_hold_is_explained() -> None:
    scores, groups, (lower, upper) = rigged()
    lower = torch.stack([torch.zeros_like(lower), lower])
    upper = torch.stack([torch.ones_like(upper), upper])
    with pytest.raises(InfeasibleError) as caught:
        project(scores.repeat(2, 1), groups["sex"], DemographicParity(0.02), bounds=(lower, upper))
    assert caught.value.batch == 1
    assert caught.value.factor == pytest.approx(5, rel=1e-12)


def test_a_million_samples_cost_a_few_passes() -> None:
    n = 1_000_000
    sex = torch.arange(n) % 2
    lower = torch.where(sex == 0, 0.5, 0.0)
    upper = torch.where(sex == 0, 1.0, 0.4)
    with pytest.raises(InfeasibleError) as caught:
        project(torch.rand(n), sex, DemographicParity(0.02), bounds=(lower, upper))
    assert caught.value.rows == ("group: 0 vs 1",)
    assert caught.value.factor == pytest.approx(5, rel=1e-6)


def test_sparse_rows_too_large_to_look_into_keep_the_rows_of_the_proof() -> None:
    """As a dense matrix they would not fit into memory."""
    n = 40_000
    index = torch.arange(n)
    rows = SparseRows(index, index, torch.ones(1, n, dtype=torch.float64), n, n)
    far = torch.zeros(n, dtype=torch.float64)
    far[7] = 2.0
    problem = QP(torch.ones(n).double(), torch.zeros(n).double(), rows, far, far + 1, 0.0, 1.0)
    assert explain(problem, 0, (7,), attempt) is None


def test_the_answer_is_worked_out_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    module = import_module("fairopt.solving.conflicts")

    def counted(*args: Any) -> Any:
        calls.append(args)
        return explain(*args)

    monkeypatch.setattr(module, "explain", counted)
    error = refusal(DemographicParity(0.02, on="sex"), "apart")
    assert not calls
    assert error.rows == ("sex: 0 vs 1",) and error.factor and str(error)
    assert len(calls) == 1


def test_a_message_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("fairopt.solving.conflicts")

    def failing(*_: Any) -> Any:
        raise ConvergenceError("no")

    monkeypatch.setattr(module, "explain", failing)
    error = refusal(DemographicParity(0.02, on="sex"), "apart")
    assert error.conflict is None and error.factor is None and error.addition is None
    assert str(error).endswith("the rows in conflict are 'sex: 0 vs 1'")


def test_errors_can_be_pickled_and_copied() -> None:
    error = refusal(DemographicParity(0.02, on="sex"), "apart")
    for other in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert other.rows == error.rows and other.factor == error.factor
        assert str(other) == str(error)


# ---------------------------------------------------------------------------------------------
# Rows that can never hold
# ---------------------------------------------------------------------------------------------


def test_a_group_of_constant_weight_zero_is_left_out_by_name_or_refused() -> None:
    scores, groups = torch.rand(6).double(), torch.tensor([0, 0, 1, 1, 2, 2])
    weights = torch.tensor([1.0, 1, 1, 1, 0, 0]).double()
    layer = FairnessLayer([DemographicParity(0.0), MinimumRate(0.9)], bounds=(0, 1))
    layer(scores, groups, weights=weights)
    assert layer.last is not None
    assert layer.last.skipped == (
        "group: 0 vs 2: a group has no samples",
        "group: 1 vs 2: a group has no samples",
        "group: 2 | minimum: a group has no samples",
    )
    strict = FairnessLayer(DemographicParity(0.0), bounds=(0, 1), missing_group="raise")
    with pytest.raises(ProblemError, match=r"lacks a group.*group: 0 vs 2, group: 1 vs 2"):
        strict(scores, groups, weights=weights)


@pytest.mark.parametrize("elastic", [False, True])
@pytest.mark.parametrize("missing_group", ["skip", "raise"])
def test_a_total_of_samples_without_weight_is_refused_by_name(
    missing_group: Any, elastic: bool
) -> None:
    """Not infeasible for these bounds or scores: for any. Elastic layers refuse it, too."""
    scores, groups = torch.rand(6).double(), torch.tensor([0, 0, 0, 1, 1, 1])
    weights = torch.tensor([1.0, 1, 1, 0, 0, 0]).double()
    for notion, name in (
        (Budget(total=1.0, on="group"), "group: 1 | total"),
        (Budget(total=(0.5, 2.0)), "budget: total"),
    ):
        layer = FairnessLayer(notion, bounds=(0, 1), missing_group=missing_group, elastic=elastic)
        some = weights if "group" in name else 0 * weights
        with pytest.raises(ProblemError, match=f"rows '{re.escape(name)}': no prediction has any"):
            layer(scores, groups, weights=some)
    FairnessLayer(Budget(total=(0.0, 2.0)), bounds=(0, 1))(scores, groups, weights=0 * weights)


@pytest.mark.parametrize("elastic", [False, True])
def test_a_group_that_is_missing_cannot_have_a_total(elastic: bool) -> None:
    layer = FairnessLayer(
        Budget(total=1.0, on="group"), bounds=(0, 1), group_counts=3, elastic=elastic
    )
    with pytest.raises(ProblemError, match=r"rows 'group: 2 \| total': no prediction has any"):
        layer(torch.rand(6), torch.tensor([0, 0, 0, 1, 1, 1]))


def test_soft_groups_that_are_alike_ask_for_nothing() -> None:
    """Rows of differences that are zero but for rounding would ask for the impossible."""
    chances = torch.tensor([[0.1, 0.2, 0.7]], dtype=torch.float64).expand(7, 3)
    scores = torch.linspace(0.1, 0.93, 7, dtype=torch.float64)
    weights = torch.linspace(0.3, 1.7, 7, dtype=torch.float64)
    groups = {"race": chances}
    problem = formulate(DemographicParity(0.0), scores, groups, bounds=(0, 1), weights=weights)
    assert not problem.rows.to_dense().matrix.any()
    torch.testing.assert_close(solve(problem).x[0], scores, rtol=0, atol=1e-15)
    one = torch.tensor([[0.1, 0.2, 0.7]], dtype=torch.float64)  # a single sample
    assert project(scores[:1], {"race": one}, DemographicParity(0.0), bounds=(0.7, None)) == 0.7


@settings(max_examples=80)
@given(conflicting_cases(20))
def test_beginning_with_few_rows_finds_the_same(case: Case) -> None:
    try:
        problem = formulate(
            case.constraints, case.scores, case.groups, case.targets, bounds=case.bounds,
            weights=case.weights,
        )  # fmt: skip
        solve(problem, backend="numba")
    except ProblemError:
        assume(False)
    except InfeasibleError as raised:
        assume(raised.conflict is not None and raised.conflict.addition > CLEAR)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(fairopt.solving.cell_means, "FEW_ROWS", 0)
            patched.setattr(fairopt.solving.cell_means, "FEW_ENTRIES", 0)
            grown = explain(problem.detach(), 0, (), attempt)
        assert grown is not None and raised.conflict is not None
        assert grown.addition == pytest.approx(raised.conflict.addition, rel=1e-8)
        expected = raised.conflict.factor
        assert grown.factor == (expected and pytest.approx(expected, rel=1e-8))
        assert len(grown.rows) == len(raised.conflict.rows) or not grown.smallest
