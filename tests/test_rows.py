"""Every form of rows against its dense matrix, from one table; and a form that is not ours.

A new form needs one line in ``FORMS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fairopt import QP, Rows, cross_validate, load_problem, residuals, save_problem, solve
from fairopt.agreement.parameters import names as names_of_parameters
from fairopt.agreement.parameters import place
from fairopt.backends.numba.backend import Numba
from fairopt.backends.osqp.backend import OSQP
from fairopt.programs.rows import FORMS as KNOWN
from fairopt.programs.rows import (
    BlockRows,
    CellRows,
    DenseRows,
    PartitionedRows,
    Partitions,
    SparseRows,
)

N = 6  # variables


class Draw:
    """Random numbers of a seed, float64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def below(self, size: int, *shape: int) -> Tensor:
        return torch.randint(0, size, shape, generator=self.generator)


@dataclass(frozen=True, eq=False)
class LowRankRows(Rows):
    """A = U V^T: the form that is not ours, with nothing but what it must have."""

    name: ClassVar[str] = "low rank"
    stored: ClassVar[dict[str, int]] = {"U": 3, "V": 3}

    U: Tensor  # (B, m, k)
    V: Tensor  # (B, n, k)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.U), self.U.shape[1], self.V.shape[1]

    def to_tensor(self) -> Tensor:
        return self.U @ self.V.mT


def partitions(draw: Draw) -> Partitions:
    """Two partitions of eight cells, into two and three parts; rows look at either."""
    member = torch.stack([draw.below(2, 8), 2 + draw.below(3, 8)], 1).int()
    return Partitions((2, 3), member, torch.tensor([0, 1, 1]))


FORMS: dict[str, Callable[[Draw, int], Rows]] = {
    "dense": lambda draw, batch: DenseRows(draw.normal(batch, 3, N)),
    "sparse": lambda draw, batch: SparseRows(
        draw.below(3, 7), draw.below(N, 7), draw.normal(batch, 7), 3, N
    ),
    "cells": lambda draw, batch: CellRows(
        draw.normal(batch, 3, 4), draw.below(4, batch, N), draw.normal(batch, N)
    ),
    "blocks": lambda draw, batch: BlockRows(
        draw.normal(batch, 2, 2, 3), draw.below(2, batch, 2), draw.normal(batch, 2)
    ),
    "parts": lambda draw, batch: PartitionedRows(
        draw.normal(batch, 3, 3), partitions(draw), draw.below(8, batch, N), draw.normal(batch, N)
    ),
    "low rank": lambda draw, batch: LowRankRows(draw.normal(batch, 3, 2), draw.normal(batch, N, 2)),
}
BATCHES = {"one": (1, 1), "three": (3, 3), "expanded": (1, 3)}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=BATCHES)
def rows(request: pytest.FixtureRequest, form: str) -> Rows:
    drawn, batch = BATCHES[request.param]
    return FORMS[form](Draw(0), drawn).expand(batch)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def points(rows: Rows, seed: int = 1) -> tuple[Tensor, ...]:
    """x, d >= 0 ``(B, n)`` and y ``(B, m)``."""
    draw, (batch, m, n) = Draw(seed), rows.shape
    d = draw.normal(batch, n).abs() * (draw.below(4, batch, n) > 0)
    return draw.normal(batch, n), d, draw.normal(batch, m)


def test_every_form_is_in_the_table() -> None:
    made = {make(Draw(0), 1).name for make in FORMS.values()}
    assert set(KNOWN) == made


def test_products(rows: Rows) -> None:
    A = rows.to_tensor()
    x, d, y = points(rows)
    assert rows.shape == A.shape
    close(rows.apply(x), torch.einsum("bmn,bn->bm", A, x))
    close(rows.transpose_apply(y), torch.einsum("bmn,bm->bn", A, y))
    gram = (A * d.unsqueeze(-2)) @ A.mT
    close(rows.gram(d), gram)
    close(rows.norms(d), gram.diagonal(dim1=-2, dim2=-1).sqrt())
    N, c = rows.factor(d, x)
    close(N @ N.mT, gram)
    close((N @ c.unsqueeze(-1)).squeeze(-1), torch.einsum("bmn,bn->bm", A, d * x))


def test_conversions(rows: Rows) -> None:
    A = rows.to_tensor()
    assert rows.to_sparse().name == "sparse"
    for other in (rows.to_dense(), rows.to_sparse(), rows.plain(), rows.detach()):
        close(other.to_tensor(), A)
    close(rows.to(torch.device("cpu")).to_tensor(), A)
    close(rows.absolute().to_tensor(), A.abs())
    close(rows.mirrored().to_tensor(), torch.cat([A, -A], -1))
    assert KNOWN[rows.plain().name] is type(rows.plain())


def test_parts_of_the_batch(rows: Rows) -> None:
    A, batch = rows.to_tensor(), rows.shape[0]
    index = torch.tensor([batch - 1, 0])
    part = rows.select(index)
    assert type(part) is type(rows)
    close(part.to_tensor(), A[index])
    shared = {name for name, t in rows.of_batch().items() if t.stride(0) == 0}
    assert {name for name, t in part.of_batch().items() if t.stride(0) == 0} >= shared


def test_expanding_copies_nothing(form: str) -> None:
    one = FORMS[form](Draw(0), 1)
    many = one.expand(5)
    assert many.shape == (5, *one.shape[1:])
    for ours, theirs in zip(many.tensors, one.tensors, strict=True):
        assert ours.data_ptr() == theirs.data_ptr()


