"""From approximate to exact: refine(), finish() and the proofs of infeasibility."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kkt import Reference

from fairopt import LP, QP, CellRows, DenseRows, SparseRows, Status, solve
from fairopt.optimality.certificates import proves_infeasible, sharpen_proof
from fairopt.optimality.finishing import Refinement, finish, refine, refined
from fairopt.optimality.linear_systems import metric, solve_reduced
from fairopt.programs.problem import Problem
from fairopt.programs.solution import Solution


def answer(problem: Problem, x: torch.Tensor, y: torch.Tensor) -> Solution:
    return Solution(problem, x, y, (Status.SOLVED,) * len(x), "test")


@st.composite
def qps(draw: st.DrawFn) -> QP:
    """Random QPs of every form, with what a solver finds hard left out: nothing is degenerate."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, n = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    m = draw(st.integers(0, n))
    kind = draw(st.sampled_from(["diagonal", "dense", "sparse", "singular"]))
    form = draw(st.sampled_from(["dense", "sparse", "cells"]))
    if kind == "diagonal":
        P = 10.0 ** rng.uniform(-2, 2, (batch, n))
    else:
        root = rng.normal(size=(batch, n, max(1, n // 2) if kind == "singular" else n + 2))
        P = root @ root.transpose(0, 2, 1)
    scale = 10.0 ** rng.uniform(-3, 3, (1, m, 1))
    A = scale * rng.normal(size=(batch, m, n))
    rows: DenseRows | SparseRows | CellRows = DenseRows(torch.from_numpy(A))
    if form == "sparse":
        rows = rows.to_sparse()
    if form == "cells":
        cells = int(rng.integers(1, n + 1))
        rows = CellRows(
            torch.from_numpy(scale * rng.normal(size=(batch, m, cells))),
            torch.from_numpy(rng.integers(0, cells, (batch, n))),
            torch.from_numpy(0.5 + rng.random((batch, n))),
        )
    inside = torch.from_numpy(rng.uniform(-0.5, 0.5, (batch, n)))
    value = rows.apply(inside)
    width = torch.from_numpy(rng.random((batch, m)) * scale[..., 0])
    equal = torch.from_numpy(rng.random(m) < 0.2)
    l, u = value - torch.where(equal, 0.0, width), value + torch.where(equal, 0.0, 0.5 * width)
    l = torch.where(torch.from_numpy(rng.random(m) < 0.2) & ~equal, -torch.inf, l)
    quadratic = torch.from_numpy(P)
    return QP(
        DenseRows(quadratic).to_sparse() if kind == "sparse" else quadratic,
        torch.from_numpy(3 * rng.normal(size=(batch, n))), rows, l, u, -1.0, 1.0,
    )  # fmt: skip


@given(qps(), st.sampled_from([1e-4, 1e-7]), st.integers(0, 1000))
def test_a_perturbed_solution_becomes_exact(problem: QP, noise: float, seed: int) -> None:
    good = Reference().solve(problem)
    torch.manual_seed(seed)
    x = good.x + noise * torch.randn_like(good.x)
    y = good.row_dual * (1 + noise * torch.randn_like(good.row_dual))
    x, y = refine(problem, x, y)
    found = answer(problem, x, y).residuals
    assert found.worst < 1e-12, found
    gap = (x - good.x).abs().max()
    assert gap < 1e-5 or objective(problem, x) <= objective(problem, good.x) + 1e-9


def objective(problem: QP, x: torch.Tensor) -> float:
    return float((x * (0.5 * problem.apply_quadratic(x) + problem.q)).sum())


def test_dependent_rows_and_many_of_them() -> None:
    """All pairs of 14 groups: 91 rows of rank 13, tolerance 0."""
    n, groups = 300, 14
    pairs = [(a, b) for a in range(groups) for b in range(a)]
    cell = torch.arange(n) % groups
    C = torch.zeros(len(pairs), groups, dtype=torch.float64)
    for r, (a, b) in enumerate(pairs):
        C[r, a], C[r, b] = 1.0 / (cell == a).sum(), -1.0 / (cell == b).sum()
    scores = torch.rand(n, dtype=torch.float64) + 0.02 * cell
    ones = torch.ones(n, dtype=torch.float64)
    zero = torch.zeros(91, dtype=torch.float64)
    cells = CellRows(C, cell, ones)
    for P in (ones, torch.diag(ones).unsqueeze(0)):
        for tolerance in (0.0, 0.05):
            problem = QP(P, -scores, cells, zero - tolerance, zero + tolerance, 0.0, 1.0)
            exact = solve(QP(ones, -scores, cells, problem.l, problem.u, 0.0, 1.0), backend="numba")
            x, y = refine(problem, exact.x + 1e-6 * torch.randn(1, n), exact.row_dual)
            found = answer(problem, x, y).residuals
            assert found.worst < 1e-13, found
            torch.testing.assert_close(x, exact.x, rtol=0, atol=1e-13)


def test_what_is_open_stays_as_it_was() -> None:
    """P is zero in the second variable and no row sees it: any value is a solution."""
    P = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    q = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    A, side = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0.5]).double()
    for quadratic in (P, P.diagonal(dim1=-2, dim2=-1)):
        problem = QP(quadratic, q, A, -side, side)
        start = torch.tensor([[0.5 + 1e-7, 0.3]], dtype=torch.float64)
        x, y = refine(problem, start, torch.tensor([[0.4]], dtype=torch.float64))
        assert x.tolist() == [[0.5, 0.3]]
        assert y.item() == pytest.approx(0.5, abs=1e-15)


def test_linear_programs() -> None:
    """min -x1 - 2 x2, x1 + x2 <= 1 within [0, 0.7]: the vertex (0.3, 0.7), y = 1."""
    c = torch.tensor([[-1.0, -2.0], [-1.0, -1.0]], dtype=torch.float64)
    A, u = torch.ones(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    problem = LP(c, A, torch.full_like(u, -torch.inf), u, 0.0, 0.7)
    start = torch.tensor([[0.3, 0.7], [0.45, 0.55]], dtype=torch.float64)
    x, y = refine(problem, start + 1e-8, torch.ones(2, 1).double() - 1e-7)
    assert answer(problem, x, y).residuals.worst < 1e-15
    assert torch.allclose(x, start, atol=1e-7)  # the second has many solutions: the nearest
    assert torch.allclose(y, torch.ones(2, 1).double(), rtol=0, atol=1e-15)


def test_the_active_set_is_repaired() -> None:
    """The answer so coarse that some rows and bounds seem active that are not, and the reverse."""
    torch.manual_seed(3)
    n, m = 20, 4
    A = torch.randn(m, n).double()
    q = 2 * torch.randn(8, n).double()
    side = torch.full((m,), 0.3).double()
    problem = QP(torch.ones(n).double(), q, A, -side, side, -1.0, 1.0)
    good = Reference().solve(problem)
    start = good.x + 0.02 * torch.randn(8, n), good.row_dual + 0.02 * torch.randn(8, m)
    work = Refinement(problem)
    before = work.point(work.clip(start[0]), start[1])
    x, y = refine(problem, *start)
    after = work.point(x, y)
    assert bool((before.row_side != after.row_side).any())
    assert bool((before.bound_side != after.bound_side).any())
    assert answer(problem, x, y).residuals.worst < 1e-13
    torch.testing.assert_close(x, good.x, rtol=0, atol=1e-7)


def test_a_weakly_active_row_gets_no_multiplier() -> None:
    """The unconstrained minimum lies on the row: its multiplier is zero, not rounding."""
    q = -torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    A = torch.tensor([[1.0 / 3, 1.0 / 7]], dtype=torch.float64)
    side = (A @ -q[0]).expand(1)
    for noise in (1e-9, -1e-9):
        problem = QP(torch.ones(2).double(), q, A, torch.full_like(side, -torch.inf), side)
        x, y = refine(problem, -q + noise, torch.full((1, 1), abs(noise)))
        assert y.tolist() == [[0.0]]
        assert torch.allclose(x, -q, rtol=0, atol=1e-16)


def test_one_bad_problem_does_not_spoil_the_others() -> None:
    q = torch.tensor([[-2.0], [-2.0]], dtype=torch.float64)
    problem = QP(torch.ones(1).double(), q, torch.ones(1, 1).double(), *bounds(0.0, 1.0), 0.0, 5.0)
    x = torch.tensor([[torch.nan], [1.0 + 1e-6]], dtype=torch.float64)
    y = torch.tensor([[7.0], [0.9]], dtype=torch.float64)
    solution = finish(
        problem, x, y, backend="test", status=(Status.INFEASIBLE, Status.SOLVED), iterations=(3, 4)
    )
    assert solution.x.tolist() == [[0.0], [1.0]]
    assert solution.row_dual.squeeze(-1).tolist() == pytest.approx([7.0, 1.0], abs=1e-15)
    assert solution.status == (Status.INFEASIBLE, Status.SOLVED)
    assert (solution.backend, solution.iterations) == ("test", (3, 4))


def bounds(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([low]).double(), torch.tensor([high]).double()


def test_finish_rounds_inside_the_bounds() -> None:
    ub = torch.full((3,), 0.1, dtype=torch.float64)  # between two float32 numbers
    problem = QP(
        torch.ones(3), torch.tensor([-1.0, 1.0, -0.05]), torch.ones(1, 3),
        torch.tensor([-1.0]), torch.tensor([1.0]), -ub, ub,
    )  # fmt: skip
    solution = finish(problem, torch.zeros(1, 3), torch.zeros(1, 1), backend="test")
    assert solution.x.dtype == torch.float32
    assert bool((solution.x.double() <= ub).all())
    assert bool((solution.x.double() >= -ub).all())
    assert solution.x[0].tolist() == pytest.approx([0.1, -0.1, 0.05], abs=1e-8)


@pytest.mark.parametrize("kind", ["diagonal", "dense", "linear"])
def test_the_reduced_system_against_least_squares(kind: str) -> None:
    """Both sides given, dependent rows, variables held: NumPy's shortest solution."""
    torch.manual_seed(0)
    n, m = 7, 4
    root = torch.randn(n, n).double()
    P = {"diagonal": torch.eye(n).double(), "dense": root @ root.T, "linear": torch.zeros(n, n)}
    P = P[kind].double()
    P = P / P.diagonal().clamp(min=1).sqrt().outer(P.diagonal().clamp(min=1).sqrt())
    A = torch.randn(m, n).double()
    A[3] = A[0] - A[1]
    free = torch.tensor([1, 1, 0, 1, 1, 1, 1]).bool()
    active = torch.tensor([1, 1, 0, 1]).bool()
    A = A / (A * free).norm(dim=1, keepdim=True)  # of unit length, as the rule wants them
    A[3] = (A[0] - 0.5 * A[1]) / ((A[0] - 0.5 * A[1]) * free).norm()
    side = torch.zeros(m).double()
    q = torch.zeros(n).double()
    problem: Problem
    if kind == "linear":
        problem = LP(q, A, side, side)
    else:
        problem = QP(
            torch.ones(n).double() if kind == "diagonal" else P.unsqueeze(0), q, A, side, side
        )
    v, nu = torch.randn(n).double() * free, torch.randn(m).double() * active
    if kind == "linear":
        v = A.T @ torch.randn(m).double() * free
    right, low = (P @ v + A.T @ nu) * free, (A @ v) * active
    F, W = free.nonzero().squeeze(-1), active.nonzero().squeeze(-1)
    K = torch.zeros(len(F) + len(W), len(F) + len(W)).double()
    K[: len(F), : len(F)] = P[F][:, F]
    K[len(F) :, : len(F)] = A[W][:, F]
    K[: len(F), len(F) :] = A[W][:, F].T
    best = np.linalg.lstsq(K.numpy(), torch.cat([right[F], low[W]]).numpy(), rcond=1e-11)[0]
    got_v, got_nu = solve_reduced(
        problem, active[None], free[None], metric(problem), right[None], low[None]
    )
    assert got_v[0, F].tolist() == pytest.approx(best[: len(F)].tolist(), abs=1e-12)
    assert got_nu[0, W].tolist() == pytest.approx(best[len(F) :].tolist(), abs=1e-12)
    assert got_v[0, 2] == 0
    assert got_nu[0, 2] == 0


def test_proofs_of_infeasibility() -> None:
    """x1 + x2 >= 3 within [0, 1]; x1 - x2 <= 0 has no part in it. Then rows alone, no bounds."""
    A = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    infinity = torch.inf
    l = torch.tensor([3.0, -infinity], dtype=torch.float64)
    u = torch.tensor([infinity, 0.0], dtype=torch.float64)
    q = torch.zeros(4, 2, dtype=torch.float64)
    problem = QP(torch.ones(2).double(), q, A, l, u, 0.0, 1.0)
    y = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-1.0, 0.2]], dtype=torch.float64)
    assert proves_infeasible(problem, y).tolist() == [True, False, False, True]
    wide = QP(torch.ones(2).double(), q, A, l, u, 0.0, 1.5)  # exactly feasible
    assert not proves_infeasible(wide, y).any()

    twice = torch.tensor([[1.0, 1.0 / 3], [-3.0, -1.0]], dtype=torch.float64)
    side = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    problem = QP(torch.ones(2).double(), q[:1], twice, torch.full_like(side, -infinity), side)
    rough = torch.tensor([[3.0 + 1e-6, 1.0 - 1e-6]], dtype=torch.float64)
    assert not proves_infeasible(problem, rough)
    assert proves_infeasible(problem, sharpen_proof(problem, rough))


def test_a_solution_that_is_exactly_zero() -> None:
    """All sides are zero: what remains of x after a step is rounding, relative to nothing."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(40):
        n = 4 + seed % 9
        A = torch.randint(-2, 3, (2, n), generator=generator).double()
        q = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
        zero = torch.zeros(2, dtype=torch.float64)
        problem = QP(torch.ones(n, dtype=torch.float64), q, A, zero, zero, 0.0, 1.0)
        # Near it, with multipliers that hold all variables but one at zero.
        x = 1e-8 * torch.rand(1, n, generator=generator, dtype=torch.float64)
        y = 0.2 * torch.randn(1, 2, generator=generator, dtype=torch.float64)
        found = refined(problem, x, y)
        assert float(found.error) <= 1e-15
        assert float(found.x.abs().max()) == 0
