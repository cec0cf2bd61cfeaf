"""The least change with hindsight: what no streaming rule can beat, computed for one order.

Someone who knows the whole stream in advance picks all predictions at once, so that the gaps are
within the tolerance at the end, and the running gaps within another number at every hundredth
sample of a part of the stream. What is asked at every sample costs no less: a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import clarabel
import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt import PredictiveEquality, project

__all__ = ["least_change", "least_change_blind"]

Floats = NDArray[np.float64]


def least_change(
    scores: Floats,
    partitions: Sequence[Sequence[NDArray[np.bool_]]],
    at_end: float,
    running: float,
    after: int,
) -> float:
    """The least mean squared change of scores in [0, 1], in the order in which they come.

        minimise  1/2 sum_i d_i^2   where 0 <= s_i + d_i <= 1, and for each of the times t
        S_gt = S_g,t-1 + sum of s_i + d_i in group g since   (the group's sum so far)
        L_pt <= S_gt / n_gt <= U_pt for each group g of partition p,   U_pt - L_pt <= the limit

    Args:
        partitions: each a list of masks ``(n,)``, the groups whose means must be near each other.
        at_end, running: the largest gap at the end, and before.
        after: how many samples are served before anything is asked.
    """
    n, groups = len(scores), [mask for part in partitions for mask in part]
    times = np.array([*range(after, n, 100), n])
    T, width = len(times), n + len(groups) * len(times) + 2 * len(partitions) * len(times)
    interval = np.searchsorted(times, np.arange(1, n + 1))

    def placed(block: sp.sparray, first: int) -> sp.csc_array:
        """A block of columns from ``first`` on, all other columns zero."""
        before = sp.csc_array((block.shape[0], first))
        after_it = sp.csc_array((block.shape[0], width - first - block.shape[1]))
        return sp.csc_array(sp.hstack([before, block, after_it]))

    sums, known, rows, limits = [], [], [], []
    group = 0
    for p, part in enumerate(partitions):
        upper = n + len(groups) * T + 2 * p * T
        for mask in part:
            since = sp.csc_array((np.ones(mask.sum()), (interval[mask], np.nonzero(mask)[0])),
                                 shape=(T, n))  # fmt: skip
            so_far = sp.eye_array(T) - sp.eye_array(T, k=-1)
            sums.append(placed(so_far, n + group * T) - placed(since, 0))
            known.append(since @ scores)
            count = np.cumsum(mask)[times - 1]
            seen = sp.csc_array(sp.eye_array(T))[count > 0]
            mean = placed(seen @ sp.diags_array(1.0 / np.maximum(count, 1)), n + group * T)
            rows += [mean - placed(seen, upper), placed(seen, upper + T) - mean]
            limits += [np.zeros(seen.shape[0])] * 2
            group += 1
        rows.append(placed(sp.eye_array(T), upper) - placed(sp.eye_array(T), upper + T))
        limits.append(np.where(times == n, at_end, running))
    change = placed(sp.eye_array(n), 0)
    rows += [change, -change]
    limits += [1.0 - scores, scores]
    G, h = sp.vstack(sums + rows, format="csc"), np.concatenate(known + limits)
    equal = len(groups) * T
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    P = sp.diags_array(np.where(np.arange(width) < n, 1.0, 0.0), format="csc")
    cones = [clarabel.ZeroConeT(equal), clarabel.NonnegativeConeT(len(h) - equal)]
    found = clarabel.DefaultSolver(
        sp.csc_matrix(P), np.zeros(width), sp.csc_matrix(G), h, cones, settings
    ).solve()
    assert str(found.status) == "Solved", found.status
    return float(np.square(found.x[:n]).mean())


def least_change_blind(scores: Tensor, sex: Tensor, targets: Tensor, tolerance: float) -> float:
    """The same for equalized odds where no label is known when a sample is served.

    The shift of a sample then depends on its chance of a positive alone: the projection onto the
    row of y = 0 that counts chances, its tolerance such that the gap among the true y = 0 is met.
    (On Adult the row of y = 1 holds with it, so that nobody has to move for it.)
    """
    low, high = 0.0, 2.0 * tolerance
    for _ in range(30):
        middle = 0.5 * (low + high)
        x = project(scores, sex, PredictiveEquality(middle), scores, bounds=(0, 1))
        means = torch.stack([
            x[(sex == g) & (targets == y)].mean() for y in (0, 1) for g in (0, 1)
        ])  # fmt: skip
        holds = bool(((means[0::2] - means[1::2]).abs() <= tolerance).all())
        low, high = (middle, high) if holds else (low, middle)
    return float((x - scores).square().mean())
