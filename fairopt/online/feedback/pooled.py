"""feedback="pooled": a multiplier and a memory per row, in ``fairopt.kernels.stream.steps``."""

from __future__ import annotations

import numpy as np
import torch

from fairopt import kernels
from fairopt.kernels.stream_records import Arrays, Floats, Samples, Settings
from fairopt.online import feedback
from fairopt.online.history import Records, stretches
from fairopt.online.state import State


class Method(feedback.Method):
    """Near the least change, and within the sides as the stream goes on."""

    early = 600.0
    fast = True

    def batch(self, state: State, part: Samples, arrays: Arrays, settings: Settings) -> Floats:
        x = np.empty(len(part.scores))
        trial = state.copy()  # its sums are counted later, in the dtype that is returned
        kernels.stream.stream(
            tuple(part), tuple(trial.statistics()), tuple(arrays), tuple(settings), len(x), False, x
        )
        state.rows[...], state.extent[...] = trial.rows, trial.extent
        return x

    def serve(
        self, state: State, samples: Samples, arrays: Arrays, settings: Settings, size: int,
        dtype: torch.dtype, records: Records | None,
    ) -> Floats:  # fmt: skip
        if dtype not in (torch.float32, torch.float64):
            return super().serve(state, samples, arrays, settings, size, dtype, records)
        out, statistics = np.empty(len(samples.scores)), tuple(state.statistics())
        for at in stretches(records, state, len(out), size):
            kernels.stream.stream(
                tuple(samples.part(at.start, at.stop)), statistics, tuple(arrays), tuple(settings),
                size, dtype == torch.float32, out[at],
            )  # fmt: skip
        return out
