"""The demands that the contract makes on every answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from fairopt.backends import Backend
from fairopt.errors import UnsupportedProblemError
from fairopt.programs.problem import Problem
from fairopt.programs.solution import Solution, Status
from fairopt.testing.failing import Failing
from fairopt.testing.known import Known, Recipe, draw
from fairopt.tolerances import AGREEMENT, OPTIMALITY, ROW_PRECISION


def fail(message: str) -> NoReturn:
    """Fail the test, without a traceback of ours."""
    pytest.fail(f"contract of a backend: {message}", pytrace=False)


def expect(holds: object, message: str) -> None:
    """Fail the test unless this holds."""
    if not holds:
        fail(message)


@contextmanager
def refusals(case: Recipe | Failing) -> Iterator[None]:
    """Skip where a backend refuses a singular P, which it may."""
    allowed = case.singular if isinstance(case, Recipe) else case.refusable
    try:
        yield
    except UnsupportedProblemError as error:
        if not allowed:
            raise
        pytest.skip(f"the backend refuses a singular P: {error}")


# Several tests look at one answer. Keyed by identity: a backend need not be hashable.
answers: dict[tuple[int, Recipe], tuple[Backend, Solution]] = {}


def answer(solver: Backend, recipe: Recipe) -> Solution:
    """The answer of the backend itself to a problem that has a solution."""
    key = id(solver), recipe
    if key not in answers:
        with refusals(recipe):
            solution = solver.solve(draw(recipe).problem)
        expect(
            isinstance(solution, Solution),
            f"expected a fairopt.Solution from solve, got {type(solution).__name__}",
        )
        answers[key] = solver, solution
    return answers[key][1]


def data(problem: Problem) -> tuple[Tensor, ...]:
    """Every tensor of a problem."""
    return *problem.tensors, *problem.structure


def well_formed(solver: Backend, problem: Problem, solution: Solution) -> None:
    """Shapes, dtypes, devices and statuses are those that ``Backend.solve`` promises."""
    batch, m, n = problem.shape
    like = problem.linear
    for name, tensor, shape, dtype in (
        ("x", solution.x, (batch, n), like.dtype),
        ("row_dual", solution.row_dual, (batch, m), torch.float64),
    ):
        expect(isinstance(tensor, Tensor), f"Solution.{name}: expected a tensor, got {tensor!r}")
        expect(
            tensor.shape == shape and tensor.dtype == dtype and tensor.device == like.device,
            f"Solution.{name}: expected shape {shape}, {dtype} on {like.device}, got "
            f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}",
        )
        expect(bool(torch.isfinite(tensor).all()), f"Solution.{name}: expected finite numbers")
        expect(not tensor.requires_grad, f"Solution.{name}: expected no history of autograd")
    status = solution.status
    expect(
        isinstance(status, tuple) and len(status) == batch
        and all(isinstance(s, Status) for s in status),
        f"Solution.status: expected a tuple of {batch} fairopt.Status, got {status!r}",
    )  # fmt: skip
    expect(
        all(s is Status.SOLVED for s in status), f"Solution.status: {words(status)}; all have one"
    )
    expect(solution.problem is problem, "Solution.problem: expected the problem that was given")
    expect(
        solution.backend == solver.name,
        f"Solution.backend: expected {solver.name!r}, got {solution.backend!r}",
    )
    expect(
        len(solution.iterations) in (0, batch) and all(i >= 0 for i in solution.iterations),
        f"Solution.iterations: expected {batch} counts or none, got {solution.iterations!r}",
    )
    expect(solution.seconds >= 0, f"Solution.seconds: expected a time, got {solution.seconds!r}")


def words(status: Sequence[Status]) -> str:
    """The statuses by their names."""
    return "(" + ", ".join(getattr(s, "name", repr(s)) for s in status) + ")"


def precise(solution: Solution, b: int) -> None:
    """Problem b of the batch meets the promise, by our residuals."""
    found, dtype = solution.residuals, solution.x.dtype
    primal = float(found.primal[b])
    outside = "x is outside its bounds; clip it last"
    fault = outside if primal == float("inf") else f"a row is violated by {primal:.1e} of its scale"
    expect(
        primal <= ROW_PRECISION[dtype],
        f"problem {b}: {fault}; promised are bounds exactly, rows to {ROW_PRECISION[dtype]:.0e}",
    )
    for name in ("stationarity", "dual_sign", "complementarity"):
        value = float(getattr(found, name)[b])
        expect(
            value <= OPTIMALITY[dtype],
            f"problem {b}: {name} is {value:.1e}, expected at most {OPTIMALITY[dtype]:.0e}; the "
            "sign convention is P x + q + A^T y + w = 0 with y > 0 where the upper side pushes",
        )


def agrees(known: Known, solution: Solution, when: str) -> None:
    """x is the known solution; row_dual its multipliers, unless rows depend."""
    tolerance = AGREEMENT[known.recipe.dtype]
    x = solution.x.detach().cpu().double()
    expect(x.shape == known.x.shape, f"{when}: expected x of shape {tuple(known.x.shape)}")
    gap = distance(x, known.x)
    if not gap <= tolerance:
        each = (x - known.x).abs().amax(-1)
        fail(
            f"{when}: x is off by {gap:.1e} of its size, expected {tolerance:.0e}; worst in "
            f"problem {int(each.argmax())} of the batch"
        )
    if known.recipe.links or not known.row_dual.numel():
        return
    # Multipliers are relative to their effect, so that the scale of a row plays no part.
    length = known.problem.rows.norms(torch.ones_like(known.x).to(solution.x.device)).cpu()
    y, expected = solution.row_dual.detach().cpu() * length, known.row_dual * length
    allowed = tolerance * max(1.0, known.recipe.spread / 10)
    if distance(y, expected) <= allowed:
        return
    expect(
        distance(-y, expected) > 1e-3,
        f"{when}: row_dual has the opposite sign; y > 0 is where the upper side pushes",
    )
    fail(
        f"{when}: row_dual is off by {distance(y, expected):.1e} of its size, expected "
        f"{allowed:.0e}; return the multipliers of the iterate that x is of"
    )


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference over the largest entry (at least 1); NaN counts as infinite."""
    if not other.numel():
        return 0.0
    gap = (one.double() - other.double()).abs()
    gap = torch.where(torch.isnan(gap), torch.inf, gap)
    return float(gap.max() / other.double().abs().max().clamp(min=1.0))
