"""How a stream learns from what it served: each feedback is one module, one line of ``MODULES``.

All share one state, ``fairopt.online.state.State``, and of two streams the state is merged in the
same way: counts and sums add up, multipliers become means (``fairopt.online.sharing.steer``).
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch

from fairopt import kernels
from fairopt.kernels.stream_records import Arrays, Floats, Samples, Settings
from fairopt.online.state import State

if TYPE_CHECKING:
    from fairopt.online.history import Records
    from fairopt.online.layout import Programme

MODULES = {"pooled": "pooled", "batch": "paper", "hard": "hard"}  # each has one class, ``Method``

# The constants of the pooled feedback; docs/streaming.md says where each comes from. They are pure
# numbers.
FORGET = 0.05
HASTE = 3.0
MARGIN = 2.5


class Method:
    """The protocol of a feedback: it defines ``batch``; all else has a safe default.

    Attributes:
        step_size: what it is made with, by default ``default_step``.
        warm_up: how many samples the pooled feedback serves first; only where ``warms_up``.
        early: after how many samples the pooled steps have half their size.
        fast: whether ``kernels.stream`` serves float32 and float64 in one call.
        bounded: whether the multiplier of the last step says how far rows can be outside.
    """

    default_step: float = 1.0
    warms_up: bool = False
    early: float = 0.0
    fast: bool = False
    bounded: bool = True

    def __init__(self, step_size: float, warm_up: int) -> None:
        self.step_size = step_size
        self.warm_up = warm_up

    def settings(self, low: float, high: float) -> Settings:
        """What the kernels need, for these bounds."""
        return Settings(
            self.step_size, FORGET, HASTE, MARGIN, self.early, high - low, low, high
        )  # fmt: skip

    def check(self, made: Programme, expected: bool) -> None:
        """Raise where the feedback cannot hold these rows, or cannot do with forecasts."""

    def batch(self, state: State, part: Samples, arrays: Arrays, settings: Settings) -> Floats:
        """The predictions of one batch, not yet counted; multipliers and extent are updated."""
        raise NotImplementedError

    def serve(
        self, state: State, samples: Samples, arrays: Arrays, settings: Settings, size: int,
        dtype: torch.dtype, records: Records | None,
    ) -> Floats:  # fmt: skip
        """All samples, ``size`` at a time; ``state`` and ``records`` are updated."""
        out = np.empty(len(samples.scores))
        for first in range(0, len(out), size):
            part = samples.part(first, first + size)
            x = self.batch(state, part, arrays, settings)
            x = torch.from_numpy(x).to(dtype).double().numpy()
            kernels.stream.close_batch(part, 0, len(x), state.statistics(), x, False)
            out[first : first + size] = x
            if records is not None:
                records.take(state)
        return out

    def answer(self, state: State, part: Samples, x: Floats, arrays: Arrays) -> None:
        """Learn from a batch that others served x, before it is counted; by default nothing."""

    def theorem(self, state: State, arrays: Arrays | None) -> tuple[float, float]:
        """The mean gap of batches, and its bound; by default NaN."""
        return math.nan, math.nan


def method_of(name: str) -> type[Method]:
    """The feedback of a name of ``MODULES``."""
    found: type[Method] = import_module(f"fairopt.online.feedback.{MODULES[name]}").Method
    return found
