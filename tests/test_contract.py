"""The contract of a backend: every backend here passes it, and what is wrong does not."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from plugin.dual_active_set import DualActiveSet
from torch import Tensor

from fairopt import QP, Solution, Status, backends, residuals
from fairopt.backends import Adjoint, Backend, Capabilities
from fairopt.optimality.certificates import proves_infeasible
from fairopt.programs.solution import gradient
from fairopt.testing import BackendContract
from fairopt.testing.cases import CASES
from fairopt.testing.failing import failing
from fairopt.testing.known import Recipe, draw, recipes

ROOT = Path(__file__).resolve().parent.parent
ALL = Capabilities(
    quadratic=frozenset({"dense", "diagonal", "sparse"}),
    linear=True,
    rows=frozenset({"cells", "dense", "sparse"}),
)

# One class for every backend that is registered, so that a new one is here on its first day. What
# is not installed is skipped by name, with the pip line. Each is asked for what it declares.
globals().update(
    {
        f"TestBackend_{name}": type(f"TestBackend_{name}", (BackendContract,), {"backend": name})
        for name in backends.names()
    }
)


def test_every_registered_backend_is_under_contract() -> None:
    assert backends.names()
    for name in backends.names():
        assert issubclass(globals()[f"TestBackend_{name}"], BackendContract)


# ---------------------------------------------------------------------------------------------
# The known solutions are solutions
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", recipes(ALL), ids=lambda recipe: recipe.label)
def test_the_known_solution_solves_its_problem(recipe: Recipe) -> None:
    """By the conditions of Karush, Kuhn and Tucker, with a margin to the next active set."""
    known = draw(recipe)
    problem, x, y = known.problem, known.x, known.row_dual
    w = torch.where(known.held != 0, -gradient(problem, x, y), 0.0)
    assert residuals(problem, x, y, w).stationarity.max() < 1e-13
    within = {"bounds": (x, problem.lb, problem.ub), "rows": (problem.rows.apply(x), problem.l,
                                                              problem.u)}  # fmt: skip
    for value, low, high in within.values():
        scale = 1e-12 * (1 + value.abs())
        assert ((value <= high.double() + scale) & (value >= low.double() - scale)).all()
    if recipe.weak:
        return
    equal = problem.l == problem.u
    if not recipe.links:
        assert ((y * known.side)[(known.side != 0) & ~equal] > 1e-5).all()
    assert ((w * known.held)[known.held != 0] > 0.05).all()
    value = problem.rows.apply(x)
    slack = torch.minimum(problem.u - value, value - problem.l)[known.side == 0]
    assert (slack > 1e-4).all()


def test_a_recipe_is_always_the_same_problem() -> None:
    recipe = recipes(ALL)[0]
    one, other = draw.__wrapped__(recipe), draw.__wrapped__(recipe)
    assert torch.equal(one.problem.q, other.problem.q)
    assert torch.equal(one.x, other.x)
    assert not torch.equal(one.x, draw(replace(recipe, name="another")).x)


def test_what_a_recipe_says_is_what_is_drawn() -> None:
    for recipe in recipes(ALL):
        problem = draw(recipe).problem
        assert problem.shape == (recipe.batch, len(recipe.sides), recipe.n)
        assert problem.l.dtype == recipe.dtype
        can = Capabilities(
            frozenset({recipe.quadratic} - {None}),  # type: ignore[arg-type]
            recipe.quadratic is None,
            frozenset({recipe.rows}),
            frozenset({"cpu"}),
        )
        assert can.missing(problem) is None, recipe.label
        if recipe.shared:
            assert problem.rows.tensors[0].stride(0) == 0


def test_a_backend_is_asked_for_all_that_it_declares_and_nothing_else() -> None:
    assert recipes(Capabilities(rows=ALL.rows)) == ()
    assert recipes(replace(ALL, rows=frozenset())) == ()
    found = recipes(
        replace(ALL, quadratic=frozenset({"dense"}), rows=frozenset({"cells", "sparse"}))
    )
    assert {r.quadratic for r in found} == {"dense", None}
    assert {r.rows for r in found} == {"cells", "sparse"}
    assert {r.dtype for r in found} == {torch.float32, torch.float64}


@pytest.mark.parametrize("case", failing(ALL), ids=lambda case: case.label)
def test_the_failing_problems_fail_and_a_proof_is_told_from_none(case: Any) -> None:
    problem, index = case.problem, case.index
    if case.status[index] is not Status.INFEASIBLE:
        return
    m = problem.shape[1]
    proofs = [
        torch.tensor(signs, dtype=torch.float64).expand(len(problem.l), m)
        for signs in itertools.product((-1.0, -0.5, 0.0, 0.5, 1.0), repeat=m)
    ]
    found = [y for y in proofs if proves_infeasible(problem, y)[index]]
    assert found, "no small proof: is it infeasible at all?"
    for y in found:  # each of the rows in conflict has a part in it
        assert set(case.rows) <= set(y[index].nonzero().squeeze(-1).tolist())
    for b, status in enumerate(case.status):
        if status is Status.SOLVED:
            assert not any(proves_infeasible(problem, y)[b] for y in proofs)


# ---------------------------------------------------------------------------------------------
# What is wrong does not pass
# ---------------------------------------------------------------------------------------------


class Right(DualActiveSet):
    """A backend that passes; every one below does one thing wrong."""

    name: ClassVar[str] = "right"
    capabilities: ClassVar[Capabilities] = Capabilities(
        quadratic=frozenset({"dense"}), rows=frozenset({"dense"}), devices=frozenset({"cpu"})
    )


def changed(change: Callable[[Solution], Solution]) -> type[Right]:
    """A backend that changes the right solution."""

    class Changed(Right):
        """A toy."""

        def solve(self, problem: Any) -> Solution:
            return change(super().solve(problem))

    return Changed


def told(solution: Solution, old: Status, new: Status) -> Solution:
    status = tuple(new if s is old else s for s in solution.status)
    return replace(solution, status=status)


class Unclipped(Right):
    """A toy."""

    def solve(self, problem: Any) -> Solution:
        solution = super().solve(problem)
        return replace(solution, x=torch.where(solution.x == problem.ub, solution.x * (1 + 1e-9),
                                               solution.x))  # fmt: skip


class Halved(Right):
    """A toy."""

    def vjp(self, problem: QP, solution: Solution, grad_x: Tensor) -> Adjoint:
        found = super().vjp(problem, solution, grad_x)
        return Adjoint(found.v / 2, found.nu / 2)


class DividedByTheBatch(Right):
    """A toy: the mistake of a published package."""

    def vjp(self, problem: QP, solution: Solution, grad_x: Tensor) -> Adjoint:
        found = super().vjp(problem, solution, grad_x)
        batch = len(grad_x) if problem.rows.tensors[0].stride(0) == 0 else 1
        return Adjoint(found.v / batch, found.nu / batch)


class NoMultiplierInTheAdjoint(Right):
    """A toy."""

    def vjp(self, problem: QP, solution: Solution, grad_x: Tensor) -> Adjoint:
        found = super().vjp(problem, solution, grad_x)
        return Adjoint(found.v, torch.zeros_like(found.nu))


class InPlace(Right):
    """A toy."""

    def solve(self, problem: Any) -> Solution:
        solution = super().solve(problem)
        problem.q.neg_()
        return solution


class Workspace(Right):
    """A toy."""

    def solve(self, problem: Any) -> Solution:
        solution = super().solve(problem)
        kept = self.__dict__.setdefault("_kept", {}).setdefault(solution.x.shape, solution.x)
        return replace(solution, x=kept.copy_(solution.x))


class Printing(Right):
    """A toy."""

    def solve(self, problem: Any) -> Solution:
        print("iteration 1")
        return super().solve(problem)


class PrintingBelow(Right):
    """A toy: as a solver in C does."""

    def solve(self, problem: Any) -> Solution:
        os.write(1, b"iteration 1\n")
        return super().solve(problem)


class Warning_(Right):
    """A toy."""

    def solve(self, problem: Any) -> Solution:
        warnings.warn("solver exited early", stacklevel=2)
        return super().solve(problem)


class FirstOfTheBatch(Right):
    """A toy."""

    def solve(self, problem: Any) -> Solution:
        solution = super().solve(problem)
        return replace(solution, x=solution.x[:1].expand_as(solution.x).clone())


class Raising(Right):
    """A toy."""

    def solve(self, problem: Any) -> Solution:
        solution = super().solve(problem)
        if Status.INFEASIBLE in solution.status:
            raise ArithmeticError("infeasible")
        return solution


class Threadless(Right):
    """A toy: its workspace is that of whoever called last."""

    def solve(self, problem: Any) -> Solution:
        self._problem = problem
        time.sleep(1e-3)
        return replace(super().solve(self._problem), problem=problem)


class Locked(Right):
    """A toy: it cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()


