"""The highs backend: exact vertices, proven failures, options that do something."""
# ruff: noqa: E402

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

scipy_optimize = pytest.importorskip("scipy.optimize", reason="HiGHS comes with SciPy")

from fairopt import (
    LP,
    QP,
    CellRows,
    ConvergenceError,
    InfeasibleError,
    ProblemError,
    SparseRows,
    Status,
    UnboundedError,
    UnsupportedProblemError,
    backends,
    solve,
)
from fairopt.backends import HiGHS
from fairopt.backends import highs as highs_
from fairopt.optimality.certificates import proves_infeasible
from fairopt.programs.solution import RowValues

INF = float("inf")
OPTIONS = [
    {},
    {"method": "interior-point"},
    {"presolve": True},
    {"method": "interior-point", "presolve": True},
]


def tensor(data: Any) -> Tensor:
    return torch.as_tensor(np.asarray(data, dtype=float))


@st.composite
def programs(draw: st.DrawFn, scales: bool = True) -> LP:
    """Feasible, infeasible and unbounded ones, of all units."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m, batch = draw(st.integers(1, 12)), draw(st.integers(0, 10)), draw(st.integers(1, 3))
    A = rng.standard_normal((batch, m, n)) * (rng.random((batch, m, n)) < 0.7)
    if m > 2 and draw(st.booleans()):
        A[:, 1] = A[:, 0] - A[:, 2]  # dependent
    point = rng.random((batch, n))
    value = np.einsum("bmn,bn->bm", A, point)
    l = value - rng.choice([0, 0.1, 1, INF], (batch, m))
    u = value + rng.choice([0, 0.1, INF], (batch, m))
    if m and draw(st.integers(0, 4)) == 0:
        l[:, 0] = np.abs(A[:, 0]).sum(-1) + 1  # beyond what the box allows
        u = np.maximum(l, u)
    c = rng.standard_normal((batch, n)) * (rng.random((batch, n)) < 0.8)
    lb, ub = rng.choice([0, 0, -INF], n), rng.choice([1, 1, INF], n)
    unit = row = cost = 1.0
    if scales:
        unit, cost = 10.0 ** draw(st.integers(-6, 6)), 10.0 ** draw(st.integers(-6, 6))
        row = 10.0 ** rng.integers(-3, 4, m)
    return LP(
        tensor(cost * c), tensor(A * np.reshape(row, (-1, 1))), tensor(l * row * unit),
        tensor(u * row * unit), tensor(lb * unit), tensor(ub * unit),
    )  # fmt: skip


def by_scipy(problem: LP, b: int) -> Any:
    """Every row as one or two inequalities, HiGHS's own choice of method.

    Without presolve, which takes two rows on one variable that meet, but for rounding, for crossed.
    """
    A = problem.rows.to_dense().matrix[b].numpy()
    l, u = problem.l[b].numpy(), problem.u[b].numpy()
    sides = np.concatenate([u, -l])
    there = np.isfinite(sides)
    return scipy_optimize.linprog(
        problem.c[b].numpy(), np.concatenate([A, -A])[there], sides[there],
        bounds=torch.stack([problem.lb[b], problem.ub[b]], 1).numpy(), method="highs",
        options={"presolve": False},
    )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(problem=programs())
def test_solutions_are_exact_and_failures_proven(options: dict[str, Any], problem: LP) -> None:
    solution = HiGHS(**options).solve(problem)
    residuals = torch.stack(list(vars(solution.residuals).values()))
    proven = proves_infeasible(problem, solution.row_dual)
    for b, status in enumerate(solution.status):
        if status is Status.SOLVED:
            assert float(residuals[:, b].max()) <= 1e-12
        else:
            assert status in (Status.INFEASIBLE, Status.UNBOUNDED)
            assert bool(proven[b]) == (status is Status.INFEASIBLE)


@given(problem=programs(scales=False))
def test_scipy_s_own_doubled_rows_give_the_same(problem: LP) -> None:
    solution = HiGHS().solve(problem)
    for b, status in enumerate(solution.status):
        other = by_scipy(problem, b)
        if status is Status.SOLVED:
            assert other.status == 0
            value = float(problem.c[b] @ solution.x[b])
            assert value == pytest.approx(other.fun, abs=1e-6)
        elif status is Status.INFEASIBLE:
            assert other.status in (2, 4)  # 4: infeasible or unbounded
        else:
            assert other.status in (3, 4)


@given(problem=programs())
def test_float32(problem: LP) -> None:
    problem = LP(
        problem.c.float(), problem.rows.to_dense().matrix.float(), problem.l.float(),
        problem.u.float(), problem.lb.float(), problem.ub.float(),
    )  # fmt: skip
    solution = HiGHS().solve(problem)
    assert solution.x.dtype == torch.float32
    excess = RowValues.at(problem, solution.x).relative
    inside = (solution.x >= problem.lb) & (solution.x <= problem.ub)
    for b, status in enumerate(solution.status):
        if status is Status.SOLVED:
            assert excess[b].sum() <= 1e-6 * max(1, len(excess[b]))
            assert bool(inside[b].all())
            assert float(solution.residuals.stationarity[b]) <= 1e-6


def parity(n: int = 60, groups: int = 3) -> LP:
    """Largest total benefit under pairwise parity of means: rows depend on each other."""
    generator = torch.Generator().manual_seed(0)
    cell = torch.arange(n) % groups
    pairs = torch.combinations(torch.arange(groups))
    C = torch.zeros(len(pairs), groups, dtype=torch.float64)
    C[torch.arange(len(pairs)), pairs[:, 0]] = groups / n
    C[torch.arange(len(pairs)), pairs[:, 1]] = -groups / n
    c = torch.randn(2, n, dtype=torch.float64, generator=generator) + cell
    side = torch.full((len(pairs),), 0.05, dtype=torch.float64)
    return LP(c, CellRows(C, cell, torch.ones(n, dtype=torch.float64)), -side, side, 0.0, 1.0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forms_of_rows_agree(options: dict[str, Any]) -> None:
    problem = parity()
    found = []
    for rows in (problem.rows, problem.rows.to_dense(), problem.rows.to_sparse()):
        same = LP(problem.c, rows, problem.l, problem.u, problem.lb, problem.ub)
        solution = solve(same, backend=HiGHS(**options))
        assert solution.residuals.worst <= 1e-12
        assert solution.backend == "highs" and min(solution.iterations) > 0
        found.append(solution)
    assert (found[0].row_dual != 0).any(1).all()  # parity costs something
    for other in found[1:]:
        assert torch.allclose(other.x, found[0].x, rtol=0, atol=1e-12)


def test_the_sign_of_the_multipliers() -> None:
    # min -x0 + 2 x1 with x0 + x1 in [1, 3], x0 <= 5, x1 >= 1: x = (2, 1), held above by the row.
    problem = LP(tensor([-1, 2]), tensor([[1, 1]]), tensor([1]), tensor([3]),
                 tensor([-INF, 1]), tensor([5, INF]))  # fmt: skip
    solution = solve(problem, backend="highs")
    assert solution.x.tolist() == [[2, 1]]
    assert solution.row_dual.tolist() == [[1]]
    assert solution.bound_dual.tolist() == [[0, -3]]


def test_repeated_entries_add_up() -> None:
    one, zero = torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1])
    rows = SparseRows(one, zero, tensor([1, 2, 1]), 1, 2)  # 3 x0 + x1
    solution = solve(LP(tensor([1, 1]), rows, tensor([3]), tensor([INF]), 0.0), backend="highs")
    assert solution.x.tolist() == [[1, 0]]


def test_without_rows_and_without_a_cost() -> None:
    problem = LP(tensor([1, -2]), torch.zeros(0, 2).double(), tensor([]), tensor([]), -1.0, 3.0)
    assert solve(problem, backend="highs").x.tolist() == [[-1, 3]]
    nothing = LP(tensor([0, 0]), tensor([[1, 1]]), tensor([1]), tensor([1]))
    assert solve(nothing, backend="highs").x.sum().item() == pytest.approx(1, abs=1e-15)


# ---------------------------------------------------------------- failures


def batch_of_all() -> LP:
    """Solved, infeasible, unbounded, and both of the latter at once."""
    A = tensor([[1, 0], [1, 0]]).expand(4, 2, 2)
    l = tensor([[0, -INF], [2, -INF], [0, -INF], [2, -INF]])
    u = tensor([[INF, 1], [INF, 1], [INF, 1], [INF, 1]])
    c = tensor([[1, 1], [1, 1], [1, -1], [1, -1]])
    return LP(c, A, l, u, tensor([-INF, 0]), INF, row_names=("at least", "at most"))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_each_problem_of_a_batch_has_its_own_end(options: dict[str, Any], threads: int) -> None:
    torch.set_num_threads(threads)
    solution = HiGHS(**options).solve(batch_of_all())
    assert solution.status == (
        Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED, Status.INFEASIBLE,
    )  # fmt: skip
    assert solution.x[0].tolist() == [0, 0]
    assert proves_infeasible(solution.problem, solution.row_dual).tolist() == [0, 1, 0, 1]


def test_the_errors_name_the_problem_and_the_rows() -> None:
    p = batch_of_all()
    with pytest.raises(InfeasibleError, match="'at least', 'at most'") as infeasible:
        solve(p, backend="highs")
    assert infeasible.value.batch == 1 and infeasible.value.rows == ("at least", "at most")
    rest = LP(p.c[::2], p.rows.to_dense().matrix[::2], p.l[::2], p.u[::2], p.lb[::2], p.ub[::2])
    with pytest.raises(UnboundedError) as unbounded:
        solve(rest, backend="highs")
    assert unbounded.value.batch == 1
    assert unbounded.value.solution.status[0] is Status.SOLVED


def test_unbounded_along_a_direction_that_is_no_axis() -> None:
    problem = LP(tensor([-1, -1, 0]), tensor([[1, -1, 0], [0, 1, -1]]), tensor([0, 0]),
                 tensor([0, 0]), 0.0)  # fmt: skip
    with pytest.raises(UnboundedError):
        solve(problem, backend="highs")


def test_an_interior_point_that_never_ends_is_stopped() -> None:
    """min -x without a bound, and rows of zeros: SciPy 1.17's iterates for ever."""
    problem = LP(tensor([-1]), tensor([[0], [0]]), tensor([0, 0]), tensor([1, INF]))
    solution = HiGHS(method="interior-point").solve(problem)
    assert solution.status == (Status.UNBOUNDED,)


