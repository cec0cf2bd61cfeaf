"""Problem data: QP and LP in one canonical form.

    minimise   1/2 x^T P x + q^T x        (LP: c^T x)
    subject to l <= A x <= u              (rows)
               lb <= x <= ub              (bounds)

Everything is batched: B problems of one shape. Data shared over the batch are *expanded*, never
copied. Nothing in this module knows of fairness, of solvers or of autograd functions; it is data,
conversions and checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from fairopt.errors import ProblemError
from fairopt.programs.rows.base import Rows, as_rows
from fairopt.programs.tensors import (
    all_finite,
    check_float,
    chosen,
    compact,
    shape_of,
    unchecked,
    without_history,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from fairopt.programs.rows.sparse import SparseRows

Derived = TypeVar("Derived")

SIDES = ("l", "u", "lb", "ub")


class Program:
    """What ``QP`` and ``LP`` share."""

    objective: ClassVar[tuple[str, ...]]  # the fields of the objective, the linear part last
    rows: Rows
    l: Tensor
    u: Tensor
    lb: Tensor
    ub: Tensor
    row_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    memo: dict[Any, Any] | None = None

    @property
    def linear(self) -> Tensor:
        """q, or c of an LP: the linear part of the objective."""
        found: Tensor = getattr(self, self.objective[-1])
        return found

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, m, n)``."""
        return self.rows.shape

    @property
    def data(self) -> dict[str, Tensor | Rows]:
        """Objective, rows, sides and bounds, by their names."""
        return {name: getattr(self, name) for name in (*self.objective, "rows", *SIDES)}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The objective, the tensors of the rows, l, u, lb, ub: all that gradients can reach."""
        objective = [getattr(self, name) for name in self.objective]
        objective = [each if isinstance(each, Tensor) else each.values for each in objective]
        return *objective, *self.rows.tensors, self.l, self.u, self.lb, self.ub

    @property
    def structure(self) -> tuple[Tensor, ...]:
        """The integer tensors that say where the values stand."""
        matrices = [each for each in self.data.values() if isinstance(each, Rows)]
        return tuple([tensor for matrix in matrices for tensor in matrix.structure])

    def replace(self, **fields: object) -> Self:
        """The same problem with other fields, which are not checked; nothing is remembered."""
        kept = {name: value for name, value in vars(self).items() if name != "memo"}
        return unchecked(type(self), **{**kept, **fields})

    def with_tensors(self, *tensors: Tensor) -> Self:
        """The same structure with other values, in the order of ``tensors``."""
        left, fields = iter(tensors), self.data
        for name, each in self.data.items():
            if isinstance(each, Tensor):
                fields[name] = next(left)
            else:
                fields[name] = each.with_tensors(*islice(left, len(each.tensors)))
        return self.replace(**fields)

    def detach(self) -> Self:
        """The same problem without its history."""
        linear = self.linear
        if self.memo is None and any(t.requires_grad for t in self.tensors if t is not linear):
            return self.with_tensors(*map(without_history, self.tensors))
        fields = {**self.__dict__, self.objective[-1]: without_history(linear)}
        return unchecked(type(self), **fields)

    def select(self, index: Tensor) -> Self:
        """Only those problems of the batch, whose numbers are in ``index``, int64."""
        return self.each(lambda t: chosen(t, index), lambda rows: rows.select(index))

    def expand(self, batch: int) -> Self:
        """The same problem ``batch`` times, without a copy, if it is one."""
        return self.each(lambda t: t.expand(batch, *t.shape[1:]), lambda rows: rows.expand(batch))

    def each(self, tensor: Callable[[Tensor], Tensor], matrix: Callable[[Rows], Rows]) -> Self:
        """The same problem with a function of each tensor and each matrix in its place."""
        every = self.data.items()
        return self.replace(
            **{n: tensor(e) if isinstance(e, Tensor) else matrix(e) for n, e in every}
        )

    def remembered(self, derive: Callable[[Self], Derived]) -> Derived:
        """``derive(self)``, done once for all problems that share a ``memo``."""
        if self.memo is None:
            return derive(self)
        if derive not in self.memo:
            self.memo[derive] = derive(self)
        found: Derived = self.memo[derive]
        return found

    def row_name(self, row: int) -> str:
        """The name of a row, or its number where none was given."""
        return self.row_names[row] if self.row_names else f"row {row}"


@dataclass(frozen=True, eq=False)
class QP(Program):
    """A batch of quadratic programs; see the top of this module for the form.

    Attributes:
        P: ``(B, n)``, the diagonal; ``(B, n, n)``, dense symmetric; or ``SparseRows``. Positive
            semidefinite. ``(n,)`` and, beside a ``q`` of shape ``(n,)``, ``(n, n)`` are taken as
            shared; so is a sparse torch matrix.
        q: ``(B, n)`` or ``(n,)``.
        rows: ``Rows`` of shape ``(B, m, n)``; a plain tensor is taken as dense.
        l, u: ``(B, m)`` or ``(m,)``, lower and upper sides; infinite for none.
        lb, ub: ``(B, n)``, ``(n,)`` or scalar, bounds; ``None`` or infinite for none.
        row_names: m readable names, used by errors and reports.
        skipped: names of rows that were left out when the problem was written, with the reason.

    Raises:
        ProblemError: shapes, dtypes or devices disagree, a value is NaN, P or q is infinite, or
            sides or bounds cross.
    """

    objective: ClassVar[tuple[str, ...]] = ("P", "q")

    P: Tensor | SparseRows
    q: Tensor
    rows: Rows
    l: Tensor
    u: Tensor
    lb: Tensor
    ub: Tensor
    row_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    # What was derived from the data other than q and the cells. Whoever writes many problems that
    # share those, and no history with them, gives all of them one dictionary.
    memo: dict[Any, Any] | None = field(default=None, repr=False)

    def __init__(  # noqa: PLR0913
        self,
        P: Tensor | SparseRows,
        q: Tensor,
        rows: Rows | Tensor,
        l: Tensor,
        u: Tensor,
        lb: Tensor | float | None = None,
        ub: Tensor | float | None = None,
        *,
        row_names: Sequence[str] = (),
        skipped: Sequence[str] = (),
    ) -> None:
        check_float("q", q)
        from fairopt.programs.rows.sparse import SparseRows  # loaded already

        if isinstance(P, Tensor) and P.layout != torch.strided:
            P = SparseRows.from_tensor(P)
        if not isinstance(P, SparseRows):
            check_float("P", P)
            if P.dim() == 2 and q.dim() == 1:
                P = P.unsqueeze(0)
        common = canonical(q, rows, l, u, lb, ub, row_names, "q")
        linear = common["q"]
        assert isinstance(linear, Tensor)
        batch, n = linear.shape
        quadratic = batched_quadratic(
            P, max(batch, len(P)) if isinstance(P, Tensor) and P.dim() == 3 else batch, n
        )
        if isinstance(quadratic, Tensor) and len(quadratic) != batch:
            raise ProblemError(
                f"P: expected a batch of {batch} like the other data, got {len(quadratic)}"
            )
        self.__dict__.update(common, P=quadratic, skipped=tuple(skipped), memo=None)

    @property
    def quadratic_form(self) -> str:
        """How P is held: "diagonal", "dense" or "sparse"."""
        if isinstance(self.P, Tensor):
            return "diagonal" if self.P.dim() == 2 else "dense"
        return "sparse"

    @property
    def is_diagonal(self) -> bool:
        """Whether P is held as its diagonal."""
        return isinstance(self.P, Tensor) and self.P.dim() == 2

    @property
    def is_definite_diagonal(self) -> bool:
        """Whether P is held as its diagonal, and all of it is positive."""
        return self.is_diagonal and self.remembered(has_positive_values)

    def quadratic_tensor(self) -> Tensor:
        """P in full, ``(B, n, n)``."""
        if isinstance(self.P, Tensor):
            return torch.diag_embed(self.P) if self.is_diagonal else self.P
        return self.P.to_tensor()

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """a_i b_j for each entry (i, j) of P that is held, in the shape of its tensor."""
        if isinstance(self.P, Tensor):
            return a * b if self.is_diagonal else a.unsqueeze(-1) * b.unsqueeze(-2)
        return a[:, self.P.row] * b[:, self.P.column]

    def diagonal(self) -> Tensor:
        """The diagonal of P, ``(B, n)``, float64; 1 where it is zero. A metric, not a matrix."""
        P = self.P
        if not isinstance(P, Tensor):
            d = P.replace(values=torch.where(P.row == P.column, P.values, 0.0)).apply(
                P.values.new_ones(()).expand(len(P.values), P.n)
            )
        else:
            d = (P if P.dim() == 2 else P.diagonal(dim1=-2, dim2=-1)).double()
        return torch.where(d > 0, d, 1.0)

    def apply_quadratic(self, x: Tensor) -> Tensor:
        """P x in float64: ``(B, n)`` to ``(B, n)``."""
        if not isinstance(self.P, Tensor):
            return self.P.apply(x)
        if self.P.dim() == 2:
            return self.P.double() * x.double()
        return (self.P.double() @ x.double().unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class LP(Program):
    """A batch of linear programs: minimise c^T x under the rows and bounds of ``QP``."""

    objective: ClassVar[tuple[str, ...]] = ("c",)

    c: Tensor
    rows: Rows
    l: Tensor
    u: Tensor
    lb: Tensor
    ub: Tensor
    row_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __init__(
        self,
        c: Tensor,
        rows: Rows | Tensor,
        l: Tensor,
        u: Tensor,
        lb: Tensor | float | None = None,
        ub: Tensor | float | None = None,
        *,
        row_names: Sequence[str] = (),
        skipped: Sequence[str] = (),
    ) -> None:
        check_float("c", c)
        common = canonical(c, rows, l, u, lb, ub, row_names, "c")
        self.__dict__.update(common, skipped=tuple(skipped))

    def apply_quadratic(self, x: Tensor) -> Tensor:
        """Zero, as ``QP.apply_quadratic`` is without P."""
        return torch.zeros_like(x, dtype=torch.float64)

    def smoothed(self, smoothing: float) -> QP:
        """The QP with the same constraints and smoothing/2 |x|^2 added to the objective."""
        if not smoothing > 0 or not math.isfinite(smoothing):
            raise ProblemError(f"smoothing: expected a positive number, got {smoothing}")
        return unchecked(
            QP, P=torch.full_like(self.c[:1, :1], smoothing).expand_as(self.c), q=self.c,
            rows=self.rows, l=self.l, u=self.u, lb=self.lb, ub=self.ub,
            row_names=self.row_names, skipped=self.skipped,
        )  # fmt: skip


Problem: TypeAlias = QP | LP


def has_positive_values(problem: QP) -> bool:
    """Whether all numbers that P is held by are positive."""
    return bool((compact(problem.tensors[0]) > 0).all())


# ---------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------


def symmetric(P: SparseRows) -> bool:
    """Whether a sparse matrix equals its transpose, to the precision asked of a dense one."""
    index = torch.cat([torch.stack([P.row, P.column]), torch.stack([P.column, P.row])], 1)
    whole = compact(P.values.detach()).double()
    _, place = torch.unique(index, dim=1, return_inverse=True)
    difference = torch.zeros(len(whole), index.shape[1], dtype=torch.float64, device=whole.device)
    difference.index_add_(1, place, torch.cat([whole, -whole], 1))
    return not whole.numel() or bool(difference.abs().max() <= 1e-10 * whole.abs().max())


def batched_quadratic(P: Tensor | SparseRows, batch: int, n: int) -> Tensor | SparseRows:
    if not isinstance(P, Tensor):
        if P.shape[1:] != (n, n) or P.shape[0] not in (1, batch):
            raise ProblemError(f"P: expected shape ({batch}, {n}, {n}), got {P.shape}")
        if not all_finite(P.values):
            raise ProblemError("P: expected finite values, got NaN or infinity")
        if not symmetric(P):
            raise ProblemError("P: expected a symmetric matrix; pass (P + P.mT) / 2")
        return P.expand(batch)
    if P.dim() <= 2 and P.shape[-1:] == (n,) and (P.dim() == 1 or len(P) in (1, batch)):
        diagonal = compact(P.detach())
        if not all_finite(diagonal) or bool((diagonal < 0).any()):
            raise ProblemError(
                "P: expected a finite diagonal without negative entries (a convex problem)"
            )
        return P.expand(batch, n)
    if P.dim() == 3 and P.shape[1:] == (n, n) and len(P) in (1, batch):
        whole = compact(P.detach())
        if not all_finite(whole):
            raise ProblemError("P: expected finite values, got NaN or infinity")
        if not torch.allclose(whole, whole.mT, rtol=1e-10, atol=1e-12 * float(whole.abs().max())):
            raise ProblemError("P: expected a symmetric matrix; pass (P + P.mT) / 2")
        return P.expand(batch, n, n)
    raise ProblemError(
        f"P: expected ({batch}, {n}) for a diagonal or ({batch}, {n}, {n}) for a matrix, where a "
        f"leading 1 means shared by the batch; got {shape_of(P)}"
    )


def canonical(
    q: Tensor,
    rows: Rows | Tensor,
    l: Tensor,
    u: Tensor,
    lb: Tensor | float | None,
    ub: Tensor | float | None,
    row_names: Sequence[str],
    linear: str,
) -> dict[str, object]:
    """The fields that QP and LP share, checked and expanded to one batch.

    Args:
        linear: what messages call q, and its name among the fields.
    """
    if isinstance(rows, Tensor):
        rows = as_rows(rows)
    elif not isinstance(rows, Rows):
        raise ProblemError(f"rows: expected Rows or a tensor, got {type(rows).__name__}")
    check_float("l", l)
    check_float("u", u)
    if q.dim() not in (1, 2) or q.shape[-1] == 0:
        raise ProblemError(
            f"{linear}: expected shape (n,) or (B, n) with n >= 1, got {shape_of(q)}"
        )
    row_batch, m, n = rows.shape
    if q.shape[-1] != n:
        raise ProblemError(f"rows: expected {q.shape[-1]} columns, one per variable, got {n}")
    lower = bound("lb", lb, -math.inf, q)
    upper = bound("ub", ub, math.inf, q)
    named = {linear: q, "l": l, "u": u, "lb": lower, "ub": upper}
    batch = max([row_batch] + [len(t) for t in named.values() if t.dim() == 2])
    fields: dict[str, object] = {}
    for name, tensor in named.items():
        size = m if name in ("l", "u") else n
        if (
            tensor.dim() > 2
            or tensor.shape[-1:] not in ((size,), ())
            or (tensor.dim() == 2 and len(tensor) not in (1, batch))
        ):
            raise ProblemError(
                f"{name}: expected shape ({batch}, {size}) or ({size},), got {shape_of(tensor)}"
            )
        if tensor.device != q.device:
            raise ProblemError(
                f"{name}: expected device {q.device}, where {linear} is, got {tensor.device}; move "
                "it with .to(...)"
            )
        fields[name] = tensor.expand(batch, size)
    if row_batch not in (1, batch):
        raise ProblemError(f"rows: expected a batch of 1 or {batch}, got {row_batch}")
    if rows.tensors[0].device != q.device:
        raise ProblemError(f"rows: expected device {q.device}, got {rows.tensors[0].device}")
    if not all_finite(q):
        raise ProblemError(f"{linear}: expected finite values, got NaN or infinity")
    for tensor in rows.tensors:
        if not all_finite(tensor):
            raise ProblemError("rows: expected finite values, got NaN or infinity")
    check_ordered("l", l, "u", u)
    check_ordered("lb", lower, "ub", upper)
    if row_names and len(row_names) != m:
        raise ProblemError(f"row_names: expected {m} names, one per row, got {len(row_names)}")
    fields["rows"] = rows.expand(batch)
    fields["row_names"] = tuple(row_names)
    return fields


def bound(name: str, value: Tensor | float | None, default: float, like: Tensor) -> Tensor:
    if value is None:
        return like.new_full((), default)
    if isinstance(value, Tensor):
        check_float(name, value)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ProblemError(f"{name}: expected a number, a tensor or None, got {value!r}")
    return like.new_full((), value)


def check_ordered(low_name: str, low: Tensor, high_name: str, high: Tensor) -> None:
    """Raise unless low <= high everywhere, low < inf and high > -inf; NaN fails all three."""
    low, high = compact(low.detach()), compact(high.detach())
    good = (low <= high) & (low < math.inf) & (high > -math.inf)
    if not bool(good.all()):
        where = tuple(int(i) for i in (~good).nonzero()[0])
        raise ProblemError(
            f"{low_name}, {high_name}: expected {low_name} <= {high_name} without NaN, and no side "
            f"infinite on the wrong end; it fails first at index {where}"
        )
