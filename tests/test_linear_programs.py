"""Linear programs: one answer where there are many, and gradients by smoothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import clarabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from torch import Tensor

from fairopt import (
    LP,
    CellRows,
    DenseRows,
    NotDifferentiableError,
    Solution,
    SparseRows,
    backends,
    solve,
)

INF = float("inf")


def tensor(data: Any) -> Tensor:
    return torch.as_tensor(np.asarray(data, dtype=float))


@pytest.fixture(scope="module", params=[name for name in backends.names() if name != "highs"])
def projector(request: pytest.FixtureRequest) -> str:
    """Each installed backend that solves projections."""
    name: str = request.param
    if name not in backends.available():
        pytest.skip(f"{name} is not installed")
    if "diagonal" not in backends.get(name).capabilities.quadratic:
        pytest.skip(f"{name} solves no projections")
    return name


@pytest.fixture(scope="module")
def vertices() -> str:
    pytest.importorskip("scipy", reason="HiGHS comes with SciPy")
    return "highs"


# ---------------------------------------------------------------- the finite perturbation property


@st.composite
def programs(draw: st.DrawFn) -> LP:
    """Small integers, so that ties are common and the threshold of s is far from zero.

    No variable can be zero: at x = 0 the precision of a row has nothing to be relative to.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m, batch = draw(st.integers(1, 6)), draw(st.integers(0, 4)), draw(st.integers(1, 3))
    A = rng.integers(-2, 3, (batch, m, n))
    lb = rng.choice([-3, 1, 2], (batch, n))
    ub = lb + rng.integers(1, 3, (batch, n))
    value = np.einsum("bmn,bn->bm", A, rng.integers(lb, ub + 1))  # of a feasible point
    l = value - rng.choice([0, 1, INF], (batch, m))
    u = value + rng.choice([0, 1, INF], (batch, m))
    return LP(*map(tensor, (rng.integers(-2, 3, (batch, n)), A, l, u, lb, ub)))


def least_norm_optimum(problem: LP, b: int, value: float) -> np.ndarray:
    """Clarabel's shortest point among those that satisfy all and cost no more than ``value``."""
    A = problem.rows.to_dense().matrix[b].numpy()
    n = A.shape[1]
    c, l, u, lb, ub = (
        t[b].numpy() for t in (problem.c, problem.l, problem.u, problem.lb, problem.ub)
    )
    G = np.concatenate([c[None], A, -A, np.eye(n), -np.eye(n)])
    h = np.concatenate([[value], u, -l, ub, -lb])
    there = np.isfinite(h)
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    answer = clarabel.DefaultSolver(
        sparse.eye_array(n, format="csc"), np.zeros(n), sparse.csc_array(G[there]), h[there],
        [clarabel.NonnegativeConeT(int(there.sum()))], settings,
    ).solve()  # fmt: skip
    assert str(answer.status) in ("Solved", "AlmostSolved")
    return np.array(answer.x)


@given(problem=programs())
def test_small_smoothing_gives_the_least_norm_solution(
    projector: str, vertices: str, problem: LP
) -> None:
    vertex = solve(problem, backend=vertices)
    smooth = [solve(problem, backend=projector, smoothing=s).x for s in (1e-2, 1e-3)]
    best = (problem.c * vertex.x).sum(-1)
    for x in smooth:
        assert torch.allclose((problem.c * x).sum(-1), best, rtol=0, atol=1e-9)
        assert bool((x.norm(dim=-1) <= vertex.x.norm(dim=-1) + 1e-9).all())
    assert torch.allclose(*smooth, rtol=0, atol=1e-9)
    for b in range(len(best)):
        other = least_norm_optimum(problem, b, float(best[b]))
        assert np.abs(smooth[0][b].numpy() - other).max() <= 1e-3  # its X* is 1e-8 wide


def test_the_threshold_is_exact(projector: str) -> None:
    # min -x over [0, 1]: at x = 1, x + w - theta = 0 with w >= 0, so theta >= 1 and s may be 1.
    problem = LP(tensor([-1]), tensor(np.zeros((0, 1))), tensor([]), tensor([]), 0.0, 1.0)
    for s, x in ((1e-3, 1.0), (1.0, 1.0), (2.0, 0.5)):
        assert solve(problem, backend=projector, smoothing=s).x.item() == pytest.approx(x, abs=1e-9)


