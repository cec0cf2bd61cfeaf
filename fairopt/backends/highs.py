"""Linear programs by HiGHS, as it comes with SciPy.

Best for LPs of any shape: dense, sparse and cell-structured rows, ill-posed ones included. The
answer is a vertex, where there is one. CPU only; no quadratic term, hence no gradient: for that,
give ``solve(..., smoothing=...)`` a positive value, which makes the LP a projection.

Each problem of the batch is passed as

    minimise c^T x    subject to    A x - z = b,    lb <= x <= ub,    l <= z <= u,

with b = u and no z for equality rows, b = 0 for the others: a row with two sides stays one
row. HiGHS takes feasibility absolutely, so that data far from 1 would be solved to no digit at all;
rows, costs and x are therefore scaled before, by powers of two, which round nothing.

HiGHS's own word that a problem is infeasible or unbounded is not passed on. Either is proven by a
further LP: the least total violation of the rows, whose multipliers are Farkas' weights, or the
steepest direction in which rows and bounds never end.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog

from fairopt.backends.contract import Backend, Capabilities
from fairopt.errors import ProblemError
from fairopt.optimality.certificates import first_proof, proves_unbounded, sharpen_proof
from fairopt.optimality.finishing import finish
from fairopt.optimality.linear_systems import solve_reduced
from fairopt.optimality.sparse_systems import solve_sparse
from fairopt.programs.problem import LP, Problem
from fairopt.programs.solution import Solution, Status
from fairopt.tolerances import FEASIBLE, HIGHS_FEASIBILITY

Array = NDArray[Any]
Method = Literal["simplex", "interior-point"]
METHODS = dict(zip(get_args(Method), ("highs-ds", "highs-ipm"), strict=True))

# On some unbounded problems HiGHS's interior point method never ends (min -x, x free, with a row of
# zeros). After this many iterations, more on large problems, it is stopped and looked into.
GUARD = 10_000


class HiGHS(Backend):
    """Simplex or interior point with crossover.

    Args:
        method: ``"simplex"`` is the dual simplex method; ``"interior-point"`` can be faster on
            large sparse problems. Both end at a vertex.
        eps: how far rows, bounds and reduced costs may be off in HiGHS's own answer, in
            units of the scaled data. Our answer is refined from it and does not depend on it, as
            long as the active constraints are found.
        presolve: whether HiGHS simplifies the problem first. Worth it for large sparse problems
            with redundant rows; on a row over all samples its time grows as their square.
        max_iter: at most this many iterations of each run of HiGHS; ``None`` for no limit but one
            that keeps the interior point method from going on for ever.
        time_limit: at most about this many seconds for each of them: HiGHS looks at the clock
            between iterations. ``None`` for no limit.

    A problem that meets a limit is ``STALLED``. One that cannot be solved takes up to three runs,
    the other two to prove why.
    """

    name: ClassVar[str] = "highs"
    capabilities: ClassVar[Capabilities] = Capabilities(
        linear=True,
        rows=frozenset({"blocks", "cells", "dense", "sparse"}),
        devices=frozenset({"cpu"}),
    )

    def __init__(
        self,
        *,
        method: Method = "simplex",
        eps: float = HIGHS_FEASIBILITY,
        presolve: bool = False,
        max_iter: int | None = None,
        time_limit: float | None = None,
    ) -> None:
        if method not in METHODS:
            raise ProblemError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if not (is_number(eps) and HIGHS_FEASIBILITY <= eps <= 1e-3):
            raise ProblemError(
                f"eps: expected a number from {HIGHS_FEASIBILITY:g} to 1e-3, got {eps!r}"
            )
        if not isinstance(presolve, bool):
            raise ProblemError(f"presolve: expected True or False, got {presolve!r}")
        if max_iter is not None and (type(max_iter) is not int or max_iter < 1):
            raise ProblemError(f"max_iter: expected an integer of at least 1, got {max_iter!r}")
        if time_limit is not None and not (is_number(time_limit) and time_limit > 0):
            raise ProblemError(f"time_limit: expected a positive number, got {time_limit!r}")
        self.method = method
        self.eps = eps
        self.presolve = presolve
        self.max_iter = max_iter
        self.time_limit = time_limit

    def solve(self, problem: Problem) -> Solution:
        assert isinstance(problem, LP)
        begun = time.perf_counter()
        programs = scaled(problem)
        answers = [
            program.answer(run)
            for program, run in zip(programs, self.each(programs, self.method), strict=True)
        ]
        unsolved = [b for b, answer in enumerate(answers) if answer.status is None]
        if unsolved:
            self.explain(problem, programs, answers, unsolved)
        solution = finish(
            problem,
            torch.from_numpy(np.stack([answer.x for answer in answers])),
            torch.from_numpy(np.stack([answer.y for answer in answers])),
            backend=self.name,
            status=tuple(answer.status or Status.STALLED for answer in answers),
            iterations=tuple(answer.iterations for answer in answers),
            reduced=solve_sparse if problem.rows.is_sparse else solve_reduced,
        )
        return replace(solution, seconds=time.perf_counter() - begun)

    def explain(
        self, problem: LP, programs: list[Program], answers: list[Answer], unsolved: list[int]
    ) -> None:
        """Find out why some problems have no solution; without a proof the status stays open.

        The proofs are the simplex method's, whose multipliers are exact; after a crossover they
        are sometimes not.
        """
        # Is there a point that satisfies the rows?
        nearest = self.each([programs[b].elastic() for b in unsolved], "simplex")
        for b, run in zip(unsolved, nearest, strict=True):
            answers[b] = answers[b].with_point(programs[b].answer(run))
        y = torch.from_numpy(np.stack([answer.y for answer in answers]))
        # Rounding may leave multipliers that push a little to infinite sides.
        infeasible, y = first_proof(problem, y, sharpen_proof(problem, y))
        feasible = []
        for b, run in zip(unsolved, nearest, strict=True):
            if infeasible[b]:
                answers[b] = replace(answers[b], status=Status.INFEASIBLE, y=y[b].numpy())
            elif run.status == SOLVED and run.objective <= FEASIBLE * programs[b].size():
                feasible.append(b)
        # If so: does the objective fall for ever?
        rays = self.each([programs[b].directions() for b in feasible], "simplex")
        direction = torch.zeros(problem.c.shape, dtype=torch.float64)
        for b, run in zip(feasible, rays, strict=True):
            direction[b] = torch.from_numpy(programs[b].feasible_direction(run.x))
            answers[b] = replace(answers[b], iterations=answers[b].iterations + run.iterations)
        falls = proves_unbounded(problem, direction)
        for b in feasible:
            answers[b] = replace(answers[b], status=Status.UNBOUNDED if falls[b] else None)

    def each(self, programs: list[Program], method: Method) -> list[Run]:
        """Solve several programs, on as many threads as torch may use."""
        workers = min(len(programs), torch.get_num_threads())
        if workers <= 1:
            return [self.run(program, method) for program in programs]
        with ThreadPoolExecutor(workers) as pool:  # HiGHS lets go of the interpreter's lock
            return list(pool.map(self.run, programs, repeat(method)))

    def run(self, p: Program, method: Method) -> Run:
        """One run of HiGHS."""
        m, n = p.A.shape
        sided = np.flatnonzero(p.l != p.u)
        z = len(sided)
        minus_z = sparse.csc_array((-np.ones(z), (sided, np.arange(z))), shape=(m, z))
        options = {
            "presolve": self.presolve,
            "primal_feasibility_tolerance": self.eps,
            "dual_feasibility_tolerance": self.eps,
        }
        guard = max(GUARD, 10 * (m + n))
        if self.max_iter is not None:
            options["maxiter"] = self.max_iter
        elif method == "interior-point":
            options["maxiter"] = guard
        if self.time_limit is not None:
            options["time_limit"] = self.time_limit
        found = linprog(
            np.concatenate([p.c, np.zeros(z)]),
            A_eq=sparse.hstack([p.A, minus_z], format="csc") if m else None,
            b_eq=np.where(p.l == p.u, p.u, 0.0) if m else None,
            bounds=np.stack(
                [np.concatenate([p.lb, p.l[sided]]), np.concatenate([p.ub, p.u[sided]])], axis=1
            ),
            method=METHODS[method],
            options=options,
        )
        iterations = int(found.nit or 0) + int(found.crossover_nit or 0)  # None after an error
        if found.status != SOLVED:
            endless = found.status == LIMIT and self.max_iter is None and iterations >= guard
            status = UNKNOWN if endless else found.status
            return Run(status, np.zeros(n), np.zeros(m), np.nan, iterations)
        y = -found.eqlin.marginals if m else np.zeros(0)
        return Run(SOLVED, found.x[:n], y, found.fun, iterations)


# linprog's numbers. UNKNOWN, 2 (infeasible) and 3 (unbounded) are examined further.
SOLVED, LIMIT, UNKNOWN = 0, 1, 4


@dataclass(frozen=True)
class Run:
    """The result of HiGHS: x ``(n,)`` and y ``(m,)``, our sign, if its status is ``SOLVED``."""

    status: int
    x: Array
    y: Array
    objective: float
    iterations: int


@dataclass(frozen=True)
class Answer:
    """The answer for one problem, in its own units; ``status`` is ``None`` until it is known."""

    status: Status | None
    x: Array
    y: Array
    iterations: int

    def with_point(self, other: Answer) -> Answer:
        """This status, at the other's point."""
        return replace(other, status=self.status, iterations=self.iterations + other.iterations)


