"""The projection's algorithm with any cell-sum oracle, driven from Python by reverse communication.

``fairopt.kernels.newton`` decides, in compiled code, at which dual shifts to look next. Where the
samples are, and who adds them up, is the oracle's business alone: threads, a process group, a
database query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fairopt.kernels.newton import advance, conclude, sum_rounding
from fairopt.kernels.state import (
    CELL_MASS, CONTINUE, DUAL, EVALUATIONS, MAGNITUDE, SHIFT, SHIFT_REST, SUM, TRIAL_SHIFT,
    TRIAL_SHIFT_REST, UNCLIPPED, new_state,
)  # fmt: skip

Array = NDArray[np.float64]


class CellSums(Protocol):
    """What the algorithm asks about the samples i of each cell k.

    With dual shifts t a sample is x_i = clip(-(q_i + w_i t_k) / P_i, lb_i, ub_i).
    """

    def limits(self) -> Array:
        """Per cell: sum of w^2 / P over the samples with lb < ub, the least and the greatest
        value of sum w x within the bounds, and sum |w|: float64 ``(4, K)``. Asked once.
        """

    def sums(self, shift_hi: Array, shift_lo: Array) -> Array:
        """Per cell, at the dual shifts t = shift_hi + shift_lo, ``(K,)`` each: sum of w x, sum of
        w^2 / P over the samples with lb < ub that clipping leaves as they are, and sum |w x|:
        float64 ``(3, K)``.

        The second part of a shift holds the digits that do not fit into the first; where they
        matter, -q / P is to be combined with the first before the second is subtracted.
        """


@dataclass
class OracleSolve:
    """A solve that stands still between two questions, or has ended.

    Attributes:
        status: one of the outcomes in ``fairopt.kernels.state``.
        C, l, u: of the problem.
        cells, rows, numbers: of ``fairopt.kernels.state``.
    """

    status: int
    C: Any
    l: Array
    u: Array
    cells: Array
    rows: Array
    numbers: Array

    @property
    def passes(self) -> int:
        return int(self.numbers[EVALUATIONS])

    @property
    def multipliers(self) -> Array:
        """Of the rows ``(m,)``: of the solution, or of the proof that there is none."""
        return self.rows[DUAL]  # type: ignore[no-any-return]

    @property
    def shifts(self) -> Array:
        """Both parts of the dual shifts, ``(2, K)``."""
        return self.cells[SHIFT : SHIFT_REST + 1]

    def conclude(self, sums: Array, precision: float, tight: NDArray[np.uint8]) -> None:
        """Judge the solution by the sums of x as it was written, ``(3, K)``.

        Args:
            precision: the largest excess of a row, relative to its scale.
            tight: written; for each row 1 where its upper side is met, plus 2 where its lower is.
        """
        self.cells[SUM : MAGNITUDE + 1] = sums
        self.status = conclude(
            self.C, self.l, self.u, self.cells, self.rows, self.status, precision, tight
        )


def solve_by_oracle(C: Any, l: Array, u: Array, oracle: CellSums, samples: int) -> OracleSolve:
    """Solve one problem: CONVERGED where nothing but rounding is left, or another status.

    Args:
        C: float64 ``(m, K)``, or ``fairopt.kernels.partitions.PartRows``.
        l, u: float64 ``(m,)``.
        samples: how many samples are summed; the rounding to expect grows with its root.
    """
    limits = oracle.limits()
    state = new_state(len(l), limits.shape[1])
    solve = OracleSolve(CONTINUE, C, l, u, *state)
    solve.cells[UNCLIPPED : CELL_MASS + 1] = limits
    trial, trial_rest = solve.cells[TRIAL_SHIFT], solve.cells[TRIAL_SHIFT_REST]
    rounding = sum_rounding(samples)
    while solve.status == CONTINUE:
        solve.cells[SUM : MAGNITUDE + 1] = oracle.sums(trial, trial_rest)
        solve.status = advance(C, l, u, *state, rounding)
    return solve
