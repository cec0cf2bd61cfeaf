"""Why rows cannot hold together, and what would let them: for the message of an error.

The smallest set. A set of rows is in conflict if no point within the bounds holds all of them.
Dropping rows one by one for as long as the rest stays in conflict (the *deletion filter*) leaves a
set of which every row is needed. Such an irreducible set need not be the smallest. To find that one
is a hard problem in general (Chakravarti, Some results concerning post-infeasibility analysis,
European J. Oper. Res. 73, 1994), so all smaller sets are tried, by size, where they are few.
Source: Chinneck, Feasibility and Infeasibility in Optimization, Springer 2008, chapters 6 and 7.

The smallest tolerance. With the middles c and the half widths h of the sides, the least common
factor and the least common addition are linear programs in one more unknown,

    min tau    c_r - tau h_r <= (A v)_r <= c_r + tau h_r   where h_r > 0, other rows as they are
    min delta  l_r - delta <= (A v)_r <= u_r + delta       for all rows,

both with v within its bounds. Few of many rows decide: the programs begin with the rows in
conflict, and while the number found does not let all rows hold, those that prove it are added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, islice

import torch
from torch import Tensor

from fairopt.errors import Conflict
from fairopt.programs.problem import LP, Problem
from fairopt.programs.rows.base import Rows
from fairopt.programs.rows.dense import DenseRows
from fairopt.programs.solution import Status
from fairopt.programs.tensors import unchecked
from fairopt.solving.cell_means import (
    Optimum,
    Project,
    Reach,
    linear_optimum,
    points,
    proof_rows,
    reach,
    with_status,
)
from fairopt.tolerances import ENOUGH

# Sets of rows to try at most, and how much of A times sets: 4095 sets are all those of 12 rows.
MOST_SETS = 4095
MOST_WORK = 4e8
AT_ONCE = 4e6  # numbers in one batch of sets
# Dense rows of more entries than this are not looked into: the answer would cost more than it says.
MOST_ENTRIES = 5e7
# Rounds in which rows are added.
ROUNDS = 30


def explain(
    problem: Problem, index: int, proof: tuple[int, ...], project: Project
) -> Conflict | None:
    """Which rows of one infeasible problem are in conflict, and what would let them hold.

    Args:
        problem: a batch, detached.
        index: the problem in it.
        proof: rows that are known to be in conflict, where a backend said so.
        project: solves the auxiliary QPs.

    Returns:
        ``None`` where the conflict cannot be proved again, or is too large to look into.
    """
    if not is_small(problem.rows):
        return None
    small = reach(problem.select(torch.tensor([index])))
    stated = torch.isfinite(small.l[0]) | torch.isfinite(small.u[0])
    candidates = stated.nonzero().squeeze(-1).tolist()
    within = Sets(small, project)
    known = tuple(r for r in proof if r in set(candidates))
    if not known or not within.conflicting([known])[0]:
        known = tuple(candidates)
        if not known or not within.conflicting([known])[0]:
            return None
    few = irreducible(known, within)
    few, smallest = smaller(few, candidates, within)
    first = torch.zeros(len(stated), dtype=torch.bool)
    first[list(few)] = True
    factor = least_factor(small, first, project)
    addition = least_addition(small, first, project)
    if addition is None:
        return None
    half = ((problem.u[index] - problem.l[index]) / 2).double().tolist()
    return Conflict(
        rows=tuple(problem.row_name(r) for r in few),
        smallest=smallest,
        factor=factor,
        addition=addition,
        tolerances=tuple(half[r] for r in few),
    )


def is_small(rows: Rows) -> bool:
    """Whether the rows in their cells fit into memory several times."""
    return rows.mean_entries <= MOST_ENTRIES


class Sets:
    """Sets of rows of one small problem, and whether each is in conflict."""

    def __init__(self, small: Reach, project: Project) -> None:
        self.small, self.project = small, project
        self.near = torch.zeros_like(small.low).clamp(small.low, small.high)
        self.size = small.A.numel()

    def conflicting(self, sets: list[tuple[int, ...]]) -> list[bool]:
        """For each set, whether it is proved that its rows cannot hold together."""
        small, answers = self.small, []
        m = small.l.shape[1]
        step = max(1, int(AT_ONCE / max(self.size, 1)))
        for first in range(0, len(sets), step):
            some = sets[first : first + step]
            inside = torch.zeros(len(some), m, dtype=torch.bool)
            for i, rows in enumerate(some):
                inside[i, list(rows)] = True
            found = self.project(
                points(
                    small.A.expand(len(some), -1, -1),
                    torch.where(inside, small.l, -torch.inf),
                    torch.where(inside, small.u, torch.inf),
                    small.low.expand(len(some), -1),
                    small.high.expand(len(some), -1),
                    self.near.expand(len(some), -1),
                )
            )
            answers += with_status(found, Status.INFEASIBLE).tolist()
        return answers


def irreducible(rows: tuple[int, ...], within: Sets) -> tuple[int, ...]:
    """A subset in conflict of which every row is needed: the deletion filter.

    Before it, the rows of which the first half already conflict are cut in halves.
    """
    while len(rows) > 3:
        halves = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        one, other = within.conflicting(halves)
        if not (one or other):
            break
        rows = halves[0] if one else halves[1]
    for r in reversed(rows):
        rest = tuple(s for s in rows if s != r)
        if rest and within.conflicting([rest])[0]:
            rows = rest
    return rows


def smaller(
    rows: tuple[int, ...], candidates: list[int], within: Sets
) -> tuple[tuple[int, ...], bool]:
    """The first smaller set in conflict, if there is one, and whether none is smaller still."""
    left = min(MOST_SETS, int(MOST_WORK / max(within.size, 1)))
    for size in range(1, len(rows)):
        number = math.comb(len(candidates), size)
        if number > left:
            return rows, False
        left -= number
        for some in chunks(combinations(candidates, size), 512):
            for one, conflict in zip(some, within.conflicting(some), strict=True):
                if conflict:
                    return one, True
    return rows, True


def chunks(sets: Iterator[tuple[int, ...]], length: int) -> Iterator[list[tuple[int, ...]]]:
    while some := list(islice(sets, length)):
        yield some


def least_factor(small: Reach, first: Tensor, project: Project) -> float | None:
    """The least tau; ``None`` where no factor is enough."""
    half = (small.u - small.l) / 2
    wide = torch.isfinite(half) & (half > 0)
    if not bool(wide.any()):
        return None
    middle = torch.where(wide, (small.l + small.u) / 2, 0.0)
    half = torch.where(wide, half, 0.0)
    # tau = scale * s, so that the column of s has entries near 1.
    scale = 1 / half.max()
    lower = torch.where(wide, middle, small.l)
    upper = torch.where(wide, middle, small.u)
    found = grown(replace(small, l=lower, u=upper), half * scale, first, project)
    return None if found is None else float(found * scale)


def least_addition(small: Reach, first: Tensor, project: Project) -> float | None:
    """The least delta, in the units of the original rows; ``None`` if it was not found."""
    per = 1 / small.length
    scale = 1 / per.max()
    found = grown(small, per * scale, first, project)
    return None if found is None else float(found * scale * small.unit)


def grown(small: Reach, by: Tensor, rows: Tensor, project: Project) -> Tensor | None:
    """``relaxed`` for all rows, found from some of them: ``(m,)``, bool, which are in conflict."""
    if not small.is_large:
        return relaxed(small, by, project)
    near = torch.zeros_like(small.low).clamp(small.low, small.high)
    for _ in range(ROUNDS):
        some = rows.nonzero().squeeze(-1)
        least = relaxed(small.of(some), by[:, some], project)
        if least is None:
            return None
        enough = least * (1 + ENOUGH) * by
        found = project(
            points(small.A, small.l - enough, small.u + enough, small.low, small.high, near)
        )
        if found.status[0] is Status.SOLVED:
            return least
        more = proof_rows(found) & ~rows
        if not bool(more.any()):
            break
        rows = rows | more
    return relaxed(small, by, project)


def relaxed(small: Reach, by: Tensor, project: Project) -> Tensor | None:
    """min s, s >= 0, with  l - s by <= A v <= u + s by."""
    column = by.unsqueeze(-1)
    below, above = torch.cat([small.A, column], -1), torch.cat([small.A, -column], -1)
    free = torch.full_like(small.l, torch.inf)
    zero = torch.zeros_like(small.low[:, :1])
    low = torch.cat([small.low, zero], -1)
    found: Optimum = linear_optimum(
        unchecked(
            LP,
            c=torch.cat([torch.zeros_like(small.low), zero + 1.0], -1),
            rows=DenseRows(torch.cat([below, above], -2)),
            l=torch.cat([small.l, -free], -1), u=torch.cat([free, small.u], -1),
            lb=low, ub=torch.cat([small.high, zero + torch.inf], -1),
        ),
        project,
        torch.zeros_like(low),
    )  # fmt: skip
    return found.value[0] if bool(found.solved[0]) else None
