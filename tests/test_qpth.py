"""The qpth backend: what it solves, what it says of what it cannot, and that it stays alone."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qpth_problems import DOUBLE, INF, changed, infeasible, known, no_rows, problem_of, tensor
from scipy.optimize import linprog
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fairopt import (
    LP,
    QP,
    DemographicParity,
    EqualizedOdds,
    MeanResidual,
    Solution,
    Status,
    formulate,
    solve,
)

if importlib.util.find_spec("qpth") is None:  # importing it asks for CVXPY, which we do not need
    pytest.skip("the package qpth is not installed", allow_module_level=True)

from fairopt.backends.qpth import backend as qpth_
from fairopt.backends.qpth.backend import QPTH

# ---------------------------------------------------------------- problems with a known solution


def one(problem: QP, b: int) -> QP:
    A = problem.rows.to_dense().matrix[b : b + 1]
    parts = (t[b : b + 1] for t in (problem.l, problem.u, problem.lb, problem.ub))
    assert isinstance(problem.P, Tensor)
    return QP(problem.P[b : b + 1], problem.q[b : b + 1], A, *parts)


def solved(problem: QP | LP, **options: Any) -> Solution:
    solution = QPTH(**options).solve(problem)
    assert set(solution.status) == {Status.SOLVED}
    assert solution.residuals.worst < 1e-12
    return solution


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 8),
    n=st.integers(1, 20),
    m=st.integers(0, 40),
    condition=st.sampled_from([1.0, 1e2, 1e4, 1e6]),
    form=st.sampled_from(["diagonal", "dense", "sparse"]),
    equalities=st.integers(0, 3),
    row_scale=st.sampled_from([1.0, 1e3, 1e-3]),
)
def test_it_finds_the_known_solution(
    seed: int, batch: int, n: int, m: int, condition: float, form: str, equalities: int,
    row_scale: float,
) -> None:  # fmt: skip
    case = known(
        np.random.default_rng(seed), batch, n, m,
        condition=condition, form=form, equalities=equalities, row_scale=row_scale,
    )  # fmt: skip
    solution = solved(case.problem)
    # Multipliers of 0.1 against curvatures of 1: what rounding leaves is 1e-16 times the condition.
    assert (solution.x - case.x).abs().max() < 1e-9


@pytest.mark.parametrize("notion", [DemographicParity, EqualizedOdds, MeanResidual])
@pytest.mark.parametrize("compare", ["pairwise", "overall"])
@pytest.mark.parametrize("tolerance", [0.0, 0.03])
@pytest.mark.parametrize(("groups", "weighted"), [(2, True), (4, False)])
def test_parity_projections_and_their_gradients_are_those_of_numba(
    notion: Any, compare: str, tolerance: float, groups: int, weighted: bool
) -> None:
    compare_with_numba(notion, compare, tolerance, groups, weighted)


def compare_with_numba(
    notion: Any, compare: str, tolerance: float, groups: int, weighted: bool
) -> None:
    batch, n = 2, 4 * groups
    group = torch.arange(n) % groups
    rise = 0.3 * group / groups
    inputs = {
        "scores": (0.7 * torch.rand(batch, n, dtype=DOUBLE) + rise).requires_grad_(),
        "tolerance": torch.tensor(tolerance, dtype=DOUBLE, requires_grad=True),
        "weights": (0.5 + torch.rand(n, dtype=DOUBLE)).requires_grad_(weighted),
        "lb": torch.zeros(n, dtype=DOUBLE, requires_grad=True),
    }
    targets = (torch.arange(n) // groups % 2).double()
    cotangent = torch.randn(batch, n, dtype=DOUBLE)

    def run(backend: str) -> tuple[Tensor, list[Tensor]]:
        limit = inputs["tolerance"] if tolerance else tolerance
        problem = formulate(
            [notion(limit, compare=compare)], inputs["scores"], group, targets,
            bounds=(inputs["lb"], 1.0), weights=inputs["weights"] if weighted else None,
        )  # fmt: skip
        x = solve(problem, backend=backend).x
        wanted = [t for t in inputs.values() if t.requires_grad]
        found = torch.autograd.grad((x * cotangent).sum(), wanted, allow_unused=True)
        return x.detach(), [torch.zeros(()) if g is None else g for g in found]

    x, gradients = run("qpth")
    reference, wanted = run("numba")
    assert (x - reference).abs().max() < 1e-12
    for gradient, want in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, want, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- what the standard form is for


def small(problem: QP) -> Tensor:
    return solved(problem).x


def test_a_step_that_is_exactly_zero_is_no_infinite_step() -> None:
    # qpth's own step length divides by it: this problem comes out of it as NaN.
    x = small(QP(tensor([1.0]), tensor([0.0]), *no_rows(1, 1), -1.0, 1.0))
    assert x.item() == 0.0


def test_the_step_length_in_place_of_qpth_s(raw: Any) -> None:
    v, dv = 0.1 + torch.rand(5, 7, dtype=DOUBLE), torch.randn(5, 7, dtype=DOUBLE)
    theirs = importlib.import_module("qpth.solvers.pdipm.batch").get_step(v, dv)
    assert torch.equal(qpth_.load().get_step(v, dv), theirs.clamp(max=1.0))
    dv[:, 3] = 0.0
    assert bool((qpth_.load().get_step(v, dv) > 0).all())


def test_no_rows_and_no_bounds() -> None:
    x = small(QP(tensor([2.0, 4.0]), tensor([2.0, 2.0]), *no_rows(1, 2)))
    assert torch.equal(x, tensor([-1.0, -0.5]))


def test_equalities_alone() -> None:
    A, b = tensor([[1.0, 1.0], [2.0, 2.0]]), tensor([2.0, 4.0])
    x = small(QP(tensor([1.0, 3.0]), tensor([0.0, 0.0]), A, b, b))
    assert torch.allclose(x, tensor([1.5, 0.5]), atol=1e-15)


def test_dependent_equalities_and_dependent_inequalities() -> None:
    problem = problem_of(equalities=2)
    A = problem.rows.to_dense().matrix
    twice = QP(
        problem.P, problem.q, torch.cat([A, 3 * A, A], 1),
        *(torch.cat([t, 3 * t, t], 1) for t in (problem.l, problem.u)), problem.lb, problem.ub,
    )  # fmt: skip
    assert (small(twice) - small(problem)).abs().max() < 1e-12


def test_rows_of_zeros_constrain_nothing() -> None:
    problem = problem_of()
    A = problem.rows.to_dense().matrix
    zero, side = torch.zeros_like(A[:, :2]), torch.zeros_like(problem.l[:, :2])
    more = QP(
        problem.P, problem.q, torch.cat([A, zero], 1),
        torch.cat([problem.l, side - tensor(0.0, 1.0)], 1),
        torch.cat([problem.u, side + tensor(0.0, 1.0)], 1),
        problem.lb, problem.ub,
    )  # fmt: skip
    assert (small(more) - small(problem)).abs().max() < 1e-12


def mixed() -> QP:
    """Every problem of the batch with equalities, ranks, sides and fixed variables of its own."""
    problem = problem_of(batch=6, n=8, m=6, equalities=2)
    A = problem.rows.to_dense().matrix.clone()
    l, u, lb, ub = (t.clone() for t in (problem.l, problem.u, problem.lb, problem.ub))
    l[1, 0] -= 0.5  # one equality less
    l[2, :2], u[2, 1] = -INF, INF  # none, and a row without sides
    A[3, 1], l[3, 1], u[3, 1] = A[3, 0], l[3, 0], u[3, 0]  # rank 1
    l[4, 5] = u[4, 5] = float((A[4, 5] * small(problem)[4]).sum())  # one more
    middle = small(problem)[5, 3]
    lb[5, 3] = ub[5, 3] = middle + 0.01
    lb[0], ub[0] = -INF, INF
    return changed(problem, rows=A, l=l, u=u, lb=lb, ub=ub)


def test_problems_of_one_batch_may_differ_in_structure() -> None:
    problem = mixed()
    x = small(problem)
    for b in range(6):
        assert (x[b] - small(one(problem, b))).abs().max() < 1e-12


@pytest.mark.parametrize("where", [0, 2])
def test_all_variables_of_a_problem_are_fixed(where: int) -> None:
    problem = problem_of(m=0)
    x = small(problem)
    lb, ub = problem.lb.clone(), problem.ub.clone()
    lb[where] = ub[where] = x[where] + 0.5
    answer = small(changed(problem, lb=lb, ub=ub))
    assert torch.equal(answer[where], lb[where])
    assert (answer - x)[torch.arange(4) != where].abs().max() < 1e-12


def test_a_side_that_is_very_far_away_is_no_different_from_none() -> None:
    problem = problem_of()
    far = changed(problem, u=problem.u.clamp(max=1e20), ub=problem.ub.clamp(max=1e20))
    assert (small(far) - small(problem)).abs().max() < 1e-12


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_do_not_matter(scale: float) -> None:
    problem = problem_of(equalities=1)
    sides = {name: getattr(problem, name) * scale for name in ("l", "u", "lb", "ub")}
    x = small(changed(problem, q=problem.q * scale, **sides))
    assert (x / scale - small(problem)).abs().max() < 1e-11
    assert isinstance(problem.P, Tensor)
    x = small(changed(problem, P=problem.P * scale, q=problem.q * scale))
    assert (x - small(problem)).abs().max() < 1e-11


@pytest.mark.parametrize("seed", [8, 26, 74])
def test_bounds_a_thousandth_as_wide_as_the_scores_are_far(seed: int) -> None:
    # Weights over six orders, some variables fixed: one attempt without a proximal term misses it.
    torch.manual_seed(seed)
    n, width = 14, 1e-3
    scores = 5 * torch.randn(1, n, dtype=DOUBLE)
    weights = 10 ** (6 * torch.rand(n, dtype=DOUBLE) - 3)
    lb = torch.full((n,), 0.25 * width, dtype=DOUBLE)
    ub = lb + width * (torch.rand(n) < 0.5)
    groups = torch.randint(0, 7, (n,))
    problem = formulate(
        [DemographicParity(0.01 * width)], scores, groups, bounds=(lb, ub), weights=weights
    )
    reference = solve(problem, backend="numba")
    assert (small(problem) - reference.x).abs().max() < 1e-12 * width


@pytest.mark.parametrize("rank", [0, 3])
def test_a_singular_p(rank: int) -> None:
    problem = problem_of(n=8, m=5)
    x = small(problem)
    X = torch.randn(4, rank, 8, dtype=DOUBLE)
    flat = changed(problem, P=X.mT @ X, lb=x - 1, ub=x + 1)
    solved(flat)
    diagonal = torch.ones(4, 8, dtype=DOUBLE)
    diagonal[:, rank:] = 0.0
    solved(changed(flat, P=diagonal))


def test_a_gradient_through_a_singular_diagonal_is_that_of_the_same_matrix() -> None:
    # One variable has no curvature and stands at a bound: x is unique and differentiable.
    A, b = tensor([[1.0, 1.0, 1.0]]), tensor([2.0])

    def gradient(P: Tensor) -> Tensor:
        q = tensor([-1.0, -2.0, 0.5]).requires_grad_()
        problem = QP(P, q.expand(1, 3), A, b - 1, b, 0.0, 5.0)
        x = solve(problem, backend="qpth").x
        return torch.autograd.grad((x * tensor(1.0, 2.0, 3.0)).sum(), q)[0]

    diagonal = tensor([1.0, 1.0, 0.0])
    assert torch.allclose(gradient(diagonal), gradient(torch.diag_embed(diagonal)), atol=1e-12)


def test_float32_is_solved_in_float64_and_kept_within_the_bounds() -> None:
    scores = torch.rand(4, 30) + 0.4 * (torch.arange(30) % 2)
    problem = formulate([DemographicParity(0.05)], scores, torch.arange(30) % 2, bounds=(0.1, 0.9))
    x = solve(problem, backend="qpth").x
    assert x.dtype == torch.float32
    assert bool(((x >= 0.1) & (x <= torch.tensor(0.9))).all())
    assert (x - solve(problem, backend="numba").x).abs().max() < 1e-6


# ---------------------------------------------------------------- linear programs


@pytest.mark.parametrize("seed", range(5))
def test_linear_programs(seed: int) -> None:
    problem = problem_of(batch=3, n=10, m=6, seed=seed, equalities=1)
    bounded = LP(
        problem.q, problem.rows, problem.l, problem.u,
        problem.lb.clamp(min=-3.0), problem.ub.clamp(max=3.0),
    )  # fmt: skip
    solution = solved(bounded)
    for b in range(3):
        A = bounded.rows.to_dense().matrix[b].numpy()
        l, u = bounded.l[b].numpy(), bounded.u[b].numpy()
        there = np.isfinite(np.r_[u, -l])
        reference = linprog(
            bounded.c[b].numpy(), np.vstack([A, -A])[there], np.r_[u, -l][there],
            bounds=[*zip(bounded.lb[b].tolist(), bounded.ub[b].tolist(), strict=True)],
        )  # fmt: skip
        assert reference.status == 0
        objective = float(bounded.c[b] @ solution.x[b])
        assert abs(objective - reference.fun) < 1e-8 * (1 + abs(reference.fun))


# ---------------------------------------------------------------- the derivative


def test_a_parameter_shared_over_the_batch_gets_the_sum_of_the_gradients() -> None:
    base = problem_of(batch=5, n=6, m=3, equalities=1)
    wanted = ("P", "q", "A", "l", "u", "lb", "ub")
    values = dict(
        zip(wanted, (base.P, base.q, base.rows.to_dense().matrix, base.l, base.u, base.lb, base.ub),
            strict=True)
    )  # fmt: skip
    shared = {name: value[0].clone().requires_grad_() for name, value in values.items()}
    q = (values["q"][:1] + 0.01 * torch.randn(5, 6, dtype=DOUBLE)).requires_grad_()
    cotangent = torch.randn(5, 6, dtype=DOUBLE)

    def loss(shared: dict[str, Tensor], q: Tensor) -> Tensor:
        problem = QP(
            shared["P"].unsqueeze(0), q, shared["A"].unsqueeze(0), shared["l"], shared["u"],
            shared["lb"], shared["ub"],
        )  # fmt: skip
        return (solve(problem, backend="qpth").x * cotangent).sum()

    names = [name for name in wanted if name != "q"]
    found = torch.autograd.grad(loss(shared, q), [shared[name] for name in names])
    step = 1e-6
    for name, gradient in zip(names, found, strict=True):
        direction = torch.randn_like(gradient)
        if name == "P":
            direction = direction + direction.mT
        if name in ("l", "u"):
            direction[0] = 0.0  # the equality: its two sides move together, below
        ends = [
            loss({**shared, name: shared[name] + sign * step * direction}, q).detach()
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        mine = (torch.where(direction != 0, gradient, 0.0) * direction).sum()
        assert torch.allclose(mine, slope, rtol=1e-6, atol=1e-6), name
    both = torch.zeros_like(shared["l"])
    both[0] = step
    ends = [
        loss({**shared, "l": shared["l"] + s * both, "u": shared["u"] + s * both}, q).detach()
        for s in (1, -1)
    ]
    mine = found[names.index("l")][0] + found[names.index("u")][0]
    assert torch.allclose(mine, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.fixture
def raw(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``qpth.qp`` as its authors ship it; CVXPY, which it imports and does not use, left out."""
    before = {name for name in sys.modules if name.split(".")[0] == "qpth"}
    if importlib.util.find_spec("cvxpy") is None:
        monkeypatch.setitem(sys.modules, "cvxpy", types.ModuleType("cvxpy"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an escape in one of its docstrings
        yield importlib.import_module("qpth.qp")
    for name in {n for n in sys.modules if n.split(".")[0] == "qpth"} - before:
        del sys.modules[name]


def test_gradients_are_qpth_s_own_but_for_its_mean_over_the_batch(raw: Any) -> None:
    batch, n, m = 4, 8, 8
    base = problem_of(batch=batch, n=n, m=m)
    A = base.rows.to_dense().matrix
    there = torch.isfinite(base.u[0])
    cotangent = torch.randn(batch, n, dtype=DOUBLE)
    P = base.P
    assert isinstance(P, Tensor)

    def raw_gradients(P: Tensor, q: Tensor, G: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        inputs = [t.clone().requires_grad_() for t in (P, q, G, h)]
        none = torch.zeros(0, dtype=DOUBLE)
        x = raw.QPFunction(verbose=-1)(*inputs, none, none)
        return torch.autograd.grad((x * cotangent).sum(), inputs)

    def our_gradients(P: Tensor, q: Tensor, G: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        inputs = [t.clone().requires_grad_() for t in (P, q, G, h)]
        one_P, one_q, one_G, one_h = inputs
        problem = QP(
            one_P if one_P.dim() == 3 else one_P.unsqueeze(0), one_q,
            one_G if one_G.dim() == 3 else one_G.unsqueeze(0), torch.full_like(one_h, -INF), one_h,
        )  # fmt: skip
        x = solve(problem, backend="qpth").x
        return torch.autograd.grad((x * cotangent).sum(), inputs)

    G, h = A[:, there], base.u[:, there]
    assert there.sum() >= 2
    for mine, theirs in zip(our_gradients(P, base.q, G, h), raw_gradients(P, base.q, G, h),
                            strict=True):  # fmt: skip
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-6)

    mine = our_gradients(P[0], base.q, G[0], h[0])
    theirs = raw_gradients(P[0], base.q, G[0], h[0])
    assert torch.allclose(mine[1], theirs[1], rtol=1e-6, atol=1e-6)
    for ours, mean in zip((mine[0], *mine[2:]), (theirs[0], *theirs[2:]), strict=True):
        assert torch.allclose(ours, batch * mean, rtol=1e-6, atol=1e-6)


class Readbacks(TorchDispatchMode):
    """Counts the numbers that the host asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["diagonal", "dense"])
def test_the_backward_reads_no_data_back(form: str) -> None:
    counts = set()
    for batch in (2, 16):
        problem = problem_of(batch=batch, form=form)
        backend = QPTH()
        solution = backend.solve(problem)
        with Readbacks() as seen:
            backend.vjp(problem, solution, torch.ones_like(problem.q))
        counts.add(seen.count)
    # One question of yes or no: is P positive, or is the matrix regular?
    assert len(counts) == 1
    assert counts.pop() <= 2


# ---------------------------------------------------------------- devices, threads, imports


def test_on_the_device_of_the_tensors(device: torch.device) -> None:
    here = mixed()
    parts = (here.P, here.q, here.rows.to_dense().matrix, here.l, here.u, here.lb, here.ub)
    there = QP(*(t.to(device) for t in parts))
    solution = solved(there)
    assert solution.x.device.type == device.type
    assert solution.row_dual.device.type == device.type
    assert (solution.x.cpu() - small(here)).abs().max() < 1e-12
    q = there.q.clone().requires_grad_()
    solve(changed(there, q=q), backend="qpth").x.sum().backward()
    assert q.grad is not None
    assert q.grad.device.type == device.type


def test_one_bad_problem_on_the_device_of_the_tensors(device: torch.device) -> None:
    bad = infeasible(problem_of(equalities=1))
    parts = (bad.P, bad.q, bad.rows.to_dense().matrix, bad.l, bad.u, bad.lb, bad.ub)
    solution = QPTH().solve(QP(*(t.to(device) for t in parts)))
    assert [s is Status.SOLVED for s in solution.status] == [True, False, True, True]
    assert solution.status[1] is Status.INFEASIBLE


def test_threads_with_problems_of_different_sizes() -> None:
    problems = [problem_of(batch=1 + k % 3, n=4 + k % 5, m=k % 4, seed=k) for k in range(24)]
    backend = QPTH()
    with ThreadPoolExecutor(4) as pool:
        together = [s.x for s in pool.map(backend.solve, problems)]
    for problem, x in zip(problems, together, strict=True):
        assert torch.equal(x, backend.solve(problem).x)


def test_one_thread_at_a_time_is_in_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    solver = qpth_.load()
    plain, inside, most = solver.forward, [0], [0]

    def forward(*args: Any, **options: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        answer = plain(*args, **options)
        inside[0] -= 1
        return answer

    monkeypatch.setattr(solver, "forward", forward)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(QPTH().solve, [problem_of(seed=k) for k in range(4)]))
    assert most[0] == 1


def test_the_solver_is_loaded_without_the_package_around_it() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('error')\n"
        "from fairopt import backends\n"
        "backends.get('qpth')\n"
        "from fairopt.backends.qpth import backend; backend.load()\n"
        "print(*sorted(n for n in sys.modules if n.split('.')[0] in ('qpth', 'cvxpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split()
    assert not done.stderr


def test_the_package_itself_is_left_as_it_is(raw: Any) -> None:
    batch = importlib.import_module("qpth.solvers.pdipm.batch")
    util = sys.modules["qpth.util"]
    qpth_.load.cache_clear()
    ours = qpth_.load()
    assert sys.modules["qpth.util"] is util
    assert batch.get_step.__module__ == "qpth.solvers.pdipm.batch"
    assert batch.lu_hack.__module__ == "qpth.solvers.pdipm.batch"
    assert ours is not batch
    assert raw.pdipm_b is batch


def test_nothing_large_is_kept_between_solves() -> None:
    QPTH().solve(problem_of())
    assert qpth_.load().factor_kkt_eye is None
