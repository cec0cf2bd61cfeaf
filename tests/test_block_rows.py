"""Rows over blocks with given sums: their matrix, files, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairopt import QP, BlockRows, ProblemError, load_problem, save_problem, solve


def block_rows(seed: int, batch: int, m: int, n: int, cells: int, C: int) -> BlockRows:
    generator = torch.Generator().manual_seed(seed)
    return BlockRows(
        torch.randn(batch, m, cells, C, generator=generator, dtype=torch.float64),
        torch.randint(0, cells, (batch, n), generator=generator),
        torch.randn(batch, n, generator=generator, dtype=torch.float64),
    )


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@given(
    st.integers(0, 1000),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_the_matrix_is_that_of_the_definition(
    seed: int, batch: int, m: int, n: int, cells: int, C: int
) -> None:
    rows = block_rows(seed, batch, m, n, cells, C)
    A = torch.zeros(batch, m + n, n * C, dtype=torch.float64)
    for b in range(batch):
        for i in range(n):
            for c in range(C):
                column = rows.coefficient[b, :, rows.cell[b, i], c] * rows.weight[b, i]
                A[b, :m, i * C + c] = column
                A[b, m + i, i * C + c] = 1.0
    for form in (rows, rows.to_dense(), rows.to_sparse(), rows.detach()):
        assert form.shape == A.shape
        close(form.to_tensor(), A)


def test_a_problem_is_saved_and_loaded(tmp_path: Path) -> None:
    rows = block_rows(3, 2, 1, 4, 2, 3)
    ones = torch.ones(4, dtype=torch.float64)
    side = torch.cat([torch.full((1,), 0.1, dtype=torch.float64), ones])
    low = torch.cat([torch.full((1,), -0.1, dtype=torch.float64), ones])
    problem = QP(ones.repeat_interleave(3), torch.randn(2, 12).double(), rows, low, side, 0.0)
    save_problem(problem, tmp_path / "problem.npz")
    loaded = load_problem(tmp_path / "problem.npz")
    assert isinstance(loaded.rows, BlockRows)
    for a, b in zip(loaded.tensors, problem.tensors, strict=True):
        assert torch.equal(a, b)
    x = [solve(p, backend="qpth").x for p in (problem, loaded)]
    close(*x)


C3 = torch.ones(1, 2, 3)
BAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "integer coefficients": ((C3.long(), torch.zeros(4).long(), torch.ones(4)), "coefficient"),
    "real cells": ((C3, torch.zeros(4), torch.ones(4)), "rows.cell: expected int64"),
    "cells out of range": ((C3, torch.full((4,), 2), torch.ones(4)), "values in 0..1"),
    "two sizes": ((C3, torch.zeros(4).long(), torch.ones(5)), "with one B and one n"),
    "no classes": ((C3[..., :0], torch.zeros(4).long(), torch.ones(4)), "C >= 1"),
    "a matrix": ((C3[0], torch.zeros(4).long(), torch.ones(4)), "coefficient \\(B, m, K, C\\)"),
    "a list": (([1.0], torch.zeros(4).long(), torch.ones(4)), "expected a tensor, got list"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(ProblemError, match=message):
        BlockRows(*arguments)
