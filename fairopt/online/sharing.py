"""Replicas of one stream: what each has served since they last met is added up, once.

A replica knows a state and, of it, what all replicas knew when they last met, ``common``. What it
has served since is the difference, and

    everything served = common + sum over replicas of (state - common)

with counts as integers and sums as pairs of doubles, added in the order of the replicas: so all who
add the same parts have the same state, bit for bit.

Between meetings each of K workers steers by common / K and what it has served itself: its share. If
each steered by all that is common, each would make up for the same excess, K times in all, and the
next meeting would find it K - 1 times as large on the other side. The pooled sums are the sums of
the shares, so what each worker holds for its share holds for all, but for how the groups are
distributed over the workers (docs/streaming.md).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from fairopt import kernels
from fairopt.errors import ProblemError
from fairopt.kernels.stream_records import (
    AWAY,
    FORECAST,
    HIGHEST_PRICE,
    MEMORY,
    MULTIPLIER,
    PENDING,
    PRICE,
    SEEN,
)
from fairopt.notions.catalogue import Constraint
from fairopt.online.layout import Layout, Programme, programme
from fairopt.online.packing import packed, unpacked
from fairopt.online.state import ARRAYS, State

Constraints = tuple[Constraint, ...]


@dataclass(frozen=True, eq=False)
class Common:
    """What a number of workers knew when they last met; ``state`` is empty if they never did."""

    state: State = field(default_factory=State)
    workers: int = 1

    def to_bytes(self) -> bytes:
        """None where they never met."""
        made = self.state.programme
        if made is None:
            return b""
        header = {"layout": made.layout.to_json(), "workers": self.workers}
        return packed(header, self.state.arrays())

    @classmethod
    def from_bytes(cls, constraints: Constraints, data: bytes) -> Common:
        """From ``to_bytes``.

        Raises:
            ProblemError: the bytes are none of a state of these constraints.
        """
        if not data:
            return cls()
        header, arrays = unpacked(data)
        if set(arrays) != set(ARRAYS) or not isinstance(header.get("workers"), int):
            raise ProblemError(f"expected the arrays {', '.join(ARRAYS)}, got {', '.join(arrays)}")
        made = programme(constraints, Layout.from_json(header.get("layout", "")))
        return cls(State.restored(made, arrays), header["workers"])

    def divide(self, state: State) -> None:
        """Let a state, of which this is part, steer by one of equal shares of it."""
        state.others = None
        if self.workers == 1 or state.programme is None or self.state.programme is None:
            return
        there, left = self.state.moved(state.programme), (self.workers - 1) / self.workers
        Q, K = there.sums.shape[1:]
        others = np.zeros((2 * Q + 1, K))
        kernels.stream.combined(there.sums, there.pending, others[:Q])
        others[FORECAST] = 0.0  # there combined leaves a mean, of errors
        others[Q:-1] = there.sums.sum(0)
        others[:-1] *= left
        others[-1, 0] = left * there.served
        state.others = others


@dataclass(frozen=True, eq=False)
class Part:
    """What one replica brings.

    Attributes:
        name: what errors call it.
        state: all that it knows.
        common: what of it all knew when they last met.
        origin: ``origin_of`` the state that it was loaded from, if it was.
    """

    name: str
    state: State
    common: Common
    origin: str = ""

    def to_bytes(self, configuration: Mapping[str, Any]) -> bytes:
        states = {"state": Common(self.state).to_bytes(), "common": self.common.to_bytes()}
        return packed(
            {"configuration": dict(configuration), "origin": self.origin},
            {name: np.frombuffer(each, np.uint8) for name, each in states.items()},
        )


def origin_of(state: State, common: Common) -> str:
    """What only replicas that go on from the same saved state have in common.

    Nothing where all of the state is common already: then any number may go on from it.
    """
    if np.array_equal(state.totals, common.state.totals):
        return ""
    return hashlib.sha256(Common(state).to_bytes()).hexdigest()


def parts_from(constraints: Constraints, data: Sequence[bytes]) -> list[Part]:
    """The parts of all ranks, from ``to_bytes``.

    Raises:
        ProblemError: configurations differ.
    """
    read = [unpacked(each) for each in data]
    first: Mapping[str, Any] = read[0][0]["configuration"]
    for rank, (header, _) in enumerate(read):
        other = header["configuration"]
        different = [
            f"{key}: {first.get(key)!r} on rank 0, {other.get(key)!r} on rank {rank}"
            for key in sorted({*first, *other})
            if first.get(key) != other.get(key)
        ]
        if different:
            raise ProblemError(
                "synchronize: expected workers of the same configuration, got "
                + "; ".join(different)
            )
    found = []
    for rank, (header, arrays) in enumerate(read):
        state, common = (
            Common.from_bytes(constraints, arrays[name].tobytes()) for name in ("state", "common")
        )
        found.append(Part(f"rank {rank}", state.state, common, header["origin"]))
    return found


def pooled(doing: str, constraints: Constraints, parts: Sequence[Part]) -> tuple[State, Common]:
    """The state of everything that the replicas served, and what of it was common before.

    Args:
        doing: what errors begin with.

    Raises:
        ProblemError: the attributes differ, or something would count twice.
        UnsupportedProblemError: too many cells together.
    """
    check_origins(doing, parts)
    common = common_of(doing, parts)
    there = [part for part in parts if part.state.programme is not None]
    if not there:
        return State(), common
    made = joint(doing, constraints, [part.state for part in there])
    before = common.state.moved(made)
    total = before.copy()
    news = [part.state.since(part.common.state).moved(made) for part in there]
    for new in news:
        total.count(new)
    waiting = int(total.totals[PENDING])
    if waiting < 0:
        raise ProblemError(
            f"{doing}: expected the targets of each sample once, got {-waiting} more than samples; "
            "observe each sample in one replica only"
        )
    if waiting == 0:
        total.pending[...] = 0.0
    steer(total, before, news)
    return total, common


def meeting(constraints: Constraints, parts: Sequence[Part]) -> Common:
    """What all workers know once they have met, in equal shares from here on.

    Raises:
        ProblemError, UnsupportedProblemError: as ``pooled`` does.
    """
    total, common = pooled("synchronize", constraints, parts)
    made, workers = total.programme, len(parts)
    unchanged = np.array_equal(total.totals, common.state.totals) and workers == common.workers
    if made is not None and not unchanged:
        # The root of the count of a share, whose square is what the shares have in common.
        base = common.state.moved(made).rows[:, SEEN] ** 2
        squares = common.workers * base
        for part in parts:
            squares = squares + part.state.moved(made).rows[:, SEEN] ** 2
            squares = squares - part.common.state.moved(made).rows[:, SEEN] ** 2
        total.rows[:, SEEN] = np.sqrt(np.maximum(squares, 0.0) / workers)
    return Common(total, workers)


def resumed(constraints: Constraints, total: State, before: State, now: State) -> State:
    """A state of everything, and what came since the replica's part of it, ``before``."""
    if now.programme is None:
        return total.copy()
    made = joint("synchronize", constraints, [total, now])
    state, new = total.moved(made), now.since(before).moved(made)
    if new.totals.any():
        state.count(new)
        state.rows[:, AWAY] = math.inf
    return state


