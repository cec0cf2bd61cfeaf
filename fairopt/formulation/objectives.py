"""Objectives: the least squares, least total change, least largest change, greatest utility.

Let s be the scores, w the weights, A the rows of the constraints with sides l and u, and lb, ub the
bounds. c is the point of the bounds next to s: the change that the bounds force is made beforehand,
so that what is solved for is of the size of the predictions, however far outside the scores are.

``"l1"``    minimise sum_i w_i |x_i - s_i|. Within the bounds |x_i - s_i| is |x_i - c_i| and the
            constant |c_i - s_i|. With x = c + p - m and p, m >= 0, variables (p, m):

                minimise w.p + w.m   subject to   l - A c <= A p - A m <= u - A c,
                                                  0 <= p <= ub - c,   0 <= m <= c - lb.

            The weights of m's columns are negative: the rows stay cell-structured, with the same
            cells. At a solution p_i or m_i is zero (if both were positive, less of both would cost
            less), also with smoothing, which then adds  smoothing/2 sum_i (x_i - c_i)^2.

``"linf"``  minimise max_{w_i > 0} |x_i - s_i|. With f = s - c the forced changes, t0 the largest of
            them, x = c + d and the maximum t0 + t, variables (d, t):

                minimise t   subject to   l - A c <= A d <= u - A c,   lb - c <= d <= ub - c,
                                          d_i - t <= t0 + f_i,   d_i + t >= f_i - t0,   t >= 0.

``"utility"``  maximise sum_i w_i s_i x_i, variables x, rows and bounds as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fairopt.errors import ConvergenceError
from fairopt.formulation.specification import Objective
from fairopt.kernels.memory import negative
from fairopt.optimality.finishing import refine
from fairopt.optimality.refinement import clipped
from fairopt.programs.problem import LP, QP
from fairopt.programs.rows.base import Rows
from fairopt.programs.rows.sparse import SparseRows
from fairopt.programs.solution import RowValues
from fairopt.programs.tensors import to_batch, unchecked
from fairopt.tolerances import ROUNDING_OF_SUM, ROW_PRECISION

Read: TypeAlias = Callable[[Tensor], Tensor]


class Formulated(NamedTuple):
    """A problem, and what the layer needs besides.

    Attributes:
        problem: without the history of ``center``.
        center: the scores with their history, where q = -center; ``solve`` then pulls gradients
            back to the center itself, which spares a small layer three steps of autograd and a
            large one the memory of two negations. ``None``: the problem carries all its history.
        read: the predictions ``(B, n)``, with their history, from the solution's x, in the dtype
            of the scores (float32 for narrower ones); ``None`` where they are that x.
    """

    problem: QP | LP
    center: Tensor | None
    read: Read | None = None


class Stated(NamedTuple):
    """Scores, rows and bounds as they were read and checked.

    Attributes:
        scores: ``(B, n)``, with their history.
        weight: float64, ``(1, n)`` or ``(B, n)``; ``None`` for ones.
        rows, l, u: the rows of the constraints and their sides.
        lb, ub: the bounds, which broadcast to the scores.
        row_names, skipped: as in ``LP``.
    """

    scores: Tensor
    weight: Tensor | None
    rows: Rows
    l: Tensor
    u: Tensor
    lb: Tensor
    ub: Tensor
    row_names: tuple[str, ...]
    skipped: tuple[str, ...]

    def fields(self, n: int, **others: Any) -> dict[str, Any]:
        """What a QP and an LP in n variables have in common, each expanded to the batch.

        Args:
            others: those that the program does not have from here.
        """
        given = {**self._asdict(), **others}
        del given["scores"], given["weight"]
        batch, m = len(self.scores), given["rows"].shape[1]
        for name, size in (("l", m), ("u", m), ("lb", n), ("ub", n)):
            given[name] = to_batch(given[name], batch, size)
        return given


def quadratic_program(stated: Stated) -> QP:
    """The QP of the least squares: P = diag(w), q = -w * scores."""
    scores, weight = stated.scores, stated.weight
    if weight is None:
        P, q = scores.new_ones(()), negative(scores)
    else:  # weight 0: the sample counts for nothing, and is moved to nothing but the bounds
        P = torch.where(weight.detach() > 0, weight, 1.0)
        q = -(P * scores.double())
    return unchecked(QP, P=to_batch(P, *q.shape), q=q, **stated.fields(q.shape[1]))


def linear_program(objective: Objective, stated: Stated) -> tuple[LP, Read | None]:
    """The LP, and how predictions come from its solution; ``None`` where they are the solution."""
    if objective == "utility":
        return greatest_utility(stated), None
    scores, lower, upper = (t.double() for t in (stated.scores, stated.lb, stated.ub))
    center = clipped(scores, lower, upper)
    if objective == "l1":
        return least_total_change(stated, center), Reader(stated, center, signs=(1, -1))
    return least_largest_change(stated, center), Reader(stated, center, signs=(1,))


def greatest_utility(stated: Stated) -> LP:
    scores, weight = stated.scores, stated.weight
    cost = -scores if weight is None else -(weight * scores.double())
    return program(stated, cost)


def least_total_change(stated: Stated, center: Tensor) -> LP:
    weight, lower, upper = stated.weight, stated.lb.double(), stated.ub.double()
    # Weight 0: the sample counts for nothing, and is moved to nothing but the bounds.
    each = center.new_ones(()) if weight is None else torch.where(weight > 0, weight, 1.0)
    cost = each.expand_as(center)
    l, u = shifted(stated, center)
    return program(
        stated,
        torch.cat([cost, cost], -1),
        rows=stated.rows.mirrored(),
        l=l,
        u=u,
        lb=center.new_zeros(()),
        ub=torch.cat([upper - center, center - lower], -1),
    )


def shifted(stated: Stated, center: Tensor) -> tuple[Tensor, Tensor]:
    """l - A c and u - A c, zero where c meets the side but for rounding.

    The rounding of a difference has no meaning, and changes of that size no precision to hold it.
    """
    value = stated.rows.apply(center)
    plain = center.detach().abs()
    rounding = ROUNDING_OF_SUM * stated.rows.detach().absolute().apply(plain)

    def moved(side: Tensor) -> Tensor:
        side = side - value
        near = side.detach().abs() <= rounding
        return torch.where(near, side - side.detach(), side)  # zero, with its history

    return moved(stated.l), moved(stated.u)


def least_largest_change(stated: Stated, center: Tensor) -> LP:
    batch, n = center.shape
    weight, lower, upper = stated.weight, stated.lb.double(), stated.ub.double()
    low, high = (lower - center).expand_as(center), (upper - center).expand_as(center)
    forced = stated.scores.double() - center
    top, bottom = forced.new_full((), math.inf), forced.new_full((), -math.inf)
    counts = None if weight is None else (weight.detach() > 0).expand_as(center)
    if counts is not None:  # weight 0: only clipped to the bounds
        low, high = torch.where(counts, low, 0.0), torch.where(counts, high, 0.0)
        forced = torch.where(counts, forced, 0.0)
    least = forced.abs().amax(-1, keepdim=True)
    above, below = least + forced, forced - least
    if counts is not None:
        above, below = torch.where(counts, above, top), torch.where(counts, below, bottom)
    l, u = shifted(stated, center)
    # What no change can exceed, and more: a bound that holds nothing, but lets every proof of
    # infeasibility be a finite sum.
    most = 1 + 2 * (high.detach() - low.detach()).amax(-1, keepdim=True)
    return program(
        stated,
        torch.nn.functional.pad(torch.zeros_like(center), (0, 1), value=1.0),
        rows=with_largest(stated.rows, n),
        l=torch.cat([l, bottom.expand_as(above), below], -1),
        u=torch.cat([u, above, top.expand_as(below)], -1),
        lb=torch.cat([low, low.new_zeros(batch, 1)], -1),
        ub=torch.cat([high, most], -1),
        row_names=(*stated.row_names, *names_of_changes(n)),
    )


def with_largest(rows: Rows, n: int) -> SparseRows:
    """A over the changes d, then d_i - t, then d_i + t."""
    parity = rows.to_sparse()
    m = parity.m
    i = torch.arange(n, device=parity.row.device)
    last = torch.full_like(i, n)
    values = parity.values.double()
    one = values.new_ones(n)
    added = torch.cat([one, -one, one, one]).expand(len(values), -1)
    return unchecked(
        SparseRows,
        row=torch.cat([parity.row, m + i, m + i, m + n + i, m + n + i]),
        column=torch.cat([parity.column, i, last, i, last]),
        values=torch.cat([values, added], -1),
        m=m + 2 * n,
        n=n + 1,
    )


@lru_cache(maxsize=16)
def names_of_changes(n: int) -> tuple[str, ...]:
    return tuple([f"change of sample {i}: {way}" for way in ("up", "down") for i in range(n)])


def program(stated: Stated, c: Tensor, **others: Any) -> LP:
    """The LP with cost c, what is not given being as stated."""
    n = c.shape[-1]
    return unchecked(LP, c=to_batch(c, len(stated.scores), n), **stated.fields(n, **others))


class Reader:
    """x = center + sum_j signs[j] z_j, where the solution is z = (z_0, z_1, ..., and more).

    The sum is made in float64, clipped to the bounds, which its rounding may exceed, and rounded
    once. That is what is returned, so that is what the rows are recomputed from. Where the sum
    cancels (predictions far smaller than the scores) its rounding may break a row; then the nearest
    point at which all hold is taken.
    """

    def __init__(self, stated: Stated, center: Tensor, signs: tuple[int, ...]) -> None:
        self.stated, self.center, self.signs = stated, center, signs

    def __call__(self, z: Tensor) -> Tensor:
        stated, n = self.stated, self.center.shape[-1]
        x = self.center
        for j, sign in enumerate(self.signs):
            x = x + sign * z[:, j * n : (j + 1) * n]
        x = clipped(x, stated.lb.double(), stated.ub.double())
        dtype = stated.scores.dtype
        if not bool((self.excess(x.to(dtype)) <= ROW_PRECISION[dtype]).all()):
            x = self.nearest(x.detach()) + (x - x.detach())  # the history of the one, zero in value
            excess = self.excess(x.to(dtype))
            if not bool((excess <= ROW_PRECISION[dtype]).all()):
                raise ConvergenceError(
                    "the predictions miss the promised precision: a row exceeds its side by "
                    f"{float(excess.max()):.1e} of its scale, expected at most "
                    f"{ROW_PRECISION[dtype]}; the scores may be many orders of magnitude larger "
                    "than the predictions: rescale them, or give bounds"
                )
        return x.to(dtype)

    def excess(self, x: Tensor) -> Tensor:
        stated = self.stated
        rows, l, u = stated.rows.detach(), stated.l.detach(), stated.u.detach()
        return RowValues(rows, l, u, x.detach()).relative

    def nearest(self, x: Tensor) -> Tensor:
        """The projection of x onto rows and bounds, from which it differs by rounding."""
        stated = self.stated
        lower, upper = (t.detach().double().expand_as(x) for t in (stated.lb, stated.ub))
        l, u = (side.detach().expand(len(x), -1) for side in (stated.l, stated.u))
        problem = unchecked(
            QP, P=torch.ones_like(x), q=-x, rows=stated.rows.detach().expand(len(x)), l=l, u=u,
            lb=lower, ub=upper,
        )  # fmt: skip
        return refine(problem, x, x.new_zeros(len(x), problem.shape[1]))[0]
