"""Derivatives of known solutions in random directions, by finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fairopt.programs.problem import QP
from fairopt.programs.rows.sparse import SparseRows
from fairopt.testing.known import Known, reference


def numbers(known: Known) -> torch.Generator:
    return torch.Generator().manual_seed(known.x.numel())


def cotangent(known: Known) -> Tensor:
    """A random cotangent of x, always the same one for problems of one size."""
    g = torch.randn(known.x.shape, generator=numbers(known), dtype=torch.float64)
    return g.to(known.problem.l.device)


def parameter_names(problem: QP) -> list[str]:
    """The parameters of a problem in words, in the order of ``problem.tensors``."""
    rows = [f"tensor {i} of the rows" for i in range(len(problem.rows.tensors))]
    return ["P", "q", *rows, "l", "u", "lb", "ub"]


Tangents: TypeAlias = tuple[Tensor | None, ...]


def directions(known: Known, leaves: Sequence[Tensor]) -> dict[str, Tangents]:
    """Random directions, by name: one tangent per leaf, ``None`` where it stays.

    Equal sides move together, infinite ones stay, P stays symmetric, zeros of P and A stay.
    """
    problem, recipe = known.problem, known.recipe
    assert isinstance(problem, QP)
    generator = numbers(known)
    P, q, *rows, l, u, lb, ub = (leaf.detach().double() for leaf in leaves)
    count = len(leaves)

    def random(like: Tensor) -> Tensor:
        r = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return r.to(like.device)

    def pair(low: Tensor, high: Tensor, size: Tensor | float) -> tuple[Tensor, Tensor]:
        down = torch.where(torch.isfinite(low), random(low) * size, 0.0)
        up = torch.where(torch.isfinite(high), random(high) * size, 0.0)
        return down, torch.where(low == high, down, up)

    def at(place: int, *tangents: Tensor) -> Tangents:
        filled: list[Tensor | None] = [None] * count
        filled[place : place + len(tangents)] = tangents
        return tuple(filled)

    if recipe.spread > 100:  # Small entries of P are no sign of small curvature.
        turn = P * random(P[:, :1].flatten(1)[:, :1].view(-1, *[1] * (P.dim() - 1)))
    elif isinstance(problem.P, SparseRows):
        n = problem.shape[-1]
        square = random(P.new_zeros(len(P), n, n))
        turn = P * (square + square.mT)[:, problem.P.row, problem.P.column]
    elif P.dim() == 3:
        square = random(P)
        turn = P * (square + square.mT)
    else:
        turn = P * random(P)
    if recipe.singular and P.dim() == 3:
        turn = torch.zeros_like(turn)  # it would not stay semidefinite
    found = {"P": at(0, turn), "q": at(1, random(q) * q.abs().max())}
    if not recipe.dependent:  # else they would contradict each other
        for i, tensor in enumerate(rows):
            found[f"tensor {i} of the rows"] = at(2 + i, tensor * random(tensor))
        length = problem.rows.norms(torch.ones_like(problem.q).double())[: len(l)]
        found["l and u"] = at(count - 4, *pair(l, u, length))
    found["lb and ub"] = at(count - 2, *pair(lb, ub, 1.0))
    return found


def derivative(known: Known, tangents: Tangents, name: str) -> Tensor:
    """dx in a direction, by central differences of the reference on its active set: ``(B, n)``."""
    problem = known.problem
    assert isinstance(problem, QP)
    # x is linear in q and the sides: there a large step has no error at all.
    step = 1.0 if name in ("q", "l and u", "lb and ub") else 1e-5

    def moved(by: float) -> Tensor:
        tensors = [
            t.double() if tangent is None else t.double() + by * tangent
            for t, tangent in zip(problem.tensors, tangents, strict=True)
        ]
        return reference(problem.with_tensors(*tensors), known.side, known.held)[0]

    return (moved(step) - moved(-step)) / (2 * step)
