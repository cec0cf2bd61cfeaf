"""What the kernels of a stream take: columns of arrays by name, and arrays in records. No Numba.

Letters: K cells, m rows, F continuous attributes v, S sets of cells, n samples. The statistics are
sums over all samples served, per cell, each an unevaluated sum of two doubles, so that a billion
additions lose nothing that a double could show:

    MASS    sum of w               VALUE    sum of w x
    SQUARE  sum of w (x - y)^2     TARGETS  sum of w y
    FORECAST  sum of w times what y was forecast to be (y itself, if it came at once)
    FEATURES  and from here for each v  sums of w v, w v x and w v^2

(y is 0 where no row needs targets.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Rows of the sums, and of the three for each continuous attribute.
MASS, VALUE, SQUARE, TARGETS, FORECAST, FEATURES = range(6)
OF_V, OF_V_X, OF_V_V, EACH_V = range(4)
# In ``totals``: samples whose targets are known (or that need none), batches, and the others.
SAMPLES, BATCHES, PENDING = range(3)
# In ``extent``.
LEAST, GREATEST = range(2)
# Columns of the rows' state: how far outside its sides the value can have been is AWAY, and SEEN is
# the root of the count at the last update.
MULTIPLIER, MEMORY, SEEN, AWAY = range(4)
# The state of feedback="batch": the multiplier, its largest value, and the sum over batches of size
# times gap in two parts.
PRICE, HIGHEST_PRICE, GAPS, GAPS_LOW = range(4)
# Columns of the terms' indices.
INSIDE, SHARE, PER, AGAIN, OF, OVER = range(6)


class Samples(NamedTuple):
    """The samples of a call in numbers.

    Attributes:
        scores: ``(n,)``, finite.
        cell: ``(n,)``, zeros where ``chances`` has the cells.
        chances: ``(n, K)``; of no length where every sample is in one cell.
        weight: ``(n,)``, or of length 1 for all.
        y: targets ``(n,)``, or of no length for none.
        v: continuous attributes ``(n, F)``.
        expected: whether the targets are forecasts.
    """

    scores: Floats
    cell: Integers
    chances: Floats
    weight: Floats
    y: Floats
    v: Floats
    expected: bool

    def part(self, first: int, last: int) -> Samples:
        """Some of them, in order."""
        at = slice(first, last)
        weight = self.weight[at] if len(self.weight) > 1 else self.weight
        return Samples(
            self.scores[at], self.cell[at], self.chances[at], weight, self.y[at], self.v[at],
            self.expected,
        )  # fmt: skip


class Statistics(NamedTuple):
    """The numbers of a stream, as ``fairopt.online.state.State`` has them.

    Attributes:
        others: ``(2 Q + 1, K)``, what of the sums other workers steer by, first as ``combined`` has
            them, then only those of known targets; below them, in the first column, its samples;
            ``None`` where the stream is not shared.
    """

    sums: Floats
    pending: Floats
    counts: Integers
    totals: Integers
    extent: Floats
    rows: Floats
    others: Floats | None


class Arrays(NamedTuple):
    """The rows in numbers that do not depend on the data.

    Attributes:
        sets: ``(S, K)``, 1 where a cell belongs to a set.
        linear_index, factor: ``(m, J, 6)`` and ``(m, J)``, the linear terms.
        const_index, const_factor: the constant terms; their OF is a row of the sums.
        needs: ``(m, N)`` sets that must not be empty; S for none.
        sides: ``(m, 2)``.
    """

    sets: Floats
    linear_index: Integers
    factor: Floats
    const_index: Integers
    const_factor: Floats
    needs: Integers
    sides: Floats


class Rows(NamedTuple):
    """The rows at given masses: what ``evaluate`` and ``values`` find.

    The value of row r is the sum over f and k of C[r, f, k] * (sum of w v_f x in k), v_0 = 1, and
    the constant; C as in ``fairopt.formulation.coefficients``.

    Attributes:
        C: ``(m, 1 + F, K)``.
        here: 1 where the row compares something, else 0, and then all else means nothing.
        curvature: the sum of w a^2 over all samples served, a their coefficients in the row.
        counted: as how many samples they count, (sum of w |a|)^2 / (4 sum of w a^2) over the mean
            weight: for a difference of means of two groups 1 / (1 / n_a + 1 / n_b).
        reach: half the sum of w |a|: by how much the value moves where each prediction that raises
            it goes up by one, and each of as many others down; for attributes an upper bound.
    """

    C: Floats
    here: Floats
    constant: Floats
    lower: Floats
    upper: Floats
    curvature: Floats
    counted: Floats
    reach: Floats
    value: Floats


class Problem(NamedTuple):
    """What ``project`` solves: rows at a price, over samples or over cells of samples.

        minimise  1/2 sum_i w_i (x_i - s_i)^2 + 1/2 sum_r kappa_r dist(v_r, [l_r, u_r])^2
        where     v = base + A (sums of w x per column) + offset,   lo <= x <= hi

    Attributes:
        column: ``(n,)``, the column of A of each sample; of no length where each has its own.
        A: ``(m, columns)``, or with more columns.
        kappa: ``(m,)``; 0 for rows without effect.
    """

    scores: Floats
    weight: Floats
    column: Integers
    A: Floats
    base: Floats
    l: Floats
    u: Floats
    kappa: Floats
    offset: Floats
    lo: float
    hi: float


class Work(NamedTuple):
    """What ``project`` computes in: per column the sum of w x and the unclipped w, and rows."""

    total: Floats
    free: Floats
    v: Floats
    H: Floats
    d: Floats
    active: Integers


class Settings(NamedTuple):
    """The constants of the pooled feedback, and the bounds; docs/streaming.md has the reasons."""

    step: float
    forget: float
    haste: float
    margin: float
    early: float
    range: float
    low: float
    high: float


class Room(NamedTuple):
    """Where the pooled feedback serves its batches; of each row twice what ``prices`` writes."""

    now: Floats
    mass: Floats
    variance: Floats
    rows: Rows
    problem: Problem
    dual: Floats
    work: Work
    awaits: float
