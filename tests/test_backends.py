"""The registry of backends, what they say they can do, and the check of what they return."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fairopt import (
    LP,
    QP,
    BackendNotFoundError,
    CellRows,
    ConvergenceError,
    DemographicParity,
    FairnessLayer,
    FairoptError,
    InfeasibleError,
    ProblemError,
    Solution,
    SolveError,
    SparseRows,
    Status,
    UnboundedError,
    UnsupportedProblemError,
    backends,
    project,
    solve,
)
from fairopt.backends import Backend, Capabilities
from fairopt.backends.numba.backend import Numba

EVERYTHING = Capabilities(
    quadratic=frozenset({"diagonal", "dense", "sparse"}),
    linear=True,
    rows=frozenset({"cells", "dense", "sparse"}),
    devices=frozenset({"cpu"}),
)


def problem(**changes: Any) -> QP:
    """Nearest point to (1, -0.5) with x0 + x1 = 1 in the unit square: (1, 0)."""
    data: dict[str, Any] = {
        "P": torch.ones(2), "q": torch.tensor([-1.0, 0.5]), "rows": torch.ones(1, 2),
        "l": torch.ones(1), "u": torch.ones(1), "lb": 0.0, "ub": 1.0,
    }  # fmt: skip
    return QP(**{**data, **changes})


class Fake(Backend):
    """Returns what it was told to, and counts its calls.

    ``solve`` judges it, so a test about something else tells it the optimum: the multipliers of its
    rows are zero unless given.
    """

    name: ClassVar[str] = "fake"
    capabilities: ClassVar[Capabilities] = EVERYTHING
    made = 0

    def __init__(self, *, x: Any = (1.0, 0.0), row_dual: float = 0.0) -> None:
        type(self).made += 1
        self.x, self.row_dual, self.solved = x, row_dual, 0

    def solve(self, problem: Any) -> Solution:
        self.solved += 1
        batch, m, n = problem.shape
        like = problem.c if isinstance(problem, LP) else problem.q
        x = torch.as_tensor(self.x, dtype=like.dtype).expand(batch, n)
        y = torch.full((batch, m), self.row_dual, dtype=torch.float64)
        return Solution(problem, x, y, (Status.SOLVED,) * batch, self.name)


def subclass(**capabilities: Any) -> type[Fake]:
    """A Fake with other capabilities."""

    class Other(Fake):
        made = 0

    Other.capabilities = replace(EVERYTHING, **capabilities)
    return Other


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """``backends.register``, undone afterwards."""
    registry, loaded = dict(backends.registry), dict(backends.loaded)
    yield backends.register
    backends.registry.clear()
    backends.registry.update(registry)
    backends.loaded.clear()
    backends.loaded.update(loaded)


# ---------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------


def test_names_and_available() -> None:
    assert "numba" in backends.names()
    assert "auto" not in backends.names()
    assert set(backends.available()) <= set(backends.names())
    assert "numba" in backends.available()


@pytest.mark.parametrize("name", backends.names())
def test_every_installed_backend_loads_and_declares_itself(name: str) -> None:
    if name not in backends.available():
        pytest.skip(f"{name} is not installed")
    backend = backends.get(name)
    assert isinstance(backend, Backend)
    assert backend.name == name
    assert isinstance(backend.capabilities, Capabilities)
    assert backend.capabilities.rows
    assert backend.capabilities.devices
    assert type(backend).__doc__


def test_the_one_with_defaults_is_made_once() -> None:
    assert backends.get("numba") is backends.get("numba")
    assert backends.get("numba", threads=1) is not backends.get("numba")
    assert backends.get("numba", threads=1) is not backends.get("numba", threads=1)
    assert backends.get("numba").threads is None
    assert backends.get("numba", threads=1).threads == 1


def test_a_registered_backend_is_loaded_when_first_asked_for(register: Callable[..., None]) -> None:
    kind, loads = subclass(), []

    def load() -> type[Backend]:
        loads.append(1)
        return kind

    register("mine", load)
    assert "mine" in backends.names()
    assert "mine" in backends.available()
    assert not loads
    assert kind.made == 0
    first = backends.get("mine")
    assert backends.get("mine") is first
    assert (len(loads), kind.made) == (1, 1)
    assert solve(problem(), backend="mine").x.tolist() == [[1.0, 0.0]]
    assert first.solved == 1
    assert solve(problem(), backend="mine").backend == "fake"
    assert kind.made == 1


def test_options_reach_the_constructor(register: Callable[..., None]) -> None:
    register("mine", subclass)
    inside = problem(q=torch.tensor([-0.25, -0.5]), l=torch.zeros(1))
    other = solve(inside, backend="mine", x=(0.25, 0.5))
    assert other.x.tolist() == [[0.25, 0.5]]
    with pytest.raises(ProblemError, match=r"backend 'mine': .*unexpected keyword argument 'y'"):
        backends.get("mine", y=1)


def test_a_backend_object_needs_no_name(register: Callable[..., None]) -> None:
    fake = Fake(x=(0.0, 1.0))
    mirrored = problem(q=torch.tensor([0.5, -1.0]))
    assert solve(mirrored, backend=fake).x.tolist() == [[0.0, 1.0]]
    assert fake.solved == 1
    layer = FairnessLayer(DemographicParity(tolerance=1.0), bounds=(0, 1), backend=fake)
    assert layer(torch.tensor([-0.3, 1.4]), torch.tensor([0, 1])).tolist() == [0.0, 1.0]
    assert layer.last.backend == "fake"


@pytest.mark.parametrize("name", ["numba", "auto"])
def test_a_name_in_use_is_refused(name: str) -> None:
    with pytest.raises(ProblemError, match=f"backend name: expected one not in use, got '{name}'"):
        backends.register(name, lambda: Fake)
    assert backends.get("numba").name == "numba"


def test_a_backend_without_its_package_says_how_to_get_it(
    register: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = backends.built_in("missing_", "Missing", "no_such_solver", "pip install no-such-solver")
    monkeypatch.setitem(backends.registry, "missing", entry)
    assert "missing" in backends.names()
    assert "missing" not in backends.available()
    with pytest.raises(
        BackendNotFoundError,
        match="backend 'missing' needs the package 'no_such_solver', which is not installed; "
        "get it with: pip install no-such-solver",
    ):
        solve(problem(), backend="missing")
    assert solve(problem()).backend in backends.available()  # auto passes it over


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(BackendNotFoundError) as caught:
        backends.get("nunba")
    for name in backends.names():
        assert name in str(caught.value)
    assert "'nunba'" in str(caught.value)


def test_looking_at_the_registry_imports_no_solver() -> None:
    code = (
        "import sys, fairopt.backends as b; b.names(); b.available(); "
        "print([m for m in ('numba', 'osqp', 'qpth', 'moreau', 'scipy') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.strip() == "[]"
    assert importlib.util.find_spec("numba") is not None  # or the test showed nothing


# ---------------------------------------------------------------------------------------------
# auto
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def only(register: Callable[..., None]) -> Callable[..., None]:
    """A registry of these backends only, in this order."""

    def replace_all(**kinds: type[Backend]) -> None:
        backends.registry.clear()
        backends.loaded.clear()
        for name, kind in kinds.items():
            register(name, lambda kind=kind: kind)

    return replace_all


def chosen(data: QP | LP) -> str:
    """The registered name of what auto took for a problem."""
    before = {name: backends.get(name).solved for name in backends.names()}
    solve(data)
    return next(name for name in backends.names() if backends.get(name).solved > before[name])


def test_auto_takes_the_first_of_those_that_can(only: Callable[..., None]) -> None:
    only(
        one=subclass(quadratic=frozenset({"diagonal"})),
        two=subclass(quadratic=frozenset({"diagonal", "dense"})),
        three=subclass(),
    )
    assert chosen(problem()) == "one"
    assert chosen(problem(P=torch.eye(2))) == "two"
    assert chosen(problem(P=torch.eye(2).to_sparse())) == "three"


def test_auto_loads_no_backend_before_its_turn(only: Callable[..., None], register: Any) -> None:
    only(one=subclass())
    register("never", lambda: pytest.fail("loaded though the one before it can"))
    solve(problem())
    assert backends.get("one").solved == 1


def test_auto_goes_on_when_one_refuses_while_solving(only: Callable[..., None]) -> None:
    class Choosy(Fake):
        def solve(self, problem: Any) -> Solution:
            raise UnsupportedProblemError("not this one")

    only(one=Choosy, two=subclass())
    for gradient in (False, True):
        q = torch.tensor([-1.0, 0.5], requires_grad=gradient)
        assert solve(problem(q=q)).x.shape == (1, 2)
    with pytest.raises(UnsupportedProblemError, match="not this one"):
        solve(problem(), backend="one")
    only(one=Choosy)
    with pytest.raises(
        UnsupportedProblemError, match="one: does not solve this one, though"
    ) as caught:
        solve(problem())
    assert "not this one" in str(caught.value.__cause__)


def test_auto_asks_for_the_form_of_the_rows(only: Callable[..., None]) -> None:
    only(
        cells=subclass(rows=frozenset({"cells"})),
        sparse=subclass(rows=frozenset({"sparse"})),
        dense=subclass(rows=frozenset({"dense"})),
    )
    cells = CellRows(torch.ones(1, 1), torch.zeros(2, dtype=torch.int64), torch.ones(2))
    assert chosen(problem(rows=cells)) == "cells"
    assert chosen(problem(rows=torch.ones(1, 2).to_sparse())) == "sparse"
    assert chosen(problem()) == "dense"


def test_auto_sends_linear_programs_to_those_that_take_them(only: Callable[..., None]) -> None:
    only(quadratic=subclass(linear=False), linear=subclass())
    cost = torch.tensor([-1.0, 2.0])  # the bounds alone hold (1, 0): the row's multiplier is zero
    data = LP(cost, torch.ones(1, 2), torch.ones(1), torch.ones(1), 0.0, 1.0)
    assert chosen(data) == "linear"
    assert chosen(data.smoothed(0.1)) == "quadratic"


def test_auto_says_why_each_one_was_refused(only: Callable[..., None]) -> None:
    only(
        one=subclass(quadratic=frozenset({"diagonal"})),
        two=subclass(rows=frozenset({"cells"}), quadratic=frozenset({"dense"})),
    )
    with pytest.raises(
        UnsupportedProblemError,
        match=r"no installed backend solves this problem; one: does not solve a dense P \(it takes:"
        r" diagonal\); two: does not solve rows in dense form \(it takes: cells\)",
    ):
        solve(problem(P=torch.eye(2)))


def test_auto_is_the_closed_form_for_a_fairness_layer() -> None:
    layer = FairnessLayer(DemographicParity(tolerance=0.1), bounds=(0, 1))
    layer(torch.tensor([0.3, 0.9]), torch.tensor([0, 1]))
    assert layer.last.backend == "numba"


# ---------------------------------------------------------------------------------------------
# Capabilities
# ---------------------------------------------------------------------------------------------


def moved(data: QP, device: str) -> QP:
    """A problem whose sides say that it is elsewhere; a QP itself cannot be made on meta."""
    out = QP.__new__(QP)
    out.__dict__.update(data.__dict__, l=data.l.to(device))
    return out


LINEAR = LP(torch.ones(2), torch.ones(1, 2), torch.ones(1), torch.ones(1))


@pytest.mark.parametrize(
    ("changes", "data", "expected"),
    [
        ({}, problem(), None),
        ({}, LINEAR, None),
        ({"linear": False}, problem(), None),
        ({"linear": False}, LINEAR,
         "linear programs (give solve(..., smoothing=...) a positive value)"),
        ({"quadratic": frozenset()}, LINEAR, None),
        ({"quadratic": frozenset()}, problem(), "a diagonal P (it takes: none)"),
        ({"quadratic": frozenset({"sparse", "diagonal"})}, problem(P=torch.eye(2)),
         "a dense P (it takes: diagonal, sparse)"),
        ({"quadratic": frozenset({"dense"})}, problem(P=torch.eye(2).to_sparse()),
         "a sparse P (it takes: dense)"),
        ({"rows": frozenset({"sparse"})}, problem(), "rows in dense form (it takes: sparse)"),
        ({"rows": frozenset({"dense"})}, problem(rows=torch.ones(1, 2).to_sparse()),
         "rows in sparse form (it takes: dense)"),
        ({"rows": frozenset({"dense", "sparse"})},
         problem(rows=CellRows(torch.ones(1, 1), torch.zeros(2).long(), torch.ones(2))),
         "rows in cells form (it takes: dense, sparse)"),
        ({"devices": frozenset({"cuda", "cpu"})}, moved(problem(), "meta"),
         "tensors on 'meta' (it runs on: cpu, cuda)"),
    ],
)  # fmt: skip
def test_what_a_backend_lacks_in_words(
    changes: dict[str, Any], data: QP | LP, expected: str | None
) -> None:
    assert replace(EVERYTHING, **changes).missing(data) == expected


def test_a_backend_that_declares_nothing_can_nothing() -> None:
    for data in (problem(), LINEAR):
        assert Capabilities().missing(data) is not None
    assert Capabilities().certifies is False  # and is checked


def test_check_names_the_backend_and_the_way_out() -> None:
    numba = backends.get("numba")
    numba.check(problem())
    with pytest.raises(
        UnsupportedProblemError,
        match=r"backend 'numba' does not solve a dense P \(it takes: diagonal\); choose another "
        'backend or backend="auto"',
    ):
        numba.check(problem(P=torch.eye(2)))


def test_a_problem_that_is_not_supported_is_not_solved() -> None:
    fake = subclass(quadratic=frozenset({"dense"}))()
    with pytest.raises(UnsupportedProblemError):
        solve(problem(), backend=fake)
    assert fake.solved == 0


# ---------------------------------------------------------------------------------------------
# The judge
# ---------------------------------------------------------------------------------------------

WRONG = {
    "a row broken": (1.0, 0.1),
    "a row broken by a little": (1.0, 1e-5),
    "above a bound": (1.0 + 1e-6, -1e-6),
    "below a bound": (0.5, -0.5),
    "NaN": (float("nan"), 0.0),
    "infinite": (float("inf"), -float("inf")),
}


@pytest.mark.parametrize("x", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("gradient", [False, True], ids=["plain", "grad"])
def test_a_wrong_answer_is_an_error(x: tuple[float, float], gradient: bool) -> None:
    data = problem(q=torch.tensor([-1.0, 0.5], requires_grad=gradient))
    with pytest.raises(
        ConvergenceError,
        match="backend 'fake', problem 0 of the batch: stopped before the promised precision",
    ) as caught:
        solve(data, backend=Fake(x=x))
    assert caught.value.batch == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_without_numbers_is_an_error_without_bounds_too(value: float) -> None:
    free = problem(lb=None, ub=None, u=torch.tensor([float("inf")]))
    with pytest.raises(ConvergenceError):
        solve(free, backend=Fake(x=(value, value)))


def test_a_wrong_linear_program_is_an_error() -> None:
    assert solve(LINEAR, backend=Fake(x=(0.5, 0.5), row_dual=-1.0)).x.tolist() == [[0.5, 0.5]]
    with pytest.raises(ConvergenceError):  # the row
        solve(LINEAR, backend=Fake(x=(1.0, 1.0), row_dual=-1.0))
    with pytest.raises(ConvergenceError):  # the multiplier
        solve(LINEAR, backend=Fake(x=(0.5, 0.5)))
    dear = replace(LINEAR, c=torch.tensor([[1.0, 2.0]]), lb=torch.zeros(1, 2))
    assert solve(dear, backend=Fake(x=(1.0, 0.0), row_dual=-1.0)).x.tolist() == [[1.0, 0.0]]
    with pytest.raises(ConvergenceError):  # the other corner, which costs more
        solve(dear, backend=Fake(x=(0.0, 1.0), row_dual=-1.0))
    with pytest.raises(ConvergenceError):  # with the multiplier that suits it
        solve(dear, backend=Fake(x=(0.0, 1.0), row_dual=-2.0))


@pytest.mark.parametrize(
    "third", [(0.5, 0.6), (0.25, 0.75)], ids=["a row broken", "feasible, not optimal"]
)
def test_the_wrong_problem_of_a_batch_is_named(third: tuple[float, float]) -> None:
    data = problem(q=torch.tensor([[-1.0, 0.0], [-0.5, -0.5], [-0.5, -0.5]]))
    x = torch.tensor([[1.0, 0.0], [0.5, 0.5], third])
    with pytest.raises(ConvergenceError, match="problem 2 of the batch") as caught:
        solve(data, backend=Fake(x=x))
    assert caught.value.batch == 2


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (Status.STALLED, ConvergenceError, "stopped before the promised precision"),
        (Status.INFEASIBLE, InfeasibleError, "the rows in conflict are 'row 0'$"),
        (Status.UNBOUNDED, UnboundedError, "the objective falls without end"),
        (Status.NONCONVEX, ProblemError, "P has a negative eigenvalue"),
    ],
)
@pytest.mark.parametrize("gradient", [False, True], ids=["plain", "grad"])
def test_what_failed_is_an_error_and_the_others_are_kept(
    status: Status, error: type[FairoptError], words: str, gradient: bool
) -> None:
    class Half(Fake):
        def solve(self, problem: Any) -> Solution:
            proof = torch.tensor([[0.0], [1.0], [1.0]], dtype=torch.float64)
            told = (Status.SOLVED, status, status)
            return replace(super().solve(problem), status=told, row_dual=proof)

    q = torch.tensor([[-1.0, 0.0], [-0.5, -0.5], [-0.5, -0.5]], requires_grad=gradient)
    x = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    with pytest.raises(
        error, match=r"backend 'fake', problem 1 of the batch \(2 of 3 failed\): .*" + words
    ) as caught:
        solve(problem(q=q), backend=Half(x=x))
    if isinstance(caught.value, SolveError):
        assert caught.value.batch == 1
        kept = caught.value.solution
        assert kept is not None and kept.status == (Status.SOLVED, status, status)
        assert torch.equal(kept.x[0], x[0]) and not kept.x.requires_grad


def test_an_exception_of_the_solver_is_ours(register: Callable[..., None]) -> None:
    class Broken(Fake):
        def solve(self, problem: Any) -> Solution:
            raise FloatingPointError("singular matrix")

    with pytest.raises(
        ConvergenceError, match="backend 'fake' raised FloatingPointError: singular matrix"
    ) as caught:
        solve(problem(), backend=Broken())
    assert isinstance(caught.value.__cause__, FloatingPointError)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_the_promised_precision_is_the_limit(dtype: torch.dtype, limit: float) -> None:
    data = problem(
        q=torch.tensor([-1.0, 0.0], dtype=dtype), P=torch.ones(2, dtype=dtype), lb=None, ub=None,
        rows=torch.ones(1, 2, dtype=dtype), l=torch.ones(1, dtype=dtype),
        u=torch.ones(1, dtype=dtype),
    )  # fmt: skip
    # The scale of this row is 3, twice the largest entry and the side: a third of an excess counts.
    inside = torch.tensor([1.0, 2 * limit], dtype=dtype)
    solve(data, backend=Fake(x=inside))
    with pytest.raises(ConvergenceError):
        solve(data, backend=Fake(x=torch.tensor([1.0, 4 * limit], dtype=dtype)))


def test_the_layer_keeps_its_state_when_the_answer_is_wrong() -> None:
    layer = FairnessLayer(DemographicParity(tolerance=0.1), bounds=(0, 1), backend=Fake(x=0.0))
    scores, groups = torch.tensor([-0.3, -0.9]), torch.tensor([0, 1])
    assert layer(scores, groups).tolist() == [0.0, 0.0]
    last = layer.last
    layer.backend.x = (0.0, 1.0)
    with pytest.raises(ConvergenceError):
        layer(scores, groups)
    assert layer.last is last


# Nearest point to (1, -0.5) with x0 + x1 = 1, without bounds: (1.25, -0.25) with multiplier -0.25.
FREE = {"lb": None, "ub": None}
FREE_OPTIMUM = (1.25, -0.25)

SUBOPTIMAL: dict[str, tuple[dict[str, Any], tuple[float, float], float]] = {
    "far": ({}, (0.25, 0.75), 0.0),
    "in the middle": ({}, (0.5, 0.5), -0.5),
    "near": ({}, (0.999, 0.001), 0.0),
    "near, without bounds": (FREE, (1.251, -0.251), -0.25),
    "no multiplier": (FREE, FREE_OPTIMUM, 0.0),
    "a multiplier of the wrong sign": (FREE, FREE_OPTIMUM, 0.25),
    "a multiplier too large": (FREE, FREE_OPTIMUM, -0.251),
    "a multiplier that is NaN": (FREE, FREE_OPTIMUM, float("nan")),
    "pushed towards no side": ({**FREE, "l": torch.tensor([-float("inf")])}, FREE_OPTIMUM, -0.25),
    "pushed towards a distant side": ({**FREE, "l": torch.zeros(1)}, FREE_OPTIMUM, -0.25),
}


def test_an_optimum_with_its_multiplier_is_accepted() -> None:
    """What the cases below are one step away from."""
    for dtype in (torch.float32, torch.float64):
        data = problem(**FREE, q=torch.tensor([-1.0, 0.5], dtype=dtype))
        found = solve(data, backend=Fake(x=FREE_OPTIMUM, row_dual=-0.25))
        assert found.residuals.worst == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("changes", "x", "row_dual"), SUBOPTIMAL.values(), ids=SUBOPTIMAL.keys())
def test_a_feasible_answer_that_is_not_optimal_is_an_error(
    changes: dict[str, Any], x: tuple[float, float], row_dual: float, dtype: torch.dtype
) -> None:
    data = problem(**{"q": torch.tensor([-1.0, 0.5], dtype=dtype), **changes})
    fake = Fake(x=x, row_dual=row_dual)
    assert fake.solve(data).residuals.primal.item() <= 1e-7  # rows and bounds do not give it away
    with pytest.raises(
        ConvergenceError,
        match="backend 'fake', problem 0 of the batch: stopped before the promised precision",
    ) as caught:
        solve(data, backend=fake)
    assert caught.value.batch == 0


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_how_far_from_optimal_is_too_far(dtype: torch.dtype, limit: float) -> None:
    """Stationarity is relative to the largest sum of terms, |P x| + |q| + |y|, here 2.5."""
    data = problem(**FREE, q=torch.tensor([-1.0, 0.5], dtype=dtype))
    solve(data, backend=Fake(x=FREE_OPTIMUM, row_dual=-0.25 - 2 * limit))
    with pytest.raises(ConvergenceError, match="stationarity"):
        solve(data, backend=Fake(x=FREE_OPTIMUM, row_dual=-0.25 - 4 * limit))


MALFORMED: dict[str, Callable[[Tensor], Tensor]] = {
    "no batch": lambda x: x[0],
    "one too many dimensions": lambda x: x.unsqueeze(0),
    "transposed": lambda x: x.mT,
    "a variable short": lambda x: x[:, :1],
    "a variable too many": lambda x: torch.cat([x, x[:, :1]], 1),
    "half": Tensor.half,
    "bfloat16": Tensor.bfloat16,
    "integers": Tensor.long,
    "narrower than the problem": Tensor.float,
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize("gradient", [False, True], ids=["plain", "grad"])
def test_an_answer_of_a_wrong_shape_or_dtype_is_the_backends_fault(
    change: Callable[[Tensor], Tensor], gradient: bool
) -> None:
    class Malformed(Fake):
        def solve(self, problem: Any) -> Solution:
            solution = super().solve(problem)
            return replace(solution, x=change(solution.x))

    q = torch.tensor([-1.0, 0.5], dtype=torch.float64, requires_grad=gradient)
    with pytest.raises(
        ConvergenceError,
        match=r"backend 'fake': expected x of shape \(1, 2\) in torch.float64 from its solve, got "
        r"\(.*\) in torch.*; the backend is at fault",
    ):
        solve(problem(q=q), backend=Malformed())


def test_a_backend_that_certifies_is_not_checked_again() -> None:
    """That is what the declaration means; the numba backend's own is tested on its own."""
    certified = subclass(certifies=True)(x=(1.0, 0.5))
    assert solve(problem(), backend=certified).x.tolist() == [[1.0, 0.5]]


