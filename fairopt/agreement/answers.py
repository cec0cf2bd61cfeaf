"""Asking one backend: its solution, its gradients, and how long both took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fairopt.agreement.data import REFERENCE, Answer
from fairopt.agreement.parameters import names
from fairopt.backends import Backend
from fairopt.errors import ConvergenceError, FairoptError, ProblemError, UnsupportedProblemError
from fairopt.programs.problem import QP, Problem
from fairopt.programs.solution import Solution, Status
from fairopt.solving.autograd import answered, judged, solve


def ask(label: str, backend: Backend, problem: Problem, g: Tensor, repeats: int) -> Answer:
    """Let one backend solve, and differentiate its solutions."""
    batch = problem.shape[0]
    no = torch.zeros(batch, dtype=torch.bool, device=problem.l.device)
    try:
        said = answered(backend, problem)
        ruled = judged(backend, problem, said)
    except UnsupportedProblemError:
        raise
    except FairoptError as error:
        return Answer(label, backend, (None,) * batch, no, no, message=str(error))
    claimed = torch.tensor([s is Status.SOLVED for s in said.status], device=no.device)
    accepted = torch.tensor([s is Status.SOLVED for s in ruled.status], device=no.device)
    answer = Answer(
        label, backend, said.status, claimed, accepted, said, said.row_dual.double(),
        said.bound_dual,
    )  # fmt: skip
    if not bool(accepted.any()):
        return answer
    part, chosen = problem, g
    if isinstance(problem, QP) and not bool(accepted.all()):
        index = accepted.nonzero().squeeze(-1)
        part, chosen = problem.select(index), g[:, index]
    try:
        if repeats and (isinstance(part, QP) or bool(accepted.all())):
            answer.forward = best(repeats, lambda: solve(part, backend=backend), no.device)
        if isinstance(part, QP):
            found, answer.backward = derive(backend, part, chosen, repeats)
            answer.gradients = {k: spread(v, accepted) for k, v in found.items()}
    except FairoptError as error:  # it gave an answer and then no gradient
        answer.message = str(error)
        answer.status = tuple(
            None if ok else s for s, ok in zip(said.status, accepted.tolist(), strict=True)
        )
        answer.gradients = {}
    return answer


def derive(
    backend: Backend, problem: QP, g: Tensor, repeats: int
) -> tuple[dict[str, Tensor], float | None]:
    """The gradients of g.x through ``solve``, ``(C, B, ...)``, and the time of one backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in problem.tensors]
    with torch.enable_grad():
        x = solve(problem.with_tensors(*leaves), backend=backend).x

    def once(cotangent: Tensor) -> tuple[Tensor, ...]:
        try:
            return torch.autograd.grad(x, leaves, cotangent, retain_graph=True)
        except FairoptError:
            raise
        except Exception as error:
            raise ConvergenceError(
                f"backend {backend.name!r} raised {type(error).__name__} in its backward pass: "
                f"{error}; the backend is at fault"
            ) from error

    found = [[t.double() for t in once(cotangent)] for cotangent in g]
    seconds = best(repeats, lambda: once(g[0]), x.device) if repeats else None
    stacked = (torch.stack(column) for column in zip(*found, strict=True))
    return dict(zip(names(problem), stacked, strict=True)), seconds


def spread(part: Tensor, where: Tensor) -> Tensor:
    """``(C, b, ...)`` for some problems of the batch to ``(C, B, ...)``, zero for the others."""
    if len(where) == part.shape[1]:
        return part
    whole = part.new_zeros(part.shape[0], len(where), *part.shape[2:])
    whole[:, where] = part
    return whole


def best(repeats: int, work: Callable[[], object], device: torch.device) -> float:
    """The shortest wall time of several calls."""
    seconds = math.inf
    with torch.no_grad():
        for _ in range(repeats):
            wait(device)
            begun = time.perf_counter()
            work()
            wait(device)
            seconds = min(seconds, time.perf_counter() - begun)
    return seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def known_answer(problem: Problem, reference: Solution | Tensor) -> Answer:
    """A reference that is no backend."""
    like = problem.linear
    batch = len(like)
    x = reference.x.detach() if isinstance(reference, Solution) else reference.detach()
    if x.dim() == 1 and batch == 1:
        x = x.unsqueeze(0)
    if x.shape != like.shape or not x.dtype.is_floating_point or x.device != like.device:
        raise ProblemError(
            f"reference: expected x of shape {tuple(like.shape)} on {like.device}, got "
            f"{tuple(x.shape)} in {x.dtype} on {x.device}"
        )
    if isinstance(reference, Solution):
        if reference.row_dual.shape != problem.l.shape:
            raise ProblemError(
                f"reference: expected row_dual of shape {tuple(problem.l.shape)}, got "
                f"{tuple(reference.row_dual.shape)}; it is the solution of another problem"
            )
        claimed = torch.tensor([s is Status.SOLVED for s in reference.status], device=x.device)
        return Answer(
            REFERENCE, None, reference.status, claimed, claimed, reference,
            reference.row_dual.double(), reference.bound_dual,
        )  # fmt: skip
    if not bool(x.isfinite().all()):
        raise ProblemError("reference: expected finite values, got NaN or infinity")
    claimed = torch.ones(batch, dtype=torch.bool, device=x.device)
    status: tuple[Status, ...] = (Status.SOLVED,) * batch
    none = torch.zeros(problem.l.shape, dtype=torch.float64, device=x.device)
    solution = Solution(problem, x, none, status, REFERENCE)
    return Answer(REFERENCE, None, status, claimed, claimed, solution)
