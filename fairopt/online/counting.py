"""Batches that were served by others: they belong to what an auditor recomputes."""

from __future__ import annotations

import math

import numpy as np

from fairopt.online.hard import Opened
from fairopt.online.layout import Arrays, Floats
from fairopt.online.paper import answer
from fairopt.online.reading import Samples
from fairopt.online.state import AWAY, PENDING, SAMPLES, SEEN, State, kernels

__all__ = ["count_batch"]

HERE, COUNT = 0, 5  # columns of what ``kernels.evaluate`` finds


def count_batch(state: State, part: Samples, x: Floats, arrays: Arrays, step: float | None) -> None:
    """Count one batch that was served x; the state is updated.

    The pooled rule's memory stays as it is, and its clock goes on: it has learnt what offset its
    own predictions need, and others' teach it nothing of that. (Were the clock to stand still, the
    next single sample would be taken for a step as long as all that was counted.)

    Args:
        step: of the paper's rule, whose multiplier answers to any batch; ``None`` for other rules.
    """
    compiled = kernels()
    if step is not None:
        answer(state, Opened(State(state.programme), part, arrays), x, arrays, step)
    compiled.close_batch(
        part.cell, part.chances, part.weight, part.y, part.v, 0, len(x), False, x,
        state.pending if part.expected else state.sums, state.counts, state.totals, part.expected,
    )  # fmt: skip
    state.extent[0] = min(state.extent[0], part.scores.min())
    state.extent[1] = max(state.extent[1], part.scores.max())
    here, count = counts_of(state, arrays)
    state.rows[:, SEEN] = np.maximum(state.rows[:, SEEN], np.sqrt(np.where(here, count, 0.0)))
    state.rows[:, AWAY] = math.inf  # the identity holds again from the rule's next step on


def counts_of(state: State, arrays: Arrays) -> tuple[np.ndarray, Floats]:
    """Which rows compare something, and as how many samples each counts."""
    assert state.programme is not None
    m, features = len(state.rows), len(state.programme.features)
    now = np.empty(state.sums.shape[1:])
    C, found = np.empty((m, 1 + features, state.programme.cells)), np.empty((m, 7))
    compiled = kernels()
    compiled.combined(state.sums, state.pending, now)
    weight = float(now[0].sum()) / float(state.totals[SAMPLES] + state.totals[PENDING])
    compiled.evaluate(
        now, *arrays, weight if weight > 0.0 else 1.0, np.empty(len(arrays.sets) + 1), C, found
    )
    return found[:, HERE] > 0.0, found[:, COUNT]