@dataclass(frozen=True)
class Program:
    """One LP in NumPy, scaled.

    Attributes:
        c, A, l, u, lb, ub: the scaled data, A in compressed columns.
        unit, row_unit, cost_unit: x, A x and c of the problem are ``unit``, ``unit * row_unit`` and
            ``cost_unit`` times those of the program; all are powers of two.
    """

    c: Array
    A: Any
    l: Array
    u: Array
    lb: Array
    ub: Array
    unit: float = 1.0
    row_unit: Any = 1.0
    cost_unit: float = 1.0

    def answer(self, run: Run) -> Answer:
        """The answer that a run on this program, or on one with further variables, gives."""
        ends = {SOLVED: Status.SOLVED, LIMIT: Status.STALLED}
        x, y = run.x[: len(self.c)] * self.unit, run.y / self.row_unit * self.cost_unit
        return Answer(ends.get(run.status), x, y, run.iterations)

    def elastic(self) -> Program:
        """The least total violation of the rows; always feasible, and never below zero.

        At the optimum A^T y + w = 0 and |y| <= 1. If it is positive, y proves that no point
        satisfies the rows: the sum of what y pushes to falls short of y.(A x) by the optimum.
        """
        m, n = self.A.shape
        eye = sparse.eye_array(m, format="csc")
        return Program(
            c=np.concatenate([np.zeros(n), np.ones(2 * m)]),
            A=sparse.hstack([self.A, eye, -eye], format="csc"),
            l=self.l,
            u=self.u,
            lb=np.concatenate([self.lb, np.zeros(2 * m)]),
            ub=np.concatenate([self.ub, np.full(2 * m, np.inf)]),
        )

    def directions(self) -> Program:
        """The steepest of the directions |d_i| <= 1 in which no row or bound ever ends."""
        return Program(
            c=self.c,
            A=self.A,
            l=np.where(np.isfinite(self.l), 0.0, -np.inf),
            u=np.where(np.isfinite(self.u), 0.0, np.inf),
            lb=np.where(np.isfinite(self.lb), 0.0, -1.0),
            ub=np.where(np.isfinite(self.ub), 0.0, 1.0),
        )

    def feasible_direction(self, d: Array) -> Array:
        """d, which is within the bounds of ``directions`` but for rounding, within them."""
        box = self.directions()
        return np.clip(d, box.lb, box.ub)

    def size(self) -> float:
        """The largest finite side."""
        sides = np.abs(np.concatenate([self.l, self.u]))
        return float(np.max(sides[np.isfinite(sides)], initial=1.0))


