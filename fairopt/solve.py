"""solve(): the one place where solving and differentiating meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairopt import backends
from fairopt.backends import Backend
from fairopt.errors import (
    ConvergenceError,
    NotDifferentiableError,
    ProblemError,
    UnsupportedProblemError,
)
from fairopt.kkt import gradients
from fairopt.problem import LP, QP, Problem
from fairopt.solution import ROW_PRECISION, Solution, Status, row_excess

__all__ = ["solve"]

# How far from optimal, in our other residuals, an answer may be.
OPTIMALITY = {torch.float64: 1e-6, torch.float32: 1e-4}


def solve(
    problem: Problem, *, backend: str | Backend = "auto", smoothing: float = 0.0, **options: Any
) -> Solution:
    """Solve a batch of problems; the solution's ``x`` carries gradients to all of its data.

    Args:
        problem: a ``QP`` or ``LP``.
        backend: a name, or a backend with its options. ``"auto"`` picks, among the installed ones
            that can solve this problem, the one that declares the highest preference.
        smoothing: for an ``LP``, the weight s of an added s/2 |x|^2, which makes x differentiable.
        **options: constructor arguments of the backend, when it is given by name.

    Raises:
        UnsupportedProblemError: the backend cannot solve this kind of problem.
        InfeasibleError: no point satisfies rows and bounds; the rows in conflict are named.
        ConvergenceError: the promised precision was not reached; nothing is returned.
        NotDifferentiableError: a gradient of an ``LP`` without smoothing was asked for.
    """
    if not isinstance(problem, (QP, LP)):
        raise ProblemError(f"problem: expected a QP or an LP, got {type(problem).__name__}")
    if isinstance(problem, LP) and smoothing:
        problem = problem.smoothed(smoothing)
    elif smoothing:
        raise ProblemError("smoothing: a QP needs none; give it a larger P instead")
    solver = choose(problem, backend, options)
    solver.check(problem)
    if isinstance(problem, LP):
        if torch.is_grad_enabled() and any(
            t.requires_grad
            for t in (
                problem.c,
                problem.l,
                problem.u,
                problem.lb,
                problem.ub,
                *problem.rows.tensors,
            )
        ):
            raise NotDifferentiableError(
                "the solution of a linear program is piecewise constant in its cost; pass "
                "smoothing=... (a positive number) to differentiate it, or solve it under "
                "torch.no_grad()"
            )
        return checked(solver, problem)
    plain = problem.detach()
    if not torch.is_grad_enabled():
        return checked(solver, plain)
    tensors = problem.tensors
    needed = tuple(tensor.requires_grad for tensor in tensors)
    if not any(needed):
        return checked(solver, plain)
    call = Call(solver, plain, needed)
    wanted = (tensor for tensor in tensors if tensor.requires_grad)
    x: Tensor = Solve.apply(call, *wanted)  # type: ignore[no-untyped-call]
    solution = call.solution
    assert solution is not None
    call.solution = solution.with_x(x.detach())  # what the backward keeps must not hold x itself
    return solution


def choose(problem: Problem, backend: str | Backend, options: dict[str, Any]) -> Backend:
    """The backend to use."""
    if isinstance(backend, Backend):
        if options:
            raise ProblemError("options: give them to the backend's constructor")
        return backend
    if not isinstance(backend, str):
        raise ProblemError(
            f"backend: expected a name, or a Backend made with its options, got {backend!r}"
        )
    if backend != "auto":
        return backends.get(backend, **options)
    if options:
        raise ProblemError('options: expected none with backend="auto"; name the backend')
    able = []
    refused = []
    for name in backends.available():
        candidate = backends.get(name)
        missing = candidate.capabilities.missing(problem)
        if missing is None:
            able.append(candidate)
        else:
            refused.append(f"{name}: does not solve {missing}")
    if not able:
        raise UnsupportedProblemError(
            "no installed backend solves this problem; " + "; ".join(refused)
        )
    return max(able, key=lambda candidate: candidate.capabilities.preference)


def checked(solver: Backend, problem: Problem) -> Solution:
    """Solve, and let our own residuals decide whether what came back is a solution."""
    solution = solver.solve(problem)
    if solver.capabilities.certifies:
        return solution
    x = solution.x
    like = problem.c if isinstance(problem, LP) else problem.q
    if x.dtype != like.dtype or x.shape != like.shape:
        raise ConvergenceError(
            f"backend {solver.name!r}: expected x of shape {tuple(like.shape)} in {like.dtype} "
            f"from its solve, got {tuple(x.shape)} in {x.dtype}; the backend is at fault"
        )
    rows = row_excess(problem.rows, problem.l, problem.u, x) <= ROW_PRECISION[x.dtype]
    inside = (x >= problem.lb) & (x <= problem.ub) & torch.isfinite(x)  # NaN is not
    found = solution.residuals
    optimal = torch.stack([found.stationarity, found.dual_sign, found.complementarity])
    good = rows.all(-1) & inside.all(-1) & (optimal <= OPTIMALITY[x.dtype]).all(0)
    if not bool(good.all()):
        index = int((~good).nonzero()[0])
        raise ConvergenceError(
            f"backend {solver.name!r}, problem {index} of the batch: {Status.STALLED.value} "
            f"({found})",
            batch=index,
        )
    return solution


@dataclass
class Call:
    """One call of ``solve``: what does not pass through autograd.

    Attributes:
        needed: for each of ``QP.tensors``, whether it requires a gradient.
    """

    solver: Backend
    problem: QP
    needed: tuple[bool, ...]
    solution: Solution | None = None


class Solve(torch.autograd.Function):
    """x as a function of those of ``QP.tensors`` that require a gradient. They were expanded to the
    batch beforehand, so that torch itself sums the gradient of whatever was shared.

    One forward with its context, not forward and ``setup_context``: the latter costs torch an
    ``inspect.signature`` per call, 28 microseconds, a fifth of what a small layer takes.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        call.solution = checked(call.solver, call.problem)
        ctx.call = call
        # All that the backward reads, so that torch notices changes made in place.
        plain, x = call.problem, call.solution.x
        ctx.save_for_backward(*plain.tensors, *plain.rows.structure, x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # raises if one was changed
        call: Call = ctx.call
        assert call.solution is not None
        adjoint = call.solver.vjp(call.problem, call.solution, grad_x)
        found = gradients(call.problem, call.solution, grad_x, adjoint, call.needed).flat
        return None, *(
            g if g is None else g.to(t.dtype)
            for g, t, need in zip(found, tensors, call.needed, strict=False)
            if need
        )
