"""solve(): the one place where solving and differentiating meet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairopt import backends
from fairopt.backends import Backend
from fairopt.errors import (
    BackendNotFoundError,
    Conflict,
    ConvergenceError,
    FairoptError,
    InfeasibleError,
    NotDifferentiableError,
    ProblemError,
    UnboundedError,
    UnsupportedProblemError,
)
from fairopt.optimality.certificates import proof_support
from fairopt.optimality.derivative import gradients
from fairopt.programs.problem import LP, QP, Problem
from fairopt.programs.solution import Solution, Status
from fairopt.tolerances import OPTIMALITY, ROW_PRECISION


def solve(
    problem: Problem, *, backend: str | Backend = "auto", smoothing: float = 0.0, **options: Any
) -> Solution:
    """Solve a batch of problems; the solution's ``x`` carries gradients to all of its data.

    Args:
        problem: a ``QP`` or ``LP``.
        backend: a name, or a backend with its options. ``"auto"`` takes the first of the installed
            ones, in the order of ``fairopt.backends.names()``, whose capabilities cover this
            problem on its device; ``Solution.backend`` says which it was.
        smoothing: for an ``LP``, the weight s of an added s/2 |x|^2, which makes x differentiable.
        **options: constructor arguments of the backend, when it is given by name.

    Raises:
        UnsupportedProblemError: the backend cannot solve this kind of problem.
        InfeasibleError: no point satisfies rows and bounds; the rows in conflict are named.
        UnboundedError: the objective falls without end.
        ConvergenceError: the promised precision was not reached; nothing is returned.
        NotDifferentiableError: a gradient of an ``LP`` without smoothing was asked for.
    """
    x, solution = solve_detached(problem, backend, smoothing, options)
    return solution.with_x(x) if x.requires_grad else solution


def solve_detached(
    problem: Problem,
    backend: str | Backend,
    smoothing: float = 0.0,
    options: dict[str, Any] | None = None,
    *,
    center: Tensor | None = None,
) -> tuple[Tensor, Solution]:
    """x with its history, and the solution without.

    Args:
        center: q = -center, to which gradients go instead of q; x then has its shape.
    """
    if not isinstance(problem, (QP, LP)):
        raise ProblemError(f"problem: expected a QP or an LP, got {type(problem).__name__}")
    if isinstance(problem, LP) and smoothing:
        problem = problem.smoothed(smoothing)
    elif smoothing:
        raise ProblemError("smoothing: a QP needs none; give it a larger P instead")
    solvers = choose(problem, backend, options or {})
    tensors, plain = problem.tensors, problem.detach()
    if center is not None:
        tensors = (tensors[0], center, *tensors[2:])
    shape = tensors[1].shape
    needed = tuple([tensor.requires_grad for tensor in tensors])
    if not torch.is_grad_enabled() or True not in needed:
        solution = first(solvers, plain)[1]
        return solution.x if center is None else solution.x.view(shape), solution
    if isinstance(plain, LP):
        raise NotDifferentiableError(
            "the solution of a linear program is piecewise constant in its cost; pass "
            "smoothing=... (a positive number) to differentiate it, or solve it under "
            "torch.no_grad()"
        )
    call = Call(solvers, plain, needed, shape, center is not None)
    x: Tensor = Solve.apply(call, *[t for t in tensors if t.requires_grad])  # type: ignore[no-untyped-call]
    assert call.solution is not None
    return x, call.solution


def check_backend(backend: str | Backend) -> str | Backend:
    """The same, if it is one; whether there is a backend of that name, the call sees."""
    if not isinstance(backend, (str, Backend)):
        raise ProblemError(
            f"backend: expected a name, or a Backend made with its options, got {backend!r}"
        )
    return backend


def choose(problem: Problem, backend: str | Backend, options: dict[str, Any]) -> Iterable[Backend]:
    """The backends to try, in order; only ``"auto"`` has more than one."""
    if isinstance(backend, Backend):
        if options:
            raise ProblemError("options: give them to the backend's constructor")
    elif check_backend(backend) == "auto":
        if options:
            raise ProblemError('options: expected none with backend="auto"; name the backend')
        return able(problem)
    elif options or backend not in backends.loaded:
        backend = backends.get(backend, **options)
    else:
        backend = backends.loaded[backend]
    problem.remembered(backend.check)
    return (backend,)


def able(problem: Problem) -> Iterator[Backend]:
    """The installed backends that declare they can solve this, loaded one after the other."""
    refused: list[str] = []
    absent: list[str] = []
    for name in backends.candidates():
        if not backends.is_available(name):
            absent.append(backends.find(name).install)
            continue
        try:
            candidate = backends.get(name)
        except BackendNotFoundError as error:  # installed, but it does not load
            refused.append(str(error))
            continue
        missing = candidate.capabilities.missing(problem)
        if missing is None:
            yield candidate
            missing = "this one, though it declares that it does"
        refused.append(f"{name}: does not solve {missing}")
    if installs := " or ".join(filter(None, absent)):
        refused.append(f"others that may solve it are not installed, get them with: {installs}")
    raise UnsupportedProblemError("no installed backend solves this problem; " + "; ".join(refused))


def first(solvers: Iterable[Backend], problem: Problem) -> tuple[Backend, Solution]:
    """The first of these that takes the problem, and its solution.

    A backend may refuse what its capabilities cannot tell (a zero on the diagonal of P, say).
    """
    refusal: UnsupportedProblemError | None = None
    try:
        for solver in solvers:
            try:
                return solver, checked(solver, problem)
            except UnsupportedProblemError as error:  # noqa: PERF203
                refusal = error
    except UnsupportedProblemError as error:  # none is left
        raise error from refusal
    assert refusal is not None
    raise refusal


def checked(solver: Backend, problem: Problem) -> Solution:
    """Solve, and let our own residuals decide whether what came back is a solution."""
    solution = answered(solver, problem)
    if not (solver.capabilities.certifies or solution.verified):
        solution = judged(solver, problem, solution)
    if set(solution.status) != {Status.SOLVED}:
        raise failure(solver.name, solution)
    return solution


def answered(solver: Backend, problem: Problem) -> Solution:
    """What the backend says, not yet judged; whatever it raises becomes our error."""
    try:
        return solver.solve(problem)
    except FairoptError:
        raise
    except Exception as error:
        raise ConvergenceError(
            f"backend {solver.name!r} raised {type(error).__name__}: {error}; the backend is at "
            "fault, try another"
        ) from error


def judged(solver: Backend, problem: Problem, solution: Solution) -> Solution:
    """The same solution; what does not pass our residuals is not called solved."""
    x = solution.x
    like = problem.linear
    if x.dtype != like.dtype or x.shape != like.shape:
        raise ConvergenceError(
            f"backend {solver.name!r}: expected x of shape {tuple(like.shape)} in {like.dtype} "
            f"from its solve, got {tuple(x.shape)} in {x.dtype}; the backend is at fault"
        )
    y = solution.row_dual
    if y.shape != problem.l.shape or len(solution.status) != len(y):
        raise ConvergenceError(
            f"backend {solver.name!r}: expected row_dual of shape {tuple(problem.l.shape)} and one "
            f"status per problem from its solve, got {tuple(y.shape)} and {len(solution.status)}; "
            "the backend is at fault"
        )
    found = solution.residuals
    optimal = torch.stack([found.stationarity, found.dual_sign, found.complementarity])
    good = (
        (found.primal <= ROW_PRECISION[x.dtype])  # NaN is not; beyond a bound it is infinite
        & torch.isfinite(x).all(-1)
        & (optimal <= OPTIMALITY[x.dtype]).all(0)
    )
    if bool(good.all()):
        return solution
    status = tuple(
        Status.STALLED if was is Status.SOLVED and not now else was
        for was, now in zip(solution.status, good.tolist(), strict=True)
    )
    return replace(solution, status=status)


def attempt(problem: QP) -> Solution:
    """The solution by the first backend that takes the problem, judged, whatever its status."""
    refusal: UnsupportedProblemError | None = None
    for solver in able(problem):
        try:
            solution = answered(solver, problem)
        except UnsupportedProblemError as error:
            refusal = error
            continue
        if solver.capabilities.certifies or solution.verified:
            return solution
        return judged(solver, problem, solution)
    assert refusal is not None
    raise refusal


def refusal_of(solution: Solution) -> FairoptError:
    """Our error for the problems of a batch that failed otherwise than by being infeasible."""
    kept = tuple(
        Status.SOLVED if status is Status.INFEASIBLE else status for status in solution.status
    )
    return failure(solution.backend, replace(solution, status=kept))


def failure(backend: str, solution: Solution) -> FairoptError:
    """Our error for the problems of a batch that were not solved; it speaks of the first."""
    failed = [b for b, status in enumerate(solution.status) if status is not Status.SOLVED]
    index = failed[0]
    status = solution.status[index]
    others = f" ({len(failed)} of {len(solution.status)} failed)" if len(failed) > 1 else ""
    message = f"backend {backend!r}, problem {index} of the batch{others}: {status.value}"
    if status is Status.NONCONVEX:
        return ProblemError(message)
    solution = solution.detach()
    if status is Status.UNBOUNDED:
        return UnboundedError(message, batch=index, solution=solution)
    if status is Status.INFEASIBLE:
        found = tuple(proof_support(solution.row_dual[index]).nonzero().squeeze(-1).tolist())
        return InfeasibleError(
            message,
            batch=index,
            rows=tuple(solution.problem.row_name(r) for r in found),
            solution=solution,
            explain=partial(conflict, solution.problem, index, found),
        )
    one = {k: f"{float(v[index]):.1e}" for k, v in vars(solution.residuals).items()}
    shown = ", ".join(f"{k} {v}" for k, v in one.items())
    return ConvergenceError(f"{message} ({shown})", batch=index, solution=solution)


def conflict(problem: Problem, index: int, proof: tuple[int, ...]) -> Conflict | None:
    """``conflicts.explain``, imported when someone asks."""
    from fairopt.solving.conflicts import explain

    return explain(problem, index, proof, attempt)


@dataclass
class Call:
    """One call of ``solve``: what does not pass through autograd.

    Attributes:
        needed: for each of ``QP.tensors``, whether it requires a gradient.
        shape: that of the x to return.
        negated: whether the second tensor is -q, in this shape.
    """

    solvers: Iterable[Backend]
    problem: QP
    needed: tuple[bool, ...]
    shape: torch.Size
    negated: bool
    solver: Backend | None = None
    solution: Solution | None = None


class Solve(torch.autograd.Function):
    """x as a function of those of ``QP.tensors`` that require a gradient. They were expanded to the
    batch beforehand, so that torch itself sums the gradient of whatever was shared.

    One forward with its context, not forward and ``setup_context``: the latter costs torch an
    ``inspect.signature`` per call, 28 microseconds, a fifth of what a small layer takes.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        call.solver, call.solution = first(call.solvers, call.problem)
        problem = call.problem
        # Without ``memo`` the other tensors are somebody's, too.
        data = (problem.q,) if problem.memo is not None else problem.tensors
        ctx.call, ctx.read = call, (*data, *problem.rows.structure, call.solution.x)
        ctx.versions = versions(ctx.read)
        return call.solution.x.view(call.shape)  # another tensor: what ctx holds must not be it

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: a second derivative is an error
            return once_differentiable(pull_back)(ctx, grad_x)
        return pull_back(ctx, grad_x)


