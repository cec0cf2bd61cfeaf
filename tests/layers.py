"""What the tests of the layer share: a small parity problem."""

from __future__ import annotations

from typing import Any

import torch

from fairopt import DemographicParity, FairnessLayer

N = 12
SCORES = torch.tensor(
    [0.9, 0.1, 0.8, 0.3, 0.7, 0.2, 0.95, 0.4, 0.6, 0.5, 0.85, 0.05], dtype=torch.float64
)
GROUPS = torch.arange(N) % 2
PARITY = DemographicParity(tolerance=0.05)


def parity(**changes: Any) -> FairnessLayer:
    """The layer of most tests."""
    return FairnessLayer(**{"constraints": PARITY, "bounds": (0, 1), **changes})
