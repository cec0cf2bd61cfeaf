"""Every backend, every way to fail: our error, the problem's index and the remedy; nothing printed.

Issue "solver-agnostic", what it must show, 5. Each batch has three problems, and the one at index 1
is bad. What a backend does not take it refuses; that, too, is in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from agreeing import skip_without

from fairopt import LP, QP, backends, solve
from fairopt.backends import Backend
from fairopt.errors import (
    BackendNotFoundError,
    ConvergenceError,
    FairoptError,
    InfeasibleError,
    ProblemError,
    SolveError,
    UnboundedError,
    UnsupportedProblemError,
)
from fairopt.problem import Problem, Rows, trusted
from fairopt.solution import Status

INF = float("inf")
BAD = 1
BACKENDS = ("numba", "osqp", "qpth", "highs")


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    skip_without(request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def _silent(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert [str(w.message) for w in recwarn] == []


def three(good: list[float], bad: list[float]) -> torch.Tensor:
    return torch.tensor([good, bad, good], dtype=torch.float64)


def program(
    name: str,
    *,
    l: tuple[list[float], list[float]] = ([0.2, 0.1], [0.2, 0.1]),
    lb: tuple[list[float], list[float]] = ([0, 0, 0], [0, 0, 0]),
    P: Any = None,
) -> Problem:
    """A batch that the backend takes: (good, bad) pairs of sides; by default all are good."""
    linear = torch.tensor([[1.0, -0.3, 0.2]], dtype=torch.float64).expand(3, 3)
    rows = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]], dtype=torch.float64).expand(3, 2, 3)
    sides = three(*l), torch.full((3, 2), INF, dtype=torch.float64)
    bounds = three(*lb), torch.ones(3, 3, dtype=torch.float64)
    if backends.get(name).capabilities.quadratic:
        P = torch.ones(3, 3, dtype=torch.float64) if P is None else P
        return QP(P, linear, rows, *sides, *bounds)
    return LP(linear, rows, *sides, *bounds)


def caught(name: str | Backend, problem: Problem, error: type[FairoptError]) -> FairoptError:
    """What is raised; and the same where gradients are asked for."""
    with pytest.raises(error) as first:
        solve(problem, backend=name)
    if isinstance(problem, QP):
        leaf = problem.q.clone().requires_grad_()
        with pytest.raises(error):
            solve(
                problem.with_tensors(problem.tensors[0], leaf, *problem.tensors[2:]), backend=name
            )
    return first.value


def tells(error: FairoptError, status: Status) -> None:
    """The status in its own words, with its remedy; which problem; and the others' solutions."""
    assert status.value in str(error)
    assert f"problem {BAD} of the batch" in str(error)
    assert isinstance(error, SolveError)
    assert error.batch == BAD
    assert error.solution is not None
    assert error.solution.status[BAD] is status
    assert error.solution.status[0] is error.solution.status[2] is Status.SOLVED


def test_the_batch_is_good_but_for_what_is_changed(name: str) -> None:
    assert set(solve(program(name), backend=name).status) == {Status.SOLVED}


def test_infeasible(name: str) -> None:
    error = caught(name, program(name, l=([0.2, 0.1], [2.5, 0.1])), InfeasibleError)
    tells(error, Status.INFEASIBLE)
    assert isinstance(error, InfeasibleError)
    assert error.rows == ("row 0",)
    assert "'row 0'" in str(error)


def test_unbounded(name: str) -> None:
    lb = ([0.0, 0.0, 0.0], [-INF, 0.0, 0.0])
    l = ([-INF, 0.1], [-INF, 0.1])
    if name == "highs":
        tells(caught(name, program(name, l=l, lb=lb), UnboundedError), Status.UNBOUNDED)
        return
    flat = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64).expand(3, 3)
    problem = program(name, l=l, lb=lb, P=flat)
    with pytest.raises((UnboundedError, UnsupportedProblemError)) as raised:
        solve(problem, backend=name)
    if isinstance(raised.value, UnboundedError):
        tells(raised.value, Status.UNBOUNDED)
    else:  # a singular P is more than it takes: it says why, and what to do
        assert "add a small positive weight" in str(raised.value)


def test_not_convex(name: str) -> None:
    P = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    P[BAD, 0, 1] = P[BAD, 1, 0] = 2.0
    if "dense" not in backends.get(name).capabilities.quadratic:
        diagonal = torch.ones(3, 3, dtype=torch.float64)
        diagonal[BAD, 0] = -1.0
        with pytest.raises(ProblemError, match="P: expected"):
            QP(diagonal, diagonal, diagonal[:1], diagonal[:, :1], diagonal[:, :1])
        return
    error = caught(name, program(name, P=P), ProblemError)
    assert Status.NONCONVEX.value in str(error)
    assert f"problem {BAD} of the batch" in str(error)


