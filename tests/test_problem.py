"""Problems as data; residuals as the independent judge."""

from __future__ import annotations

import math

import pytest
import torch

from fairopt import LP, QP, DenseRows, SparseRows, residuals, solve
from fairopt.programs.tensors import all_finite, compact, is_uniform


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


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
