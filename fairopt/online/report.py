"""What a stream says of itself, recomputed from its statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fairopt.kernels.stream_records import AWAY, MASS, MEMORY, MULTIPLIER, VALUE
from fairopt.online.state import State, pooled

if TYPE_CHECKING:
    from fairopt.online.feedback import Method


@dataclass(frozen=True)
class GroupReport:
    """One cell: a group, with its outcome where a notion asks for it.

    Attributes:
        name: such as ``"sex: 0 | y = 1"``.
        samples: how many; where groups or outcomes are chances, their sum.
        mass: total weight.
        mean: mean prediction; NaN without samples.
    """

    name: str
    samples: float
    mass: float
    mean: float


@dataclass(frozen=True)
class RowReport:
    """One row on the pooled statistic: all predictions served so far.

    Attributes:
        name, notion: as ``audit`` has them.
        value: what the row bounds, recomputed from the sums; what ``audit`` of all predictions
            finds.
        lower, upper: its sides.
        excess: by how much the value is outside; 0 where it is not.
        multiplier: signed; positive pushes the value down. In units of a prediction.
        memory: what the multiplier has been lately.
        count: as how many samples the row counts; for a difference of two means
            1 / (1/n_a + 1/n_b).
        bound: what ``excess`` cannot exceed, by the identity that ties it to the multiplier of the
            last step. Infinite while targets are awaited, until the step after ``observe`` or
            ``merge``, and where the state is shared with other workers, for then the identity is
            of this worker's share; NaN for ``feedback="batch"``, whose bound is of another
            quantity.
    """

    name: str
    notion: str
    value: float
    lower: float
    upper: float
    excess: float
    multiplier: float
    memory: float
    count: float
    bound: float


@dataclass(frozen=True)
class OnlineReport:
    """What a stream says of itself. ``str(report)`` is a table.

    Attributes:
        feedback: its name.
        samples: how many were served with their targets known, or none needed.
        pending: how many were served whose targets have not been observed.
        batches: how many calls, or batches of ``run``.
        groups, rows: one entry per cell and per row that means something.
        skipped: names of rows that compare nothing yet.
        batch_gap: for ``feedback="batch"``, the mean over batches of the gap within the batch,
            weighted by their sizes: the quantity of its theorem; else NaN.
        batch_bound: and the theorem's bound on it; infinite after several streams were pooled, for
            the theorem is of one sequence of steps.
    """

    feedback: str
    samples: int
    pending: int
    batches: int
    groups: tuple[GroupReport, ...]
    rows: tuple[RowReport, ...]
    skipped: tuple[str, ...]
    batch_gap: float
    batch_bound: float

    @property
    def worst(self) -> RowReport | None:
        """The row with the largest excess; among rows that hold, the one nearest to a side."""
        return max(
            self.rows,
            key=lambda r: (r.excess, -min(r.value - r.lower, r.upper - r.value)),
            default=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: what is infinite or not a number is None."""

        def plain(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: plain(each) for key, each in value.items()}
            if isinstance(value, (list, tuple)):
                return [plain(each) for each in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        found: dict[str, Any] = plain(asdict(self))
        return found

    def __str__(self) -> str:
        width = max([3, *(len(row.name) for row in self.rows)])
        waiting = f", {self.pending} more without targets" if self.pending else ""
        lines = [
            f"{self.samples} samples in {self.batches} batches{waiting}",
            f"{'row':{width}}  {'pooled':>10}  {'lower':>10}  {'upper':>10}  {'excess':>9}  "
            f"{'multiplier':>10}",
        ]
        lines += [
            f"{r.name:{width}}  {r.value:10.6f}  {r.lower:10.6f}  {r.upper:10.6f}  {r.excess:9.2e}"
            f"  {r.multiplier:10.6f}"
            for r in self.rows
        ]
        lines += [f"{g.name or 'all'}: {g.samples:.6g}, mean {g.mean:.6f}" for g in self.groups]
        lines += [f"skipped: {name}" for name in self.skipped]
        if not math.isnan(self.batch_gap):
            lines.append(f"mean gap of batches {self.batch_gap:.6f}, bound {self.batch_bound:.6f}")
        return "\n".join(lines)


def report_of(state: State, name: str, feedback: Method) -> OnlineReport:
    """The report of a state, served by a feedback of this name."""
    made = state.programme
    samples, batches, pending = map(int, state.totals)
    arrays = None if made is None else made.arrays()
    paper = feedback.theorem(state, arrays)
    if made is None:
        return OnlineReport(name, samples, pending, batches, (), (), (), *paper)
    now, found = pooled(state, made)
    groups = []
    certain = int(state.counts.sum()) == samples
    for k, label in enumerate(made.labels):
        mass = float(now[MASS, k])
        if mass > 0.0:
            count = float(state.counts[k]) if certain else mass
            groups.append(GroupReport(label, count, mass, float(now[VALUE, k] / mass)))
    rows, skipped = [], list(made.rows.uncompared)
    for r, row in enumerate(made.rows.names):
        if not found.here[r]:
            skipped.append(f"{row}: a group has no samples")
            continue
        low, v, high = float(found.lower[r]), float(found.value[r]), float(found.upper[r])
        multiplier, memory = (float(state.rows[r, c]) for c in (MULTIPLIER, MEMORY))
        bound = math.inf if pending or state.shared else abs(float(state.rows[r, AWAY]))
        owner = type(made.rows.plan.constraints[made.rows.owners[r]]).__name__
        excess = max(0.0, low - v, v - high)
        bound = bound if feedback.bounded else math.nan
        count = float(found.counted[r])
        rows.append(RowReport(row, owner, v, low, high, excess, multiplier, memory, count, bound))
    return OnlineReport(
        name, samples, pending, batches, tuple(groups), tuple(rows), tuple(skipped), *paper
    )
