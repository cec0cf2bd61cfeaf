"""What must a streaming rule change on the Adult data, even if it has nothing to learn?

A lower bound, in a simplified model, on the mean squared change of any rule that at each moment
after sample 2,000, taken by itself, has the pooled gap within 0.05 in 19 of 20 streams; and within
0.051 in 99 of 100, where that is said. The rule knows from which distribution each group's scores
and labels are drawn and how long the stream is, but not which samples will come. ``bench.causal``
and ``bench.causal_rows`` say how.

It is over the optimum of one who knows the whole stream, in the same model: samples are drawn anew,
nothing is clipped at the bounds, the levels that groups are held to are those of the optimum on the
data and stay, and the counts of groups grow evenly. In a random order of the same samples the sums
at the end are certain; a rule that knew them, too, would need less.

"Race, any rule": each group has to be in its window of 0.05 by itself; the largest is moved as by
the optimum. Such a bound allows that all groups fail in the same streams, as if a rule gave these
up. "Race, group by group": each is held by its own samples, so that they fail independently.

"Equalized odds": the rows of both outcomes, each to first order about the optimum. A late label is
known 1,000 samples after it was served; until then what is known of it is the share of its outcome
among the group's samples with scores like its own, in 16 bins. What it adds has one distribution
for all samples, and not more for being moved. "Late, in hindsight" is of one who knows the whole
stream, but not which label is whose.

"Pooled" is what the pooled rule changes in 20 streams of samples drawn anew, in batches of 1, over
the optima of these streams.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from bench import causal, causal_rows
from bench.causal import Limit
from bench.harness import RESULTS, Report, arguments
from fairopt import DemographicParity, EqualizedOdds, OnlineParity, project

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from streams import adult_scores, served_late

TOLERANCE, MORE, FIRST, DELAY, BINS, STREAMS = 0.05, 0.001, 2000, 1000, 16, 20
GRID, EVALUATIONS = 0.8, 150


def race(report: Report) -> None:
    scores, groups, _ = adult_scores()
    codes = groups["race"]
    best = project(scores, codes, DemographicParity(TOLERANCE), bounds=(0, 1))
    s, x, g = scores.numpy(), best.numpy(), codes.numpy()
    largest = np.bincount(g).argmax()
    held = []
    for group in np.unique(g[g != largest]):
        mine = g == group
        level = x[mine].mean()
        sign = 1.0 if level > s[mine].mean() else -1.0
        held.append(causal.Group(sign * (s[mine] - level), int(mine.sum()), TOLERANCE))
    rest = float(np.square(x - s)[g == largest].sum())
    known = rest + sum(map(causal.least_change_known, held))
    for name, limits in asked((MORE,)).items():
        alone = [causal.least_change_causal([group], len(s), FIRST, limits) for group in held]
        report.add(f"race, any rule, {name}", (rest + sum(alone)) / known)
        cost = rest + causal.least_change_causal(held, len(s), FIRST, limits)
        report.add(f"race, group by group, {name}", cost / known)


def odds(report: Report) -> None:
    """With b = the share of the other group in an outcome, + for women and - for men,

        D = sum over the samples of that outcome of b (x - the level of their group),

    the levels of women and men 0.05 apart. How many of a group come then does not change the sum
    to first order, as it does not change the gap. Of a sample whose label is awaited, the part
    that the chance of its outcome gives is known at once.
    """
    scores, groups, targets = adult_scores()
    best = project(scores, groups["sex"], EqualizedOdds(TOLERANCE), targets, bounds=(0, 1))
    s, x, g, y = scores.numpy(), best.numpy(), groups["sex"].numpy(), targets.numpy()
    positive = np.empty(len(s))
    for k in (0, 1):
        mine = np.nonzero(g == k)[0]
        place = np.searchsorted(np.quantile(s[mine], np.arange(1, BINS) / BINS), s[mine])
        for j in range(BINS):
            positive[mine[place == j]] = y[mine[place == j]].mean()
    b, full, slack = np.empty((2, len(s))), np.empty((2, len(s))), np.empty(2)
    for outcome in (0, 1):
        cells = [(g == k) & (y == outcome) for k in (0, 1)]
        share = cells[1].sum() / (cells[0].sum() + cells[1].sum())
        slack[outcome] = MORE * share * (1.0 - share) * (y == outcome).mean()
        b[outcome] = np.where(g == 0, share, share - 1.0)
        full[outcome] = b[outcome] * (s - np.array([x[cell].mean() for cell in cells])[g])
    here, chance = np.stack([y == 0, y == 1]).astype(float), np.stack([1.0 - positive, positive])
    once = causal_rows.Rows(here * full, here * b, np.zeros_like(full))
    late = causal_rows.Rows(chance * full, chance * b, (here - chance) * full, DELAY)
    known = causal_rows.least_change_known(once, len(s))
    blind = causal_rows.least_change_known(late, len(s))
    report.add("equalized odds, late, in hindsight", blind / known)
    for label, rows in (("at once", once), (f"{DELAY:,} late", late)):
        for name, limits in asked(tuple(slack)).items():
            cost = causal_rows.least_change_causal(
                rows, len(s), FIRST, limits, grid=GRID, evaluations=EVALUATIONS * len(limits)
            )
            report.add(f"equalized odds, labels {label}, {name}", cost / known)


def asked(slack: tuple[float, ...]) -> dict[str, list[Limit]]:
    """What must hold, if 0.001 of the gap is so much of the sums."""
    within = Limit(0.05, (0.0,) * len(slack))
    return {
        "19 of 20": [within],
        "19 of 20, and 99 of 100 within 0.051": [within, Limit(0.01, slack)],
    }


def pooled(report: Report) -> None:
    scores, groups, targets = adult_scores()
    n = len(scores)
    ours, best = np.zeros(3), np.zeros(3)
    for seed in range(STREAMS):
        drawn = torch.randint(0, n, (n,), generator=torch.Generator().manual_seed(seed))
        s, race, sex, y = scores[drawn], groups["race"][drawn], groups["sex"][drawn], targets[drawn]
        parity, equal = DemographicParity(TOLERANCE), EqualizedOdds(TOLERANCE)
        served = [
            OnlineParity(parity, bounds=(0, 1)).run(s, race, batch_size=1),
            OnlineParity(equal, bounds=(0, 1)).run(s, sex, y, batch_size=1),
            served_late(OnlineParity(equal, bounds=(0, 1)), s, sex, y, DELAY, 1),
        ]
        odds = project(s, sex, equal, y, bounds=(0, 1))
        optima = [project(s, race, parity, bounds=(0, 1)), odds, odds]
        ours += [float((x - s).square().sum()) for x in served]
        best += [float((x - s).square().sum()) for x in optima]
    names = "race", "equalized odds, labels at once", f"equalized odds, labels {DELAY:,} late"
    for name, ratio in zip(names, ours / best, strict=True):
        report.add(f"{name}, pooled", ratio)


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("limits", (__doc__ or "").strip())
    race(report)
    odds(report)
    pooled(report)
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
