"""The operator splitting solver OSQP: any QP, sparse ones above all.

Best where P or the rows are sparse, where P is not diagonal, and for large problems that are not
the projections that ``numba`` solves. CPU only; the problems of a batch are solved side by side.

OSQP (Stellato, Banjac, Goulart, Bemporad and Boyd, "OSQP: an operator splitting solver for
quadratic programs", Math. Program. Comput. 12, 2020) returns a point to a tolerance, and
``optimality.finishing`` makes it exact to rounding. That takes the place of OSQP's own polishing,
which does the same with less effect, and prints a line wherever no row is active.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import osqp
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.backends.contract import Backend, Capabilities
from fairopt.backends.osqp.scaled import Pattern, Scaled, Standard
from fairopt.backends.osqp.workspaces import Workspaces
from fairopt.errors import ProblemError
from fairopt.kernels.threads import in_parallel
from fairopt.optimality.certificates import first_proof, sharpen_proof
from fairopt.optimality.derivative import Adjoint, adjoint
from fairopt.optimality.finishing import finish, refined
from fairopt.optimality.linear_systems import Reduced, solve_reduced
from fairopt.optimality.sparse_systems import is_convex, solve_sparse
from fairopt.programs.problem import QP, Problem
from fairopt.programs.solution import Solution, Status
from fairopt.tolerances import OSQP_CERTIFICATE, ROW_PRECISION

Array = NDArray[Any]

KEPT = 16  # idle workspaces; one holds about ten copies of the problem's entries
# Multiples of eps and of max_iter. Refinement makes most problems exact after the first stage; the
# others may converge, or turn out infeasible, at a higher precision.
STAGES = ((1e3, 0.1), (1.0, 1.0), (1e-3, 1.0))

SAID = osqp.SolverStatus
PRIMAL_INFEASIBLE = (SAID.OSQP_PRIMAL_INFEASIBLE, SAID.OSQP_PRIMAL_INFEASIBLE_INACCURATE)
SOLVED = (SAID.OSQP_SOLVED, SAID.OSQP_SOLVED_INACCURATE)
DUAL_INFEASIBLE = (SAID.OSQP_DUAL_INFEASIBLE, SAID.OSQP_DUAL_INFEASIBLE_INACCURATE)


@dataclass
class Answer:
    """One problem's x, multipliers, status and iterations, in the problem's own units."""

    x: Array
    y: Array
    status: Status
    iterations: int


class OSQP(Backend):
    """OSQP, with workspaces that are kept between calls.

    Calls with the same sparsity pattern update a workspace in place of setting one up, and start
    from its last solution. A few workspaces are kept per object, the latest ones; copies and
    pickles of the object start without any.

    Args:
        eps: stop when the residuals of a problem, scaled to a size of about 1, are below this, both
            absolutely and relative to their terms. The solution is made exact from there: already
            from a thousand times this where that succeeds, and where it fails, because the wrong
            constraints seem active, from a thousandth.
        max_iter: stop each of these three after this many iterations, the first after a tenth.
        threads: at most this many problems of a batch at a time; by default
            ``torch.get_num_threads()`` at each call.

    Raises:
        ProblemError: an option is out of its range.
    """

    name: ClassVar[str] = "osqp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        quadratic=frozenset({"diagonal", "dense", "sparse"}),
        rows=frozenset({"blocks", "cells", "dense", "sparse"}),
        devices=frozenset({"cpu"}),
    )

    def __init__(
        self, *, eps: float = 1e-6, max_iter: int = 20_000, threads: int | None = None
    ) -> None:
        if not 0 < eps < 1:
            raise ProblemError(f"eps: expected a number between 0 and 1, got {eps}")
        if max_iter < 1:
            raise ProblemError(f"max_iter: expected at least 1, got {max_iter}")
        if threads is not None and threads < 1:
            raise ProblemError(f"threads: expected at least 1, got {threads}")
        self.eps = eps
        self.max_iter = max_iter
        self.threads = threads
        self._workspaces: Workspaces[Workspace] = Workspaces(KEPT)

    def solve(self, problem: Problem) -> Solution:
        assert isinstance(problem, QP)
        begun = time.perf_counter()
        standard = Standard(problem)
        answers = self.several(standard, range(problem.shape[0]), *STAGES[0])
        solution = self.finished(problem, answers)
        for stage in STAGES[1:]:
            again = [
                b
                for b, good in enumerate(solution.context)
                if not good and solution.status[b] in (Status.SOLVED, Status.STALLED)
            ]
            if not again:
                break
            for b, answer in zip(again, self.several(standard, again, *stage), strict=True):
                answers[b] = replace(answer, iterations=answer.iterations + answers[b].iterations)
            solution = self.finished(problem, answers)
        return replace(solution, seconds=time.perf_counter() - begun)

    def vjp(self, problem: QP, solution: Solution, grad_x: Tensor) -> Adjoint:
        """The shared rule, with a sparse factorisation where P or the rows are sparse."""
        return adjoint(problem, solution, grad_x, reduced(problem))

    def several(
        self, standard: Standard, which: Sequence[int], loose: float, short: float
    ) -> list[Answer]:
        """Some problems of the batch, side by side, to these multiples of eps and max_iter."""
        eps, max_iter = loose * self.eps, max(1, int(short * self.max_iter))

        def some(first: int, last: int) -> list[Answer]:
            return [self.one(standard, b, eps, max_iter) for b in which[first:last]]

        workers = min(len(which), self.threads or torch.get_num_threads())
        return [answer for part in in_parallel(some, len(which), workers) for answer in part]

    def one(self, standard: Standard, b: int, eps: float, max_iter: int) -> Answer:
        """Problem b of the batch."""
        form = standard.scaled(b)
        m, n = standard.m, standard.n
        key = (form.P_pattern, form.A_pattern)
        work = self._workspaces.take(key)
        same = work is not None and np.array_equal(work.form.P, form.P)
        if not same and not is_convex(standard.problem, b):
            return Answer(np.zeros(n), np.zeros(m), Status.NONCONVEX, 0)
        if work is None:
            work = Workspace(form)
        else:
            work.update(form)
        answer = work.solve(eps, max_iter)
        status, iterations = answer.info.status_val, answer.info.iter
        if status in SOLVED:
            self._workspaces.give(key, work)
            return Answer(form.s * answer.x, form.t * answer.y[:m], Status.SOLVED, iterations)
        if status == SAID.OSQP_SIGINT:
            raise KeyboardInterrupt
        if status not in PRIMAL_INFEASIBLE:
            # Whether there is a point at all: OSQP may have seen first that the objective falls
            # without end, or nothing within the limit.
            nearest = Workspace(without_objective(form)).solve(eps, max_iter)
            iterations += nearest.info.iter
            if nearest.info.status_val in PRIMAL_INFEASIBLE:
                answer, status = nearest, nearest.info.status_val
            elif status in DUAL_INFEASIBLE and nearest.info.status_val in SOLVED:
                return Answer(form.s * nearest.x, np.zeros(m), Status.UNBOUNDED, iterations)
        if status in PRIMAL_INFEASIBLE:
            y = form.t * answer.prim_inf_cert[:m]
            return Answer(np.zeros(n), y, Status.INFEASIBLE, iterations)
        return Answer(form.s * answer.x, form.t * answer.y[:m], Status.STALLED, iterations)

    def finished(self, problem: QP, answers: Sequence[Answer]) -> Solution:
        """The solution from all answers: refined, or proven infeasible.

        Its context says which problems refinement made exact.
        """
        x, y = (
            torch.from_numpy(np.stack([getattr(answer, name) for answer in answers]))
            for name in ("x", "y")
        )
        status = tuple(answer.status for answer in answers)
        if Status.INFEASIBLE in status:
            y, status = proven(problem, y, status)
        solver = reduced(problem)
        point = refined(problem, x, y, solver)
        exact = (point.error <= ROW_PRECISION[torch.float64]).tolist()
        solution = finish(
            problem, x, y, backend=self.name, point=point,
            # A problem that ran into the limit may be near enough to be refined: then it is solved.
            status=tuple(
                Status.SOLVED if s is Status.STALLED and good else s
                for s, good in zip(status, exact, strict=True)
            ),
            iterations=tuple(answer.iterations for answer in answers),
        )  # fmt: skip
        return replace(solution, context=exact)


class Workspace:
    """One OSQP solver, the problem that it holds, and its solution's multipliers of the rows."""

    def __init__(self, form: Scaled) -> None:
        self.form = form
        self.multipliers: Array | None = None
        self.limits: tuple[float, int] | None = None
        self.solver = osqp.OSQP(algebra="builtin")
        self.solver.setup(
            form.P_pattern.matrix(form.P), form.q, form.A_pattern.matrix(form.A), form.l, form.u,
            verbose=False, polishing=False,
            eps_prim_inf=OSQP_CERTIFICATE, eps_dual_inf=OSQP_CERTIFICATE, warm_starting=True,
            rho=1.0, scaling=0, check_termination=5,
            adaptive_rho_interval=200,  # at 50, number 118 of Hock and Schittkowski cycles
        )  # fmt: skip

    def update(self, form: Scaled) -> None:
        """Another problem of the same pattern. A matrix that stays needs no new factorisation.

        The solver would start from the last solution. Where P is diagonal there is a better start:
        the multipliers of the rows change little from one batch to the next, and the rest follows
        from them and the new data.
        """
        before, self.form = self.form, form
        changed = {
            name: new
            for name, old, new in (("Px", before.P, form.P), ("Ax", before.A, form.A))
            if not np.array_equal(old, new)
        }
        self.solver.update(q=form.q, l=form.l, u=form.u, **changed)
        same = not changed and np.array_equal(before.q, form.q)
        if form.is_diagonal and self.multipliers is not None and not same:
            x, y = form.start(self.multipliers)
            self.solver.warm_start(x=x, y=y)

    def solve(self, eps: float, max_iter: int) -> Any:
        """From where the last solve ended, or ``update`` put it."""
        if self.limits != (eps, max_iter):
            self.solver.update_settings(eps_abs=eps, eps_rel=eps, max_iter=max_iter)
            self.limits = eps, max_iter
        answer = self.solver.solve(raise_error=False)
        self.multipliers = self.form.t * answer.y[: len(self.form.t)]
        return answer


