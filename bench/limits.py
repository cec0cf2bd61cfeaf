"""What must a streaming rule change on the Adult data, even if it knows every distribution?

A lower bound, in a simplified model, on the mean squared change of any rule that at each moment
after sample 2,000, taken by itself, has the pooled gap within 0.05 in 19 of 20 streams. The rule
knows from which distribution each group's scores and labels are drawn, but not which will come, so
that there is nothing to learn. ``bench.causal`` says how.

It is over the optimum of one who knows the whole stream, in the same model: samples are drawn anew
(not in a random order of the same ones), nothing is clipped at the bounds, the levels that groups
are held to are those of the optimum on the data and stay, and the counts of groups grow evenly.

"race": each group by itself against its level, within it in 19 of 20 streams each; the largest is
moved as by the optimum. "equalized odds": the row of the negatives alone, to first order about the
optimum. A label is known 1,000 samples after it was served; what it adds has one distribution for
all samples, and not more for being moved.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from bench.causal import Floats, Walk, least_change_causal, least_change_known
from bench.harness import RESULTS, Report, arguments
from fairopt import DemographicParity, PredictiveEquality, project

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from streams import adult_scores

TOLERANCE, FIRST, DELAY, BINS, ALPHA = 0.05, 2000, 1000, 16, 0.05


def race(report: Report) -> None:
    scores, groups, _ = adult_scores()
    codes = groups["race"]
    best = project(scores, codes, DemographicParity(TOLERANCE), bounds=(0, 1))
    s, x, g = scores.numpy(), best.numpy(), codes.numpy()
    largest = np.bincount(g).argmax()
    causal = known = float(np.square(x - s)[g == largest].sum())
    for group in np.unique(g):
        mine = g == group
        if group == largest:
            continue
        level = x[mine].mean()
        sign = 1.0 if level > s[mine].mean() else -1.0
        steps = sign * (s[mine] - level)
        walk = Walk([1.0], [steps], [np.full(len(steps), 1.0 / len(steps))])
        first = max(1, round(FIRST * len(steps) / len(s)))
        causal += least_change_causal(walk, len(steps), first, ALPHA, grid=0.02)
        known += least_change_known(walk, len(steps))
    report.add("race", causal / known)


def odds(report: Report) -> None:
    """With b = 1 - the share of their group among the negatives, + for women and - for men,

        D = sum over the negatives of b (x - the level of their group),

    the levels of women and men 0.05 apart. How many of a group come then does not change the sum
    to first order, as it does not change the gap. Of a sample whose label is awaited, the part
    that its chance of being negative gives is known at once.
    """
    scores, groups, targets = adult_scores()
    notion = PredictiveEquality(TOLERANCE)
    best = project(scores, groups["sex"], notion, targets, bounds=(0, 1)).numpy()
    s, g, y = scores.numpy(), groups["sex"].numpy(), targets.numpy()
    negatives = [((g == k) & (y == 0)).sum() for k in (0, 1)]
    levels = [best[(g == k) & (y == 0)].mean() for k in (0, 1)]
    shares = np.array(negatives) / sum(negatives)
    effects: list[float] = []
    steps: list[Floats] = []
    surprises: list[Floats] = []
    for k, b in ((0, shares[1]), (1, -shares[0])):
        negative = (g == k) & (y == 0)
        effects.append(abs(b))
        steps.append(b * (s[negative] - levels[k]))
    n = sum(negatives)
    at_once = Walk(effects, steps, [np.full(len(d), 1.0 / n) for d in steps])
    known = least_change_known(at_once, n)
    first = round(FIRST * n / len(s))
    bound = least_change_causal(at_once, n, first, ALPHA, grid=0.04, iterations=15)
    report.add("equalized odds, labels at once", bound / known)
    effects, steps = [], []
    for k, b in ((0, shares[1]), (1, -shares[0])):
        mine, outcome = s[g == k], y[g == k]
        place = np.searchsorted(np.quantile(mine, np.arange(1, BINS) / BINS), mine)
        for j in range(BINS):
            here = place == j
            chance = 1.0 - outcome[here].mean()
            full = b * (mine[here] - levels[k])
            effects.append(abs(b) * chance)
            steps.append(chance * full)
            surprises.append((1.0 - outcome[here] - chance) * full)
    surprise = np.concatenate(surprises)
    # Within a bin chance and score hang together: what that adds is no surprise.
    steps = [d + surprise.mean() for d in steps]
    middle = (np.arange(200) + 0.5) / 200
    label = np.quantile(surprise, middle)
    label = (label - label.mean()) * surprise.std() / label.std()
    walk = Walk(effects, steps, [np.full(len(d), 1.0 / len(s)) for d in steps], label, DELAY)
    report.add("equalized odds, labels not known when served, all else known",
               least_change_known(walk, len(s)) / known)  # fmt: skip
    bound = least_change_causal(walk, len(s), FIRST, ALPHA, grid=0.05, iterations=15)
    report.add(f"equalized odds, labels {DELAY:,} late", bound / known)


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("limits", (__doc__ or "").strip())
    race(report)
    odds(report)
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
