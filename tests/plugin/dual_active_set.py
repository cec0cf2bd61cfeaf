"""A dual active-set method, dense: Goldfarb and Idnani, Mathematical Programming 27 (1983), 1-33.

From the unconstrained minimum, take in the most violated constraint, again and again, and leave go
of those whose multiplier would change its sign. Every constraint is written c.x >= d. With
P = L L^T the algebra is that of least squares in L^-1 c.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fairopt import QP, Solution, SparseRows, Status, UnsupportedProblemError
from fairopt.backends import Backend, Capabilities
from fairopt.programs.problem import Problem

Array = NDArray[np.float64]

DEPENDENT = 1e-10  # what is left of a unit vector that lies in the span of others
VIOLATED = 1e-13  # relative to the scale of the promise


class DualActiveSet(Backend):
    """For small dense strictly convex problems; exact to rounding.

    Args:
        rounds: at most this many constraints are taken in, for each row and variable.
    """

    name: ClassVar[str] = "dual-active-set"
    capabilities: ClassVar[Capabilities] = Capabilities(
        quadratic=frozenset({"diagonal", "dense", "sparse"}),
        rows=frozenset({"cells", "dense", "sparse"}),
        devices=frozenset({"cpu"}),
    )

    def __init__(self, *, rounds: int = 20) -> None:
        self.rounds = rounds

    def solve(self, problem: Problem) -> Solution:
        assert isinstance(problem, QP)
        P = problem.P.to_dense().matrix if isinstance(problem.P, SparseRows) else problem.P
        P = torch.diag_embed(P) if problem.is_diagonal else P
        rows = problem.rows
        A = rows.with_tensors(*(t.double() for t in rows.tensors)).to_dense().matrix
        data = [
            t.double().numpy()
            for t in (P, problem.q, A, problem.l, problem.u, problem.lb, problem.ub)
        ]
        answers = [self.solve_one(*(array[b] for array in data)) for b in range(len(problem.q))]
        x, row_dual, status, iterations = zip(*answers, strict=True)
        rounded = torch.from_numpy(np.stack(x)).to(problem.q.dtype)
        lb, ub = (side.to(problem.q.dtype) for side in (problem.lb, problem.ub))
        return Solution(
            problem=problem,
            x=rounded.clamp(lb, ub),
            row_dual=torch.from_numpy(np.stack(row_dual)),
            status=status,
            backend=self.name,
            iterations=iterations,
        )

    def solve_one(
        self, P: Array, q: Array, A: Array, l: Array, u: Array, lb: Array, ub: Array
    ) -> tuple[Array, Array, Status, int]:
        """x, the row multipliers, the status and the number of steps of one problem."""
        n, m = len(q), len(l)
        eigenvalues = np.linalg.eigvalsh(P)
        if eigenvalues[0] < -1e-12 * np.abs(eigenvalues).max():
            return np.zeros(n), np.zeros(m), Status.NONCONVEX, 0
        if eigenvalues[0] <= 1e-13 * eigenvalues[-1]:
            raise UnsupportedProblemError(f"backend {self.name!r} needs a positive definite P")
        inverse = np.linalg.inv(np.linalg.cholesky(P))  # L^-1

        # Lower sides of rows and bounds, then upper ones; c.x >= d in units of |c|.
        values = np.vstack([A, np.eye(n)])
        low, high = np.r_[l, lb], np.r_[u, ub]
        C, d = np.vstack([values, -values]), np.r_[low, -high]
        length = np.linalg.norm(C, axis=1)
        length[length == 0] = 1.0
        C, d = C / length[:, None], d / length
        equal = np.r_[low == high, low == high]

        constrains = np.isfinite(d)
        scale = np.abs(d, where=constrains, out=np.zeros_like(d)) + 1e-300

        x = -inverse.T @ (inverse @ q)
        active: list[int] = []
        multiplier = np.zeros(0)
        status, steps = Status.STALLED, 0
        while steps < self.rounds * (n + m):
            steps += 1
            if active:  # rounding must not look like a violation of what depends on these
                B = inverse @ C[active].T
                x = x + inverse.T @ np.linalg.lstsq(B.T, d[active] - C[active] @ x, rcond=None)[0]
            violation = np.full(len(d), -np.inf)
            terms = np.abs(C).sum(1) * np.abs(x).max() + scale
            np.divide(d - C @ x, terms, where=constrains, out=violation)
            violation[active] = -np.inf
            violation[equal & (violation > VIOLATED)] += 10.0  # these first
            new = int(np.argmax(violation))
            if violation[new] <= VIOLATED:
                status = Status.SOLVED
                break
            push = 0.0
            while True:
                B, c = inverse @ C[active].T, inverse @ C[new]
                r = np.linalg.lstsq(B, c, rcond=None)[0] if active else np.zeros(0)
                left = c - B @ r
                falls = (r > 1e-14) & ~equal[active]
                limits = np.where(falls, multiplier / np.where(falls, r, 1.0), np.inf)
                first = float(limits.min(initial=np.inf))
                full = np.inf
                if np.linalg.norm(left) > DEPENDENT * np.linalg.norm(c):
                    full = (d[new] - C[new] @ x) / (left @ left)
                t = min(first, full)
                if not np.isfinite(t):  # no point satisfies the active ones and the new one
                    proof = np.zeros(len(d))
                    proof[active], proof[new] = -r, 1.0
                    return x, rows_of(proof / length, m), Status.INFEASIBLE, steps
                if np.isfinite(full):
                    x = x + t * (inverse.T @ left)
                multiplier, push = multiplier - t * r, push + t
                if t == full:
                    active.append(new)
                    multiplier = np.append(multiplier, push)
                    break
                gone = int(np.argmin(limits))
                del active[gone]
                multiplier = np.delete(multiplier, gone)

        if active:
            B = inverse @ C[active].T
            multiplier = np.linalg.lstsq(B, inverse @ (P @ x + q), rcond=None)[0]
        dual = np.zeros(len(d))
        dual[active] = multiplier
        return np.clip(x, lb, ub), rows_of(dual / length, m), status, steps


def rows_of(dual: Array, m: int) -> Array:
    """From the multipliers of all sides those of the rows: positive where the upper side pushes."""
    lower, upper = np.split(dual, 2)
    rows: Array = (upper - lower)[:m]
    return rows