def without_objective(form: Scaled) -> Scaled:
    """The projection of zero onto the constraints."""
    n = len(form.q)
    pattern = Pattern.of((n, n), np.arange(n + 1), np.arange(n))
    return replace(form, P_pattern=pattern, P=np.ones(n), q=np.zeros(n))


def proven(problem: QP, y: Tensor, status: tuple[Status, ...]) -> tuple[Tensor, tuple[Status, ...]]:
    """Certificates of infeasibility made exact and checked; without a proof a problem is stalled.

    Where all sides are zero, and zero is the solution, OSQP may take rounding for a proof. Its
    multipliers are then meaningless, and refinement starts without any.
    """
    proven, proof = first_proof(problem, sharpen_proof(problem, y), y)
    claimed = torch.tensor([s is Status.INFEASIBLE for s in status])
    proof = torch.where(proven.unsqueeze(-1), proof, 0.0)
    return torch.where(claimed.unsqueeze(-1), proof, y), tuple(
        Status.STALLED if claim and not good else s
        for s, claim, good in zip(status, claimed.tolist(), proven.tolist(), strict=True)
    )


def reduced(problem: Problem) -> Reduced:
    """The solver of the linear systems of refinement and backward pass."""
    assert isinstance(problem, QP)
    if problem.quadratic_form == "sparse" or problem.rows.is_sparse:
        return solve_sparse
    # Where part of a diagonal is zero there is no Schur complement.
    return (
        solve_sparse if problem.is_diagonal and not problem.is_definite_diagonal else solve_reduced
    )
