"""The shared backward for any P and any form of rows, against finite differences and itself."""

from __future__ import annotations

from typing import Any, ClassVar

import clarabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch.autograd import gradcheck

from fairopt import QP, DenseRows, Solution, SparseRows, Status, solve
from fairopt.backends import Backend, Capabilities
from fairopt.optimality.linear_systems import least_norm
from fairopt.programs.problem import Problem


class Reference(Backend):
    """Clarabel, for any QP: a solver that knows nothing of fairopt's backward."""

    name = "reference"
    capabilities: ClassVar[Capabilities] = Capabilities(
        quadratic=frozenset({"diagonal", "dense", "sparse"}),
        rows=frozenset({"cells", "dense", "sparse"}),
        devices=frozenset({"cpu"}),
        certifies=True,  # to the accuracy of an interior point, which the tests below allow for
    )

    def solve(self, problem: Problem) -> Solution:
        assert isinstance(problem, QP)
        answers = [self.one(problem, b) for b in range(problem.shape[0])]
        x, y = (torch.from_numpy(np.stack(part)) for part in zip(*answers, strict=True))
        return Solution(problem, x, y, (Status.SOLVED,) * len(x), self.name)

    @staticmethod
    def one(problem: QP, b: int) -> tuple[np.ndarray, np.ndarray]:
        n = problem.shape[2]
        P = problem.P
        if isinstance(P, SparseRows):
            P = P.to_dense().matrix
        P = torch.diag(P[b]) if P.dim() == 2 else P[b]
        A = problem.rows.to_dense().matrix[b].numpy()
        l, u = problem.l[b].numpy(), problem.u[b].numpy()
        lb, ub = problem.lb[b].numpy(), problem.ub[b].numpy()
        G = np.vstack([A, -A, np.eye(n), -np.eye(n)])
        h = np.r_[u, -l, ub, -lb]
        there = np.isfinite(h)
        settings_ = clarabel.DefaultSettings()
        settings_.verbose = False
        settings_.tol_gap_abs = settings_.tol_gap_rel = settings_.tol_feas = 1e-11
        answer = clarabel.DefaultSolver(
            sparse.csc_matrix(np.triu(P.numpy())), problem.q[b].numpy(),
            sparse.csc_matrix(G[there]), h[there],
            [clarabel.NonnegativeConeT(int(there.sum()))], settings_,
        ).solve()  # fmt: skip
        z = np.zeros(len(h))
        z[there] = answer.z
        m = len(l)
        return np.clip(np.array(answer.x), lb, ub), z[:m] - z[m : 2 * m]


def random_qp(seed: int, kind: str, batch: int = 1) -> list[torch.Tensor]:
    """P, q, A, l, u, lb, ub with some rows and bounds active, strictly."""
    rng = np.random.default_rng(seed)
    n, m = 6, 3
    if kind == "diagonal":
        P = 0.5 + rng.random((batch, n))
    else:
        root = rng.normal(size=(batch, n, n))
        P = root @ root.transpose(0, 2, 1) + 0.5 * np.eye(n)
    arrays = [
        P,
        3 * rng.normal(size=(batch, n)),
        rng.normal(size=(batch, m, n)),
        np.full((batch, m), -0.2),
        np.full((batch, m), 0.3),
        np.full((batch, n), -0.8),
        np.full((batch, n), 0.9),
    ]
    return [torch.from_numpy(a).requires_grad_() for a in arrays]


@pytest.mark.parametrize("kind", ["diagonal", "dense", "sparse"])
@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_gradient_against_finite_differences(kind: str, form: str, batch: int) -> None:
    inputs = random_qp(1, kind, batch)

    def solution(P, q, A, l, u, lb, ub):  # type: ignore[no-untyped-def]
        P = 0.5 * (P + P.mT) if P.dim() == 3 else P
        if kind == "sparse":
            P = DenseRows(P).to_sparse()
        rows: Any = DenseRows(A).to_sparse() if form == "sparse" else A
        return solve(QP(P, q, rows, l, u, lb, ub), backend=Reference()).x

    assert gradcheck(solution, inputs, eps=1e-5, atol=1e-4, rtol=1e-3)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_diagonal_and_general_route_agree(seed: int, batch: int) -> None:
    tensors = random_qp(seed, "diagonal", batch)
    grads = []
    for dense in (False, True):
        inputs = [t.detach().clone().requires_grad_() for t in tensors]
        P, *rest = inputs
        problem = QP(torch.diag_embed(P) if dense else P, *rest)
        x = solve(problem, backend=Reference()).x
        x.backward(torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x))
        grads.append([t.grad for t in inputs])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_dependent_rows_get_the_shortest_multiplier() -> None:
    N = torch.tensor([[[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]], dtype=torch.float64)
    c = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    nu = least_norm(N, c)[0]
    # Rows of unit length: the first two share one unknown equally, the third stands alone.
    assert nu.tolist() == pytest.approx([-0.5, -0.25, -1 / 3], abs=1e-15)


def test_gradient_of_x_is_unique_though_rows_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    A = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    g = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    found = []
    for rows in (A, torch.cat([A, A[:1] + A[1:], -3 * A[:1]])):
        sides = rows @ torch.full((8,), 0.1, dtype=torch.float64)
        point = q.clone().requires_grad_()
        x = solve(QP(torch.ones(8).double(), point, rows, sides, sides), backend="numba").x
        x.backward(g)
        found.append(point.grad)
    torch.testing.assert_close(*found, rtol=0, atol=1e-13)
