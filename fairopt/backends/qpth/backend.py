"""The batched interior point of the qpth package, on the device where the tensors are.

Best for many small dense problems at once, above all on a GPU: P of any form, any rows and bounds,
LPs too. Each iteration factors one dense matrix per problem with a row for every finite side, so
large problems are for other backends. All work is in float64. An LP whose best vertices are nearly
tied may come out as stalled; ``highs`` is the better choice for LPs on the CPU.

qpth (Amos and Kolter, "OptNet", ICML 2017) wants a positive definite P, one-sided rows, equalities
apart and independent, no infinite side: ``standard_form`` brings a batch into that form. The answer
is accurate to about ``eps``; ``optimality.finishing`` makes it exact to rounding, and our residuals
decide which problems are solved. The others are tried again apart from their batch, with a proximal
term that makes singular systems harmless; those that remain are classified by proofs.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from fairopt.backends.contract import Backend, Capabilities
from fairopt.backends.qpth.proofs import elastic, proof, recession
from fairopt.backends.qpth.standard_form import (
    DEFINITE,
    NONCONVEX,
    SINGULAR,
    Standard,
    curvature,
    to_dense,
)
from fairopt.errors import ProblemError, whole_number
from fairopt.optimality.certificates import proves_unbounded
from fairopt.optimality.finishing import finish, refine
from fairopt.optimality.linear_systems import lu_factor
from fairopt.programs.problem import Problem
from fairopt.programs.solution import RowValues, Solution, Status
from fairopt.tolerances import FEASIBLE, QPTH_AIM, QPTH_ENOUGH, ROW_PRECISION

# The weight of the proximal term, relative to the curvature, in each attempt. A singular P needs
# one: the smaller, the further it moves and the worse its condition. For a definite P, with the
# minimum without constraints perhaps very far from narrow bounds, a large one sees what is near.
PROXIMAL = {
    SINGULAR: (1e-2, 1e-3, 1e-4, 1e-5, 1e-4, 1e-6, 1e2),
    DEFINITE: (0.0, 1e2, 1e4, 1e6, 1e8, 1e3, 1e5),
}
ATTEMPTS = 7
NEAR = 1e-1  # of a row's scale: a point that violates rows by less is worth starting from
PROVE_AT = 2  # the attempt before which what is not solved is tested for having no solution


class QPTH(Backend):
    """The batched primal-dual interior point of qpth.

    Args:
        eps: stop when the residuals of every problem, added up, are below this. They are those of
            the scaled problem, whose solution is about one unit from its minimum without
            constraints.
        max_iter: at most this many iterations of each attempt.
        not_improved_limit: stop an attempt when for this many iterations no problem has improved.
    """

    name: ClassVar[str] = "qpth"
    capabilities: ClassVar[Capabilities] = Capabilities(
        quadratic=frozenset({"diagonal", "dense", "sparse"}),
        linear=True,
        rows=frozenset({"blocks", "cells", "dense", "sparse"}),
        devices=frozenset({"cpu", "cuda"}),
    )

    def __init__(
        self, *, eps: float = 1e-9, max_iter: int = 40, not_improved_limit: int = 3
    ) -> None:
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
            raise ProblemError(f"eps: expected a number between 0 and 1, got {eps!r}")
        for name, value in (("max_iter", max_iter), ("not_improved_limit", not_improved_limit)):
            whole_number(name, value, 1, "an integer of at least 1")
        self.eps = eps
        self.max_iter = max_iter
        self.not_improved_limit = not_improved_limit

    def solve(self, problem: Problem) -> Solution:
        begun = time.perf_counter()
        dense = to_dense(problem)
        dtype = problem.linear.dtype
        kind = curvature(dense, torch.finfo(dtype).eps)
        x, y = self.attempt(dense, kind, torch.zeros_like(dense.lb), 0)
        solution = finish(problem, x, y, backend=self.name)
        good = (shortfall(solution, QPTH_AIM) <= 1) & (kind != NONCONVEX)
        if not all(good.tolist()):
            solution = self.rescue(solution, good, dense, kind)
        return replace(solution, seconds=time.perf_counter() - begun)

    def rescue(self, first: Solution, good: Tensor, problem: Problem, kind: Tensor) -> Solution:
        """The solution after more attempts at what the first left unsolved, and proofs.

        Args:
            first: after the first attempt.
            good: which of its problems are solved, ``(B,)``.
            problem: the same in the form of ``to_dense``.
            kind: its curvature.
        """
        status = [Status.NONCONVEX if k == NONCONVEX else Status.SOLVED for k in kind.tolist()]
        unsolved = [
            b for b, ok in enumerate(good.tolist()) if not ok and status[b] is Status.SOLVED
        ]
        work = Attempts(self, problem, kind, first.x.double(), first.row_dual, unsolved)
        work.run(range(1, PROVE_AT))
        for b, (reason, y) in self.reasons(work).items():
            status[b] = reason
            work.close(b, y)
        work.run(range(PROVE_AT, ATTEMPTS))

        last = finish(first.problem, work.x, work.y, backend=self.name, status=tuple(status))
        keep = good.unsqueeze(-1)
        last = replace(
            last,
            x=torch.where(keep, first.x, last.x),
            row_dual=torch.where(keep, first.row_dual, last.row_dual),
        )
        fine = (shortfall(last, QPTH_ENOUGH) <= 1).tolist()
        ends = (
            Status.STALLED if was is Status.SOLVED and not ok else was
            for was, ok in zip(status, fine, strict=True)
        )
        return replace(last, status=tuple(ends))

    def reasons(self, work: Attempts) -> dict[int, tuple[Status, Tensor]]:
        """For each problem that is shown to have no solution, which way, and its multipliers."""
        if not work.unsolved:
            return {}
        where, part = work.part()
        spread, scale = elastic(part)
        n = part.lb.shape[-1]

        def settled(index: Tensor, x: Tensor, y: Tensor) -> Tensor:
            rows = part.select(index)
            proven, _ = proof(rows, y, scale[index])
            return proven | feasible(rows, x[:, :n])

        search = Attempts.afresh(self, spread)
        search.run(range(ATTEMPTS), settled)
        none, y = proof(part, search.y, scale)
        there = feasible(part, search.x[:, :n])

        def falls(index: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return proves_unbounded(part.select(index), x)

        search = Attempts.afresh(self, recession(part))
        search.run(range(PROVE_AT), falls)
        endless = there & (work.kind[where] == SINGULAR) & proves_unbounded(part, search.x)
        return {
            b: (Status.INFEASIBLE if proven else Status.UNBOUNDED, y[i])
            for i, (b, proven, down) in enumerate(
                zip(work.unsolved, none.tolist(), endless.tolist(), strict=True)
            )
            if proven or down
        }

    def attempt(
        self, problem: Problem, kind: Tensor, center: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """x and the rows' multipliers, as qpth has them; garbage where it failed, perhaps NaN.

        Args:
            problem: from ``to_dense``.
            kind: its curvature.
            center: ``(B, n)``, of the proximal term.
            count: of attempts before this one.
        """
        singular, definite = PROXIMAL[SINGULAR][count], PROXIMAL[DEFINITE][count]
        weight = torch.where(kind == SINGULAR, singular, definite).to(center.dtype)
        form = Standard(problem, weight, center)
        if not form.G.shape[-2]:
            z, nu = form.without_inequalities()
            return form.recover(z, form.h, nu)
        E, e = (form.E, form.e) if form.e.shape[-1] else (form.e.new_zeros(0),) * 2
        with qpth_lock:
            solver = load()
            z, nu, lam, _ = solver.forward(
                form.K, torch.zeros_like(form.K[..., 0]), form.G, form.h, E, e,
                *solver.pre_factor_kkt(form.K, form.G, E),
                eps=self.eps, verbose=-1, notImprovedLim=self.not_improved_limit,
                maxIter=self.max_iter,
            )  # fmt: skip
            vars(solver)["factor_kkt_eye"] = None  # of shape (B, i, i); qpth would keep it
        return form.recover(z, lam, form.e if nu is None else nu)


class Attempts:
    """Attempts at the problems of a batch that are still unsolved, each from the last one's point.

    Attributes:
        problem, kind: the batch and its curvature.
        x, y: the best known points and multipliers, ``(B, n)`` and ``(B, m)``.
        center: the latest points, where they are any good; the next attempts start from there.
        unsolved: indices of the problems not yet solved.
    """

    def __init__(
        self,
        backend: QPTH,
        problem: Problem,
        kind: Tensor,
        x: Tensor,
        y: Tensor,
        unsolved: list[int],
    ) -> None:
        self.backend = backend
        self.problem, self.kind = problem, kind
        self.x, self.y = x, y
        self.center = nearby(problem, x, torch.zeros_like(x))
        self.unsolved = unsolved

    @staticmethod
    def afresh(backend: QPTH, problem: Problem) -> Attempts:
        """No problem of the batch has been tried yet."""
        kind = curvature(problem, torch.finfo(torch.float64).eps)
        y = torch.zeros_like(problem.l)
        return Attempts(backend, problem, kind, torch.zeros_like(problem.lb), y, [*range(len(y))])

    def part(self) -> tuple[Tensor, Problem]:
        """The unsolved problems: their indices, and the problems."""
        where = torch.tensor(self.unsolved, device=self.x.device)
        return where, self.problem.select(where)

    def run(
        self, counts: range, settled: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    ) -> None:
        """Attempts number ``counts``; what our residuals accept is no longer among them.

        Args:
            settled: takes indices, x and y; tells what else need not be tried again.
        """
        for count in counts:
            if not self.unsolved:
                return
            where, part = self.part()
            old_x, old_y = self.x[where], self.y[where]
            before = error(part, old_x, old_y)
            center = self.center[where]
            x, y = self.backend.attempt(part, self.kind[where], center, count)
            x, y = refine(part, x, y)
            self.center = self.center.index_copy(0, where, nearby(part, x, center))
            after = error(part, x, y)
            better = (after < before).unsqueeze(-1)
            x, y = torch.where(better, x, old_x), torch.where(better, y, old_y)
            self.x, self.y = self.x.index_copy(0, where, x), self.y.index_copy(0, where, y)
            done = torch.minimum(after, before) <= 1
            if settled is not None:
                done = done | settled(where, x, y)
            self.unsolved = [
                b for b, ok in zip(self.unsolved, done.tolist(), strict=True) if not ok
            ]

    def close(self, index: int, y: Tensor) -> None:
        """A problem that has no solution, with its multipliers."""
        self.unsolved = [b for b in self.unsolved if b != index]
        self.y = self.y.clone()
        self.y[index] = y


def error(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    """The worst of our residuals in units of what is aimed at, ``(B,)``."""
    return shortfall(Solution(problem=problem, x=x, row_dual=y, status=(), backend=""), QPTH_AIM)


def nearby(problem: Problem, x: Tensor, other: Tensor) -> Tensor:
    """x where it violates no row by much, else the other point."""
    near = (RowValues.at(problem, x).relative <= NEAR).all(-1, keepdim=True)
    return torch.where(near, x, other)


def feasible(problem: Problem, x: Tensor) -> Tensor:
    """Whether x, within the bounds, satisfies the rows to a tolerance that tells: ``(B,)``."""
    return (RowValues.at(problem, x).relative <= FEASIBLE).all(-1)


def shortfall(solution: Solution, limits: Mapping[torch.dtype, tuple[float, ...]]) -> Tensor:
    """The worst of our residuals in units of these limits and of the promised precision: ``(B,)``.

    Above 1, the problem is not solved to these limits; NaN counts as infinite.
    """
    found, dtype = solution.residuals, solution.x.dtype
    optimality = (found.stationarity, found.dual_sign, found.complementarity)
    parts = [found.primal / ROW_PRECISION[dtype]]
    parts += [one / limit for one, limit in zip(optimality, limits[dtype], strict=True)]
    return torch.nan_to_num(torch.stack(parts).amax(0), nan=torch.inf)


# ---------------------------------------------------------------------------------------------
# The solver's module
# ---------------------------------------------------------------------------------------------

# qpth keeps a mask in a module-level variable between two lines that use it.
qpth_lock = threading.Lock()


@cache
def load() -> ModuleType:
    """A copy of our own of ``qpth.solvers.pdipm.batch``, with two of its functions replaced.

    Importing it the usual way runs ``qpth/__init__``, which imports CVXPY. Of the package this
    module uses only ``qpth.util``. As it is a copy, what is replaced is so for nobody else.
    """
    spec = importlib.util.find_spec("qpth")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    name, before = "qpth.util", sys.modules.get("qpth.util")
    sys.modules[name] = before or from_file("fairopt._qpth_util", root / "util.py")
    try:
        solver = from_file("fairopt._qpth_batch", root / "solvers" / "pdipm" / "batch.py")
    finally:
        if before is None:
            del sys.modules[name]
    vars(solver).update(get_step=step_length, lu_hack=factor)
    return solver


def from_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def step_length(v: Tensor, dv: Tensor) -> Tensor:
    """The largest step up to 1 along dv that keeps each v >= 0: ``(B, i)`` to ``(B,)``.

    In the place of one that divides by dv before it looks at its sign: where dv is zero it steps
    to infinity, and min 1/2 x^2 for |x| <= 1 comes out as NaN.
    """
    return torch.where(dv < 0, -v / dv, 1.0).amin(1).clamp(max=1.0)


def factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """LU, on CUDA without pivoting, as the module expects: its blocks are positive definite.

    In the place of one that raises if any matrix of the batch is singular, and loses the others.
    """
    pivot = not matrix.is_cuda
    data, pivots = lu_factor(matrix, pivot=pivot)
    if not pivot:
        natural = torch.arange(1, matrix.shape[-1] + 1, dtype=torch.int32, device=matrix.device)
        pivots = natural.expand(matrix.shape[:-1]).contiguous()
    return data, pivots
