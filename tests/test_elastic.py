"""Elastic solutions: the least total violation, by HiGHS, and the nearest point that has it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conflicting import conflicting_cases, least_total
from hypothesis import assume, given, settings
from problems import Case

from fairopt import QP, InfeasibleError, ProblemError, Status, formulate, solve
from fairopt.elastic import solve_elastic

seen: Counter[str] = Counter()


def written(case: Case) -> QP:
    """The case as a problem; drawn again where one of its rows is refused at once."""
    try:
        problem = formulate(
            case.constraints, case.scores, case.groups, case.targets, bounds=case.bounds,
            weights=case.weights,
        )  # fmt: skip
    except ProblemError:
        assume(False)
    return problem


def is_nearest(solution: Any) -> None:
    """The optimality conditions of  objective + rho V  within the bounds, from our multipliers.

    Whoever minimises that, and V too, minimises the objective among the points that minimise V.
    """
    problem, x, y = solution.problem, solution.x, solution.row_dual
    found = solution.residuals
    assert float(found.stationarity.max()) <= 1e-9
    assert float(found.dual_sign.max()) == 0.0
    rho = y.abs().amax(-1, keepdim=True)
    value = problem.rows.apply(x)
    scale = problem.rows.absolute().apply(x.abs().amax(-1, keepdim=True).expand_as(x)) + 1e-300
    small = 1e-9 * rho
    for push, side in ((y, problem.u), (-y, problem.l)):
        beyond = torch.where(torch.isinf(side), 0.0, (value - side) * push.sign()) / scale
        beyond = beyond if side is problem.u else -beyond.neg()
    above, below = value - problem.u, problem.l - value
    assert (y[above > 1e-9 * scale] >= (rho - small).expand_as(y)[above > 1e-9 * scale]).all()
    assert (-y[below > 1e-9 * scale] >= (rho - small).expand_as(y)[below > 1e-9 * scale]).all()
    assert (above[y > small] >= -1e-9 * scale[y > small]).all()  # a price is paid at a side only
    assert (below[y < -small] >= -1e-9 * scale[y < -small]).all()


@settings(max_examples=400)
@given(conflicting_cases())
def test_the_least_total_violation_and_of_those_the_nearest(case: Case) -> None:
    problem = written(case)
    x, solution = solve_elastic(problem, "numba")
    seen[solution.status[0].name] += 1
    assert ((x >= problem.lb) & (x <= problem.ub)).all()
    total = float(solution.excess.sum())
    least = least_total(problem)
    assert abs(total - least) <= 1e-6 * least + 1e-9, (total, least)
    if solution.status[0] is Status.SOLVED:
        assert torch.equal(x, solve(problem, backend="numba").x)
        assert not solution.exceeded
        return
    with pytest.raises(InfeasibleError):
        solve(problem, backend="numba")
    assert solution.exceeded
    is_nearest(solution)


def test_the_draws_above_are_of_both_kinds() -> None:
    assert seen["ELASTIC"] >= 100 and seen["SOLVED"] >= 50, seen
