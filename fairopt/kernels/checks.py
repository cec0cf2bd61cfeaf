"""Checks of small inputs on the CPU, compiled: one call where torch needs seven.

For a few thousand samples the calls are what a fairness layer costs. Large inputs are better off
with torch's vectorised and threaded reductions.
"""

from __future__ import annotations

import numpy as np

from fairopt.kernels.compilation import compiled


@compiled()
def finite(values):  # type: ignore[no-untyped-def]
    """Whether every element of a contiguous array is finite."""
    bad = 0
    for value in values.ravel():
        bad += not (abs(value) < np.inf)  # counted, not branched on, so that it vectorises
    return bad == 0


@compiled()
def encode(codes, out, counts):  # type: ignore[no-untyped-def]
    """Smallest and largest code; if all are in 0..len(counts) - 1, they are copied and counted.

    Args:
        codes: integers, ``(1, n)``, contiguous, n >= 1.
        out: uint8 like ``codes``, written.
        counts: int64, at most 256 zeros, written.
    """
    flat, bytes_ = codes.ravel(), out.ravel()
    low = high = np.int64(flat[0])
    for code in flat:
        low, high = min(low, np.int64(code)), max(high, np.int64(code))
    if low >= 0 and high < len(counts):
        for i in range(len(flat)):
            bytes_[i] = flat[i]
        for i in range(len(flat)):
            counts[bytes_[i]] += 1
    return low, high