def test_rows_that_no_bound_helps_to_contradict() -> None:
    # x0 + x1 <= 1, x0 - x1 <= 1, x0 >= 1 + 1e-6, all variables free: the weights are (1, 1, -2).
    A = tensor([[1, 1], [1, -1], [1, 0]])
    problem = LP(tensor([1, 1]), A, tensor([-INF, -INF, 1 + 1e-6]), tensor([1, 1, INF]))
    solution = HiGHS().solve(problem)
    assert solution.status == (Status.INFEASIBLE,)
    y = solution.row_dual[0]
    assert torch.allclose(y / y[0], tensor([1, 1, -2]), rtol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"max_iter": 1},
        {"max_iter": 1, "method": "interior-point"},
        # Interior point looks at the clock only if there was time left when it began.
        {"time_limit": 1e-9},
    ],
    ids=str,
)
def test_a_limit_is_a_stall(options: dict[str, Any]) -> None:
    with pytest.raises(ConvergenceError) as error:
        solve(parity(400, 5), backend=HiGHS(**options))
    assert error.value.solution.status == (Status.STALLED,) * 2


def test_a_solver_that_lies_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    true = highs_.linprog

    def lying(*data: Any, **more: Any) -> Any:
        found = true(*data, **more)
        if found.status == 0:
            found.x = found.x * 0 + 0.5
            found.eqlin.marginals = found.eqlin.marginals * 0
        return found

    monkeypatch.setattr(highs_, "linprog", lying)
    problem = parity()
    try:
        solution = solve(problem, backend="highs")
    except ConvergenceError:
        return
    assert solution.residuals.worst <= 1e-6  # or the refinement has mended it


