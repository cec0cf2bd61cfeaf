"""What cannot be solved, for every backend: our error with status, index and remedy; silence.

One table, backends by failures. In a batch it is always problem 1 of three that fails. That the
other two are solved, and that infeasibility is proved, is in the contract (``fairopt.testing``).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from agreeing import skip_without
from torch import Tensor

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
from fairopt.kernels.projection import STATUS
from fairopt.kernels.state import STALLED
from fairopt.programs.problem import Problem
from fairopt.programs.solution import Status

BACKENDS = ("numba", "osqp", "qpth", "highs")
INF = float("inf")


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    skip_without(request.param)
    return backends.get(request.param)


@pytest.fixture(autouse=True)
def _silent(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing is printed, also below Python, and nothing warned."""
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert capfd.readouterr() == ("", "")


def three(backend: Backend, **second: Any) -> Problem:
    """min |x|^2 / 2 + q.x (or q.x) with 1 <= x_1 + x_2 <= 3, x_1 >= -2 and 0 <= x <= 2.

    Args:
        second: what is different in problem 1 of the three: q, l, u, lb, ub, or P.
    """
    data = {
        "P": tensor(1, 1), "q": tensor(1, 2), "l": tensor(1, -2), "u": tensor(3, INF),
        "lb": tensor(0, 0), "ub": tensor(2, 2),
    }  # fmt: skip
    if "P" in second and second["P"].dim() == 2:
        data["P"] = torch.eye(2, dtype=torch.float64)
    P, *rest = (
        torch.stack([value, second.get(name, value), value]) for name, value in data.items()
    )
    rows = tensor([1, 1], [1, 0])
    if backend.capabilities.quadratic:
        return QP(P, rest[0], rows, *rest[1:])
    return LP(rest[0], rows, *rest[1:])


def fails(
    problem: Problem,
    backend: Backend | str,
    error: type[FairoptError],
    status: Status,
    words: str,
    index: int = 1,
) -> None:
    """With and without gradients."""
    for grad in (False, True):
        linear = (problem.c if isinstance(problem, LP) else problem.q).clone()
        asked = problem
        if grad and isinstance(problem, QP):
            asked = problem.with_tensors(
                problem.tensors[0], linear.requires_grad_(), *problem.tensors[2:]
            )
        with pytest.raises(error, match=words) as caught:
            solve(asked, backend=backend)
        message = str(caught.value)
        assert f"problem {index} of the batch" in message
        assert status.value.split(";")[-1] in message  # the remedy
        if isinstance(caught.value, SolveError):
            assert caught.value.batch == index
            assert caught.value.solution is not None
            other = status if index == 0 else Status.SOLVED
            assert caught.value.solution.status == (other, status, other)


def test_the_other_two_have_a_solution(backend: Backend) -> None:
    solution = solve(three(backend), backend=backend)
    assert solution.status == (Status.SOLVED,) * 3
    torch.testing.assert_close(solution.x[1], tensor(1, 0), rtol=0, atol=1e-9)


def test_infeasible(backend: Backend) -> None:
    problem = three(backend, l=tensor(5, -2), u=tensor(INF, INF))  # the bounds allow 4
    fails(problem, backend, InfeasibleError, Status.INFEASIBLE, "rows in conflict are 'row 0'")


def test_unbounded(backend: Backend) -> None:
    """x_2 falls without end. What needs a definite P says so instead, and how to get one."""
    changes = {"q": tensor(1, -1), "u": tensor(INF, INF), "ub": tensor(2, INF)}
    problem = three(backend, P=tensor(1, 0), **changes)
    if backend.name == "numba":
        with pytest.raises(UnsupportedProblemError, match="add a small positive weight there"):
            solve(problem, backend=backend)
    else:
        fails(problem, backend, UnboundedError, Status.UNBOUNDED, "bound the variables")


def test_a_P_that_is_not_convex(backend: Backend) -> None:
    bent = tensor([1, 2], [2, 1])
    if "dense" in backend.capabilities.quadratic:
        problem = three(backend, P=bent)
        fails(problem, backend, ProblemError, Status.NONCONVEX, "has a negative eigenvalue")
        return
    one = tensor(1)
    with pytest.raises(UnsupportedProblemError, match=r"'[a-z]*' does not solve a dense P"):
        solve(QP(bent, tensor(1, 1), tensor([1, 1]), one, one), backend=backend)


def test_a_diagonal_that_is_not_convex_is_no_problem_at_all() -> None:
    with pytest.raises(ProblemError, match="P: expected a finite diagonal without negative"):
        three(backends.get("numba"), P=tensor(1, -1))


def hard(name: str) -> Problem:
    """One problem for which a single iteration is too few between two that need none."""
    torch.manual_seed(0)
    n, m = 40, 60
    A = torch.randn(m, n, dtype=torch.float64)
    side = torch.full((3, m), 100.0, dtype=torch.float64)
    side[1] = 0.05
    q = torch.zeros(3, n, dtype=torch.float64)
    q[1] = 10 * torch.randn(n, dtype=torch.float64)
    if name == "highs":
        return LP(q, A, -side, side, -1.0, 1.0)
    values = torch.logspace(0, 3, n, dtype=torch.float64)
    return QP(values, q, A, -side, side, -1.0, 1.0)


