"""Batches in which one problem has no solution, and the others do."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from fairopt.backends import Capabilities
from fairopt.programs.problem import LP, QP, Problem
from fairopt.programs.solution import Status
from fairopt.testing.known import as_quadratic, as_rows

INF = float("inf")


@dataclass(frozen=True, eq=False)
class Failing:
    """A batch, the status that each problem must get, and the rows in conflict.

    Attributes:
        label: the batch in words.
        refusable: whether a backend may refuse such a P (it is singular) instead.
    """

    label: str
    problem: Problem
    status: tuple[Status, ...]
    rows: tuple[int, ...] = ()
    refusable: bool = False

    @property
    def index(self) -> int:
        """The first problem that fails."""
        return next(b for b, s in enumerate(self.status) if s is not Status.SOLVED)


@dataclass(frozen=True)
class Case:
    """The data that all forms share. Sides and bounds of problem 1 differ from the others'."""

    name: str
    A: list[list[float]]
    l: tuple[list[float], list[float]]
    u: tuple[list[float], list[float]]
    lb: tuple[list[float], list[float]]
    ub: tuple[list[float], list[float]]
    linear: list[float]
    P: tuple[list[list[float]], list[list[float]]] | None = None
    rows: tuple[int, ...] = ()


def eye(n: int, *, first: float = 1.0) -> list[list[float]]:
    return [[(first if i == 0 else 1.0) if i == j else 0.0 for j in range(n)] for i in range(n)]


def twice(values: list[float]) -> tuple[list[float], list[float]]:
    return values, values


LINEAR = [-0.4, 0.3, -0.2, 0.1]
INFEASIBLE = (
    Case(
        "a row that the bounds contradict",
        [[1, 1, 0, 0], [0, 0, 1, -1]],
        ([-1, -INF], [3, -INF]), twice([INF, 5]),
        twice([0.0] * 4), twice([1.0] * 4), LINEAR, rows=(0,),
    ),
    Case(
        "a row that the bounds contradict by little",
        [[1, 1, 0, 0], [0, 0, 1, -1]],
        ([2.0, -INF], [2.001, -INF]), twice([INF, 5]),
        twice([0.0] * 4), twice([1.0] * 4), LINEAR, rows=(0,),
    ),
    Case(
        "two rows that contradict each other",
        [[0, 0, 1, 0], [1, 1, 0, 0], [2, 2, 0, 0]],
        ([-INF, -9, -INF], [-INF, 1, -INF]), ([1, INF, 8], [1, INF, 0]),
        twice([-10.0] * 4), twice([10.0] * 4), LINEAR, rows=(1, 2),
    ),
    Case(
        "three equalities that depend and contradict each other",
        [[1, 1, 0, 0], [0, 1, 1, 0], [1, 2, 1, 0], [0, 0, 0, 1]],
        ([0.75, 0.5, 1.25, -INF], [0.75, 0.5, 3, -INF]), ([0.75, 0.5, 1.25, 5], [0.75, 0.5, 3, 5]),
        twice([-10.0] * 4), twice([10.0] * 4), LINEAR, rows=(0, 1, 2),
    ),
)  # fmt: skip
FREE = Case(
    "two rows that contradict each other, no bounds",
    [[0, 0, 1, 0], [1, 1, 0, 0], [2, 2, 0, 0]],
    ([-INF, -9, -INF], [-INF, 1, -INF]), ([1, INF, 8], [1, INF, 0]),
    twice([-INF] * 4), twice([INF] * 4), LINEAR, rows=(1, 2),
)  # fmt: skip
UNBOUNDED_LP = (
    Case(
        "a variable that falls without end",
        [[0, 1, 1]], twice([-1]), twice([1]),
        ([-1, -1, -1], [-INF, -1, -1]), twice([INF] * 3), [1, 1, 0.5],
    ),
    Case(
        "a direction within the rows without end",
        [[1, -1, 0]], twice([0]), twice([0]),
        twice([-1, -1, -1]), ([2, 2, 2], [INF, INF, 2]), [-1, -0.5, 1],
    ),
)  # fmt: skip
UNBOUNDED_QP = Case(
    "a variable that falls without end",
    [[0, 1, 1]], twice([-1]), twice([1]),
    ([-1, -1, -1], [-INF, -1, -1]), twice([INF] * 3), [1, -0.5, 0.25],
    (eye(3, first=0.0), eye(3, first=0.0)),
)  # fmt: skip
NONCONVEX = tuple(
    Case(
        f"P with a negative eigenvalue, {1 - off:.3g}",
        [[1, 0, 1]], twice([-1]), twice([1]),
        twice([-1, -1, -1]), twice([1, 1, 1]), [0.3, -0.2, 0.1],
        ([[2, 1, 0], [1, 2, 0], [0, 0, 1]], [[1, off, 0], [off, 1, 0], [0, 0, 1]]),
    )
    for off in (3.0, 1.01)
)  # fmt: skip


def failing(can: Capabilities, device: str = "cpu") -> list[Failing]:
    """All problems that a backend with these capabilities must not call solved."""
    turn = cycle(sorted(can.rows - {"blocks"}))
    found: list[Failing] = []

    def add(case: Case, form: str | None, status: Status, pattern: str = "solved first") -> None:
        # Sides of one of the problems make it fail; which one differs.
        order = [0, 1, 0] if pattern == "solved first" else [1, 0]

        def tensor(pair: tuple[list[float], list[float]]) -> Tensor:
            return torch.tensor([pair[i] for i in order], dtype=torch.float64, device=device)

        A = torch.tensor([case.A] * len(order), dtype=torch.float64, device=device)
        kind = next(turn)
        matrix = as_rows(A, kind)
        q = tensor(twice(case.linear))
        sides = [tensor(pair) for pair in (case.l, case.u, case.lb, case.ub)]
        problem: Problem
        if form is None:
            problem = LP(q, matrix, *sides)
        else:
            n = len(case.linear)
            P = case.P or (eye(n), eye(n))
            stack = torch.tensor([P[i] for i in order], dtype=torch.float64, device=device)
            problem = QP(as_quadratic(stack, form), q, matrix, *sides)
        statuses = tuple(status if i else Status.SOLVED for i in order)
        label = f"{case.name}, {f'{form} P' if form else 'LP'}, {kind} rows"
        refusable = status is Status.UNBOUNDED and form is not None
        found.append(Failing(label, problem, statuses, case.rows, refusable))

    forms: list[str | None] = [*sorted(can.quadratic), *([None] if can.linear else [])]
    for form in forms if can.rows else ():
        for case in INFEASIBLE:
            add(case, form, Status.INFEASIBLE)
        if form is None:
            for case in UNBOUNDED_LP:
                add(case, form, Status.UNBOUNDED)
            continue
        add(FREE, form, Status.INFEASIBLE, "failed first")
        add(UNBOUNDED_QP, form, Status.UNBOUNDED)
        if form != "diagonal":  # a diagonal with a negative entry is no QP in the first place
            for case in NONCONVEX:
                add(case, form, Status.NONCONVEX)
    return found