class Positional(Right):
    """A toy."""

    def __init__(self, rounds: int = 20) -> None:
        super().__init__(rounds=rounds)


class Untyped(Right):
    """A toy."""

    def __init__(self, *, rounds=20) -> None:  # type: ignore[no-untyped-def]
        super().__init__(rounds=rounds)


class Hidden(Right):
    """A toy: nobody sees its option."""

    def __init__(self, *, rounds: int = 20, eps: float = 1e-9) -> None:
        super().__init__(rounds=rounds)
        self._eps = eps


class Everything(Right):
    """A toy: it takes problems that it does not declare."""

    def check(self, problem: Any) -> None:
        pass


class Doubling(Right):
    """A toy."""

    def solve(self, problem: Any) -> Solution:
        torch.set_default_dtype(torch.float64)
        return super().solve(problem)


class Seeding(Right):
    """A toy."""

    def solve(self, problem: Any) -> Solution:
        torch.manual_seed(0)
        return super().solve(problem)


class Mute(Right):
    pass


class Reserved(Right):
    """A toy."""

    name = "auto"


class Unknown(Right):
    """A toy."""

    capabilities = replace(Right.capabilities, rows=frozenset({"dense", "csr"}))


class Asymmetric(Right):
    """A toy: it takes P for a diagonal."""

    def solve(self, problem: Any) -> Solution:
        P = torch.diag_embed(problem.P.diagonal(dim1=-2, dim2=-1))
        inner = problem.with_tensors(P, *problem.tensors[1:])
        return replace(super().solve(inner), problem=problem)