def pull_back(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of what ``Solve`` was given."""
    call: Call = ctx.call
    assert call.solver is not None
    assert call.solution is not None
    if versions(ctx.read) != ctx.versions:
        raise RuntimeError(
            "a tensor of the problem, or its solution, was modified by an inplace operation "
            "between solve and backward, which needs it as it was; modify a clone instead"
        )
    problem, solution = call.problem, call.solution
    if call.negated:
        grad_x = grad_x.reshape(solution.x.shape)
    adjoint = call.solver.vjp(problem, solution, grad_x)
    if call.needed.count(True) == 1 and call.needed[1]:  # the usual case: only the scores
        given: list[Tensor | None] = [adjoint.v]
        wanted = [problem.q]
    else:
        found = gradients(problem, solution, grad_x, adjoint, call.needed).flat
        given = [g for g, need in zip(found, call.needed, strict=False) if need]
        wanted = [t for t, need in zip(problem.tensors, call.needed, strict=True) if need]
    for i, (g, t) in enumerate(zip(given, wanted, strict=True)):
        if g is not None and g.dtype != t.dtype:
            given[i] = g.to(t.dtype)
    if call.negated and call.needed[1]:
        at = int(call.needed[0])
        v = given[at]
        assert v is not None
        given[at] = v.neg_().view(call.shape)
    return None, *given


def versions(tensors: tuple[Tensor, ...]) -> list[int]:
    """How often each was modified in place.

    What ``save_for_backward`` compares; that costs a microsecond per tensor.
    """
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
