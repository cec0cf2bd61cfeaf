"""The quantities that several answers have, each with its unit and its tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fairopt.agreement.data import Allowed, Answer, Merged, Quantity
from fairopt.agreement.degeneracy import standing, units
from fairopt.agreement.parameters import names, natural_sizes, place
from fairopt.optimality.linear_systems import metric
from fairopt.programs.problem import LP, QP, Problem
from fairopt.tolerances import ZERO_GRADIENT, ZERO_SOLUTION


def examine(problem: Problem, order: Sequence[Answer], allowed: Allowed) -> Merged:
    """Merge the answers, best first, and see how each problem's solution stands."""
    batch, m, n = problem.shape
    x = torch.zeros(batch, n, dtype=torch.float64, device=problem.l.device)
    y, w = x.new_zeros(batch, m), torch.zeros_like(x)
    solved = torch.zeros(batch, dtype=torch.bool, device=x.device)
    for answer in order:
        if answer.solution is None or answer.row_dual is None or answer.bound_dual is None:
            continue
        take = answer.accepted & ~solved
        x[take] = answer.solution.x.detach().double()[take]
        y[take], w[take] = answer.row_dual[take], answer.bound_dual[take]
        solved = solved | take
    # Multipliers carry the rounding of the data divided by the smallest singular value.
    rank = 100 * torch.finfo(problem.linear.dtype).eps / allowed.gradient
    return Merged(x, y, w, solved, standing(problem, x, y, w, touch=allowed.solution, rank=rank))


def points(
    problem: Problem, answers: Sequence[Answer], where: Merged, limits: Allowed
) -> Iterable[Quantity]:
    """x, the objective and the multipliers."""
    m = problem.shape[1]
    solved = [a for a in answers if a.solution is not None]
    claims = {a.label: a.claimed for a in solved}
    x = {a.label: a.solution.x.detach().double() for a in solved if a.solution is not None}
    if not x:
        return
    d = metric(problem)
    root = d.sqrt()
    ones = torch.ones_like(where.x)
    allowed, gradient_allowed = (ones[:, 0] * limit for limit in limits)
    unique = where.standing.unique | ~where.solved
    unique_duals = where.standing.unique_duals
    yield Quantity(
        "x", x, claims, ones, ZERO_SOLUTION * size_of_x(problem, root), allowed, unique,
        lambda e: f"x[{e}]",
    )  # fmt: skip
    terms = {label: objective(problem, v) for label, v in x.items()}
    magnitude = torch.stack([big for _, big in terms.values()]).nan_to_num(0.0, 0.0).amax(0)
    yield Quantity(
        "objective", {label: f.unsqueeze(-1) for label, (f, _) in terms.items()}, claims,
        ones[:, :1], magnitude, allowed, ~unique, lambda _: "",
    )  # fmt: skip
    dual = [a for a in solved if a.row_dual is not None]
    claims = {a.label: a.claimed for a in dual}
    _, force = units(problem, where.x, root)
    floor = ZERO_GRADIENT * force.squeeze(-1)
    length = problem.rows.norms(1 / d)
    if m:
        yield Quantity(
            "row_dual", {a.label: a.row_dual for a in dual if a.row_dual is not None}, claims,
            torch.where(length > 0, 1 / length, torch.inf), floor, gradient_allowed, unique_duals,
            lambda e: place(problem, "row_dual", (e,)),
        )  # fmt: skip
    yield Quantity(
        "bound_dual", {a.label: a.bound_dual for a in dual if a.bound_dual is not None}, claims,
        root, floor, gradient_allowed, unique_duals, lambda e: f"bound_dual[{e}]",
    )  # fmt: skip


def size_of_x(problem: Problem, root: Tensor) -> Tensor:
    """The size of x to expect, for problems that are solved by zero: ``(B,)``."""
    sides = torch.cat([problem.lb, problem.ub], -1).double().abs()
    sides = torch.where(sides > 0, sides, torch.inf).amin(-1)
    sides = torch.where(sides.isinf(), 0.0, sides)
    if isinstance(problem, LP):
        return sides
    return torch.maximum(sides, (problem.q.double().abs() / root.square()).amax(-1))


