"""Batches before they are served, and those that others served and an auditor recomputes too."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fairopt import kernels
from fairopt.kernels.stream_records import AWAY, SEEN, Arrays, Floats, Rows, Samples
from fairopt.online.state import State

if TYPE_CHECKING:
    from fairopt.online.feedback import Method


class Opened:
    """The rows before a batch, in the letters of ``fairopt.kernels.stream``."""

    def __init__(self, state: State, samples: Samples, arrays: Arrays) -> None:
        assert state.programme is not None
        n, K, m = len(samples.scores), state.programme.cells, len(state.rows)
        F = samples.v.shape[1]
        compiled = kernels.stream
        self.rows: Rows = compiled.empty_rows(m, F, K)
        self.A = np.empty((m, n))
        compiled.open_batch(
            samples, 0, n, state.statistics(), state.others, arrays, np.empty(state.sums.shape[1:]),
            np.empty(len(arrays.sets) + 1), self.rows,
        )  # fmt: skip
        compiled.loadings(self.rows.C, samples, 0, n, self.A)
        self.here = self.rows.here > 0.0
        self.base = self.rows.value
        self.sides = np.stack([self.rows.lower, self.rows.upper], 1)
        self.weight = np.broadcast_to(samples.weight, n).astype(np.float64)


def count_batch(state: State, part: Samples, x: Floats, arrays: Arrays, feedback: Method) -> None:
    """Count one batch that was served x; the state is updated.

    The pooled memory stays as it is, and its clock goes on: it has learnt what offset its own
    predictions need, and others' teach it nothing of that. (Were the clock to stand still, the
    next single sample would be taken for a step as long as all that was counted.)
    """
    compiled = kernels.stream
    feedback.answer(state, part, x, arrays)
    compiled.close_batch(part, 0, len(x), state.statistics(), x, False)
    compiled.widen(state.extent, part.scores, 0, len(x))
    now = Opened(state, part.part(0, 0), arrays)  # before a batch of nobody: what the rows are now
    root = np.sqrt(np.where(now.here, now.rows.counted, 0.0))
    state.rows[:, SEEN] = np.maximum(state.rows[:, SEEN], root)
    state.rows[:, AWAY] = math.inf  # the identity holds again from the next step on
