"""LU of a batch, in particular where torch's own is wrong with two threads."""

from __future__ import annotations

import pytest
import torch

from fairopt.optimality.linear_systems import lu_factor


@pytest.mark.parametrize("n", [1, 5, 99, 100, 160, 220])
def test_factors_multiply_to_the_matrix(n: int, device: torch.device) -> None:
    torch.set_num_threads(2)
    plain = torch.eye(n, dtype=torch.float64).repeat(6, 1, 1)
    for matrix in (plain, plain + torch.rand(6, n, n, dtype=torch.float64)):
        matrix = matrix.to(device)
        P, L, U = torch.lu_unpack(*lu_factor(matrix))
        assert (P @ L @ U - matrix).abs().max() < 1e-12 * n


def test_a_singular_matrix_spoils_no_other() -> None:
    matrix = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    matrix[1] = 0.0
    factors, pivots = lu_factor(matrix)
    solution = torch.linalg.lu_solve(factors, pivots, torch.ones(3, 3, 1, dtype=torch.float64))
    assert torch.equal(solution[[0, 2]], torch.ones(2, 3, 1, dtype=torch.float64))
