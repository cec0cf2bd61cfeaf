"""What the tests of comparisons share: a small problem, and backends with one thing broken."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from fairopt import QP, DemographicParity, Solution, formulate
from fairopt.backends.numba.backend import Numba
from fairopt.programs.problem import Problem

GROUPS = torch.arange(20) % 3


def parity(tolerance: float = 0.05, bounds: Any = (0, 1), batch: int = 4) -> QP:
    """A batch of projections of 20 scores onto three rows, well away from the next active set."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(batch, 20, generator=generator, dtype=torch.float64)
    return formulate(DemographicParity(tolerance), noise + 0.2 * GROUPS, GROUPS, bounds=bounds)


class Twin(Numba):
    """Nothing is broken."""

    name: ClassVar[str] = "twin"


class WrongX(Twin):
    """One variable of one problem of the batch is off by 0.001."""

    name: ClassVar[str] = "wrong-x"

    def solve(self, problem: Problem) -> Solution:
        solution = super().solve(problem)
        x = solution.x.clone()
        if len(x) == 4:
            x[2, 3] += 1e-3
        return solution.with_x(x)