def test_quadratic_problems_are_refused() -> None:
    one = tensor([1])
    with pytest.raises(UnsupportedProblemError, match="'highs' does not solve a diagonal P"):
        solve(QP(one, one, one[None], -one, one), backend="highs")


def test_nothing_is_printed_and_nothing_warned(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in OPTIONS:
            HiGHS(**options, max_iter=100, time_limit=10).solve(batch_of_all())  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "highs-ds"}, "method: expected one of simplex, interior-point, got 'highs-ds'"),
        ({"eps": 1e-11}, "eps: expected a number from 1e-10"),
        ({"eps": float("nan")}, "eps"),
        ({"eps": "1e-9"}, "eps"),
        ({"presolve": "on"}, "presolve: expected True or False, got 'on'"),
        ({"max_iter": 0}, "max_iter: expected an integer of at least 1, got 0"),
        ({"max_iter": True}, "max_iter"),
        ({"time_limit": 0.0}, "time_limit: expected a positive number"),
        ({"time_limit": "1"}, "time_limit"),
        ({"tol": 1}, "tol"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        backends.get("highs", **options)


def test_no_option_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    true = highs_.linprog

    def spy(*data: Any, **more: Any) -> Any:
        seen.append((more["method"], more["options"]))
        return true(*data, **more)

    monkeypatch.setattr(highs_, "linprog", spy)
    solve(parity(), backend=HiGHS(
        method="interior-point", eps=1e-8, presolve=True, max_iter=500, time_limit=60.0
    ))  # fmt: skip
    for method, options in seen:
        assert method == "highs-ipm"
        assert options == {
            "presolve": True,
            "primal_feasibility_tolerance": 1e-8,
            "dual_feasibility_tolerance": 1e-8,
            "maxiter": 500,
            "time_limit": 60.0,
        }
    assert len(seen) == 2
    assert repr(HiGHS(max_iter=3)).startswith("HiGHS(method='simplex', eps=1e-10")


def test_a_looser_eps_does_not_loosen_the_answer() -> None:
    problem = parity()
    tight, loose = (solve(problem, backend=HiGHS(eps=eps)) for eps in (1e-10, 1e-4))
    assert torch.allclose(tight.x, loose.x, rtol=0, atol=1e-12)
    assert loose.residuals.worst <= 1e-12


@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_threads_as_torch_may_use(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    true = highs_.ThreadPoolExecutor

    def spy(workers: int) -> Any:
        used.append(workers)
        return true(workers)

    monkeypatch.setattr(highs_, "ThreadPoolExecutor", spy)
    torch.set_num_threads(threads)
    HiGHS().solve(parity())
    assert used == ([] if threads == 1 else [2])


def test_large_costs_little() -> None:
    """One row over all samples: HiGHS's presolve would take seconds, growing as their square."""
    solution = solve(parity(40_000, 2), backend="highs")
    assert solution.residuals.worst <= 1e-12
