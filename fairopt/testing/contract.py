"""The contract of a backend, as tests: all that ``fairopt.solve`` relies on and users may expect.

The backend is asked only for problems that its ``Capabilities`` declare. Answers are
compared with solutions that were chosen before the problem was (``fairopt.testing.known``), with
their derivatives by finite differences, and with our residuals; never with another backend.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from fairopt import backends
from fairopt.backends import Backend, Capabilities
from fairopt.errors import (
    BackendNotFoundError,
    FairoptError,
    InfeasibleError,
    ProblemError,
    SolveError,
    UnboundedError,
    UnsupportedProblemError,
)
from fairopt.optimality.certificates import proves_infeasible
from fairopt.optimality.derivative import gradients
from fairopt.programs.problem import QP
from fairopt.programs.solution import Status
from fairopt.solving.autograd import solve
from fairopt.testing.cases import CASES, FORMS, everything, general_recipes, known_recipes
from fairopt.testing.derivatives import cotangent, derivative, directions, parameter_names
from fairopt.testing.failing import Failing
from fairopt.testing.judging import (
    agrees,
    answer,
    data,
    distance,
    expect,
    fail,
    precise,
    refusals,
    well_formed,
    words,
)
from fairopt.testing.known import Recipe, draw
from fairopt.testing.parity import in_closed_form, parity
from fairopt.tolerances import GRADIENT_AGREEMENT

THREADS, ROUNDS = 4, 4
ERRORS: dict[Status, type[FairoptError]] = {
    Status.INFEASIBLE: InfeasibleError,
    Status.UNBOUNDED: UnboundedError,
    Status.NONCONVEX: ProblemError,
}


class BackendContract:
    """What every backend must pass. Subclass it and say which backend:

        class TestMine(BackendContract):
            backend = MySolver()

    ``backend`` may also be a registered name; while what that needs is not installed, all tests are
    skipped and name the missing package.
    """

    backend: ClassVar[Backend | str]

    @classmethod
    def solver(cls) -> Backend:
        """The backend under test."""
        backend = getattr(cls, "backend", None)
        if isinstance(backend, str):
            return backends.get(backend)
        if not isinstance(backend, Backend):
            fail(f"{cls.__name__}.backend: expected a Backend or a name, got {backend!r}")
        return backend

    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        name = self.backend
        if isinstance(name, str) and not backends.is_available(name):
            try:
                backends.get(name)
            except BackendNotFoundError as error:
                pytest.skip(str(error))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """The problems of each test: those that the backend claims, on the devices that exist."""
        for argument, choose in CASES.items():
            if argument not in metafunc.fixturenames:
                continue
            name = self.backend
            if isinstance(name, str) and not backends.is_available(name):
                metafunc.parametrize(argument, [None], ids=["not installed"])
            else:
                cases = list(choose(self.solver().capabilities))
                metafunc.parametrize(argument, cases)

    # -----------------------------------------------------------------------------------------
    # Its description
    # -----------------------------------------------------------------------------------------

    def test_it_says_what_it_is(self) -> None:
        """A name, a docstring, and capabilities in the known words."""
        solver = self.solver()
        kind = type(solver).__name__
        name, can = solver.name, solver.capabilities
        expect(isinstance(name, str) and name, f"{kind}.name: expected a word, got {name!r}")
        expect(name != "auto", f"{kind}.name: 'auto' is reserved")
        expect(
            isinstance(can, Capabilities),
            f"{kind}.capabilities: expected a fairopt.backends.Capabilities, got {can!r}",
        )
        for field, known in FORMS.items():
            unknown = set(getattr(can, field)) - known
            expect(
                not unknown,
                f"{kind}.capabilities.{field}: expected some of {sorted(known)}, got "
                f"{sorted(unknown)}",
            )
        expect(
            can.rows and can.devices and (can.quadratic or can.linear),
            f"{kind}.capabilities: expected at least one form of rows, one device, and quadratic "
            f"or linear programs; got {can}",
        )
        expect(type(solver).__doc__, f"{kind}: expected a docstring that says when to choose it")

    def test_its_options_are_typed_keywords_and_repr_shows_them(self) -> None:
        """``get("name")`` is the one with defaults, and reports can say which one was used."""
        solver = self.solver()
        kind = type(solver).__name__
        expect(repr(solver).startswith(kind), f"repr: expected {kind}(...), got {solver!r}")
        for option in inspect.signature(type(solver)).parameters.values():
            where = f"option {option.name!r} of {kind}"
            expect(
                option.kind is inspect.Parameter.KEYWORD_ONLY
                and option.default is not inspect.Parameter.empty
                and option.annotation is not inspect.Parameter.empty,
                f"{where}: expected a keyword-only argument with a type and a default, got "
                f"'{option}'",
            )
            expect(f"{option.name}=" in repr(solver), f"{where}: repr leaves it out: {solver!r}")

    def test_it_can_be_pickled_and_copied(self) -> None:
        """A model that holds a backend is saved and copied with it, also after a solve."""
        solver, known = self.solver(), draw(next(iter(general_recipes(self.solver().capabilities))))
        solver.solve(known.problem)
        made: dict[str, Callable[[], Any]] = {
            "pickle.loads(pickle.dumps(backend))": lambda: pickle.loads(pickle.dumps(solver)),
            "copy.deepcopy(backend)": lambda: copy.deepcopy(solver),
        }
        for how, make in made.items():
            try:
                other = make()
            except Exception as error:
                message = f"contract of a backend: {how} raised {type(error).__name__}: {error}"
                raise pytest.fail.Exception(message, pytrace=False) from error
            expect(
                type(other) is type(solver) and repr(other) == repr(solver),
                f"{how}: expected {solver!r}, got {other!r}",
            )
            for each in (other, solver):
                agrees(known, each.solve(known.problem), f"{how}, then solve")

    # -----------------------------------------------------------------------------------------
    # Its answers
    # -----------------------------------------------------------------------------------------

    def test_the_solution_is_well_formed(self, known: Recipe) -> None:
        """Shapes, dtypes, devices, one status per problem."""
        problem = draw(known).problem
        well_formed(self.solver(), problem, answer(self.solver(), known))

    def test_the_solution_has_the_promised_precision(self, known: Recipe) -> None:
        """By our residuals: rows to 1e-12 (1e-6 in float32), bounds exactly, and optimality."""
        solution = answer(self.solver(), known)
        for b in range(len(solution.x)):
            precise(solution, b)

    def test_the_solution_is_the_known_one(self, known: Recipe) -> None:
        """x, and the row multipliers where they are unique."""
        agrees(draw(known), answer(self.solver(), known), "solve")

    def test_an_answer_stays_what_it_was(self, form: Recipe) -> None:
        """The next solve does not write into the tensors that the last one returned."""
        solver, first, second = self.solver(), draw(form), draw(replace(form, name="another"))
        solution = solver.solve(first.problem)
        x, y = solution.x.clone(), solution.row_dual.clone()
        solver.solve(second.problem)
        expect(
            torch.equal(solution.x, x) and torch.equal(solution.row_dual, y),
            "a second solve changed the solution that the first one returned; return new tensors",
        )

    def test_what_came_in_is_left_alone(self, form: Recipe) -> None:
        """No tensor of the problem is changed, and none is handed out."""
        problem = draw(form).problem
        before = [tensor.clone() for tensor in data(problem)]
        x = self.solver().solve(problem).x
        for place, (tensor, was) in enumerate(zip(data(problem), before, strict=True)):
            expect(torch.equal(tensor, was), f"solve changed tensor {place} of the problem")
        x.add_(1.0)
        for tensor, was in zip(data(problem), before, strict=True):
            expect(torch.equal(tensor, was), "x shares memory with the problem; return a new one")

    # -----------------------------------------------------------------------------------------
    # Derivatives
    # -----------------------------------------------------------------------------------------

    def test_vjp_is_the_shared_rule(self, smooth: Recipe) -> None:
        """A vjp of its own may be faster; it must give what ``Backend.vjp`` gives."""
        solver, found = self.solver(), draw(smooth)
        problem, solution = found.problem, answer(solver, smooth)
        assert isinstance(problem, QP)
        g = cotangent(found)
        needed = (True,) * len(problem.tensors)
        adjoints = solver.vjp(problem, solution, g), Backend.vjp(solver, problem, solution, g)
        names = ["A^T nu", *(f"the gradient of {name}" for name in parameter_names(problem))]
        # A^T nu, the pull on the variables, is unique where nu is not.
        own, shared = (
            (problem.rows.transpose_apply(each.nu),
             *gradients(problem, solution, g, each, needed).flat)
            for each in adjoints
        )  # fmt: skip
        for name, one, other in zip(names, own, shared, strict=True):
            assert one is not None
            assert other is not None
            if smooth.dependent and name not in ("A^T nu", "the gradient of q"):
                continue  # the multipliers of dependent rows are not unique
            gap = distance(one, other)
            expect(
                gap <= GRADIENT_AGREEMENT[smooth.dtype],
                f"vjp: {name} is off by {gap:.1e} of its size from that of "
                "Backend.vjp(backend, problem, solution, grad_x)",
            )

    def test_gradients_match_finite_differences(self, smooth: Recipe) -> None:
        """Of all parameters, through ``solve``; also of those that the batch shares."""
        found = draw(smooth)
        problem = found.problem
        assert isinstance(problem, QP)
        leaves = [
            (t[:1] if smooth.shared and t is not problem.q else t).detach().clone()
            for t in problem.tensors
        ]
        for leaf in leaves:
            leaf.requires_grad_()
        whole = [leaf.expand_as(t) for leaf, t in zip(leaves, problem.tensors, strict=True)]
        g = cotangent(found)
        with refusals(smooth):
            x = solve(problem.with_tensors(*whole), backend=self.solver()).x
        (x.double() * g).sum().backward()
        for name, tangents in directions(found, leaves).items():
            slope, size = 0.0, float((g * x.detach()).abs().sum())
            for leaf, tangent in zip(leaves, tangents, strict=True):
                if tangent is not None:
                    grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                    part = grad.detach().double() * tangent
                    slope, size = slope + float(part.sum()), size + float(part.abs().sum())
            change = g.cpu() * derivative(found, tangents, name)
            expected = float(change.sum())
            size += float(change.abs().sum())
            shared = ", shared by the batch," if smooth.shared and name != "q" else ""
            expect(
                abs(slope - expected) <= GRADIENT_AGREEMENT[smooth.dtype] * size,
                f"the gradient of {name}{shared} gives a slope of {slope:.9g} in a random "
                f"direction; finite differences of the known solution give {expected:.9g}. Where "
                "vjp is the default one, look at row_dual: it says which rows are active",
            )

    def test_gradcheck(self, form: Recipe) -> None:
        """``torch.autograd.gradcheck`` of ``solve``, which calls the backend for each difference.

        Its step is large, for x is linear in these data up to the next active set.
        """
        if form.quadratic is None:
            return
        small = replace(form, batch=1, n=5, sides=("equal", "upper", "inside only"))
        found = draw(small)  # two solves for each of its numbers
        problem = found.problem
        assert isinstance(problem, QP)
        P, q, *rows, l, u, lb, ub = problem.tensors

        def x_of(q: Tensor, shift: Tensor, move: Tensor) -> Tensor:
            tensors = (P, q, *rows, l + shift, u + shift, lb + move, ub + move)
            return solve(problem.with_tensors(*tensors), backend=self.solver()).x

        start = (q, torch.zeros_like(l), torch.zeros_like(lb))
        inputs = tuple(t.clone().requires_grad_() for t in start)
        try:
            gradcheck(x_of, inputs, eps=1e-3, atol=2e-4, rtol=1e-3, nondet_tol=1e-6)
        except GradcheckError as error:
            fail(f"gradcheck of x by (q, a shift of l and u, a shift of lb and ub): {error}")

    # -----------------------------------------------------------------------------------------
    # Problems that it cannot solve
    # -----------------------------------------------------------------------------------------

    def test_it_says_what_failed(self, failure: Failing) -> None:
        """By the status of each problem; the others are solved, and infeasibility is proved."""
        solver = self.solver()
        with refusals(failure):
            solution = solver.solve(failure.problem)
        expect(
            tuple(solution.status) == failure.status,
            f"expected the status {words(failure.status)}, got {words(solution.status)}",
        )
        proven = proves_infeasible(failure.problem, solution.row_dual)
        for b, status in enumerate(solution.status):
            if status is Status.SOLVED:
                precise(solution, b)
            elif status is Status.INFEASIBLE:
                expect(
                    proven[b],
                    f"problem {b} is infeasible and its row_dual is no proof of that: expected y "
                    "with y.(A x) above the sum of y_r times the side that y_r pushes to (u where "
                    "y_r > 0, l where y_r < 0) for every x within the bounds, got "
                    f"{solution.row_dual[b].tolist()}",
                )

    def test_solve_raises_what_failed(self, failure: Failing) -> None:
        """Our error, with the index of the problem, the rows in conflict and the other answers."""
        index = failure.index
        kind = ERRORS[failure.status[index]]
        try:
            with refusals(failure):
                solve(failure.problem, backend=self.solver())
        except FairoptError as error:
            expect(
                isinstance(error, kind),
                f"expected fairopt.solve to raise {kind.__name__}, it raised "
                f"{type(error).__name__}: {error}",
            )
            if not isinstance(error, SolveError):
                return
            expect(error.batch == index, f"expected problem {index} to be named, got {error.batch}")
            expect(error.solution is not None, "expected the error to hold the solution")
            if failure.rows:
                names = tuple(f"row {r}" for r in failure.rows)
                expect(
                    error.rows == names,
                    f"expected the rows in conflict to be {names}, got {error.rows}; row_dual is "
                    "to be zero for rows that have no part in it",
                )
        else:
            fail(f"expected fairopt.solve to raise {kind.__name__}, it returned an answer")

    def test_it_refuses_what_it_does_not_declare(self, undeclared: Recipe) -> None:
        """With ``UnsupportedProblemError``, so that ``backend="auto"`` goes on to the next."""
        try:
            solve(draw(undeclared).problem, backend=self.solver())
        except UnsupportedProblemError:
            return
        except FairoptError as error:
            fail(f"expected UnsupportedProblemError, got {type(error).__name__}: {error}")
        fail("expected UnsupportedProblemError for what capabilities do not declare")

    # -----------------------------------------------------------------------------------------
    # Manners
    # -----------------------------------------------------------------------------------------

    def test_it_prints_nothing_and_warns_of_nothing(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Messages belong into the solution, also where the solver fails."""
        solver = self.solver()
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for problem in everything(solver.capabilities):
                with suppress(UnsupportedProblemError):
                    solver.solve(problem)
        printed = "".join(capfd.readouterr())
        expect(not printed, f"solve printed: {printed[:300]!r}")
        said = [
            str(w.message) for w in caught if issubclass(w.category, (UserWarning, RuntimeWarning))
        ]
        expect(not said, f"solve warned: {said[:1]}")

    def test_it_leaves_torch_as_it_was(self) -> None:
        """Default dtype, threads, gradient mode and random numbers are the user's."""
        solver = self.solver()

        def state() -> dict[str, Any]:
            return {
                "default dtype": torch.get_default_dtype(),
                "threads": torch.get_num_threads(),
                "gradient mode": torch.is_grad_enabled(),
                "state of the random numbers": torch.get_rng_state().tolist(),
            }

        torch.rand(1)  # so that a solver that sets the seed we started from is seen
        before = state()
        for problem in everything(solver.capabilities):
            with suppress(UnsupportedProblemError):
                solver.solve(problem)
        after = state()
        changed = [name for name in before if before[name] != after[name]]
        expect(not changed, f"solve changed torch's {', '.join(changed)}")

    def test_it_works_in_inference_mode(self, form: Recipe) -> None:
        """Where autograd is off altogether."""
        found = draw(form)
        with torch.inference_mode():
            agrees(found, solve(found.problem, backend=self.solver()), "solve in inference mode")

    def test_threads_may_share_it(self) -> None:
        """Several threads at once, the same and different problems, one backend."""
        solver = self.solver()
        several = [draw(r) for r in known_recipes(solver.capabilities) if not r.singular][:12]
        tasks = [several[(i * 5 + i // len(several)) % len(several)]
                 for i in range(ROUNDS * len(several))]  # fmt: skip
        with ThreadPoolExecutor(THREADS) as pool:
            answers = [pool.submit(solver.solve, known.problem) for known in tasks]
            for known, future in zip(tasks, answers, strict=True):
                error = future.exception()
                expect(
                    error is None,
                    f"{THREADS} threads at once: solve raised {type(error).__name__}: {error}",
                )
                agrees(known, future.result(), f"{THREADS} threads at once")

    # -----------------------------------------------------------------------------------------
    # In a layer
    # -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
    def test_a_layer_takes_it_as_an_object(self, dtype: torch.dtype) -> None:
        """With predictions and gradients in closed form; and the model that holds it is saved."""
        layer = parity(self.solver(), dtype)
        layer = pickle.loads(pickle.dumps(layer))
        in_closed_form(layer, dtype)

    def test_a_layer_takes_it_by_name(self) -> None:
        """Where it is registered under its name, or an entry point."""
        solver = self.solver()
        name = self.backend if isinstance(self.backend, str) else solver.name
        if name not in backends.names() or type(backends.get(name)) is not type(solver):
            pytest.skip(f"no backend {name!r} of this class is registered")
        parity(solver, torch.float64)  # skips where the backend does not take it
        layer = parity(name, torch.float64)
        in_closed_form(layer, torch.float64)
        assert layer.last is not None
        expect(
            layer.last.backend == solver.name,
            f"Solution.backend: expected {solver.name!r}, got {layer.last.backend!r}",
        )