# ---------------------------------------------------------------------------------------------
# The default derivative
# ---------------------------------------------------------------------------------------------


def test_a_backend_without_a_derivative_has_the_shared_one() -> None:
    """A backend that only solves trains as well as one with its own vjp."""

    class Borrowed(Numba):
        name = "borrowed"
        vjp = Backend.vjp

    scores = torch.rand(30, dtype=torch.float64)
    groups = torch.arange(30) % 3
    found = []
    for backend in (Numba(), Borrowed()):
        leaf = scores.clone().requires_grad_()
        fair = project(
            leaf, groups, DemographicParity(tolerance=0.01), bounds=(0, 0.8), backend=backend
        )
        (fair * torch.arange(30)).sum().backward()
        found.append(leaf.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_backend_sees_detached_data() -> None:
    seen: list[Tensor] = []

    class Watching(Numba):
        name = "watching"

        def solve(self, problem: Any) -> Solution:
            seen.extend(problem.tensors)
            return super().solve(problem)

    leaf = torch.rand(6, requires_grad=True)
    tolerance = torch.tensor(0.1, requires_grad=True)
    project(leaf, torch.arange(6) % 2, DemographicParity(tolerance=tolerance), bounds=(0, 1),
            backend=Watching())  # fmt: skip
    assert seen
    assert not any(tensor.requires_grad for tensor in seen)


def test_sparse_rows_are_taken_as_they_are() -> None:
    rows = SparseRows(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.ones(2), 1, 2)
    assert solve(problem(rows=rows), backend="numba").x.tolist() == [[1.0, 0.0]]