def test_iteration_limit(name: str) -> None:
    problem = program(name)
    if name == "numba":  # no such option: it stops by itself
        with pytest.raises(ProblemError, match=r"'max_iter'; its options: 'threads'"):
            solve(problem, backend=name, max_iter=1)
        return
    limits = {"osqp": {"max_iter": 1}, "qpth": {"max_iter": 1}, "highs": {"max_iter": 1}}
    hard = hardest(name)
    with pytest.raises(ConvergenceError) as raised:
        solve(hard, backend=name, **limits[name])
    error = raised.value
    assert Status.STALLED.value in str(error)
    assert "stationarity" in str(error)  # how far it came
    assert error.solution is not None
    assert Status.STALLED in error.solution.status


def hardest(name: str) -> Problem:
    """A problem that one iteration does not solve."""
    generator = torch.Generator().manual_seed(0)
    n, m = 30, 20
    A = torch.randn(m, n, generator=generator, dtype=torch.float64)
    x = torch.rand(n, generator=generator, dtype=torch.float64)
    u = A @ x + 0.1
    linear = torch.randn(1, n, generator=generator, dtype=torch.float64)
    if backends.get(name).capabilities.quadratic:
        return QP(torch.ones(n, dtype=torch.float64), 10 * linear, A, u - 5.0, u, 0.0, 1.0)
    return LP(linear, A, u - 5.0, u, 0.0, 1.0)


@pytest.mark.parametrize("where", ["q", "rows", "l", "lb", "P"])
def test_nan_never_gets_to_a_solver(name: str, where: str) -> None:
    problem = program(name)
    linear = problem.tensors[0] if isinstance(problem, LP) else problem.q
    data = {
        "P": torch.ones(3, 3, dtype=torch.float64), "q": linear.clone(),
        "rows": problem.rows.to_dense().matrix.clone(), "l": problem.l.clone(),
        "lb": problem.lb.clone(),
    }  # fmt: skip
    data[where][BAD, ..., 0] = float("nan")
    sides = data["l"], problem.u, data["lb"], problem.ub
    if isinstance(problem, LP) and where == "P":
        pytest.skip(f"{name} solves linear programs, which have no P")
    cost = "c" if isinstance(problem, LP) else "q"
    word = {"q": cost, "l": "l, u", "lb": "lb, ub"}.get(where, where)
    quadratic = () if isinstance(problem, LP) else (data["P"],)
    with pytest.raises(ProblemError, match=rf"^{word}: expected .*(NaN|finite)"):
        type(problem)(*quadratic, data["q"], data["rows"], *sides)


@pytest.mark.parametrize("missing", ["osqp", "qpth", "highs"])
def test_missing_package(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed here: pretend that nothing is."""
    problem = program("numba")
    monkeypatch.setattr("fairopt.backends._entry.find_spec", lambda package: None)
    monkeypatch.setattr(backends, "loaded", {})
    with pytest.raises(BackendNotFoundError, match=f"'{missing}' needs .*pip install"):
        solve(problem, backend=missing)


def test_dtype_and_device(name: str) -> None:
    data = torch.ones(1, 2, dtype=torch.float16)
    with pytest.raises(ProblemError, match=r"expected float"):
        QP(data, data, data, data[:, :1], data[:, :1])
    if "cuda" in backends.get(name).capabilities.devices:
        return
    problem = program(name)
    meta = torch.device("meta")
    moved = {
        key: value.to(meta) if isinstance(value, (torch.Tensor, Rows)) else value
        for key, value in vars(problem).items()
    }
    elsewhere = trusted(type(problem), **moved)  # a check would read values
    with pytest.raises(UnsupportedProblemError, match=rf"'{name}' does not solve .*meta.*cpu"):
        solve(elsewhere, backend=name)


def test_a_solver_that_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = type(backends.get(name))()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("license expired")

    monkeypatch.setattr(backend, "solve", broken)
    error = caught(backend, program(name), ConvergenceError)
    assert f"backend '{name}' raised RuntimeError: license expired" in str(error)
    assert "try another" in str(error)


LIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "beside the rows": lambda x: x * 0.5,
    "beyond a bound": lambda x: x + 1.0,
    "feasible, not optimal": lambda x: torch.ones_like(x),
    "no number": lambda x: x * float("nan"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_answer_is_not_returned(
    name: str, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = type(backends.get(name))()
    if backend.capabilities.certifies:
        pytest.skip(f"{name} declares that it checks its own answers")
    honest = backend.solve

    def lying(problem: Problem) -> Any:
        found = honest(problem)
        x = found.x.clone()
        x[BAD] = LIES[lie](x[BAD])
        return type(found)(
            problem=problem, x=x, row_dual=found.row_dual, status=found.status, backend=name
        )

    monkeypatch.setattr(backend, "solve", lying)
    error = caught(backend, program(name), ConvergenceError)
    tells(error, Status.STALLED)