def limited(name: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The backend with the lowest limit it takes; numba has no option, its kernel is told."""
    kind = type(backends.get(name))
    if name != "numba":
        return kind(max_iter=1)  # type: ignore[call-arg]
    module = importlib.import_module("fairopt.backends.numba.backend")
    true = module.solve

    def stopped(*data: Any) -> int:
        true(*data)
        x, outcome = data[7], data[11]
        outcome[1, STATUS], x[1] = STALLED, 0.5
        return 1

    monkeypatch.setattr(module, "solve", stopped)
    return kind()


def test_the_iteration_limit(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    problem = hard(backend.name)
    assert solve(problem, backend=backend).status == (Status.SOLVED,) * 3
    index = 0 if backend.name == "highs" else 1  # HiGHS stops before it looks at any of them
    stalled, words = Status.STALLED, r"stopped before the promised precision.* \(stationarity "
    fails(problem, limited(backend.name, monkeypatch), ConvergenceError, stalled, words, index)


@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("where", ["q", "rows", "P"])
def test_data_that_is_not_finite(backend: Backend, where: str, value: float) -> None:
    """Refused before any solver sees it."""
    good = three(backend)
    tensors = {"q": tensor(1, 2), "rows": tensor([1, 1], [1, 0]), "P": tensor(1, 1)}
    tensors[where].view(-1)[1] = value
    sides = (good.l[:1], good.u[:1], 0.0, 2.0)
    with pytest.raises(ProblemError, match=f"^{where}: expected (finite values|a finite diagonal)"):
        solve(QP(tensors["P"], tensors["q"], tensors["rows"], *sides), backend=backend)


@pytest.mark.parametrize("where", ["l", "u", "lb", "ub"])
def test_a_side_that_is_no_number(backend: Backend, where: str) -> None:
    with pytest.raises(
        ProblemError, match=rf"{where}.*: expected .*without NaN.* at index \(1, 0\)"
    ):
        solve(three(backend, **{where: tensor(float("nan"), 1)}), backend=backend)


@pytest.mark.parametrize(
    "name", [name for name, entry in backends.registry.items() if entry.package is not None]
)
def test_a_missing_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretended, whatever is installed here: the line that installs it is in the message."""
    one = tensor(1)
    problem = QP(one, one, one[None], -one, one)
    monkeypatch.setattr("fairopt.backends.entries.find_spec", lambda package: None)
    monkeypatch.setattr(backends, "loaded", {})
    assert name not in backends.available()
    with pytest.raises(BackendNotFoundError, match=f"'{name}' needs .*: pip install "):
        solve(problem, backend=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex128])
def test_a_dtype_that_nobody_takes(backend: Backend, dtype: torch.dtype) -> None:
    q = torch.ones(2).to(dtype)
    with pytest.raises(ProblemError, match=f"^q: expected .*float32.*float64.* got {dtype}"):
        solve(
            QP(torch.ones(2), q, torch.ones(1, 2), -torch.ones(1), torch.ones(1)), backend=backend
        )


def test_a_device_that_it_does_not_run_on(backend: Backend) -> None:
    problem = three(backend)
    elsewhere = type(problem).__new__(type(problem))  # neither can be made on meta
    elsewhere.__dict__.update(problem.__dict__, l=problem.l.to("meta"))
    devices = ", ".join(sorted(backend.capabilities.devices))
    words = rf"'{backend.name}' does not solve tensors on 'meta' \(it runs on: {devices}\); choose"
    with pytest.raises(UnsupportedProblemError, match=words):
        solve(elsewhere, backend=backend)


# Where each backend calls its solver.
SOLVERS: dict[str, Callable[[pytest.MonkeyPatch, Callable[..., Any]], None]] = {
    "numba": lambda patch, broken: patch.setattr(module("numba.backend"), "solve", broken),
    "osqp": lambda patch, broken: patch.setattr(module("osqp.backend").Workspace, "solve", broken),
    "qpth": lambda patch, broken: patch.setattr(module("qpth.backend").load(), "forward", broken),
    "highs": lambda patch, broken: patch.setattr(module("highs"), "linprog", broken),
}


def module(name: str) -> Any:
    return importlib.import_module(f"fairopt.backends.{name}")


def test_a_solver_that_raises(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise FloatingPointError("out of cheese")

    SOLVERS[backend.name](monkeypatch, broken)
    words = f"'{backend.name}' raised FloatingPointError: out of cheese; .*try another"
    with pytest.raises(ConvergenceError, match=words) as caught:
        solve(three(type(backend)()), backend=type(backend)())
    assert isinstance(caught.value.__cause__, FloatingPointError)
