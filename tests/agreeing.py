"""What tests that hold backends against each other share: who takes part, and how to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor

from fairopt import QP, solve
from fairopt.agreement.parameters import names, natural_sizes
from fairopt.backends import get, is_available
from fairopt.errors import BackendNotFoundError
from fairopt.programs.problem import Problem

QUADRATIC = ("numba", "osqp", "qpth")
LINEAR = ("highs", "qpth")
SOLUTIONS = 1e-7
GRADIENTS = 1e-6
# A gradient smaller than this share of its natural size has that share to agree with: what is zero
# but for rounding has no digits.
FLOOR = 1e-3


def skip_without(name: str) -> None:
    """Skip, by name, where the package that a backend needs is not installed."""
    if not is_available(name):
        try:
            get(name)
        except BackendNotFoundError as error:
            pytest.skip(str(error))


def capable(problem: Problem, among: Sequence[str] = (*QUADRATIC, "highs")) -> list[str]:
    """The installed backends that declare they take the problem."""
    found = [name for name in among if is_available(name)]
    return [name for name in found if get(name).capabilities.missing(problem) is None]


def relative(one: Tensor, other: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest value; NaN counts as infinite."""
    if not one.numel():
        return 0.0
    gap = (one.double() - other.double()).abs().max()
    scale = max(float(one.abs().max()), float(other.abs().max()), floor)
    if gap == 0:
        return 0.0
    return float(gap) / scale if bool(gap.isfinite()) and scale > 0 else float("inf")


def each_pair_agrees(
    what: str, values: Mapping[str, Tensor], tolerance: float, floor: float = 0.0
) -> None:
    for one, other in combinations(values, 2):
        gap = relative(values[one], values[other], floor)
        assert gap <= tolerance, f"{what}: {one} and {other} differ by {gap:.1e} of its size"


def differentiated(
    problem: QP, backend: str, g: Tensor, shared: Iterable[int] = ()
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """x, row_dual and the gradients of g.x with respect to all data.

    Args:
        shared: which of ``problem.tensors`` are one for the whole batch.
    """
    leaves = [
        (tensor[:1] if i in set(shared) else tensor).detach().clone().requires_grad_()
        for i, tensor in enumerate(problem.tensors)
    ]
    whole = [leaf.expand_as(t) for leaf, t in zip(leaves, problem.tensors, strict=True)]
    solution = solve(problem.with_tensors(*whole), backend=backend)
    (solution.x * g).sum().backward()
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    return solution.x.detach(), solution.row_dual, grads


def backends_agree(
    problem: QP, g: Tensor, backends: Sequence[str], shared: Sequence[int] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Solutions to 1e-7, gradients to 1e-6; what the first backend says.

    Gradients are held against each other in units that no scaling of rows or variables changes.
    """
    found = {name: differentiated(problem, name, g, shared) for name in backends}
    x, y, grads = found[backends[0]]
    for b in range(len(x)):
        each_pair_agrees(f"x, problem {b}", {k: v[0][b] for k, v in found.items()}, SOLUTIONS)
    sizes, root, _ = natural_sizes(problem, x.double(), y)
    reach = (g / root).norm(dim=-1)
    for i, name in enumerate(names(problem)):
        unit = sizes[name] * reach.view(-1, *[1] * (sizes[name].dim() - 1))
        if i in set(shared):
            unit = unit.sum(0, keepdim=True)
        unit = torch.where(unit > 0, unit, torch.inf)
        values = {k: v[2][i] / unit for k, v in found.items()}
        for b in range(len(unit)):
            part = {k: v[b] for k, v in values.items()}
            each_pair_agrees(f"gradient of {name}, problem {b}", part, GRADIENTS, FLOOR)
    return x, grads


def inputs_agree(
    solve_for: Callable[[str], Tensor],
    inputs: Mapping[str, Tensor],
    g: Tensor,
    backends: Sequence[str],
) -> dict[str, Tensor]:
    """Solutions and the gradients of g.x by tensors that the problem is written from.

    Args:
        solve_for: x by the backend of that name, from ``inputs``.
    """
    x: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {name: {} for name in inputs}
    for backend in backends:
        answer = solve_for(backend)
        x[backend] = answer.detach()
        grads = torch.autograd.grad((answer * g).sum(), [*inputs.values()], allow_unused=True)
        for (name, tensor), grad in zip(inputs.items(), grads, strict=True):
            found[name][backend] = torch.zeros_like(tensor) if grad is None else grad
    each_pair_agrees("x", x, SOLUTIONS, 1e-6)
    for name, values in found.items():
        each_pair_agrees(f"gradient of {name}", values, GRADIENTS, FLOOR * float(g.norm()))
    return {name: values[backends[0]] for name, values in found.items()}
