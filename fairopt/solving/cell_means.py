"""What rows can reach within bounds: the small problem that is left when nothing but that matters.

Whether rows can hold, and how far they must give way, does not depend on the objective. With rows
in cell form it does not depend on the samples either, only on the means of the cells,

    v_k = sum_{i in k} w_i x_i / M_k,    M_k = sum_{i in k} |w_i|,

each of which takes every value between the mean of its lower and that of its upper ends, on its
own. So n samples become K variables in one pass, whatever n is. Rows that are dense keep their n.

All is on the CPU, in float64, on rows of length sum_k |A_rk| = 1 and in units of the largest finite
side or bound, so that thresholds mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from fairopt.optimality.certificates import proof_support
from fairopt.programs.problem import LP, QP, Problem
from fairopt.programs.rows.dense import DenseRows
from fairopt.programs.solution import Solution, Status
from fairopt.programs.tensors import unchecked
from fairopt.tolerances import DUALITY_GAP, REDUCED_COST, SETTLED

# A solver of strictly convex QPs with diagonal P and dense rows, on the CPU, in float64.
Project: TypeAlias = Callable[[QP], Solution]

ROUNDS = 60  # proximal steps; two or three are the rule
FEW_ROWS, FEW_ENTRIES = 12, 20_000  # rows, and entries of all, that are taken at once
LONGEST = 1e9  # of a step's weight on the cost


@dataclass(frozen=True, eq=False)
class Reach:
    """Rows l <= A v <= u and bounds low <= v <= high of one batch of small problems.

    Attributes:
        A: ``(B, m, K)``, rows of length 1 or zero.
        l, u: ``(B, m)``, possibly infinite.
        low, high: ``(B, K)``, possibly infinite.
        length: ``(B, m)``: one unit of a row here is ``length * unit`` of the original row.
        unit: ``(B,)``.
    """

    A: Tensor
    l: Tensor
    u: Tensor
    low: Tensor
    high: Tensor
    length: Tensor
    unit: Tensor

    def of(self, rows: Tensor) -> Reach:
        """The same with some of the rows, by number."""
        some = {name: getattr(self, name)[:, rows] for name in ("A", "l", "u", "length")}
        return replace(self, **some)

    @property
    def is_large(self) -> bool:
        """Whether linear programs had better begin with a few of the rows."""
        return self.A.shape[1] > FEW_ROWS and self.A[0].numel() > FEW_ENTRIES


def reach(problem: Problem) -> Reach:
    """The small problem; see the top of the file."""
    l, u, lb, ub = (local(t) for t in (problem.l, problem.u, problem.lb, problem.ub))
    A, low, high = problem.rows.detach().to(torch.device("cpu")).means(lb, ub)
    length = A.abs().sum(-1)
    length = torch.where(length > 0, length, 1.0)
    A, l, u = A / length.unsqueeze(-1), l / length, u / length
    sizes = torch.cat([l, u, low, high], -1).abs()
    sizes = torch.where(torch.isfinite(sizes), sizes, 0.0)
    unit = sizes.amax(-1)
    unit = torch.where(unit > 0, unit, 1.0)
    l, u, low, high = (t / unit.unsqueeze(-1) for t in (l, u, low, high))
    return Reach(A, l, u, low, torch.maximum(low, high), length, unit)


def local(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def points(A: Tensor, l: Tensor, u: Tensor, low: Tensor, high: Tensor, near: Tensor) -> QP:
    """The QP  minimise 1/2 |v - near|^2  within rows and bounds."""
    return unchecked(
        QP, P=torch.ones_like(near), q=-near, rows=DenseRows(A), l=l, u=u, lb=low, ub=high,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Optimum:
    """What ``linear_optimum`` found, per problem.

    Attributes:
        x: ``(B, n)``.
        y: ``(B, m)``, multipliers in the sign convention of ``Solution``.
        value: ``(B,)``, c.x.
        bound: ``(B,)``, the lower bound on the optimum that y gives by weak duality.
        solved: ``(B,)``, bool: value and bound are one number but for rounding.
        infeasible: ``(B,)``, bool: no point is within rows and bounds.
    """

    x: Tensor
    y: Tensor
    value: Tensor
    bound: Tensor
    solved: Tensor
    infeasible: Tensor


def linear_optimum(problem: LP, project: Project, start: Tensor) -> Optimum:
    """Solve LPs with a solver of projections: the proximal point method.

        x_{j+1} = argmin  c.x + 1/(2 t) |x - x_j|^2   within rows and bounds

    Each step is the projection of x_j - t c. On linear programs the method ends after finitely many
    steps, the fewer the larger t, and x_{j+1} = x_j means that the multipliers of the projection,
    over t, are dual optimal without any error of t's. Sources: Rockafellar, Monotone operators and
    the proximal point algorithm, SIAM J. Control Optim. 14, 1976; Ferris, Finite termination of the
    proximal point algorithm, Math. Programming 50, 1991; for one step with a large t, Mangasarian
    and Meyer, Nonlinear perturbation of linear programs, SIAM J. Control Optim. 17, 1979.

    Args:
        problem: dense rows, float64, data near 1 in size, c at most 1.
        start: ``(B, n)``, any point.
    """
    rows = problem.rows
    assert isinstance(rows, DenseRows)
    c, x = problem.c, start.clamp(problem.lb, problem.ub)
    batch = len(c)
    t = 10.0
    y = torch.zeros_like(problem.l)
    value = bound = torch.full((batch,), torch.nan, dtype=torch.float64)
    solved = torch.zeros(batch, dtype=torch.bool)
    impossible = solved
    for _ in range(ROUNDS):
        found = project(
            points(rows.matrix, problem.l, problem.u, problem.lb, problem.ub, x - t * c)
        )
        impossible = with_status(found, Status.INFEASIBLE)
        good = with_status(found, Status.SOLVED) & ~solved
        new = torch.where(good.unsqueeze(-1), found.x.double(), x)
        y = torch.where(good.unsqueeze(-1), found.row_dual / t, y)
        moved = (new - x).abs().amax(-1) / t
        x = new
        value, bound = (c * x).sum(-1), dual_bound(problem, x, y)
        size = value.abs() + (c * x).abs().sum(-1)
        solved = solved | (good & (moved <= SETTLED) & (value - bound <= DUALITY_GAP * (1 + size)))
        if bool((solved | impossible).all()):
            break
        t = min(3 * t, LONGEST)
    return Optimum(x, y, value, bound, solved, impossible)


def with_status(solution: Solution, status: Status) -> Tensor:
    """Which problems of the batch have this status: ``(B,)``, bool."""
    return torch.tensor([s is status for s in solution.status])


def proof_rows(solution: Solution) -> Tensor:
    """Which rows have a part in the proof that some problem has no solution: ``(m,)``, bool."""
    part = proof_support(solution.row_dual)
    return (part & with_status(solution, Status.INFEASIBLE).unsqueeze(-1)).any(0)


def dual_bound(problem: LP, x: Tensor, y: Tensor) -> Tensor:
    """min over the bounds of c.x + y.(A x) minus what y earns at the sides: ``(B,)``.

    No point within rows and bounds has a smaller c.x. What pushes to a bound that is not there is
    either rounding, and counts at x, or makes the bound worthless.
    """
    y = torch.where(torch.isinf(torch.where(y > 0, problem.u, problem.l)), 0.0, y)
    d = problem.c + problem.rows.transpose_apply(y)
    size = problem.c.abs() + problem.rows.absolute().transpose_apply(y.abs())
    end = torch.where(d > 0, problem.lb, problem.ub)
    # Beside multipliers near 1 those of rows that hold without them are rounding themselves.
    of_terms, of_largest = REDUCED_COST
    rounding = d.abs() <= torch.maximum(of_terms * size, of_largest * size.amax(-1, keepdim=True))
    end = torch.where(torch.isinf(end) & rounding, x, end)
    least = torch.where(d == 0, 0.0, d * end).sum(-1)
    side = torch.where(y > 0, problem.u, problem.l)
    return least - torch.where(y == 0, 0.0, y * side).sum(-1)
