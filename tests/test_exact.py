"""The embedded backend is exact: our residuals, an independent solver, and named hard cases."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from problems import Case, cases, catalogue_cases, clarabel_solution, least_violation, plain

from fairopt import (
    QP,
    DemographicParity,
    EqualizedOdds,
    InfeasibleError,
    MeanResidual,
    formulate,
    project,
    solve,
)
from fairopt.programs.solution import RowValues

seen: Counter[str] = Counter()


@settings(max_examples=2500, suppress_health_check=list(HealthCheck), deadline=None)
@given(cases())
def residuals_rows_and_bounds_hold(case: Case) -> None:
    problem = formulate(
        case.constraints, case.scores, case.groups, case.targets, bounds=case.bounds,
        weights=case.weights,
    )  # fmt: skip
    seen["drawn"] += 1
    try:
        solution = solve(problem, backend="numba")
    except InfeasibleError as error:
        # Only where bounds or targets forbid it; HiGHS, asked independently, agrees.
        seen["infeasible"] += 1
        assert error.rows and set(error.rows) <= set(problem.row_names)
        assert least_violation(plain(problem)) > 0.0
        return
    x = solution.x
    assert ((x >= problem.lb) & (x <= problem.ub)).all()
    assert (RowValues.at(problem, x).relative <= 1e-12).all()
    assert solution.residuals.worst <= 1e-9, str(solution.residuals)
    agree_with_clarabel(problem, x)


def agree_with_clarabel(problem, x) -> None:
    p = plain(problem)
    other = clarabel_solution(p)
    if other is None:
        seen["Clarabel gave up"] += 1
        return
    seen["compared"] += 1
    ours = x[0].numpy() / p.unit

    def value(z: np.ndarray) -> float:
        return float(0.5 * z @ (p.P * z) + p.q @ z)

    # Clarabel may be infeasible by its own tolerance, and then lower. The objective is strongly
    # convex with modulus P, so that a gap e in value is at most sqrt(2 e) in distance.
    gap = 1e-6 * max(abs(value(ours)), 0.5 * float((p.q**2 / p.P).sum())) + 1e-9
    assert abs(value(ours) - value(other)) <= gap
    assert float((p.P * (ours - other) ** 2).sum()) <= 4 * gap


@pytest.mark.slow
def test_residuals_rows_and_bounds_hold_on_drawn_problems() -> None:
    """And most of them were compared."""
    seen.clear()
    residuals_rows_and_bounds_hold()
    assert seen["compared"] > 0.5 * seen["drawn"], seen
    assert seen["infeasible"] < 0.2 * seen["drawn"], seen


@pytest.mark.slow
@settings(max_examples=600, suppress_health_check=list(HealthCheck), deadline=None)
@given(catalogue_cases())
def test_every_notion_is_exact_on_drawn_problems(case: Case) -> None:
    """Feasible by construction, hard and soft labels, all notions together."""
    problem = formulate(
        case.constraints, case.scores, case.groups, case.targets, bounds=case.bounds,
        weights=case.weights,
    )  # fmt: skip
    x = check(problem)
    assert ((x >= problem.lb[0]) & (x <= problem.ub[0])).all()
    agree_with_clarabel(problem, x.unsqueeze(0))


# ---------------------------------------------------------------------------------------------
# By name
# ---------------------------------------------------------------------------------------------


def check(problem) -> torch.Tensor:
    """Solve, judge by our residuals, and return x of the first problem."""
    solution = solve(problem, backend="numba")
    assert (RowValues.at(problem, solution.x).relative <= 1e-12).all()
    assert solution.residuals.worst <= 1e-9, str(solution.residuals)
    return solution.x[0]


@pytest.mark.parametrize("compare", ["pairwise", "overall"])
def test_all_91_pairs_of_14_groups_at_tolerance_0_with_18_samples(compare) -> None:
    rng = np.random.default_rng(3)
    groups = torch.from_numpy(np.r_[np.arange(14), rng.integers(0, 14, 4)])
    scores = torch.from_numpy(rng.random(18))
    problem = formulate(DemographicParity(0.0, compare=compare), scores, groups, bounds=(0, 1))
    assert problem.shape[1] == (91 if compare == "pairwise" else 14)
    x = check(problem)
    means = torch.stack([x[groups == g].mean() for g in range(14)])
    assert means.max() - means.min() <= 1e-14
    agree_with_clarabel(problem, x.unsqueeze(0))


def test_a_group_wholly_clipped_at_a_bound() -> None:
    scores = torch.tensor([-3.0, -2.0, -2.5, -4.0, 0.3, 0.5, 0.9, 0.2], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    x = check(formulate(DemographicParity(0.1), scores, groups, bounds=(0, 1)))
    # The clipped group stays at 0; the other comes down to a mean of 0.1 by its own shift.
    assert x[:4].tolist() == [0.0] * 4
    assert x[4:].mean().item() == pytest.approx(0.1, abs=1e-15)
    agree_with_clarabel(formulate(DemographicParity(0.1), scores, groups, bounds=(0, 1)), x[None])


def test_two_attributes_that_coincide() -> None:
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, 4, 60))
    scores = torch.from_numpy(rng.random(60)) + 0.1 * codes
    one = project(scores, codes, DemographicParity(0.02), bounds=(0, 1))
    both = project(
        scores, {"sex": codes, "race": codes.clone()}, DemographicParity(0.02), bounds=(0, 1)
    )
    assert (one - both).abs().max() <= 1e-14


def test_bounds_that_meet() -> None:
    scores = torch.linspace(0, 1, 10, dtype=torch.float64)
    groups = torch.arange(10) % 2
    fixed = torch.full((10,), 0.25, dtype=torch.float64)
    x = check(formulate(DemographicParity(0.0), scores, groups, bounds=(fixed, fixed)))
    assert (x == 0.25).all()
    some = fixed.clone()
    some[5:] = 1.0
    x = check(formulate(DemographicParity(0.0), scores, groups, bounds=(fixed, some)))
    assert (x[:5] == 0.25).all()


def test_16_samples_one_group_clipped_zero_curvature() -> None:
    """The shape of problem on which the prototype failed: no free sample where a step is needed."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        groups = torch.from_numpy(np.arange(16) % rng.integers(2, 5))
        scores = torch.from_numpy(np.where(groups.numpy() == 0, 50.0, 1.0) * rng.normal(size=16))
        check(formulate(EqualizedOdds(0.0), scores, groups, groups % 2 * 0 + 1, bounds=(0, 1)))


