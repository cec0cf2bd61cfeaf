"""Rows in three forms behind one set of operations; residuals as the independent judge."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairopt import LP, QP, CellRows, DenseRows, Rows, SparseRows, residuals, solve
from fairopt.programs.problem import all_finite, compact, is_uniform


def cell_rows(seed: int, batch: int, m: int, n: int, cells: int) -> CellRows:
    generator = torch.Generator().manual_seed(seed)
    return CellRows(
        torch.randn(batch, m, cells, generator=generator, dtype=torch.float64),
        torch.randint(0, cells, (batch, n), generator=generator),
        torch.randn(batch, n, generator=generator, dtype=torch.float64),
    )


@given(
    st.integers(0, 1000),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(1, 12),
    st.integers(1, 4),
)
def test_every_form_computes_the_same(seed: int, batch: int, m: int, n: int, cells: int) -> None:
    rows = cell_rows(seed, batch, m, n, cells)
    dense, sparse = rows.to_dense(), rows.to_sparse()
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    y = torch.randn(batch, m, generator=generator, dtype=torch.float64)
    d = torch.rand(batch, n, generator=generator, dtype=torch.float64)
    A = dense.matrix
    for form in (rows, dense, sparse):
        assert form.shape == (batch, m, n)
        close(form.apply(x), (A @ x.unsqueeze(-1)).squeeze(-1))
        close(form.transpose_apply(y), (A.mT @ y.unsqueeze(-1)).squeeze(-1))
        close(form.gram(d), A * d.unsqueeze(-2) @ A.mT)
        close(form.norms(d), (A * d.unsqueeze(-2) @ A.mT).diagonal(dim1=-2, dim2=-1).sqrt())
        close(form.to_dense().matrix, A)
        close(form.to_sparse().to_dense().matrix, A)
        close(form.absolute().to_dense().matrix, A.abs())
        N, c = form.factor(d, x)
        close(
            (N @ c.unsqueeze(-1)).squeeze(-1), ((A * d.unsqueeze(-2)) @ x.unsqueeze(-1)).squeeze(-1)
        )


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["cells", "dense", "sparse"])
def test_pull_back_is_the_gradient_of_the_dense_matrix(form: str) -> None:
    rows: Rows = cell_rows(0, 2, 3, 7, 4)
    rows = {"cells": rows, "dense": rows.to_dense(), "sparse": rows.to_sparse()}[form]
    y, nu = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    v, x = torch.randn(2, 7).double(), torch.randn(2, 7).double()
    leaves = [t.clone().requires_grad_() for t in rows.tensors]
    A = rows.with_tensors(*leaves).to_dense().matrix
    (A * (y.unsqueeze(-1) * v.unsqueeze(-2) + nu.unsqueeze(-1) * x.unsqueeze(-2))).sum().backward()
    for ours, leaf in zip(rows.pull_back(y, v, nu, x), leaves, strict=True):
        close(ours, leaf.grad)


def test_shared_data_are_expanded_not_copied() -> None:
    q = torch.randn(5, 3, dtype=torch.float64)
    A = torch.randn(2, 3, dtype=torch.float64)
    problem = QP(
        torch.ones(3).double(), q, A, -torch.ones(2).double(), torch.ones(2).double(), 0, 1
    )
    assert problem.shape == (5, 2, 3)
    assert problem.rows.to_dense().matrix.data_ptr() == A.data_ptr()
    assert is_uniform(problem.lb) and compact(problem.lb).shape == (1, 1)
    assert isinstance(problem.lb, torch.Tensor) and problem.lb.shape == (5, 3)


def test_sparse_torch_matrices_are_taken() -> None:
    A = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    for matrix in (A.to_sparse_coo(), A.to_sparse_csr(), A.to_sparse_csc()):
        problem = QP(
            torch.eye(3).double().to_sparse(), torch.zeros(3).double(), matrix, A[:, 0], A[:, 0] + 1
        )
        assert isinstance(problem.rows, SparseRows) and isinstance(problem.P, SparseRows)
        close(problem.rows.to_dense().matrix[0], A)
        close(problem.apply_quadratic(torch.ones(1, 3).double()), torch.ones(1, 3).double())


def test_problems_are_frozen() -> None:
    problem = LP(
        torch.ones(2).double(),
        torch.ones(1, 2).double(),
        torch.zeros(1).double(),
        torch.ones(1).double(),
    )
    with pytest.raises(AttributeError):
        problem.c = torch.zeros(1, 2)  # type: ignore[misc]
    assert problem.smoothed(0.5).P.tolist() == [[0.5, 0.5]]


def solved() -> tuple[QP, torch.Tensor, torch.Tensor, torch.Tensor]:
    """minimise |x - (2, 0)|^2 / 2, x_1 - x_2 <= 1, x_1 <= 1.2: x = (1.2, 0.2), by hand."""
    problem = QP(
        torch.ones(2).double(),
        torch.tensor([-2.0, 0.0], dtype=torch.float64),
        torch.tensor([[1.0, -1.0]], dtype=torch.float64),
        torch.tensor([-torch.inf], dtype=torch.float64),
        torch.tensor([1.0], dtype=torch.float64),
        None,
        torch.tensor([1.2, 5.0], dtype=torch.float64),
    )
    return (
        problem,
        torch.tensor([[1.2, 0.2]], dtype=torch.float64),
        torch.tensor([[0.2]], dtype=torch.float64),
        torch.tensor([[0.6, 0.0]], dtype=torch.float64),
    )


def test_residuals_vanish_at_a_hand_made_solution_and_the_backend_finds_it() -> None:
    problem, x, y, w = solved()
    assert residuals(problem, x, y, w).worst <= 1e-15
    found = solve(problem, backend="numba")
    close(found.x, x)
    close(found.row_dual, y)
    close(found.bound_dual, w)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda x, y, w: (x, y, w + torch.tensor([[0.1, 0.0]])), "stationarity"),
        (lambda x, y, w: (x + torch.tensor([[0.0, -0.1]]), y, w), "primal"),
        (lambda x, y, w: (x + 1e-9, y, w), "primal"),  # beyond its bound: not at all
        (lambda x, y, w: (x, -y, w), "dual_sign"),  # there is no lower side
        (lambda x, y, w: (x - torch.tensor([[0.5, 0.0]]), y, w), "complementarity"),
    ],
)
def test_each_residual_sees_its_own_fault(change, field: str) -> None:  # type: ignore[no-untyped-def]
    problem, *point = solved()
    found = residuals(problem, *change(*point))
    assert float(getattr(found, field)) > 0.01


@pytest.mark.parametrize("place", [0, 1, 2], ids=["x", "row_dual", "bound_dual"])
def test_residuals_of_nan_are_not_zero(place: int) -> None:
    problem, *point = solved()
    point[place] = point[place].clone()
    point[place][0, -1] = float("nan")
    found = residuals(problem, *point)
    assert math.isnan(found.worst)
    assert math.isnan(found.stationarity.item())
    assert place > 0 or math.isnan(found.primal.item())


def test_all_finite_is_not_fooled_by_overflow() -> None:
    large = torch.full((10,), 3e38, dtype=torch.float32)
    assert not torch.isfinite(large.sum())
    assert all_finite(large)
    assert not all_finite(torch.tensor([1.0, float("nan")]))
    assert not all_finite(torch.tensor([float("inf"), float("-inf")]))


def test_dense_rows_of_zero_rows() -> None:
    problem = QP(
        torch.ones(3).double(),
        -torch.tensor([0.2, 2.0, -1.0], dtype=torch.float64),
        DenseRows(torch.zeros(0, 3).double()),
        torch.zeros(0).double(),
        torch.zeros(0).double(),
        0,
        1,
    )
    assert solve(problem, backend="numba").x.tolist() == [[0.2, 1.0, 0.0]]
