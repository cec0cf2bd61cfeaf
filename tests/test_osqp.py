"""What is special about the OSQP backend; what it shares with all is in test_contract.py."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Case, cases
from test_refine import qps

pytest.importorskip("osqp", reason='the backend osqp needs it: pip install "fairopt[osqp]"')

from fairopt import (
    QP,
    ConvergenceError,
    DemographicParity,
    DenseRows,
    FairnessLayer,
    FairoptError,
    InfeasibleError,
    ProblemError,
    SparseRows,
    Status,
    backends,
    formulate,
    solve,
)
from fairopt.backends.osqp import backend as osqp_
from fairopt.backends.osqp.backend import OSQP
from fairopt.backends.osqp.scaled import Standard
from fairopt.backends.osqp.workspaces import Workspaces
from fairopt.optimality.derivative import adjoint
from fairopt.optimality.linear_systems import metric, solve_reduced
from fairopt.optimality.sparse_systems import is_convex, solve_sparse


def parity(n: int = 60, batch: int = 1, seed: int = 0, tolerance: float = 0.02) -> QP:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(n) % 3
    scores = torch.rand(batch, n, generator=generator, dtype=torch.float64) * 0.7 + 0.1 * groups
    problem = formulate([DemographicParity(tolerance)], scores, {"group": groups}, bounds=(0, 1))
    assert isinstance(problem, QP)
    return problem


# ---------------------------------------------------------------- answers


@settings(max_examples=60)
@given(cases(200))
def test_agrees_with_the_closed_form_on_parity_problems(case: Case) -> None:
    """Degenerate ones too: rows that depend, groups wholly at a bound, tolerances of nothing."""
    try:
        problem = formulate(
            case.constraints, case.scores, case.groups, case.targets, bounds=case.bounds,
            weights=case.weights,
        )  # fmt: skip
        assert isinstance(problem, QP)
        expected = solve(problem, backend="numba")
    except InfeasibleError:
        with pytest.raises(InfeasibleError) as error:
            solve(problem, backend="osqp")
        assert error.value.rows
        return
    except FairoptError:  # nothing to compare with
        return
    size = float(expected.x.abs().max())
    try:
        found = solve(problem, backend="osqp")
    except ConvergenceError:
        # Refused, not answered wrongly; and only where the sides of some row are so close that no
        # iterative solver can tell which of them many dependent rows lean on.
        width = (problem.u - problem.l) / problem.rows.norms(torch.ones_like(problem.q))
        assert float(width[width > 0].min()) < 1e-6 * size
        return
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-7 * size)


@given(qps())
def test_the_answer_is_exact_not_only_accurate(problem: QP) -> None:
    solution = solve(problem, backend="osqp")
    assert solution.residuals.worst < 1e-12, solution.residuals


def test_units_do_not_matter() -> None:
    """Scores times a power of two: the same steps to the same digits."""
    plain = solve(parity(), backend=OSQP())
    for unit in (2.0**-30, 2.0**30):
        problem = parity()
        problem = QP(
            problem.P, unit * problem.q, problem.rows, unit * problem.l, unit * problem.u,
            unit * problem.lb, unit * problem.ub,
        )  # fmt: skip
        scaled = solve(problem, backend=OSQP())
        assert scaled.iterations == plain.iterations
        assert torch.equal(scaled.x, unit * plain.x)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """OSQP's polishing would, where nothing is active; its setup would, where P is not convex."""
    ones = torch.ones(3).double()
    rows = torch.ones(1, 3).double()
    side = torch.full((1,), 9.0).double()
    free = solve(QP(ones, 0.1 * ones, rows, -side, side, -1.0, 1.0), backend="osqp")
    assert free.row_dual.tolist() == [[0.0]]
    bent = torch.tensor([[[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]).double()
    with pytest.raises(ProblemError, match="negative eigenvalue"):
        solve(QP(bent, ones, rows, -side, side, -1.0, 1.0), backend="osqp")
    with pytest.raises(InfeasibleError):
        solve(QP(ones, ones, rows, side, side, -1.0, 1.0), backend="osqp")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


# ---------------------------------------------------------------- failures


def test_at_the_iteration_limit_what_is_not_exact_is_stalled() -> None:
    torch.manual_seed(0)
    n, m = 40, 20
    root = torch.randn(n, n).double()
    A, q = torch.randn(m, n).double(), 10 * torch.randn(n).double()
    side = torch.full((m,), 0.1).double()
    problem = QP((root @ root.T).unsqueeze(0), q, A, -side, side, -0.2, 0.2)
    assert OSQP(max_iter=1).solve(problem).status == (Status.STALLED,)
    with pytest.raises(ConvergenceError, match="problem 0"):
        solve(problem, backend=OSQP(max_iter=1))
    assert solve(problem, backend=OSQP()).residuals.worst < 1e-12


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize(("smallest", "convex"), [(-1e-8, False), (0.0, True), (1e-8, True)])
def test_a_slightly_indefinite_P_is_caught(form: str, smallest: float, convex: bool) -> None:
    """OSQP itself looks at P + sigma I with the rows' curvature added, and would see nothing."""
    torch.manual_seed(0)
    n = 12
    basis, _ = torch.linalg.qr(torch.randn(n, n).double())
    values = torch.cat([torch.tensor([smallest]), torch.linspace(0.5, 2.0, n - 1)]).double()
    dense = (basis * values) @ basis.T
    dense = 0.5 * (dense + dense.T)
    P: Any = dense.unsqueeze(0) if form == "dense" else SparseRows.from_tensor(dense)
    zero = torch.zeros(n).double()
    problem = QP(P, zero, torch.ones(1, n).double(), zero[:1] - 1, zero[:1] + 1, -1.0, 1.0)
    assert is_convex(problem, 0) is convex
    expected = Status.SOLVED if convex else Status.NONCONVEX
    assert OSQP().solve(problem).status == (expected,)


def test_a_conflict_far_smaller_than_the_data_is_found() -> None:
    """Bounds miss a row by 1e-6 of the scores: the first stage, to 1e-4, cannot see it."""
    q = torch.tensor([-1.0, -1e6]).double()
    A, one = torch.tensor([[1.0, 1.0]]).double(), torch.ones(1).double()
    solution = OSQP().solve(QP(torch.ones(2).double(), q, A, 3 * one, 3 * one, 0.0, 1.0))
    assert solution.status == (Status.INFEASIBLE,)
    assert float(solution.row_dual) < 0  # the lower side pushes


def test_no_point_comes_before_no_minimum() -> None:
    """The objective falls without end, but there is no point either: that is what is said."""
    P, q = torch.tensor([0.0, 1.0]).double(), torch.tensor([-1.0, 0.0]).double()
    A = torch.tensor([[0.0, 1.0]]).double()
    for side, status in ((0.5, Status.UNBOUNDED), (2.0, Status.INFEASIBLE)):
        low = torch.tensor([side]).double()
        solution = OSQP().solve(QP(P, q, A, low, low + 1, torch.tensor([0.0, -1.0]).double(), None))
        assert solution.status == (Status.SOLVED if status is None else Status.UNBOUNDED,)
        ub = torch.tensor([torch.inf, 1.0]).double()
        solution = OSQP().solve(QP(P, q, A, low, low + 1, 0.0, ub))
        assert solution.status == (status,)


@pytest.mark.parametrize("option", ["eps", "max_iter", "threads"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ProblemError, match=f"{option}: expected"):
        backends.get("osqp", **{option: 0})
    assert f"{option}=" in repr(OSQP())


def test_max_iter_and_eps_reach_the_solver() -> None:
    problem = parity()
    coarse, fine = (OSQP(eps=eps).solve(problem).iterations[0] for eps in (1e-3, 1e-11))
    assert coarse < fine
    assert OSQP(eps=1e-11, max_iter=fine - 5).solve(problem).iterations[0] < fine + 60


# ---------------------------------------------------------------- workspaces


@pytest.fixture
def setups(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every workspace that is set up."""
    made: list[Any] = []
    original = osqp_.Workspace.__init__

    def counted(self: Any, *args: Any) -> None:
        made.append(self)
        original(self, *args)

    monkeypatch.setattr(osqp_.Workspace, "__init__", counted)
    return made


def test_a_workspace_is_kept_while_the_pattern_stays(setups: list[Any]) -> None:
    backend = OSQP()
    for seed in range(4):
        solve(parity(seed=seed), backend=backend)
    assert len(setups) == 1
    solve(parity(n=61), backend=backend)
    assert len(setups) == 2
    scaled = parity()
    rows = scaled.rows
    changed = QP(
        2 * scaled.P, scaled.q, rows.with_tensors(*(3 * t for t in rows.tensors)),
        9 * scaled.l, 9 * scaled.u, scaled.lb, scaled.ub,
    )  # fmt: skip
    exact = solve(changed, backend="numba").x
    assert torch.allclose(solve(changed, backend=backend).x, exact, rtol=0, atol=1e-13)
    assert len(setups) == 2  # all values changed, the pattern did not


def test_history_does_not_show_in_the_answer() -> None:
    used = OSQP()
    for seed in range(5):
        problem = parity(seed=seed, tolerance=0.01 * (seed + 1))
        a, b = solve(problem, backend=used), solve(problem, backend=OSQP())
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-14)
        torch.testing.assert_close(a.row_dual, b.row_dual, rtol=0, atol=1e-12)


def test_the_next_batch_starts_from_what_rows_cost_in_the_last() -> None:
    """At a solution that start is the solution, whatever the solver had before."""
    generator = torch.Generator().manual_seed(0)

    def next_problem() -> QP:
        groups = torch.randint(0, 2, (2000,), generator=generator)
        scores = torch.rand(2000, generator=generator, dtype=torch.float64) * 0.8 + 0.2 * groups
        found = formulate(DemographicParity(0.02), scores, groups, bounds=(0, 0.9))
        assert isinstance(found, QP)
        return found

    problem = next_problem()
    exact = solve(problem, backend="numba")
    form = Standard(problem).scaled(0)
    x, y = form.start(exact.row_dual[0].numpy())
    torch.testing.assert_close(torch.from_numpy(form.s * x), exact.x[0], rtol=0, atol=1e-13)
    A = form.A_pattern.matrix(form.A)
    assert np.abs(x + form.q + A.T @ y).max() < 1e-14
    outside = np.maximum(A @ x - form.u, form.l - A @ x)
    assert outside.max() < 1e-13
    assert np.abs(y[1:][outside[1:] < -1e-9]).max() == 0

    used = OSQP()
    solve(problem, backend=used)
    kept = fresh = 0
    for _ in range(5):
        problem = next_problem()
        kept += solve(problem, backend=used).iterations[0]
        fresh += solve(problem, backend=OSQP()).iterations[0]
    assert kept < fresh


def test_a_failure_leaves_no_workspace_behind() -> None:
    backend = OSQP()
    groups = torch.arange(60) % 3
    apart = torch.where(groups == 2, 0.9, 0.0).double(), torch.where(groups == 2, 1.0, 0.5).double()
    problem = parity()
    impossible = QP(problem.P, problem.q, problem.rows, problem.l, problem.u, *apart)
    with pytest.raises(InfeasibleError) as error:
        solve(impossible, backend=backend)
    assert error.value.rows
    assert len(backend._workspaces) == 0
    a, b = solve(problem, backend=backend), solve(problem, backend="numba")
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-14)


def test_workspaces_are_bounded_in_number() -> None:
    backend = OSQP()
    for n in range(30, 30 + 2 * osqp_.KEPT):
        solve(parity(n=n), backend=backend)
    assert len(backend._workspaces) == osqp_.KEPT


def test_the_least_recently_used_goes_first() -> None:
    kept: Workspaces[str] = Workspaces(2)
    for key in "ab":
        kept.give(key, key.upper())
    assert kept.take("a") == "A"
    assert kept.take("a") is None  # one taker at a time
    kept.give("a", "A")
    kept.give("c", "C")
    assert kept.take("b") is None
    assert (kept.take("a"), kept.take("c"), len(kept)) == ("A", "C", 0)


def test_workspaces_are_not_part_of_a_copy_or_a_pickle() -> None:
    layer = FairnessLayer(DemographicParity(0.05), bounds=(0, 1), backend=OSQP(eps=1e-8, threads=1))
    scores, groups = torch.rand(50).double(), torch.arange(50) % 2
    expected = layer(scores, groups)
    backend = layer.backend
    assert isinstance(backend, OSQP)
    assert len(backend._workspaces) == 1
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other.backend) == repr(backend)
        assert len(other.backend._workspaces) == 0
        assert torch.equal(other(scores, groups), expected)
    assert len(pickle.dumps(backend)) < 1000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_starts_without() -> None:
    backend = OSQP()
    solve(parity(), backend=backend)
    backend._workspaces.lock.acquire()  # as another thread of the parent might hold it
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            empty = len(backend._workspaces) == 0
            x = backend.solve(parity()).x
            os.write(write, b"good" if empty and bool(torch.isfinite(x).all()) else b"bad")
        finally:
            os._exit(0)
    backend._workspaces.lock.release()
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"good"
    os.close(read)
    os.close(write)


def test_threads_never_share_a_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    busy: set[int] = set()
    shared: list[int] = []
    lock = threading.Lock()
    original = osqp_.Workspace.solve

    def watched(self: Any, *args: Any) -> Any:
        with lock:
            if id(self) in busy:
                shared.append(id(self))
            busy.add(id(self))
        try:
            return original(self, *args)
        finally:
            with lock:
                busy.discard(id(self))

    monkeypatch.setattr(osqp_.Workspace, "solve", watched)
    backend = OSQP()
    problems = [parity(seed=seed) for seed in range(24)]
    expected = [solve(problem, backend="numba").x for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda p: solve(p, backend=backend).x, problems))
    assert not shared
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("own", "torch_s", "workers"), [(None, 3, 3), (2, 3, 2), (None, 1, 1)])
def test_a_batch_uses_as_many_threads_as_it_may(
    own: int | None, torch_s: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = osqp_.in_parallel

    def recorded(work: Any, size: int, workers: int) -> Any:
        asked.append(workers)
        return original(work, size, workers)

    monkeypatch.setattr(osqp_, "in_parallel", recorded)
    torch.set_num_threads(torch_s)
    problem = parity(batch=6)
    x = solve(problem, backend=OSQP(threads=own)).x
    assert asked == [workers]
    torch.testing.assert_close(x, solve(problem, backend="numba").x, rtol=0, atol=1e-14)


# ---------------------------------------------------------------- the problem as OSQP gets it


@given(qps())
def test_the_scaled_problem_is_the_problem(problem: QP) -> None:
    standard = Standard(problem)
    for b in range(problem.shape[0]):
        form = standard.scaled(b)
        m = problem.shape[1]
        P = form.P_pattern.matrix(form.P).toarray()
        P = P + np.triu(P, 1).T
        A = form.A_pattern.matrix(form.A).toarray()
        for row in form.A_pattern, form.P_pattern:
            matrix = row.matrix(np.ones(len(form.A if row is form.A_pattern else form.P)))
            assert matrix.has_canonical_format  # sorted, nothing twice
        assert np.abs(P.diagonal()[P.diagonal() != 0] - 1).max(initial=0) < 1e-12
        lengths = np.linalg.norm(A, axis=1)
        assert np.abs(lengths[lengths > 0] - 1).max(initial=0) < 1e-12
        z = np.random.default_rng(0).normal(size=len(form.q))
        x = torch.from_numpy(form.s * z).expand(problem.shape[0], -1)
        plain = 0.5 * x * problem.apply_quadratic(x) + x * problem.q
        unit2 = (form.s**2 * problem.diagonal()[b].numpy())[0]
        assert unit2 * (0.5 * z @ P @ z + form.q @ z) == pytest.approx(float(plain[b].sum()))
        value = form.t * 0 + (A @ z)[:m] * unit2 / form.t
        assert value == pytest.approx(problem.rows.apply(x)[b].numpy(), abs=1e-9 * np.abs(z).max())
        side = form.u[:m] * unit2 / form.t
        assert side == pytest.approx(problem.u[b].numpy())


# ---------------------------------------------------------------- sparse linear algebra


@given(qps(), st.integers(0, 1000), st.booleans())
def test_the_sparse_system_is_the_shared_one(problem: QP, seed: int, dependent: bool) -> None:
    torch.manual_seed(seed)
    if dependent and problem.shape[1] > 1:
        A = problem.rows.to_dense().matrix.clone()
        A[:, -1] = -2 * A[:, 0]
        problem = QP(
            problem.P, problem.q, A, torch.full_like(problem.l, -1), torch.ones_like(problem.u)
        )
    active, free = torch.rand_like(problem.l) < 0.6, torch.rand_like(problem.q) < 0.8
    d = metric(problem)
    right, low = torch.randn_like(problem.q), torch.randn_like(problem.l)
    for row_right in (None, low):
        v, nu = solve_reduced(problem, active, free, d, right, row_right)
        v_sparse, nu_sparse = solve_sparse(problem, active, free, d, right, row_right)
        top = 1 + float(v.abs().max())
        torch.testing.assert_close(v_sparse, v, rtol=1e-7, atol=1e-7 * top)
        length = problem.rows.norms(1 / d)
        torch.testing.assert_close(nu_sparse * length, nu * length, rtol=1e-7, atol=1e-7 * top)


@given(qps())
def test_the_backward_is_the_shared_one(problem: QP) -> None:
    backend = OSQP()
    solution = backend.solve(problem)
    g = torch.linspace(-1, 1, problem.q.numel()).double().view_as(problem.q)
    own, shared = backend.vjp(problem, solution, g), adjoint(problem, solution, g)
    top = 1 + float(shared.v.abs().max())
    torch.testing.assert_close(own.v, shared.v, rtol=1e-7, atol=1e-7 * top)
    length = problem.rows.norms(1 / problem.diagonal())
    torch.testing.assert_close(own.nu * length, shared.nu * length, rtol=1e-6, atol=1e-6 * top)


def test_large_sparse_problems_never_become_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of 10,000 variables, P tridiagonal, every tenth row an average of neighbours."""

    def refused(self: SparseRows) -> DenseRows:
        raise AssertionError("made dense")

    monkeypatch.setattr(SparseRows, "to_dense", refused)
    n = 10_000
    i = torch.arange(n)
    P = SparseRows(
        torch.cat([i, i[1:], i[:-1]]),
        torch.cat([i, i[:-1], i[1:]]),
        torch.cat([torch.full((n,), 2.0), torch.full((2 * n - 2,), -1.0)]).double(),
        n,
        n,
    )
    m = n // 10
    row = torch.arange(m).repeat_interleave(5)
    column = (10 * row + torch.arange(5).repeat(m)) % n
    rows = SparseRows(row, column, torch.full((5 * m,), 0.2).double(), m, n)
    q = torch.sin(0.01 * i).double().requires_grad_()
    side = torch.full((m,), 0.3).double()
    x = solve(QP(P, q, rows, -side, side, -1.0, 1.0), backend="osqp").x
    direction = torch.cos(0.02 * i).double()
    (x[0] * direction).sum().backward()
    assert q.grad is not None

    # Along one direction, against a difference of solutions.
    step, towards = 1e-6, torch.sin(0.05 * i).double()
    with torch.no_grad():
        ends = [
            solve(QP(P, q + s * towards, rows, -side, side, -1.0, 1.0), backend="osqp").x[0]
            for s in (-step, step)
        ]
    expected = float((ends[1] - ends[0]) @ direction) / (2 * step)
    assert float(q.grad @ towards) == pytest.approx(expected, rel=1e-4)


def test_repeated_entries_of_sparse_rows_add_up() -> None:
    rows = SparseRows(
        torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]),
        torch.tensor([[1.0, -3.0, 2.0, 5.0]]).double(), 2, 2,
    )  # fmt: skip
    assert rows.absolute().to_dense().matrix.tolist() == [[[2.0, 5.0], [0.0, 2.0]]]
    d = torch.tensor([[1.0, 4.0]]).double()
    assert rows.norms(d).tolist() == rows.to_dense().norms(d).tolist()
    twice = SparseRows(
        torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]), torch.ones(3).double(), 2, 2
    )
    side = torch.tensor([9.0, 9.0]).double()
    problem = QP(twice, torch.tensor([-1.0, -3.0]).double(), rows, -side, side)
    assert problem.diagonal().tolist() == [[2.0, 1.0]]
    # (0.5, 3) would have 14 in the first row, 5 x2 - 2 x1; the curvatures are 2 and 1.
    y = (14.0 - 9.0) / (4 / 2 + 25 / 1)
    x = solve(problem, backend="osqp").x[0].tolist()
    assert x == pytest.approx([0.5 + 2 * y / 2, 3.0 - 5 * y], abs=1e-14)
