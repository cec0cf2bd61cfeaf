"""The compiled twins of kkt and refinement for rows over cells, and the sides that are told.

The oracle is the same rule on tensors, which other tests hold against finite differences.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_refine import qps

from fairopt import QP, CellRows, DemographicParity, DenseRows, formulate, solve
from fairopt.optimality.active_sets import active_set
from fairopt.optimality.compiled_cells import CellRefinement, solve_cells
from fairopt.optimality.finishing import finish, refinement
from fairopt.optimality.linear_systems import has_cells, solve_reduced
from fairopt.optimality.refinement import Refinement
from fairopt.programs.tensors import unchecked


@st.composite
def cell_problems(draw: st.DrawFn) -> QP:
    """Diagonal P, rows over cells: random, or small integers, with many ties and dependent rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, n, m = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    cells = int(rng.integers(1, n + 1))
    cell = torch.from_numpy(rng.integers(0, cells, (batch, n)))
    if draw(st.booleans()):
        C, q = rng.integers(-1, 2, (batch, m, cells)), rng.integers(-4, 5, (batch, n)) / 2
        weight, P = np.ones((batch, n)), np.ones((batch, n))
        l, u = -rng.integers(0, 2, (batch, m)) / 2, rng.integers(0, 2, (batch, m)) / 2
    else:
        C, q = rng.normal(size=(batch, m, cells)), 2 * rng.normal(size=(batch, n))
        weight, P = 0.5 + rng.random((batch, n)), 10.0 ** rng.uniform(-2, 2, (batch, n))
        l, u = -rng.random((batch, m)), rng.random((batch, m))
        if m > 2:
            C[:, 2] = C[:, 0] - C[:, 1]  # dependent
        l[:, -1] = -np.inf
    as_tensor = [torch.from_numpy(np.asarray(each, np.float64)) for each in (C, weight, P, q, l, u)]
    C, weight, P, q, l, u = as_tensor
    return QP(P, q, CellRows(C, cell, weight), l, u, -1.0, draw(st.sampled_from([1.0, torch.inf])))


def dense(problem: QP) -> QP:
    """The same problem with rows that no compiled code takes."""
    return QP(
        problem.P, problem.q, DenseRows(problem.rows.to_dense().matrix), problem.l, problem.u,
        problem.lb, problem.ub,
    )  # fmt: skip