def test_two_equal_answers_do_not_prove_that_smoothing_is_small(projector: str) -> None:
    # min -x over [1, 2] has x = 2, but for every s >= 1 the answer is 1.
    problem = LP(tensor([-1]), tensor(np.zeros((0, 1))), tensor([]), tensor([]), 1.0, 2.0)
    for s, x in ((4.0, 1.0), (2.0, 1.0), (0.5, 2.0)):
        assert solve(problem, backend=projector, smoothing=s).x.item() == pytest.approx(x, abs=1e-9)


def test_what_smoothing_costs_at_most(projector: str, vertices: str) -> None:
    """c.x_s - c.x* <= s/2 (|x*|^2 - |x_s|^2), whatever s."""
    problem = parity()
    best = solve(problem, backend=vertices).x
    for s in (1e-3, 0.1, 1.0, 10.0):
        x = solve(problem, backend=projector, smoothing=s).x
        cost = (problem.c * (x - best)).sum(-1)
        allowed = s / 2 * (best.square() - x.square()).sum(-1)
        assert bool((cost <= allowed + 1e-9).all()) and bool((cost >= -1e-9).all())


def parity(scale: float = 1.0, cost: float = 1.0, n: int = 24) -> LP:
    """Pairwise parity of the means of three groups, within [0, 1] times ``scale``."""
    generator = torch.Generator().manual_seed(3)
    C = tensor([[1, -1, 0], [1, 0, -1], [0, 1, -1]]) * 3 / n
    cell = torch.arange(n) % 3
    c = torch.randn(2, n, dtype=torch.float64, generator=generator) + 0.7 * cell
    side = tensor([0.05] * 3) * scale
    rows = CellRows(C, cell, torch.ones(n, dtype=torch.float64))
    return LP(cost * c, rows, -side, side, 0.0, scale)


@pytest.mark.parametrize(("scale", "cost"), [(1e4, 1.0), (1.0, 1e-5), (1e-6, 1e3)])
def test_smoothing_scales_as_cost_over_length(projector: str, scale: float, cost: float) -> None:
    plain = solve(parity(), backend=projector, smoothing=0.3).x
    scaled = solve(parity(scale, cost), backend=projector, smoothing=0.3 * cost / scale).x
    assert torch.allclose(scaled / scale, plain, rtol=0, atol=1e-7)
    assert ((plain > 0.01) & (plain < 0.99)).any()  # it does smooth


# ---------------------------------------------------------------- many solutions


def test_many_solutions_have_one_smoothed_one(projector: str, vertices: str) -> None:
    # Every point of the simplex is optimal.
    problem = LP(tensor([2, 2, 2]), tensor([[1, 1, 1]]), tensor([1]), tensor([1]), 0.0)
    third = tensor([[1, 1, 1]]) / 3
    for s in (1e-4, 1.0, 100.0):
        x = solve(problem, backend=projector, smoothing=s).x
        assert torch.allclose(x, third, rtol=0, atol=1e-9)
    vertex = solve(problem, backend=vertices).x
    assert sorted(vertex[0].tolist()) == [0, 0, 1]
    assert torch.equal(vertex, solve(problem, backend=vertices).x)


def test_every_solver_of_lps_returns_a_solution() -> None:
    problem = LP(tensor([2, 2, 1]), tensor([[1, 1, 1]]), tensor([1]), tensor([2]), 0.0, 0.8)
    for name in backends.available():
        if backends.get(name).capabilities.linear:
            x = solve(problem, backend=name).x[0]  # x2 = 0.8, the others share 0.2 as they like
            assert float(x[2]) == pytest.approx(0.8, abs=1e-9)
            assert float(x[0] + x[1]) == pytest.approx(0.2, abs=1e-9)


# ---------------------------------------------------------------- gradients


def data() -> dict[str, Tensor]:
    """Two smoothed programs, each with a row at either side, and free and held variables."""
    return {
        "c": tensor([[1.0, 0.4, 0.5, 0.9], [0.6, 0.8, -0.3, -1.7]]),
        "A": tensor([[1.0, 0.8, 0.5, -0.4], [0.3, -1.0, 0.7, 0.6]]),
        "l": tensor([0.2, -9.0]),
        "u": tensor([9.0, -1.1]),
        "lb": tensor([-1.0, -1.1, -0.2, -0.9]),
        "ub": tensor([0.9, 1.0, 0.3, 0.8]),
    }