class OneSided(Right):
    """A toy: it knows no lower sides."""

    def solve(self, problem: Any) -> Solution:
        P, q, A, l, u, lb, ub = problem.tensors
        lower = torch.where(l == u, l, -torch.inf)
        inner = problem.with_tensors(P, q, A, lower, u, lb, ub)
        return replace(super().solve(inner), problem=problem)


class Touching(Right):
    """A toy: rows that touch x without pushing count as active."""

    def solve(self, problem: Any) -> Solution:
        solution = super().solve(problem)
        touching = problem.u - problem.rows.apply(solution.x) <= 1e-12
        y = torch.where(touching & (solution.row_dual == 0), 1e-9, solution.row_dual)
        return replace(solution, row_dual=y)


class Alone(Right):
    """A toy: no problem is solved where one is infeasible."""

    def solve(self, problem: Any) -> Solution:
        solution = super().solve(problem)
        if Status.INFEASIBLE in solution.status:
            return replace(solution, status=(Status.INFEASIBLE,) * len(solution.status))
        return solution


BROKEN: dict[str, tuple[type[Backend], str]] = {
    "the dual has the wrong sign": (
        changed(lambda s: replace(s, row_dual=-s.row_dual)), "known_one"),
    "the dual is zero": (
        changed(lambda s: replace(s, row_dual=torch.zeros_like(s.row_dual))), "known_one"),
    "the dual is that of another iterate": (
        changed(lambda s: replace(s, row_dual=s.row_dual * (1 + 1e-5))), "known_one"),
    "the dual is float32": (
        changed(lambda s: replace(s, row_dual=s.row_dual.float())), "well_formed"),
    "x is float64 for a float32 problem": (
        changed(lambda s: replace(s, x=s.x.double())), "well_formed"),
    "x has a history": (
        changed(lambda s: replace(s, x=s.x.clone().requires_grad_())), "well_formed"),
    "x is a little off": (
        changed(lambda s: replace(s, x=s.x * (1 - 1e-5))), "known_one"),
    "a row is violated a little": (
        changed(lambda s: replace(s, x=s.x * (1 - 1e-10))), "promised_precision"),
    "x is not clipped": (Unclipped, "promised_precision"),
    "one status for the batch": (
        changed(lambda s: replace(s, status=s.status[:1])), "well_formed"),
    "a status in words": (
        changed(lambda s: replace(s, status=("solved",) * len(s.status))),  # type: ignore[arg-type]
        "well_formed"),
    "another name in the solution": (
        changed(lambda s: replace(s, backend="left")), "well_formed"),
    "no solution object": (changed(lambda s: s.x), "well_formed"),  # type: ignore[arg-type]
    "the first of the batch for all": (FirstOfTheBatch, "known_one"),
    "half of the gradient": (Halved, "shared_rule"),
    "a wrong gradient of what the batch shares": (DividedByTheBatch, "finite_differences"),
    "no multiplier in the adjoint": (NoMultiplierInTheAdjoint, "shared_rule"),
    "weakly active rows count as active": (Touching, "finite_differences"),
    "half of the gradient, by gradcheck": (Halved, "gradcheck"),
    "its input is changed": (InPlace, "left_alone"),
    "its output is changed later": (Workspace, "stays_what_it_was"),
    "it prints": (Printing, "prints_nothing"),
    "it prints below Python": (PrintingBelow, "prints_nothing"),
    "it warns": (Warning_, "warns_of_nothing"),
    "infeasible is called solved": (
        changed(lambda s: told(s, Status.INFEASIBLE, Status.SOLVED)), "what_failed"),
    "infeasible is called stalled": (
        changed(lambda s: told(s, Status.INFEASIBLE, Status.STALLED)), "raises_what_failed"),
    "non-convex is called solved": (
        changed(lambda s: told(s, Status.NONCONVEX, Status.SOLVED)), "what_failed"),
    "no proof of infeasibility": (
        changed(lambda s: replace(s, row_dual=torch.ones_like(s.row_dual))), "says_what_failed"),
    "rows that have no part in a conflict": (
        changed(lambda s: replace(s, row_dual=s.row_dual + 1e-6)), "raises_what_failed"),
    "one failure spoils the batch": (Alone, "what_failed"),
    "it raises for what failed": (Raising, "what_failed"),
    "it is not safe with threads": (Threadless, "threads"),
    "it cannot be pickled": (Locked, "pickled"),
    "a positional option": (Positional, "typed_keywords"),
    "an untyped option": (Untyped, "typed_keywords"),
    "an option that repr hides": (Hidden, "typed_keywords"),
    "it takes what it does not declare": (Everything, "does_not_declare"),
    "it sets the default dtype": (Doubling, "leaves_torch"),
    "it sets the seed": (Seeding, "leaves_torch"),
    "no docstring": (Mute, "says_what_it_is"),
    "a reserved name": (Reserved, "says_what_it_is"),
    "a capability that there is not": (Unknown, "says_what_it_is"),
    "the diagonal of P only": (Asymmetric, "known_one"),
    "lower sides are ignored": (OneSided, "known_one"),
}  # fmt: skip


