"""Batches that were served by others: they belong to what an auditor recomputes."""

from __future__ import annotations

import math

import numpy as np

from fairopt.kernels.stream_records import AWAY, SEEN, Arrays, Floats, Samples
from fairopt.online.feedback.hard import Opened
from fairopt.online.feedback.paper import answer
from fairopt.online.state import State, kernels


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
    compiled.close_batch(part, 0, len(x), state.statistics(), x, False)
    compiled.widen(state.extent, part.scores, 0, len(x))
    now = Opened(state, part.part(0, 0), arrays)  # before a batch of nobody: what the rows are now
    root = np.sqrt(np.where(now.here, now.rows.counted, 0.0))
    state.rows[:, SEEN] = np.maximum(state.rows[:, SEEN], root)
    state.rows[:, AWAY] = math.inf  # the identity holds again from the rule's next step on
