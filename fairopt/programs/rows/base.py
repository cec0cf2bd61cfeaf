"""What every form of rows declares, and its operations, each with a default by the dense matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fairopt.programs.tensors import chosen, unchecked, without_history

if TYPE_CHECKING:
    from typing_extensions import Self

    from fairopt.programs.rows.dense import DenseRows
    from fairopt.programs.rows.sparse import SparseRows

FORMS: dict[str, type[Rows]] = {}


def as_rows(matrix: Tensor) -> Rows:
    """Sparse rows of a sparse torch matrix ``(m, n)``, dense ones of another, ``(B, m, n)``."""
    from fairopt.programs.rows.dense import DenseRows  # which know this module
    from fairopt.programs.rows.sparse import SparseRows

    sparse = matrix.layout != torch.strided
    return SparseRows.from_tensor(matrix) if sparse else DenseRows(matrix)


class Rows(ABC):
    """The matrix A of a problem, shape ``(B, m, n)``, in whatever form is cheapest.

    All products are computed and returned in float64. A form must declare ``name`` and ``stored``,
    and define ``shape`` and ``to_tensor``. All other operations have defaults that are right for
    every form, and cost what they cost for a dense matrix; a form overrides those that its
    structure makes cheaper.

    Attributes:
        name: of the form, by which backends declare that they take it and files say what they hold.
        stored: the floating-point tensors that a form consists of, which gradients are taken with
            respect to: attributes and arguments of its constructor, each with its number of
            dimensions. The first is the batch; tensors of one dimension are shared by it.
        pattern: the same for the integer tensors, which say where the values stand.
        given: further attributes, which are no tensors; files keep m and n, none else.
        is_sparse: whether linear systems had better be solved by a sparse factorisation.
    """

    name: ClassVar[str]
    stored: ClassVar[dict[str, int]]
    pattern: ClassVar[dict[str, int]] = {}
    given: ClassVar[tuple[str, ...]] = ()
    is_sparse: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            FORMS[cls.name] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """``(B, m, n)``."""

    @abstractmethod
    def to_tensor(self) -> Tensor:
        """The matrix as a tensor ``(B, m, n)``."""

    # What a form consists of

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The floating-point tensors that define A: what gradients are taken with respect to."""
        return tuple([self.__dict__[name] for name in self.stored])

    @property
    def structure(self) -> tuple[Tensor, ...]:
        """The integer tensors that say where the values stand."""
        return tuple([self.__dict__[name] for name in self.pattern])

    @property
    def parameters(self) -> dict[str, Tensor]:
        """``tensors`` by the names that reports call them."""
        return {f"rows.{name}": self.__dict__[name] for name in self.stored}

    def replace(self, **tensors: Tensor) -> Self:
        """The same rows with other tensors in the place of some, which are not checked."""
        names = (*self.stored, *self.pattern, *self.given)
        return unchecked(type(self), **{**{n: self.__dict__[n] for n in names}, **tensors})

    def with_tensors(self, *tensors: Tensor) -> Self:
        """The same structure with other values, in the order of ``tensors``."""
        return self.replace(**dict(zip(self.stored, tensors, strict=True)))

    def of_batch(self) -> dict[str, Tensor]:
        """The stored tensors that are not shared by the batch."""
        every = {**self.stored, **self.pattern}
        return {name: self.__dict__[name] for name, dims in every.items() if dims > 1}

    def expand(self, batch: int) -> Self:
        """The same rows for each of ``batch`` problems, without a copy."""
        return self.replace(
            **{name: t.expand(batch, *t.shape[1:]) for name, t in self.of_batch().items()}
        )

    def select(self, index: Tensor) -> Self:
        """The rows of those problems of the batch only, whose numbers are in ``index``, int64."""
        return self.replace(**{name: chosen(t, index) for name, t in self.of_batch().items()})

    def detach(self) -> Self:
        """The same rows without their history."""
        return self.with_tensors(*map(without_history, self.tensors))

    def to(self, device: torch.device) -> Self:
        """The same rows on another device."""
        every = (*self.stored, *self.pattern)
        return self.replace(**{name: self.__dict__[name].to(device) for name in every})

    def place(self, parameter: str, index: tuple[int, ...]) -> tuple[int | None, list[str]]:
        """Where an element of one of ``parameters`` stands: its row, if it has one, and the rest.

        Args:
            index: without the batch.
        """
        return None, [str(i) for i in index]

    # Conversions

    def plain(self) -> Rows:
        """The same rows in the form whose name they have, without what they know beyond it."""
        return self

    def to_dense(self) -> DenseRows:
        """The same matrix, dense."""
        from fairopt.programs.rows.dense import DenseRows  # which knows this module

        return DenseRows(self.to_tensor())

    def to_sparse(self) -> SparseRows:
        """The same matrix, sparse; the pattern is shared by the batch."""
        from fairopt.programs.rows.sparse import SparseRows

        dense = self.to_tensor()
        row, column = (dense.detach() != 0).any(0).nonzero(as_tuple=True)
        return SparseRows(row, column, dense[:, row, column], dense.shape[1], dense.shape[2])

    @property
    def cell_data(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Weight, cell and coefficients, where A is held as these, for compiled code."""
        return None

    # Operations

    def apply(self, x: Tensor) -> Tensor:
        """A x: ``(B, n)`` to ``(B, m)``."""
        return (self.to_tensor().double() @ x.double().unsqueeze(-1)).squeeze(-1)

    def transpose_apply(self, y: Tensor) -> Tensor:
        """A^T y: ``(B, m)`` to ``(B, n)``."""
        return (self.to_tensor().double().mT @ y.double().unsqueeze(-1)).squeeze(-1)

    def factor(self, d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, c)`` with N N^T = A D A^T and N c = A D g, for D = diag(d), d >= 0.

        N is ``(B, m, k)`` with the smallest k the structure offers, c is ``(B, k)``.
        """
        root = d.double().sqrt()
        return self.to_tensor().double() * root.unsqueeze(-2), root * g.double()

    def gram(self, d: Tensor) -> Tensor:
        """A diag(d) A^T: ``(B, n)`` to ``(B, m, m)``."""
        factor, _ = self.factor(d, d)
        return factor @ factor.mT

    def norms(self, d: Tensor) -> Tensor:
        """sqrt of the diagonal of A diag(d) A^T: ``(B, n)`` to ``(B, m)``."""
        factor, _ = self.factor(d, d)
        norms: Tensor = torch.linalg.vector_norm(factor, dim=-1)
        return norms

    def pull_back(self, y: Tensor, v: Tensor, nu: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Gradients of ``tensors`` when that of A is y v^T + nu x^T; never forms it if it can."""
        whole = y.unsqueeze(-1) * v.unsqueeze(-2) + nu.unsqueeze(-1) * x.unsqueeze(-2)
        with torch.enable_grad():
            leaves = [tensor.detach().double().requires_grad_() for tensor in self.tensors]
            matrix = self.with_tensors(*leaves).to_tensor()
        return torch.autograd.grad(matrix, leaves, whole)

    def absolute(self) -> Rows:
        """|A|, element by element."""
        return self.to_dense().absolute()

    def mirrored(self) -> Rows:
        """[A, -A]."""
        matrix = self.to_tensor()
        return self.to_dense().replace(matrix=torch.cat([matrix, -matrix], -1))

    def means(self, lb: Tensor, ub: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A' and ends with  { A x : lb <= x <= ub } = { A' v : low <= v <= high }, all float64.

        With a structure there are fewer v than x: the means of what all rows weigh alike.
        """
        return self.to_tensor().double(), lb, ub

    @property
    def mean_entries(self) -> int:
        """How many numbers the A' of ``means`` is."""
        return self.shape[1] * self.shape[2]

    def sign_conditions(
        self, b: int, side: Tensor, room: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """G ``(k, m)`` and h ``(k,)`` with  G y <= h  just where  side_i (A^T y)_i <= room_i.

        Args:
            b: the problem.
            side: ``(n,)``: 1 or -1, or 0 where nothing is asked.
            room: ``(n,)``, zero or positive but for rounding.
        """
        asked = (side != 0).nonzero().squeeze(-1)
        yield (self.to_tensor()[b][:, asked].double() * side[asked]).mT, room[asked].clamp(min=0.0)