def joint(doing: str, constraints: Constraints, states: Sequence[State]) -> Programme:
    """The rows over the groups of all states; one of theirs where it knows them all."""
    programmes = [state.programme for state in states if state.programme is not None]
    layout = reduce(lambda a, b: joined(doing, a, b), (each.layout for each in programmes))
    known = [each for each in programmes if each.layout == layout]
    return known[0] if known else programme(constraints, layout)


def steer(total: State, before: State, news: Sequence[State]) -> None:
    """Multipliers of all: means of what the parts came to, by the samples of each since.

    A row's mean is over those in which it has acted since. Where several were at work nobody knows
    how far a row is from its aim; and the theorem of feedback="batch" is of one sequence of steps.
    """
    at_work = [new for new in news if new.totals.any()]
    if len(at_work) < 2:
        for new in at_work:
            total.rows[...] = new.rows
            total.paper[PRICE : HIGHEST_PRICE + 1] = new.paper[PRICE : HIGHEST_PRICE + 1]
        return
    sizes = np.array([float(new.served) for new in at_work])
    rows = np.stack([new.rows for new in at_work])
    weight = (rows[:, :, SEEN] > before.rows[:, SEEN]) * sizes[:, None]
    whole = weight.sum(0)
    share = weight / np.where(whole > 0.0, whole, 1.0)
    steered = slice(MULTIPLIER, MEMORY + 1)
    mean = (share[:, :, None] * rows[:, :, steered]).sum(0)
    total.rows[:, steered] = np.where(whole[:, None] > 0.0, mean, before.rows[:, steered])
    steps = rows[:, :, SEEN] ** 2 - before.rows[:, SEEN] ** 2
    total.rows[:, SEEN] = np.sqrt(before.rows[:, SEEN] ** 2 + steps.sum(0))
    total.rows[:, AWAY] = math.inf
    if sizes.any():
        total.paper[PRICE] = np.average([new.paper[PRICE] for new in at_work], weights=sizes)
    total.paper[HIGHEST_PRICE] = math.inf


def check_origins(doing: str, parts: Sequence[Part]) -> None:
    """Raise where two parts went on from one saved state that was not common to all."""
    seen: dict[str, Part] = {}
    for part in parts:
        if part.origin and part.origin in seen:
            raise ProblemError(
                f"{doing}: expected replicas that count different samples, got "
                f"{seen[part.origin].name} and {part.name} that were both loaded from one state, "
                "whose samples would count twice; load it in one, and let the others begin empty "
                "(reset)"
            )
        seen[part.origin] = part


def common_of(doing: str, parts: Sequence[Part]) -> Common:
    """What all knew when they last met. A part that never met anyone may join."""
    met = [part for part in parts if part.common.state.programme is not None]
    if not met:
        return Common()
    first = met[0].common.to_bytes()
    for part in met[1:]:
        if part.common.to_bytes() != first:
            counts = [p.common.state.served for p in (met[0], part)]
            raise ProblemError(
                f"{doing}: expected replicas that last met at the same time, got {met[0].name}, "
                f"which knew of {counts[0]} samples then, and {part.name}, which knew of "
                f"{counts[1]}; load states that were saved after the same synchronize(), or load "
                "one and let the others begin empty (reset)"
            )
    return met[0].common


def joined(doing: str, a: Layout, b: Layout) -> Layout:
    """The groups of both.

    Raises:
        ProblemError: the attributes differ.
    """
    same = (a.names, a.soft, a.continuous, tuple(n for n, _ in a.codes))
    other = (b.names, b.soft, b.continuous, tuple(n for n, _ in b.codes))
    if same != other:
        raise ProblemError(
            f"{doing}: expected streams with the same attributes, got {', '.join(a.names)} and "
            f"{', '.join(b.names)}"
        )
    if a.soft and a.codes != b.codes:
        raise ProblemError(f"{doing}: expected chances of equally many groups, got other numbers")
    return a.with_codes(dict(b.codes))