def test_one_sample_groups_and_ties() -> None:
    scores = torch.tensor([0.2, 0.2, 0.2, 0.7], dtype=torch.float64)
    x = project(scores, torch.arange(4), DemographicParity(0.0), bounds=(0, 1))
    assert (x - scores.mean()).abs().max() <= 1e-16


@pytest.mark.parametrize("spread", [1e8, 1e-8])
def test_rows_hold_to_the_precision_of_the_predictions_not_of_the_scores(spread: float) -> None:
    rng = np.random.default_rng(5)
    scores = torch.from_numpy(rng.normal(size=200) * spread)
    groups = torch.from_numpy(rng.integers(0, 3, 200))
    problem = formulate(DemographicParity(0.01), scores, groups, bounds=(0, 1))
    x = check(problem)
    means = [x[groups == g].mean().item() for g in range(3)]
    assert max(means) - min(means) <= 0.01 + 1e-13


def test_dense_and_sparse_rows_give_what_cells_give() -> None:
    rng = np.random.default_rng(2)
    scores = torch.from_numpy(rng.random(80))
    groups = torch.from_numpy(rng.integers(0, 4, 80))
    cells = formulate(DemographicParity(0.01), scores, groups, bounds=(0, 1))
    x = check(cells)
    for rows in (cells.rows.to_dense(), cells.rows.to_sparse()):
        other = QP(cells.P, cells.q, rows, cells.l, cells.u, cells.lb, cells.ub)
        assert (check(other) - x).abs().max() <= 1e-13


def test_infeasible_rows_are_named() -> None:
    lower = torch.tensor([0.0, 0.0, 0.9, 0.9], dtype=torch.float64)
    upper = torch.tensor([0.1, 0.1, 1.0, 1.0], dtype=torch.float64)
    with pytest.raises(InfeasibleError, match=r"sex: 0 vs 1") as error:
        project(
            torch.rand(4, dtype=torch.float64), {"sex": torch.tensor([0, 0, 1, 1])},
            DemographicParity(0.5), bounds=(lower, upper),
        )  # fmt: skip
    assert error.value.rows == ("sex: 0 vs 1",)
    assert error.value.batch == 0


def test_contradictory_notions_are_infeasible_without_bounds() -> None:
    scores = torch.rand(40, dtype=torch.float64)
    groups = torch.arange(40) % 2
    targets = groups.double()
    with pytest.raises(InfeasibleError, match="in conflict"):
        project(scores, groups, [DemographicParity(0.0), MeanResidual(0.1)], targets, bounds=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_returned_tensor_holds_when_recomputed_in_float64(dtype: torch.dtype) -> None:
    limit = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    generator = torch.Generator().manual_seed(0)
    for n in (10, 1_000, 200_000):
        groups = torch.randint(0, 3, (n,), generator=generator)
        scores = torch.rand(n, generator=generator, dtype=dtype) + 0.2 * groups
        x = project(scores, groups, DemographicParity(0.01), bounds=(0, 1))
        assert x.dtype == dtype and x.min() >= 0 and x.max() <= 1
        means = [x[groups == g].double().mean().item() for g in range(3)]
        assert max(means) - min(means) <= 0.01 + 2 * limit
