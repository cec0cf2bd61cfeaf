"""Solutions where none exist: the least total violation of the rows, then the objective.

    minimise  the objective  over the points within the bounds that minimise

        V(x) = sum_r max(A x - u, l - A x, 0)_r.

Bounds always hold. V adds the rows in their own units: differences of means for parity rows; a row
in totals counts n times as much as the same row in means, and rows can be weighed by scaling them.

Derivation. V is the value of a linear program whose dual is

    maximise  D(z) = min over the bounds of z.(A x)  -  sum_r z_r side_r(z),    -1 <= z <= 1,

side_r being u_r where z_r > 0 and l_r where z_r < 0. Let z be any of its solutions and
t = A^T z. By complementary slackness a point within the bounds minimises V if and only if

    A_r x >= u_r  where z_r = 1,       A_r x <= l_r  where z_r = -1,
    A_r x = u_r   where 0 < z_r < 1,   A_r x = l_r   where -1 < z_r < 0,
    l_r <= A_r x <= u_r  where z_r = 0,
    x_i = lb_i  where t_i > 0,         x_i = ub_i    where t_i < 0.

So what is left is the problem as it was, with the same objective, the same A and the same form, and
with other sides and bounds: ``confined``. Any backend solves it and gives its derivative. z does
not depend on the objective, so the derivative by scores is exact; sides and bounds move z only
where the linear program has several solutions, and there the derivative is one-sided.

z comes from the small problem of ``solving.cell_means`` by ``linear_optimum``. D(z) bounds V from
below by weak duality, whatever z is: a point is returned only if V(x) = D(z) but for rounding.

Multipliers. With y and w those of the confined problem, (rho z + y, rho t + w) are those of

    minimise  the objective + rho V(x)   within the bounds

for every rho that is large enough for the signs to be right; the smallest is taken. That makes the
result a solution of an exact penalty problem. Rows that are exceeded have the multiplier rho or
-rho. Source: Mangasarian, Sufficiency of exact penalty minimization, SIAM J. Control Optim. 23,
1985.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairopt.backends import Backend
from fairopt.errors import ConvergenceError, InfeasibleError, UnsupportedProblemError
from fairopt.optimality.certificates import dual_value
from fairopt.programs.problem import LP, QP, Problem
from fairopt.programs.rows.dense import DenseRows
from fairopt.programs.solution import RowValues, Solution, Status
from fairopt.programs.tensors import unchecked
from fairopt.solving.autograd import attempt, refusal_of, solve_detached
from fairopt.solving.cell_means import (
    Project,
    Reach,
    linear_optimum,
    points,
    proof_rows,
    reach,
    with_status,
)
from fairopt.solving.conflicts import is_small
from fairopt.tolerances import (
    AT_LIMIT,
    EXCEEDED,
    IS_VIOLATED,
    LEAST_VIOLATION,
    NO_VIOLATION,
    ROW_PRECISION,
)

ROUNDS = 30  # in which rows are added


def solve_elastic(
    problem: Problem,
    backend: str | Backend,
    smoothing: float = 0.0,
    options: dict[str, Any] | None = None,
    *,
    center: Tensor | None = None,
) -> tuple[Tensor, Solution]:
    """What ``solve_detached`` returns, and where that finds no point, the elastic solution.

    Problems of the batch that have a point within rows and bounds get what they would get alone.

    Raises:
        ConvergenceError: the least total violation was not found to the promised precision.
        UnsupportedProblemError: the rows are dense and too many.
        SolveError: some problem of the batch has no solution for another reason.
    """
    try:
        return solve_detached(problem, backend, smoothing, options, center=center)
    except (InfeasibleError, ConvergenceError) as error:
        if error.solution is None:
            raise
        answer = error.solution
    infeasible = torch.tensor([s is Status.INFEASIBLE for s in answer.status])
    others = torch.tensor([s not in (Status.INFEASIBLE, Status.SOLVED) for s in answer.status])
    if bool(others.any()) and not (
        all(s in (Status.INFEASIBLE, Status.SOLVED, Status.STALLED) for s in answer.status)
        and are_infeasible(problem.detach().select(others.nonzero().squeeze(-1)))
    ):
        raise refusal_of(answer)
    infeasible = infeasible | others
    which = infeasible.nonzero().squeeze(-1)
    if bool(infeasible.all()):
        return one_kind(problem, which, backend, smoothing, options, center)
    rest = (~infeasible).nonzero().squeeze(-1)
    hard, soft = (
        None if center is None else center[index.to(center.device)] for index in (rest, which)
    )
    plain = solve_detached(problem.select(rest), backend, smoothing, options, center=hard)
    elastic = one_kind(problem.select(which), which, backend, smoothing, options, soft)
    return together(problem.detach(), (rest, *plain), (which, *elastic))


def one_kind(
    problem: Problem,
    numbers: Tensor,
    backend: str | Backend,
    smoothing: float,
    options: dict[str, Any] | None,
    center: Tensor | None,
) -> tuple[Tensor, Solution]:
    """The elastic solution of a batch of which no problem has a point within its rows and bounds.

    Args:
        numbers: of the problems, for errors.
    """
    if not is_small(problem.rows):
        raise UnsupportedProblemError(
            f"elastic: expected rows in cell form, or dense ones of fewer entries, got "
            f"{problem.shape} in (batch, rows, variables); solve smaller batches"
        )
    detached = problem.detach()
    z, found = least_violation(detached, attempt)
    if not bool(found.all()):
        raise uncertain(int(numbers[int((~found).nonzero()[0])]))
    narrow = confined(problem, z)
    x, solution = solve_detached(narrow, backend, smoothing, options, center=center)
    checked(detached, z, solution.x, numbers)
    return x, unchecked(
        Solution,
        problem=detached,
        x=solution.x,
        row_dual=penalty_multipliers(solution, z),
        status=(Status.ELASTIC,) * len(z),
        backend=solution.backend,
        iterations=solution.iterations,
        seconds=solution.seconds,
    )


def are_infeasible(problem: Problem) -> bool:
    """Whether no problem of a batch has a point: asked where a backend stopped without a word."""
    if not is_small(problem.rows):
        return False
    z, found = least_violation(problem, attempt)
    least, size = dual_value(problem, z, push(problem, z))
    return bool((found & (least > IS_VIOLATED * size)).all())


def uncertain(index: int) -> ConvergenceError:
    return ConvergenceError(
        f"elastic, problem {index} of the batch: the least total violation of the rows was not "
        "found to the promised precision; rescale the scores or the rows, or solve in float64",
        batch=index,
    )


def least_violation(problem: Problem, project: Project) -> tuple[Tensor, Tensor]:
    """z of the top of the file, ``(B, m)``, and whether it is known to be optimal, ``(B,)``.

    Few of many rows decide. A solution for some rows, zero for the others, is one for all if they
    hold on the points that it leaves; if they do not, those that prove it are added.
    """
    small = reach(problem)
    z, found = torch.zeros_like(small.l), torch.zeros(len(small.l), dtype=torch.bool)
    if small.is_large:
        rows = torch.zeros(small.l.shape[1], dtype=torch.bool)
        near = torch.zeros_like(small.low).clamp(small.low, small.high)
        l, u = small.l * small.length, small.u * small.length
        A = small.A * small.length.unsqueeze(-1)
        every = points(A, l, u, small.low, small.high, near)
        for _ in range(ROUNDS):
            left = confined(every, z)
            assert isinstance(left, QP)
            answer = project(left)
            solved = with_status(answer, Status.SOLVED)
            # Rows that nothing moves any more were not asked to hold.
            missed = RowValues.at(every, answer.x).relative > EXCEEDED
            missed = missed & solved.unsqueeze(-1) & ~rows
            found = solved & ~missed.any(-1)
            more = (proof_rows(answer) & ~rows) | missed.any(0)
            if bool(found.all()) or not bool(more.any()):
                break
            rows = rows | more
            some = rows.nonzero().squeeze(-1)
            z = z.index_copy(1, some, priced(small.of(some), project)[0])
    if not bool(found.all()):
        z, found = priced(small, project)
    return z.to(problem.l.device), found.to(problem.l.device)


def priced(small: Reach, project: Project) -> tuple[Tensor, Tensor]:
    """z for all these rows: the multipliers of a linear program with a slack for each side.

    minimise  sum_r s+_r + s-_r   subject to  l <= A v - s+ + s- <= u,  s >= 0
    """
    batch, m, _ = small.A.shape
    price = small.length / small.length.amax(-1, keepdim=True)
    eye = torch.eye(m, dtype=small.A.dtype).expand(batch, m, m)
    zero, free = torch.zeros_like(small.l), torch.full_like(small.l, torch.inf)
    found = linear_optimum(
        unchecked(
            LP,
            c=torch.cat([torch.zeros_like(small.low), price, price], -1),
            rows=DenseRows(torch.cat([small.A, -eye, eye], -1)),
            l=small.l, u=small.u,
            lb=torch.cat([small.low, zero, zero], -1),
            ub=torch.cat([
                small.high,
                torch.where(torch.isinf(small.u), zero, free),
                torch.where(torch.isinf(small.l), zero, free),
            ], -1),
        ),
        project,
        torch.cat([torch.zeros_like(small.low), zero, zero], -1),
    )  # fmt: skip
    size = found.y.abs()
    z = (found.y / price).clamp(-1, 1)
    z = torch.where(size <= NO_VIOLATION * size.amax(-1, keepdim=True), 0.0, z)
    z = torch.where(z.abs() >= 1 - AT_LIMIT, z.sign(), z)
    return z, found.solved


def push(problem: Problem, z: Tensor) -> Tensor:
    """t = A^T z, ``(B, n)``, zero where it is that but for rounding."""
    t = problem.rows.transpose_apply(z)
    size = problem.rows.absolute().transpose_apply(z.abs())
    end = torch.where(t > 0, problem.lb, problem.ub)
    # Nothing is held at infinity.
    limit = torch.where(torch.isinf(end), 1e2 * NO_VIOLATION, NO_VIOLATION)
    return torch.where(t.abs() <= limit * size, 0.0, t)


def confined(problem: Problem, z: Tensor) -> Problem:
    """The problem on the points of least total violation, with the history of its data."""
    t = push(problem.detach(), z)
    l, u, lb, ub = problem.l, problem.u, problem.lb, problem.ub
    t = torch.where(torch.isinf(torch.where(t > 0, lb, ub)), 0.0, t)
    lower, upper = torch.where(t < 0, ub, lb), torch.where(t > 0, lb, ub)
    # A row that no variable can move any more holds because z is optimal; said again, it would
    # hold but for rounding.
    movable = problem.rows.detach().absolute().apply((lower < upper).double()) > 0
    sides = {
        "l": torch.where(z > 0, u, torch.where(z == -1, -torch.inf, l)),
        "u": torch.where(z < 0, l, torch.where(z == 1, torch.inf, u)),
    }
    return problem.replace(
        l=torch.where(movable, sides["l"], -torch.inf),
        u=torch.where(movable, sides["u"], torch.inf),
        lb=lower,
        ub=upper,
    )


def checked(problem: Problem, z: Tensor, x: Tensor, numbers: Tensor) -> None:
    """Raise unless V(x) is D(z) but for rounding."""
    least, _ = dual_value(problem, z, push(problem, z))
    rows = RowValues.at(problem, x)
    total = rows.excess.sum(-1)
    good = total - least <= LEAST_VIOLATION * total + ROW_PRECISION[x.dtype] * rows.scale.sum(-1)
    if not bool(good.all()):
        raise uncertain(int(numbers[int((~good).nonzero()[0])]))


def penalty_multipliers(solution: Solution, z: Tensor) -> Tensor:
    """rho z + y, ``(B, m)``, with the smallest rho for which all signs are right."""
    y, w, t = solution.row_dual, solution.bound_dual, push(solution.problem, z)
    room = torch.where(z == 0, 1.0, torch.minimum(z.abs(), 1 - z.abs()))
    rows = torch.where(room > 0, y.abs() / room, y.abs())
    bounds = torch.where(t == 0, 0.0, w.abs() / t.abs())
    rho = torch.cat([rows, bounds], -1).amax(-1, keepdim=True)
    return rho * z + y


class Part(NamedTuple):
    """Some problems of a batch, solved."""

    numbers: Tensor
    x: Tensor
    solution: Solution


def together(problem: Problem, *solved: tuple[Tensor, Tensor, Solution]) -> tuple[Tensor, Solution]:
    """The batch, put together from its parts."""
    parts = [Part(*one) for one in solved]
    order = torch.cat([part.numbers for part in parts]).argsort().tolist()

    def in_order(tensors: list[Tensor]) -> Tensor:
        whole = torch.cat(tensors)
        return whole[torch.tensor(order, device=whole.device)]

    def listed(name: str) -> tuple[Any, ...]:
        whole = [one for part in parts for one in getattr(part.solution, name)]
        return tuple(whole[i] for i in order) if len(whole) == len(order) else ()

    first = parts[0].solution
    x = in_order([part.x for part in parts])
    return x, unchecked(
        Solution,
        problem=problem,
        x=x.detach(),
        row_dual=in_order([part.solution.row_dual for part in parts]),
        status=listed("status"),
        backend=first.backend,
        iterations=listed("iterations"),
        seconds=sum(part.solution.seconds for part in parts),
    )
