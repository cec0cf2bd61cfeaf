"""The parameters of a QP: their names, places in words, natural sizes of their gradients.

Natural sizes. Gradients with respect to data of different size cannot be compared with one number:
a row scaled by 1000 has a gradient 1000 times smaller. In the metric of P^-1 (d is its diagonal,
|A_r| the length of a row, see ``fairopt.agreement.degeneracy``) let

    X = max sqrt(d_i) |x_i| and |q_i| / sqrt(d_i),  Y = max |y_r| |A_r|,  G = sqrt(sum g_i^2 / d_i).

For P = diag(d) the adjoint obeys |v_i| sqrt(d_i) <= G, and nu_r |A_r| is of the size of G. The
formulas of ``fairopt.optimality.derivative`` then bound each gradient by G times

    q_i    1 / sqrt(d_i)                  P_ij     X / sqrt(d_i d_j)
    l, u   1 / |A_r|                      lb, ub   sqrt(d_i)
    A_ri   (X + Y) / (|A_r| sqrt(d_i))    and through the chain rule for what defines A.

Divided by it a gradient is a pure number that does not change when rows or variables are rescaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fairopt.programs.problem import QP, Problem
from fairopt.programs.rows.sparse import SparseRows

SIDES = ("l", "u", "lb", "ub")


def names(problem: QP) -> tuple[str, ...]:
    """A name for each of ``problem.tensors``: P, q, rows..., l, u, lb, ub."""
    return ("P", "q", *problem.rows.parameters, *SIDES)


def place(problem: Problem, name: str, index: tuple[int, ...]) -> str:
    """An element in words: ``u['group: 0 - 1']``; ``index`` has no batch dimension."""
    words = [str(i) for i in index]
    if name == "P" and isinstance(problem, QP) and isinstance(problem.P, SparseRows):
        words = [str(int(problem.P.row[index[0]])), str(int(problem.P.column[index[0]]))]
    elif name == "P" and len(index) == 1:
        words *= 2
    elif name in ("l", "u", "row_dual"):
        words[0] = row_word(problem, index[0])
    elif name in problem.rows.parameters:
        row, words = problem.rows.place(name, index)
        words = words if row is None else [row_word(problem, row), *words]
    return f"{name}[{', '.join(words)}]" if words else name


def row_word(problem: Problem, row: int) -> str:
    """The name of a row in quotes, or its number."""
    return repr(problem.row_name(row)) if problem.row_names else str(row)


def natural_sizes(
    problem: QP, x: Tensor, row_dual: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The natural sizes of the gradients with respect to ``problem.tensors``.

    Args:
        problem: the problem, detached.
        x, row_dual: a solution, float64.

    Returns:
        For each name the size over G, of the tensor's shape; sqrt(d), ``(B, n)``, for G; and
        X + Y, ``(B,)``, by which a relative change of the data moves sqrt(d) x, roughly.
    """
    rows = problem.rows
    root = problem.diagonal().sqrt()
    length = rows.norms(1 / root.square())
    inverse = torch.where(length > 0, 1 / length, 0.0)
    X = torch.maximum((root * x).abs(), (problem.q.double() / root).abs()).amax(-1)
    total = X + (row_dual * length).abs().amax(-1) if length.shape[-1] else X
    total = torch.where(total > 0, total, 1.0)
    zero = torch.zeros_like(root), torch.zeros_like(inverse)
    sizes_of_rows = rows.with_tensors(*(tensor.abs() for tensor in rows.tensors))
    inner = sizes_of_rows.pull_back(inverse, 1 / root, zero[1], zero[0])

    def times(tensor: Tensor) -> Tensor:
        return tensor * total.view(-1, *[1] * (tensor.dim() - 1))

    sizes = (
        times(1 / problem.products(root, root)), 1 / root, *map(times, inner), inverse, inverse,
        root, root,
    )  # fmt: skip
    return dict(zip(names(problem), sizes, strict=True)), root, total
