"""What do the streaming rules reach on the Adult data, what does it cost, and how fast are they?

16,281 probabilities of a logistic regression, demographic parity with tolerance 0.05, 20 random
orders, one default setting for all batch sizes. "end" is the largest pooled gap after the last
sample, "running" the largest from sample 2,000 on; "change" is the mean squared change over the
offline optimum of the same scores. And the same for race, for both, for equalized odds whose
labels come 1,000 samples late, for the paper's rule, and for feedback="hard" (warm-up 256). And
for several workers with equal parts of the samples, who synchronise after a number of samples each;
"all by all" is what would come of it if each steered by all that is common, not by a share.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from bench.harness import RESULTS, Report, Spread, arguments
from fairopt import DemographicParity, EqualizedOdds, OnlineParity, project

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from streams import adult_scores, meet, order, running_gap

PARITY = DemographicParity(0.05)


def adult(
    report: Report, label: str, on: tuple[str, ...], feedback: str, batch: int, orders: int
) -> None:
    scores, groups, _ = adult_scores()
    chosen = {name: groups[name] for name in on}
    optimum = float((project(scores, chosen, PARITY, bounds=(0, 1)) - scores).square().mean())
    warm_up = 256 if feedback == "hard" else 0
    ends, runnings, changes = [], [], []
    for seed in range(orders):
        at = order(seed, len(scores))
        stream = OnlineParity(PARITY, bounds=(0, 1), feedback=feedback, warm_up=warm_up)
        x = stream.run(scores[at], {k: v[at] for k, v in chosen.items()}, batch_size=batch)
        gaps = [running_gap(x, codes[at], batch) for codes in chosen.values()]
        ends.append(max(float(gap[-1]) for gap in gaps))
        runnings.append(max(float(gap[-(-2000 // batch) :].max()) for gap in gaps))
        changes.append(float((x - scores[at]).square().mean()) / optimum)
    ours = feedback == "pooled" and on == ("sex",)
    name = f"{label}, b = {batch}"
    report.add(f"{name}: end", max(ends), at_most=0.051 if ours else None)
    above = sum(end > 0.05 + 1e-12 for end in ends)
    report.add(f"{name}: orders of {orders} that end above 0.050", above,
               at_most=1 if ours else None)  # fmt: skip
    report.add(f"{name}: running", max(runnings), at_most=0.065 if ours else None)
    report.add(f"{name}: change", statistics.fmean(changes), at_most=1.2 if ours else None)


def odds(report: Report, batch: int, orders: int) -> None:
    scores, groups, targets = adult_scores()
    notion, sex, n = EqualizedOdds(0.05), groups["sex"], len(scores)
    best = project(scores, sex, notion, targets, bounds=(0, 1))
    optimum = float((best - scores).square().mean())
    ends, changes = [], []
    for seed in range(orders):
        at = order(seed, n)
        s, g, y = scores[at], sex[at], targets[at]
        stream, x, seen = OnlineParity(notion, bounds=(0, 1)), torch.empty(n).double(), 0
        for first in range(0, n, 64):
            last = min(first + 64, n)
            x[first:last] = stream.run(s[first:last], g[first:last], batch_size=batch)
            known = n if last == n else last - 1000
            if known > seen:
                old = slice(seen, known)
                stream.observe(y[old], x[old], g[old], scores=s[old])
                seen = known
        worst = stream.report().worst
        assert worst is not None
        ends.append(0.05 + worst.excess)
        changes.append(float((x - s).square().mean()) / optimum)
    name = f"equalized odds, labels 1,000 late, b = {batch}"
    report.add(f"{name}: end, or 0.05", max(ends), at_most=0.051)
    report.add(f"{name}: change", statistics.fmean(changes))


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
            row = streams[0].report().rows[0]
            if streams[0].report().samples >= 2000:
                gaps.append(abs(row.value))
        ends.append(gaps[-1])
        runnings.append(max(gaps))
        changes.append(change / len(scores) / optimum)
    name = f"{count} workers, every {every}" + ("" if shares else ", all by all")
    report.add(f"{name}: end", max(ends), at_most=0.051 if shares else None)
    report.add(f"{name}: running", max(runnings), at_most=0.065 if shares else None)
    report.add(f"{name}: change", statistics.fmean(changes), at_most=1.5 if shares else None)


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
        adult(report, "sex and race, pooled", ("sex", "race"), "pooled", batch, 20)
        odds(report, batch, 5)
    for count, every in ((1, 256), (4, 16), (4, 256), (16, 16), (16, 256)):
        workers(report, count, every, True, 20)
        workers(report, count, every, False, 5)
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