def scaled(problem: LP) -> list[Program]:
    """The problems of a batch, one by one."""
    batch, m, n = problem.shape
    rows = problem.rows.to_sparse()
    row, column = rows.row.numpy(), rows.column.numpy()
    values, c, l, u, lb, ub = (
        t.double().numpy()
        for t in (rows.values, problem.c, problem.l, problem.u, problem.lb, problem.ub)
    )
    programs = []
    for b in range(batch):
        length = np.zeros(m)
        np.maximum.at(length, row, np.abs(values[b]))
        row_unit = power_of_two(length)
        sides = np.abs(np.concatenate([l[b] / row_unit, u[b] / row_unit, lb[b], ub[b]]))
        sides = sides[np.isfinite(sides) & (sides > 0)]
        unit = float(power_of_two(np.median(sides))) if len(sides) else 1.0
        cost_unit = float(power_of_two(np.abs(c[b]).max()))
        programs.append(
            Program(
                c=c[b] / cost_unit,
                A=sparse.csc_array((values[b] / row_unit[row], (row, column)), shape=(m, n)),
                l=l[b] / row_unit / unit,
                u=u[b] / row_unit / unit,
                lb=lb[b] / unit,
                ub=ub[b] / unit,
                unit=unit,
                row_unit=row_unit,
                cost_unit=cost_unit,
            )
        )
    return programs


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def power_of_two(size: Any) -> Any:
    """The power of two just below ``size``; 1 for zero. Dividing by it rounds nothing."""
    _, exponent = np.frexp(size)
    return np.where(np.asarray(size) > 0, np.exp2(np.clip(exponent - 1.0, -500, 500)), 1.0)