@given(cell_problems(), st.integers(0, 1000), st.booleans())
def test_the_reduced_system(problem: QP, seed: int, both: bool) -> None:
    assert has_cells(problem)
    torch.manual_seed(seed)
    active, free = torch.rand(problem.l.shape) < 0.7, torch.rand(problem.q.shape) < 0.7
    right, low = torch.randn(problem.q.shape).double(), torch.randn(problem.l.shape).double()
    arguments = (active, free, problem.diagonal(), right, *([low] if both else []))
    v, nu = solve_cells(problem, *arguments)
    assert bool((v[~free] == 0).all())
    assert bool((nu[~active] == 0).all())
    other_v, other_nu = solve_reduced(dense(problem), *arguments)
    # Of right-hand sides that no point reaches the closest is taken: then numbers can be large.
    scale = 1 + max(float(other_v.abs().max()), float(other_nu.abs().max()))
    torch.testing.assert_close(v, other_v, rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(nu, other_nu, rtol=0, atol=1e-10 * scale)
    # And `solve_reduced` itself takes the compiled way.
    assert torch.equal(solve_reduced(problem, *arguments)[0], v)


@given(cell_problems(), st.integers(0, 1000))
def test_points_and_steps(problem: QP, seed: int) -> None:
    torch.manual_seed(seed)
    compiled, plain = refinement(problem, solve_reduced), Refinement(problem)
    assert isinstance(compiled, CellRefinement)
    x = plain.clip(torch.randn(problem.q.shape).double())
    y = torch.randn(problem.l.shape).double() * (torch.rand(problem.l.shape) < 0.7)
    for _ in range(2):
        ours, theirs = compiled.point(x, y), plain.point(x, y)
        torch.testing.assert_close(ours.error, theirs.error, rtol=1e-10, atol=1e-15)
        assert torch.equal(ours.clear, theirs.clear)
        for name in ("row_side", "bound_side", "weak"):
            same = getattr(ours, name) == getattr(theirs, name)
            assert bool((same | ~ours.clear.unsqueeze(-1)).all()), name
        x, y = compiled.step(theirs)
        expected = plain.step(theirs)
        torch.testing.assert_close(x, expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(y, expected[1], rtol=1e-9, atol=1e-9)


def test_what_a_batch_shares_is_shared() -> None:
    """Also where it was not expanded: a kernel that read on behind it would find anything."""
    C = torch.tensor([[[1.0, -1.0], [1.0, 1.0]]], dtype=torch.float64)
    rows = CellRows(C, torch.tensor([[0, 1, 1]]), torch.ones(1, 3).double())
    q = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    side = torch.tensor([[0.1, 0.2]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    whole = QP(torch.ones(3).double(), q, rows, side, side, -1.0, 1.0)
    short = unchecked(
        QP, P=one.expand(1, 3), q=q, rows=rows, l=side, u=side, lb=-one.expand(1, 3),
        ub=one.expand(1, 3), row_names=(), skipped=(), memo=None,
    )  # fmt: skip
    x, y = torch.zeros(4, 3).double(), torch.zeros(4, 2).double()
    a, b = Refinement(whole), CellRefinement(short)
    assert b.point(x, y).row_side.tolist() == a.point(x, y).row_side.tolist()
    torch.testing.assert_close(b.step(b.point(x, y)), a.step(a.point(x, y)))
    active, free = torch.tensor([[True, True]]), torch.tensor([[True, False, True]])
    short_v = solve_cells(short, active, free, one.expand(1, 3), q, side)[0]
    torch.testing.assert_close(
        short_v, solve_reduced(dense(whole), active, free, whole.P, q, side.expand(4, -1))[0]
    )


def test_what_overflows_is_no_solution() -> None:
    """NaN in the residual, here infinity minus infinity, must not be lost among the numbers."""
    rows = CellRows(
        torch.tensor([[0.0, 10.0]]).double(), torch.tensor([0, 1, 0]), torch.ones(3).double()
    )
    side = torch.zeros(1).double()
    P = torch.tensor([1.0, 1e300, 1.0], dtype=torch.float64)
    problem = QP(P, torch.zeros(3).double(), rows, side, side)
    x = torch.tensor([[0.0, 1e10, 0.0]], dtype=torch.float64)
    y = torch.tensor([[-1e308]], dtype=torch.float64)
    for work in (CellRefinement(problem), Refinement(problem)):
        assert bool(work.point(x, y).error.isnan().all()), type(work).__name__


@given(st.one_of(cell_problems(), qps()), st.sampled_from([0.0, 1e-9]), st.integers(0, 1000))
def test_the_sides_that_are_told_are_those_of_the_rule(
    problem: QP, noise: float, seed: int
) -> None:
    """Also where multipliers are zero, rows depend on each other, and bounds meet samples."""
    torch.manual_seed(seed)
    start = solve(problem, backend="osqp")
    x = start.x + noise * torch.randn_like(start.x)
    solution = finish(problem, x, start.row_dual, backend="test")
    if solution.sides is not None:
        active, free = active_set(problem, solution, problem.diagonal())
        assert torch.equal(solution.sides[0], active)
        assert torch.equal(solution.sides[1], free)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_when_sides_are_told(dtype: torch.dtype) -> None:
    """As a rule for float64, not where a sample is exactly at its bound, never for float32."""
    scores = torch.tensor([0.9, 0.7, 0.45, 0.2, 0.3, 0.1], dtype=dtype)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])

    def sides(scores: torch.Tensor) -> object:
        problem = formulate(DemographicParity(0.1), scores, groups, bounds=(0, 1))
        return solve(problem, backend="osqp").sides

    assert (sides(scores) is not None) == (dtype == torch.float64)
    at = scores.clone()
    at[0] = at[3] = 0.5
    at[4:] = 0.5
    at[1:3] = torch.tensor([0.0, 1.0])  # parity holds already, and two samples are at bounds
    assert sides(at) is None