def objective(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """The objective and the sum of the magnitudes of its terms: ``(B,)`` each."""
    linear = problem.linear.double() * x
    value, size = linear.sum(-1), linear.abs().sum(-1)
    if isinstance(problem, QP):
        curved = 0.5 * x * problem.apply_quadratic(x)
        value, size = value + curved.sum(-1), size + curved.abs().sum(-1)
    return value, size


def gradient_quantities(
    problem: QP, answers: Sequence[Answer], where: Merged, g: Tensor, tolerance: float
) -> Iterable[Quantity]:
    """One for each parameter; the C cotangents side by side."""
    able = [a for a in answers if a.gradients]
    if not able:
        return
    sizes, root, _ = natural_sizes(problem, where.x, where.row_dual)
    G = (g.double() / root).norm(dim=-1)
    floor = torch.full_like(G[0], ZERO_GRADIENT)
    for name, tensor in zip(names(problem), problem.tensors, strict=True):
        shape = tensor.shape[1:]
        count = math.prod(shape)
        if not count:
            continue
        unit = sizes[name].reshape(len(tensor), 1, count) * G.T.unsqueeze(-1)

        def words(e: int, name: str = name, shape: torch.Size = shape, count: int = count) -> str:
            return place(problem, name, index_of(e % count, shape))

        counts = where.standing.unique
        if name not in ("P", "q"):
            counts = counts & where.standing.unique_duals
        yield Quantity(
            f"gradient of {name}",
            {a.label: a.gradients[name].transpose(0, 1).flatten(1) for a in able},
            {a.label: a.accepted for a in able},
            unit.flatten(1), floor, torch.full_like(floor, tolerance), counts, words,
        )  # fmt: skip


def index_of(element: int, shape: torch.Size) -> tuple[int, ...]:
    """The indices of an element that is numbered row by row."""
    return tuple(map(int, torch.unravel_index(torch.tensor(element), shape)))


def input_quantities(
    problem: Problem,
    answers: Sequence[Answer],
    inputs: Mapping[str, Tensor],
    cotangents: int,
    tolerance: float,
) -> Iterable[Quantity]:
    """Gradients with respect to the tensors that the problem was computed from, by autograd."""
    assert isinstance(problem, QP)
    able = [a for a in answers if a.gradients and bool(a.accepted.all())]
    every = zip(names(problem), problem.tensors, strict=True)
    differentiable = [(name, tensor) for name, tensor in every if tensor.requires_grad]
    if not able:
        return
    found: dict[str, dict[str, list[Tensor]]] = {name: {} for name in inputs}
    for answer in able:
        for c in range(cotangents):
            grads: Sequence[Tensor | None] = [None] * len(inputs)
            if differentiable:
                grads = torch.autograd.grad(
                    [tensor for _, tensor in differentiable],
                    list(inputs.values()),
                    [answer.gradients[name][c].to(tensor.dtype) for name, tensor in differentiable],
                    retain_graph=True,
                    allow_unused=True,
                )
            for (name, tensor), grad in zip(inputs.items(), grads, strict=True):
                value = torch.zeros_like(tensor) if grad is None else grad
                found[name].setdefault(answer.label, []).append(value.double().flatten())
    for name, tensor in inputs.items():
        values = {label: torch.cat(parts).unsqueeze(0) for label, parts in found[name].items()}
        one = next(iter(values.values())).new_ones(1)
        size = torch.stack([v.abs().amax() for v in values.values()]).nan_to_num(0.0, 0.0).amax()

        def words(e: int, name: str = name, shape: torch.Size = tensor.shape) -> str:
            if not shape:
                return name
            return f"{name}{[*index_of(e % math.prod(shape), shape)]}"

        yield Quantity(
            f"gradient of {name}", values, dict.fromkeys(values, one > 0),
            one.expand(1, next(iter(values.values())).shape[-1]), one * size * ZERO_GRADIENT,
            one * tolerance, one > 0, words, whole=True,
        )  # fmt: skip
