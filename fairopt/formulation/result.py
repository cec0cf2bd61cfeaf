"""A problem written from scores and constraints, and how its parts are put together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.formulation.inputs import describe
from fairopt.formulation.objectives import Read
from fairopt.formulation.template import Trace
from fairopt.programs.problem import LP, QP
from fairopt.programs.rows.base import Rows
from fairopt.programs.tensors import compact, to_batch, unchecked


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


def put_together(
    P: Tensor,
    q: Tensor,
    rows: Rows,
    l: Tensor,
    u: Tensor,
    lower: Tensor,
    upper: Tensor,
    names: tuple[str, ...],
    skipped: tuple[str, ...],
) -> QP:
    """The QP of data that were checked: each expanded to ``q``'s batch."""
    batch, n = q.shape
    m = rows.shape[1]
    return unchecked(
        QP,
        P=to_batch(P, batch, n),
        q=q,
        rows=rows,
        l=to_batch(l, batch, m),
        u=to_batch(u, batch, m),
        lb=to_batch(lower, batch, n),
        ub=to_batch(upper, batch, n),
        row_names=names,
        skipped=skipped,
    )


def only_one(rows: Trace) -> tuple[str, ...]:
    """What is not compared because there is one group only, as problems report it."""
    return tuple([f"{name}: only one group" for name in rows.alone])


def check_nonnegative(names: tuple[str, ...], lower: Tensor) -> None:
    """Raise unless predictions cannot be negative, where a notion needs that."""
    if names and not bool((compact(lower.detach()) >= 0).all()):
        raise ProblemError(
            f"bounds: {', '.join(names)} needs a lower bound of at least 0, got "
            f"{describe(compact(lower.detach()))}; a ratio of means says nothing where they can be "
            "negative"
        )
