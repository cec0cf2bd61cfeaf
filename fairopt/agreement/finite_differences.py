"""Derivatives of a solution by finite differences: an oracle that knows no derivation.

Every parameter is moved along random directions that keep the problem of its kind: P stays
symmetric and semidefinite, equal sides move together, others do not cross, infinite ones stay.
With L = g.x,

    (L(h) - L(-h)) / 2h = dL/d(direction) + O(h^2).

A second figure, with the step 4h, shows how far the first can be trusted: the errors of truncation
and of the solver's rounding are of the size of the difference between the two. Where the active
set at any of the four points is not that of the solution, the oracle has no opinion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fairopt.agreement.data import ORACLE, Answer, Merged, Quantity
from fairopt.agreement.parameters import names, natural_sizes
from fairopt.backends import Backend
from fairopt.errors import FairoptError
from fairopt.optimality.active_sets import bound_sides, row_sides
from fairopt.programs.problem import QP
from fairopt.programs.solution import Solution
from fairopt.solving.autograd import solve
from fairopt.tolerances import DOUBTFUL, ZERO_GRADIENT

DIRECTIONS = 2  # random directions for each parameter
STEP = 6e-6  # the cube root of the rounding of float64
FAR = 4.0
MARGIN = 0.05  # of the distance between two sides: what all steps may use up


@dataclass(frozen=True, eq=False)
class Slope:
    """The figures of the oracle for one parameter and K directions.

    Attributes:
        directions: ``(K, B, ...)``.
        partners: how the opposite side moved, ``(K, B, ...)``: together where they are equal.
            ``None`` for parameters that are no sides.
        values: ``(K, C, B)``, the derivative of g.x along each, for C cotangents g.
        doubt: ``(K, C, B)``, how far the values can be trusted.
        size: ``(C, B)``, the natural size of the values.
        known: ``(B,)`` bool, where the oracle has an opinion.
    """

    directions: Tensor
    partners: Tensor | None
    values: Tensor
    doubt: Tensor
    size: Tensor
    known: Tensor


def finite_differences(
    problem: QP,
    backend: Backend,
    cotangents: Tensor,
    unique_duals: Tensor,
    generator: torch.Generator,
) -> dict[str, Slope]:
    """Derivatives of g.x with respect to each parameter, by name, along random directions.

    Args:
        problem: well-posed problems, detached; they are solved in float64.
        backend: solves them, four times for each parameter and direction.
        cotangents: g, ``(C, B, n)``.
        unique_duals: ``(B,)`` bool. Where it is false, rows, sides and bounds do not move alone:
            constraints that depend on each other would contradict each other.
        generator: of the random directions, on the CPU.

    Raises:
        FairoptError: the problem itself is not solved.
    """
    problem = problem.with_tensors(*(tensor.double() for tensor in problem.tensors))
    g = cotangents.double()
    with torch.no_grad():
        base = solve(problem, backend=backend)
        sizes, root, total = natural_sizes(problem, base.x, base.row_dual)
        G = (g / root).norm(dim=-1)
        found = {}
        for position, (name, tensor) in enumerate(
            zip(names(problem), problem.tensors, strict=True)
        ):
            known = unique_duals | (name in ("P", "q"))
            equal = None
            if name in PARTNER:
                other = position + (1 if name in ("l", "lb") else -1)
                equal = problem.tensors[other] == tensor
            moves, values, doubts = [], [], []
            for _ in range(DIRECTIONS):
                noise = 2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1
                move = direction(problem, name, noise.to(tensor.device), sizes[name], total)
                x = {}
                for step in (STEP, -STEP, FAR * STEP, -FAR * STEP):
                    moved = list(problem.tensors)
                    moved[position] = tensor + step * move
                    if equal is not None:
                        moved[other] = torch.where(equal, moved[position], moved[other])
                    x[step], same = moved_point(problem.with_tensors(*moved), base, backend)
                    known = known & same
                near = (g * (x[STEP] - x[-STEP])).sum(-1) / (2 * STEP)
                far = (g * (x[FAR * STEP] - x[-FAR * STEP])).sum(-1) / (2 * FAR * STEP)
                moves.append(move)
                values.append(near)
                doubts.append((near - far).abs())
            steps = torch.stack(moves)
            found[name] = Slope(
                steps, None if equal is None else steps * equal, torch.stack(values),
                torch.stack(doubts), G * total, known,
            )  # fmt: skip
    return found


PARTNER = {"l": "u", "u": "l", "lb": "ub", "ub": "lb"}


def direction(problem: QP, name: str, noise: Tensor, size: Tensor, total: Tensor) -> Tensor:
    """A direction in which g.x changes by its natural size, from noise between -1 and 1."""
    if name == "P":
        # (S P + P S) / 2 with S diagonal: P -> (1 + hS/2) P (1 + hS/2) stays semidefinite.
        n = problem.shape[2]
        s = noise.new_zeros(len(noise), n)
        some = noise[..., 0] if noise.dim() == 3 else noise[:, :n]
        s[:, : some.shape[1]] = some
        one = torch.ones_like(s)
        return problem.tensors[0] * (problem.products(s, one) + problem.products(one, s)) / 2
    scale = total.view(-1, *[1] * (size.dim() - 1))
    move = noise * torch.where(size > 0, scale / size, 0.0)
    if name in PARTNER:
        here, there = getattr(problem, name), getattr(problem, PARTNER[name])
        room = torch.where(here == there, torch.inf, MARGIN / (FAR * STEP) * (there - here).abs())
        move = torch.where(here.isinf(), 0.0, torch.minimum(torch.maximum(move, -room), room))
    return move


def moved_point(moved: QP, base: Solution, backend: Backend) -> tuple[Tensor, Tensor]:
    """x of the moved problem, and where its active set is the same: ``(B, n)``, ``(B,)``."""
    try:
        solution = solve(moved, backend=backend)
    except FairoptError as error:
        attached = getattr(error, "solution", None)
        if attached is None:
            return torch.full_like(base.x, torch.nan), torch.zeros(
                len(base.x), dtype=torch.bool, device=base.x.device
            )
        solution = attached
    problem = base.problem
    assert isinstance(problem, QP)
    before, after = problem.diagonal(), moved.diagonal()
    rows = (row_sides(problem, base, before) != 0) == (row_sides(moved, solution, after) != 0)
    bounds = (bound_sides(problem, base, before) != 0) == (bound_sides(moved, solution, after) != 0)
    same = rows.all(-1) & bounds.all(-1) & solution.x.isfinite().all(-1)
    return solution.x, same


def slopes(
    problem: QP,
    answers: Sequence[Answer],
    where: Merged,
    named: str,
    g: Tensor,
    tolerance: float,
    generator: torch.Generator,
    notes: list[str],
) -> Iterable[Quantity]:
    """Gradients along random directions, beside finite differences in these directions."""
    able = [a for a in answers if a.gradients]
    solvers = [a for a in able if a.backend is not None and a.solution is not None]
    # The reference that was named, else the fastest: any that is accepted will do.
    solver = min(
        solvers,
        key=lambda a: (a.label != named, a.solution.seconds if a.solution else 0.0),
        default=None,
    )
    if solver is None or solver.backend is None:
        notes.append(f"{ORACLE}: no backend answered")
        return
    usable = solver.accepted & where.standing.unique
    index = usable.nonzero().squeeze(-1)
    if not len(index):
        notes.append(f"{ORACLE}: x is not shown to be unique in any problem")
        return
    try:
        found = finite_differences(
            problem.select(index), solver.backend, g[:, index],
            where.standing.unique_duals[index], generator,
        )  # fmt: skip
    except FairoptError as error:
        notes.append(f"{ORACLE}: not possible: {error}")
        return
    batch, C = len(problem.l), len(g)

    def whole(part: Tensor, fill: float = 0.0) -> Tensor:
        """``(K, C, b)`` to ``(B, K * C)``."""
        out = part.new_full((batch, part.shape[0] * C), fill)
        out[index] = part.permute(2, 0, 1).flatten(1)
        return out

    silent = []
    for name, slope in found.items():
        if not slope.directions[0, 0].numel():
            continue
        values = {ORACLE: whole(slope.values)}
        for answer in able:
            values[answer.label] = whole(along(answer.gradients, index, name, slope))
        unit = whole(slope.size.expand_as(slope.values), 1.0)
        scale = (values[ORACLE] / unit).abs().amax(-1).clamp(min=ZERO_GRADIENT)
        doubt = (whole(slope.doubt) / unit).amax(-1) / scale
        known = torch.zeros_like(usable)
        known[index] = slope.known
        known = known & (doubt <= DOUBTFUL)
        if not bool(known.any()):
            silent.append(name)
            continue

        def words(e: int, name: str = name) -> str:
            return f"{name}, direction {e // C}, cotangent {e % C}"

        yield Quantity(
            f"slope along {name}", values,
            {a.label: a.accepted & known for a in able} | {ORACLE: known}, unit,
            torch.full_like(scale, ZERO_GRADIENT), tolerance + 3 * doubt.nan_to_num(0.0), known,
            words,
        )  # fmt: skip
    if silent:
        notes.append(
            f"{ORACLE}: no opinion on {', '.join(silent)}: the active set changes within a step, "
            "or they are too inaccurate"
        )


def along(gradients: dict[str, Tensor], index: Tensor, name: str, slope: Slope) -> Tensor:
    """<gradient, direction> for each direction and cotangent, ``(K, C, b)``."""
    total = inner(gradients[name][:, index], slope.directions)
    if slope.partners is not None:
        total = total + inner(gradients[PARTNER[name]][:, index], slope.partners)
    return total


def inner(gradient: Tensor, direction: Tensor) -> Tensor:
    """``(C, b, ...)`` with ``(K, b, ...)`` to ``(K, C, b)``."""
    return torch.einsum("cbe,kbe->kcb", gradient.flatten(2), direction.flatten(2))