def test_gradients_of_all_tensors(rows: Rows) -> None:
    """Of ``apply`` and ``transpose_apply`` by autograd, of the matrix by ``pull_back``."""
    x, _, y = points(rows)
    v, _, nu = points(rows, 2)

    def gradients(loss: Callable[[Rows], Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in rows.tensors]
        return torch.autograd.grad(loss(rows.with_tensors(*leaves)), leaves)

    def product(form: Rows) -> Tensor:
        return (nu * form.apply(x)).sum() + (v * form.transpose_apply(y)).sum()

    def reference(form: Rows) -> Tensor:
        whole = y.unsqueeze(-1) * v.unsqueeze(-2) + nu.unsqueeze(-1) * x.unsqueeze(-2)
        return (form.to_tensor() * whole).sum()

    expected = gradients(reference)
    for found in (gradients(product), rows.pull_back(y, v, nu, x)):
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)


def test_declared_tensors_are_all_of_them(rows: Rows) -> None:
    assert [*rows.parameters.values()] == [*rows.tensors]
    assert all(t.is_floating_point() for t in rows.tensors)
    assert not any(t.is_floating_point() for t in rows.structure)
    twice = rows.with_tensors(*(2 * t for t in rows.tensors))
    assert type(twice) is type(rows)
    assert twice.shape == rows.shape
    for name, tensor in rows.parameters.items():
        row, words = rows.place(name, (0,) * (tensor.dim() - 1))
        assert row is None or 0 <= row < rows.shape[1]
        assert words


def test_what_rows_reach_is_kept_by_their_means(rows: Rows) -> None:
    """The extremes of each row over the bounds are those over the means."""
    A = rows.to_tensor()
    x, d, _ = points(rows)
    lb, ub = x - d, x + d
    small, low, high = rows.means(lb, ub)
    assert small[0].numel() <= rows.mean_entries
    for sign in (1, -1):
        close(sums(sign * small, low, high), sums(sign * A, lb, ub))


def sums(A: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The largest value of each row."""
    return torch.maximum(A * low.unsqueeze(-2), A * high.unsqueeze(-2)).sum(-1)


def test_sign_conditions_are_those_of_the_variables(rows: Rows) -> None:
    """G y <= h if and only if side_i (A^T y)_i <= room_i wherever a side is asked for."""
    batch, m, n = rows.shape
    draw, b = Draw(3), batch - 1
    side = draw.below(3, n).double() - 1
    room = draw.normal(n).abs()
    parts = [*rows.sign_conditions(b, side, room)]
    seen = set()
    for _ in range(200):
        y = draw.normal(batch, m)
        by_variables = bool((side * rows.transpose_apply(y)[b] <= room)[side != 0].all())
        assert all(bool((G @ y[b] <= h).all()) for G, h in parts) == by_variables
        seen.add(by_variables)
    assert seen == {True, False}


# ---------------------------------------------------------------- a form that is not ours


class Projection(Numba):
    """Ours, which takes the other form as it takes all that are no cells."""

    capabilities = replace(Numba.capabilities, rows=Numba.capabilities.rows | {LowRankRows.name})


class Splitting(OSQP):
    capabilities = replace(OSQP.capabilities, rows=OSQP.capabilities.rows | {LowRankRows.name})


def problem_of(rows: Rows) -> QP:
    draw, (batch, m, n) = Draw(4), rows.shape
    return QP(
        1 + draw.normal(batch, n).abs(), 3 * draw.normal(batch, n), rows,
        torch.full((m,), -0.2).double(), torch.full((m,), 0.1).double(), -1.0, 1.0,
    )  # fmt: skip


@pytest.fixture
def foreign() -> QP:
    return problem_of(FORMS["low rank"](Draw(0), 3))


def test_another_form_is_solved_and_differentiated(foreign: QP) -> None:
    dense = foreign.replace(rows=foreign.rows.to_dense())
    expected = solve(dense, backend="numba")
    found = solve(foreign, backend=Projection())
    close(found.x, expected.x)
    assert found.residuals.worst <= 1e-12
    assert residuals(foreign, found.x, found.row_dual, found.bound_dual).worst <= 1e-12
    leaves = [t.detach().clone().requires_grad_() for t in foreign.tensors]
    x = solve(foreign.with_tensors(*leaves), backend=Projection()).x
    ours = torch.autograd.grad((x * foreign.q).sum(), leaves)
    matrix = foreign.rows.with_tensors(*leaves[2:4]).to_dense()
    x = solve(dense.replace(rows=matrix), backend="numba").x
    theirs = torch.autograd.grad((x * foreign.q).sum(), leaves[2:4])
    for one, other in zip(ours[2:4], theirs, strict=True):
        close(one, other)


def test_another_form_is_refused_by_name_where_it_is_not_taken(foreign: QP) -> None:
    with pytest.raises(Exception, match="rows in low rank form"):
        solve(foreign, backend="osqp")


def test_another_form_is_saved_and_loaded(foreign: QP, tmp_path: Path) -> None:
    save_problem(foreign, tmp_path / "problem")
    loaded = load_problem(tmp_path / "problem")
    assert isinstance(loaded.rows, LowRankRows)
    for one, other in zip(loaded.tensors, foreign.tensors, strict=True):
        assert torch.equal(one, other)


def test_another_form_is_selected(foreign: QP) -> None:
    whole = solve(foreign, backend=Projection()).x
    part = foreign.select(torch.tensor([2, 0]))
    assert isinstance(part.rows, LowRankRows)
    assert torch.equal(solve(part, backend=Projection()).x, whole[[2, 0]])


def test_another_form_is_compared_between_backends(foreign: QP) -> None:
    found = cross_validate(foreign, [Projection(), Splitting()], finite_differences=True, repeats=0)
    assert found.agree, str(found)
    names = names_of_parameters(foreign)
    assert names[2:4] == ("rows.U", "rows.V")
    assert place(foreign, "rows.U", (1, 0)) == "rows.U[1, 0]"