def smoothed(projector: str, form: Callable[[Tensor], Any], data: dict[str, Tensor]) -> Solution:
    c, A, *sides = data.values()
    return solve(LP(c, form(A), *sides), backend=projector, smoothing=0.8)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "dense": DenseRows,
    "sparse": lambda A: SparseRows(
        torch.arange(2).repeat_interleave(4), torch.arange(4).repeat(2), A.reshape(1, -1), 2, 4
    ),
    "cells": lambda A: CellRows(A, torch.arange(4), torch.ones(4, dtype=torch.float64)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", data())
def test_gradients_of_the_smoothed_program(projector: str, name: str, form: str) -> None:
    plain = data()
    found = smoothed(projector, FORMS[form], plain)
    assert found.row_dual.sign().tolist() == [[-1, 1], [-1, 1]]
    held = (found.bound_dual != 0).sum(-1)
    assert held.tolist() == [1, 2]

    def of(value: Tensor) -> Tensor:
        return smoothed(projector, FORMS[form], {**plain, name: value}).x

    variable = plain[name].clone().requires_grad_()
    assert torch.autograd.gradcheck(of, (variable,), eps=1e-6, atol=1e-6)


def test_at_a_vertex_costs_have_no_gradient_and_sides_have_that_of_the_lp(projector: str) -> None:
    # min -2 x0 - x1 with x0 + x1 <= u, x0 <= 1: x = (1, u - 1) for 1 < u < 2.
    for s in (1e-1, 1e-3):
        c = tensor([-2, -1]).requires_grad_()
        u, ub = tensor([1.5]).requires_grad_(), tensor([1, 1]).requires_grad_()
        problem = LP(c, tensor([[1, 1]]), tensor([-INF]), u, 0.0, ub)
        x = solve(problem, backend=projector, smoothing=s).x
        assert torch.allclose(x, tensor([[1, 0.5]]), rtol=0, atol=1e-9)
        (x * tensor([3, 5])).sum().backward()
        assert c.grad is not None and u.grad is not None and ub.grad is not None
        assert c.grad.abs().max() <= 1e-6
        assert u.grad.tolist() == pytest.approx([5], abs=1e-6)
        assert ub.grad.tolist() == pytest.approx([-2, 0], abs=1e-6)


def linear(name: str, form: str) -> tuple[LP, Tensor]:
    """A program of which one thing requires a gradient."""
    one = torch.ones(3, dtype=torch.float64)
    tensors = {
        "c": -one, "l": -one[:1], "u": one[:1], "lb": 0 * one, "ub": one.clone(),
        "matrix": one[None].clone(), "values": one.clone(), "coefficient": one[None].clone(),
        "weight": one.clone(),
    }  # fmt: skip
    wanted = tensors[name].requires_grad_()
    rows: Any = {
        "dense": lambda: DenseRows(tensors["matrix"]),
        "sparse": lambda: SparseRows(
            torch.zeros(3, dtype=torch.int64), torch.arange(3), tensors["values"], 1, 3
        ),
        "cells": lambda: CellRows(tensors["coefficient"], torch.arange(3), tensors["weight"]),
    }[form]()
    return LP(tensors["c"], rows, *(tensors[k] for k in ("l", "u", "lb", "ub"))), wanted


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, "dense") for name in ("c", "l", "u", "lb", "ub", "matrix")]
    + [("values", "sparse"), ("coefficient", "cells"), ("weight", "cells")],
)
@pytest.mark.parametrize("backend", ["highs", "auto"])
def test_without_smoothing_a_gradient_is_refused(
    vertices: str, name: str, form: str, backend: str
) -> None:
    problem, wanted = linear(name, form)
    with pytest.raises(NotDifferentiableError, match=r"smoothing=.*torch\.no_grad"):
        solve(problem, backend=backend)
    with torch.no_grad():
        x = solve(problem, backend=backend).x
    assert x.sum().item() == pytest.approx(1, abs=1e-12)
    assert not x.requires_grad
    solve(problem, smoothing=0.1).x.sum().backward()
    assert wanted.grad is not None
    assert not solve(linear(name, form)[0].smoothed(1.0).detach()).x.requires_grad
