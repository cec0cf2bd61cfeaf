"""What do the streaming rules reach on the Adult data, what does it cost, and how fast are they?

16,281 probabilities of a logistic regression, demographic parity with tolerance 0.05, 20 random
orders, one default setting for all batch sizes. "end" is the largest pooled gap after the last
sample, "running" the largest from sample 2,000 on; "change" is the mean squared change over the
offline optimum of the same scores. And the same for race, for both, for equalized odds with labels
at once and 1,000 samples late, for a mean residual of 20 simulated streams, for the paper's rule,
and for feedback="hard" (warm-up 256).

"hindsight" is the least change of anyone who knows the whole order in advance, ends at 0.050 and
runs at most at 0.065 after 2,000 samples (mean of five orders, over the offline optimum). "blind"
is the same without the running gap, where no label is known when a sample is served. "drift" has
simulated streams, whose changes are not relative.

And for several workers with equal parts of the samples, who synchronise after a number of samples
each; "all by all" is what would come of it if each steered by all that is common, not by a share.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench.harness import RESULTS, Report, Spread, arguments
from bench.hindsight import least_change, least_change_blind
from fairopt import DemographicParity, EqualizedOdds, MeanResidual, OnlineParity, project
from fairopt.online.module import Feedback

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from streams import (
    KINDS,
    adult_scores,
    meet,
    order,
    orders_of,
    regression,
    running_gap,
    served_late,
)

PARITY = DemographicParity(0.05)
ODDS = EqualizedOdds(0.05)


def adult(
    report: Report,
    label: str,
    on: tuple[str, ...],
    feedback: Feedback,
    batch: int,
    orders: int,
    step: float | None = None,
) -> None:
    scores, groups, _ = adult_scores()
    chosen = {name: groups[name] for name in on}
    optimum = float((project(scores, chosen, PARITY, bounds=(0, 1)) - scores).square().mean())
    warm_up = 256 if feedback == "hard" else 0
    ends, runnings, changes = [], [], []
    for seed in range(orders):
        at = order(seed, len(scores))
        stream = OnlineParity(
            PARITY, bounds=(0, 1), feedback=feedback, step_size=step, warm_up=warm_up
        )
        x = stream.run(scores[at], {k: v[at] for k, v in chosen.items()}, batch_size=batch)
        gaps = [running_gap(x, codes[at], batch) for codes in chosen.values()]
        ends.append(max(float(gap[-1]) for gap in gaps))
        runnings.append(max(float(gap[-(-2000 // batch) :].max()) for gap in gaps))
        changes.append(float((x - scores[at]).square().mean()) / optimum)
    ours = feedback == "pooled" and step is None
    name = f"{label}, b = {batch}"
    report.add(f"{name}: end", max(ends), at_most=0.051 if ours else None)
    above = sum(end > 0.05 + 1e-12 for end in ends)
    report.add(f"{name}: orders of {orders} that end above 0.050", above,
               at_most=1 if ours else None)  # fmt: skip
    report.add(f"{name}: running", max(runnings), at_most=0.065 if ours else None)
    report.add(f"{name}: change", statistics.fmean(changes), at_most=1.2 if ours else None)


def hindsight(report: Report) -> None:
    scores, groups, targets = adult_scores()
    values, sex = scores.numpy(), groups["sex"]
    by = {name: [(codes == g).numpy() for g in codes.unique()] for name, codes in groups.items()}
    odds = [[((sex == g) & (targets == y)).numpy() for g in (0, 1)] for y in (0, 1)]
    for label, parts, best in (
        ("sex", [by["sex"]], project(scores, sex, PARITY, bounds=(0, 1))),
        ("race", [by["race"]], project(scores, groups["race"], PARITY, bounds=(0, 1))),
        ("sex and race", list(by.values()), project(scores, groups, PARITY, bounds=(0, 1))),
        ("equalized odds", odds, project(scores, sex, ODDS, targets, bounds=(0, 1))),
    ):  # fmt: skip
        optimum = float((best - scores).square().mean())
        least = []
        for seed in range(5):
            at = order(seed, len(scores)).numpy()
            ordered = [[mask[at] for mask in part] for part in parts]
            least.append(least_change(values[at], ordered, 0.05, 0.065, 2000) / optimum)
        report.add(f"{label}: hindsight", statistics.fmean(least))
    blind = least_change_blind(scores, sex, targets, 0.05)
    report.add("equalized odds: blind", blind / optimum)


def odds(report: Report, delay: int, batch: int, orders: int) -> None:
    scores, groups, targets = adult_scores()
    sex, n = groups["sex"], len(scores)
    best = project(scores, sex, ODDS, targets, bounds=(0, 1))
    optimum = float((best - scores).square().mean())
    ends, runnings, changes = [], [], []
    for seed in range(orders):
        at = order(seed, n)
        s, g, y = scores[at], sex[at], targets[at]
        stream = OnlineParity(ODDS, bounds=(0, 1))
        if delay:
            x = served_late(stream, s, g, y, delay, batch)
        else:
            x = stream.run(s, g, y, batch_size=batch)
        worst = stream.report().worst
        assert worst is not None
        ends.append(abs(worst.value))
        gap = np.zeros(n)
        for outcome in (0, 1):
            # From sample to sample of this outcome; between them its gap stays.
            at_them = np.nonzero(y.numpy() == outcome)[0]
            among = running_gap(x[at_them], g[at_them], 1)
            place = np.searchsorted(at_them, np.arange(n), side="right") - 1
            gap = np.maximum(gap, among[place.clip(0)])
        runnings.append(gap[1999:].max())
        changes.append(float((x - s).square().mean()) / optimum)
    name = f"equalized odds, labels {f'{delay:,} late' if delay else 'at once'}, b = {batch}"
    report.add(f"{name}: end", max(ends), at_most=0.051)
    above = sum(end > 0.05 + 1e-12 for end in ends)
    report.add(f"{name}: orders of {orders} that end above 0.050", above, at_most=1)
    report.add(f"{name}: running", max(runnings), at_most=0.065)
    report.add(f"{name}: change", statistics.fmean(changes), at_most=1.2)


def residuals(report: Report, delay: int, batch: int, streams: int) -> None:
    notion, ends, changes = MeanResidual(0.5), [], []
    for seed in range(streams):
        scores, groups, targets = regression(seed)
        stream = OnlineParity(notion, bounds=None)
        if delay:
            x = served_late(stream, scores, groups, targets, delay, batch)
        else:
            x = stream.run(scores, groups, targets, batch_size=batch)
        worst = stream.report().worst
        assert worst is not None
        ends.append(abs(worst.value) / 0.5)
        best = project(scores, groups, notion, targets, bounds=None)
        changes.append(float((x - scores).square().mean() / (best - scores).square().mean()))
    name = f"mean residual, targets {f'{delay:,} late' if delay else 'at once'}, b = {batch}"
    report.add(f"{name}: end, of the tolerance", max(ends), at_most=1.02)
    above = sum(end > 1.0 + 1e-12 for end in ends)
    report.add(f"{name}: streams of {streams} that end above it", above, at_most=1)
    report.add(f"{name}: change", statistics.fmean(changes), at_most=1.2)


def drift(report: Report) -> None:
    for kind in KINDS:
        raw, ends, runnings, changes, optima = [], [], [], [], []
        for seed in range(5):
            scores, groups = orders_of(kind, seed, 20_000)
            x = OnlineParity(PARITY, bounds=(0, 1)).run(scores, groups)
            gap = running_gap(x, groups, 1)
            raw.append(running_gap(scores, groups, 1)[-1])
            ends.append(gap[-1])
            runnings.append(gap[1999:].max())
            changes.append(float((x - scores).square().mean()))
            best = project(scores, groups, PARITY, bounds=(0, 1))
            optima.append(float((best - scores).square().mean()))
        report.add(f"drift, {kind}: raw gap", statistics.fmean(raw))
        report.add(f"drift, {kind}: end", max(ends))
        report.add(f"drift, {kind}: running", max(runnings))
        report.add(f"drift, {kind}: mean squared change", statistics.fmean(changes))
        report.add(f"drift, {kind}: the optimum's", statistics.fmean(optima))


def workers(report: Report, count: int, every: int, shares: bool, orders: int) -> None:
    scores, groups, _ = adult_scores()
    sex = groups["sex"]
    optimum = float((project(scores, sex, PARITY, bounds=(0, 1)) - scores).square().mean())
    ends, runnings, changes = [], [], []
    for seed in range(orders):
        at = order(seed, len(scores))
        streams = [OnlineParity(PARITY, bounds=(0, 1)) for _ in range(count)]
        parts = [(scores[at[k::count]].split(every), sex[at[k::count]].split(every))
                 for k in range(count)]  # fmt: skip
        gaps, change = [], 0.0
        for turn in range(max(len(s) for s, _ in parts)):
            for stream, (s, g) in zip(streams, parts, strict=True):
                if turn < len(s):
                    x = stream.run(s[turn], g[turn])
                    change += float((x - s[turn]).square().sum())
            meet(streams)
            for stream in streams if not shares else ():
                stream._state.others = None
                stream._commit(stream._state)
            row = streams[0].report().rows[0]
            if streams[0].report().samples >= 2000:
                gaps.append(abs(row.value))
        ends.append(gaps[-1])
        runnings.append(max(gaps))
        changes.append(change / len(scores) / optimum)
    name = f"{count} workers, every {every}" + ("" if shares else ", all by all")
    report.add(f"{name}: end", max(ends))
    report.add(f"{name}: running", max(runnings))
    report.add(f"{name}: change", statistics.fmean(changes))


def speed(report: Report) -> None:
    n = 1_000_000
    scores = torch.rand(n, dtype=torch.float64)
    groups = (torch.rand(n) < 0.4).long()
    scores = (scores + 0.2 * groups).clamp(0, 1)
    stream = OnlineParity(PARITY, bounds=(0, 1))
    stream(scores[:1], groups[:1])
    stream(scores[:10], groups[:10])
    rates = []
    for _ in range(7):
        began = time.process_time()
        stream.run(scores, groups, batch_size=1)
        rates.append(n / (time.process_time() - began) / 1e6)
    report.add("run(batch_size=1), two groups, one core", Spread.of(rates),
               "million samples per second", at_least=2.0)  # fmt: skip
    one, code, calls = scores[:1], groups[:1], []
    for _ in range(20):
        began = time.process_time()
        for _ in range(500):
            stream(one, code)
        calls.append((time.process_time() - began) / 500 * 1e6)
    report.add("one call, b = 1", Spread.of(calls), "us", at_most=30)


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("streaming", (__doc__ or "").strip())
    speed(report)
    for batch in (1, 2, 4, 8, 16, 64, 256):
        adult(report, "sex, pooled", ("sex",), "pooled", batch, 20)
        adult(report, "sex, the paper's rule", ("sex",), "batch", batch, 2)
        adult(report, "sex, hard", ("sex",), "hard", batch, 2)
    for batch in (1, 64):
        adult(report, "race, pooled", ("race",), "pooled", batch, 20)
        adult(report, "race, pooled, step_size 0.5", ("race",), "pooled", batch, 20, 0.5)
        adult(report, "sex and race, pooled", ("sex", "race"), "pooled", batch, 20)
        for delay in (0, 1000):
            odds(report, delay, batch, 20)
            residuals(report, delay, batch, 20)
    hindsight(report)
    drift(report)
    for count, every in ((1, 256), (4, 16), (4, 256), (16, 16), (16, 256)):
        workers(report, count, every, True, 20)
        workers(report, count, every, False, 5)
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