def verdicts(
    backend: Backend, only: str, capfd: pytest.CaptureFixture[str]
) -> tuple[int, list[str]]:
    """How many tests of the contract ran whose name contains ``only``, and what they said."""
    kind = type("Toy", (BackendContract,), {"backend": backend})
    count, said = 0, []
    for name, test in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("test_") or only not in name:
            continue
        arguments = list(inspect.signature(test).parameters)[1:]
        choices: dict[str, list[Any]] = {"capfd": [capfd], "dtype": [torch.float64, torch.float32]}
        for argument, choose in CASES.items():
            if argument in arguments:
                cases = choose(backend.capabilities)
                choices[argument] = [case.values[0] for case in cases]
        for values in itertools.product(*(choices[argument] for argument in arguments)):
            count += 1
            try:
                test(kind(), *values)
            except pytest.skip.Exception:
                continue
            except (pytest.fail.Exception, Exception) as error:
                said.append(f"{name}: {error}")
    return count, said


def test_the_right_one_passes(capfd: pytest.CaptureFixture[str]) -> None:
    """Or what follows would show nothing."""
    count, said = verdicts(Right(), "test_", capfd)
    assert count > 100
    assert not said


@pytest.mark.parametrize(("kind", "test"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_wrong_is_caught(
    kind: type[Backend], test: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count, said = verdicts(kind(), test, capfd)
    assert count
    assert any("contract of a backend: " in message for message in said), said


def test_a_class_that_names_no_backend_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"expected a Backend or a name, got None"):
        BackendContract.solver()
    kind = type("Forgotten", (BackendContract,), {"backend": Right})  # the class, not an object
    with pytest.raises(pytest.fail.Exception, match=r"Forgotten.backend: expected a Backend"):
        kind.solver()


# ---------------------------------------------------------------------------------------------
# The page that explains it
# ---------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_passes(tmp_path: Path) -> None:
    """As a reader has it: the page's blocks in one file, given to pytest."""
    pytest.importorskip("scipy", reason="the example's solver is SciPy's")
    page = (ROOT / "docs" / "adding-a-backend.md").read_text("utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    assert "(BackendContract):" in code
    (tmp_path / "test_page.py").write_text(code, "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull,
         "--rootdir", ".", "test_page.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(done.stdout.strip().splitlines()[-1].split(" passed")[0].split()[-1]) > 100
