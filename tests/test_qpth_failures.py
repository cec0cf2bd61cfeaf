"""What the qpth backend says of problems without a solution, and of options that make no sense."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from qpth_problems import DOUBLE, INF, changed, infeasible, no_rows, problem_of, tensor
from torch import Tensor

from fairopt import (
    LP,
    QP,
    ConvergenceError,
    InfeasibleError,
    ProblemError,
    Status,
    UnboundedError,
    backends,
    solve,
)
from fairopt.optimality.certificates import proves_infeasible

if importlib.util.find_spec("qpth") is None:  # importing it asks for CVXPY, which we do not need
    pytest.skip("the package qpth is not installed", allow_module_level=True)

from fairopt.backends.qpth import backend as qpth_
from fairopt.backends.qpth.backend import QPTH

# ---------------------------------------------------------------- failures


def unbounded(problem: QP) -> QP:
    assert isinstance(problem.P, Tensor)
    P, A = problem.P.clone(), problem.rows.to_dense().matrix.clone()
    P[1, -1, :] = P[1, :, -1] = 0.0
    A[1, :, -1] = 0.0
    q = problem.q.clone()
    q[1, -1] = 1.0
    lb = problem.lb.clone()
    lb[1, -1] = -INF
    return changed(problem, P=P, q=q, rows=A, lb=lb)


def nonconvex(problem: QP) -> QP:
    assert isinstance(problem.P, Tensor)
    P = problem.P.clone()
    P[1, 0, 0] = -1.0
    return changed(problem, P=P)


BAD = {
    Status.INFEASIBLE: (infeasible, InfeasibleError),
    Status.UNBOUNDED: (unbounded, UnboundedError),
    Status.NONCONVEX: (nonconvex, ProblemError),
}


@pytest.fixture
def _quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    printed = capfd.readouterr()
    assert not printed.out
    assert not printed.err


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("status", BAD)
@pytest.mark.parametrize("form", ["dense", "float32"])
def test_one_bad_problem_is_named_and_does_not_spoil_the_others(status: Status, form: str) -> None:
    spoil, error = BAD[status]
    good = problem_of(equalities=1)
    bad = spoil(good)
    if form == "float32":
        good, bad = (
            QP(
                *(t.float() for t in (p.P, p.q, p.rows.to_dense().matrix)),
                p.l.float() - 1e-3,
                p.u.float() + 1e-3,
                p.lb.float(),
                p.ub.float(),
            )
            for p in (good, bad)
        )
    others = torch.tensor([0, 2, 3])
    alone = QPTH().solve(good)
    solution = QPTH().solve(bad)
    assert solution.status == (Status.SOLVED, status, Status.SOLVED, Status.SOLVED)
    difference = (solution.x - alone.x)[others].abs().max()
    assert difference < (1e-12 if form == "dense" else 1e-6)
    assert bool(torch.isfinite(solution.x).all())
    with pytest.raises(error, match="problem 1 of the batch"):
        solve(bad, backend="qpth")


def test_unbounded_without_rows() -> None:
    P = tensor([1.0, 0.0], [1.0, 1.0])
    problem = QP(P, tensor([0.0, 1.0], [0.0, 1.0]), *no_rows(2, 2))
    assert QPTH().solve(problem).status == (Status.UNBOUNDED, Status.SOLVED)


def test_the_proof_of_infeasibility_names_the_rows_in_conflict() -> None:
    problem = infeasible(problem_of(equalities=1))
    solution = QPTH().solve(problem)
    assert bool(proves_infeasible(problem, solution.row_dual)[1])
    with pytest.raises(InfeasibleError) as caught:
        solve(problem, backend="qpth")
    assert caught.value.batch == 1
    assert caught.value.rows == ("row 2", "row 3")


def test_rows_that_bounds_contradict() -> None:
    problem = QP(tensor([1.0]), tensor([0.0]), tensor([[2.0]]), tensor(4.0), tensor(INF), 0.0, 1.0)
    with pytest.raises(InfeasibleError) as caught:
        solve(problem, backend="qpth")
    assert caught.value.rows == ("row 0",)


def test_contradicting_equalities_that_depend_on_each_other() -> None:
    A, b = tensor([[1.0, 1.0], [1.0, 1.0]]), tensor([1.0, 2.0])
    solution = QPTH().solve(QP(tensor([1.0, 1.0]), tensor([0.0, 0.0]), A, b, b))
    assert solution.status == (Status.INFEASIBLE,)


def test_a_row_of_zeros_that_cannot_hold() -> None:
    A = torch.zeros(1, 1, 2, dtype=DOUBLE)
    problem = QP(tensor([1.0, 1.0]), tensor([0.0, 0.0]), A, tensor(1.0), tensor(2.0))
    assert QPTH().solve(problem).status == (Status.INFEASIBLE,)


def test_feasible_by_a_hair_and_infeasible_by_a_hair_are_told_apart() -> None:
    A = tensor([[1.0, 1.0], [1.0, 1.0]])
    for gap, status in ((-1e-6, Status.SOLVED), (0.0, Status.SOLVED), (1e-6, Status.INFEASIBLE)):
        low, high = tensor(-INF, 1.0 + gap), tensor(1.0, INF)
        solution = QPTH().solve(QP(tensor([1.0, 1.0]), tensor([0.0, 0.0]), A, low, high))
        assert solution.status == (status,), gap


@pytest.mark.parametrize("seed", range(5))
def test_infeasible_and_unbounded_linear_programs(seed: int) -> None:
    problem = problem_of(batch=2, n=6, m=3, seed=seed)
    free = LP(problem.q, problem.rows, problem.l, problem.u)  # 3 rows cannot bound 6 variables
    assert set(QPTH().solve(free).status) == {Status.UNBOUNDED}
    A = problem.rows.to_dense().matrix.clone()
    A[:, 1] = A[:, 0]
    l, u = (torch.full_like(problem.l, side) for side in (-INF, INF))
    u[:, 0], l[:, 1] = 1.0, 2.0
    assert set(QPTH().solve(LP(problem.q, A, l, u)).status) == {Status.INFEASIBLE}


@pytest.mark.usefixtures("_quiet")
def test_a_limit_of_iterations_that_is_too_low_is_stalled_and_no_wrong_answer() -> None:
    torch.set_num_threads(1)  # every attempt is made, and none is large
    problem = problem_of(batch=2, n=20, m=40, condition=1e6)
    solution = QPTH(max_iter=1).solve(problem)
    assert set(solution.status) == {Status.STALLED}
    with pytest.raises(ConvergenceError, match="problem 0 of the batch"):
        solve(problem, backend=QPTH(max_iter=1))


@pytest.mark.parametrize("eps", [0.0, -1.0, 1.0, float("nan"), INF, "1e-9", True])
def test_eps_is_checked(eps: Any) -> None:
    with pytest.raises(ProblemError, match="eps: expected a number between 0 and 1"):
        QPTH(eps=eps)


@pytest.mark.parametrize("option", ["max_iter", "not_improved_limit"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_limits_are_checked(option: str, value: Any) -> None:
    with pytest.raises(ProblemError, match=f"{option}: expected an integer of at least 1"):
        QPTH(**{option: value})


def test_options_reach_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    solver = qpth_.load()
    plain = solver.forward

    def forward(*args: Any, **options: Any) -> Any:
        seen.update(options)
        return plain(*args, **options)

    monkeypatch.setattr(solver, "forward", forward)
    backends.get("qpth", eps=1e-8, max_iter=25, not_improved_limit=4).solve(problem_of())
    assert seen == {"eps": 1e-8, "verbose": -1, "notImprovedLim": 4, "maxIter": 25}
