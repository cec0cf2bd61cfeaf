"""How long does the fairness layer take, forward and backward, beside a normalisation layer?

float32 probabilities, bounds (0, 1), demographic parity with tolerance 0.05, backend "numba";
against torch.nn.BatchNorm1d(1) on the same values. And how do time and memory grow with samples and
with groups?
"""

from __future__ import annotations

import torch

from bench.harness import RESULTS, Report, Spread, arguments, fresh, interleaved, ratio
from bench.problems import forward_backward, probabilities
from fairopt import DemographicParity, FairnessLayer

MEMORY = """
import gc, json, resource, sys
import torch
from bench.problems import forward_backward, probabilities
from fairopt import DemographicParity, FairnessLayer

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

n = int(sys.argv[1])
layer = FairnessLayer(DemographicParity(tolerance=0.05), bounds=(0, 1), backend="numba")

def step(problem):
    fair = layer(problem.scores, problem.groups)
    fair.backward(problem.gradient)
    return fair

for small in (100, 100_000):
    step(probabilities(small))  # imports, kernels and threads are there before we look
layer = FairnessLayer(DemographicParity(tolerance=0.05), bounds=(0, 1), backend="numba")
problem = probabilities(n)
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew from here
before = status("VmRSS:")
fair = step(problem)
print(json.dumps({"extra": status("VmHWM:") - before}))
"""


def layer() -> FairnessLayer:
    parity = DemographicParity(tolerance=0.05, compare="pairwise")
    return FairnessLayer(parity, bounds=(0, 1), backend="numba")


def against_batch_norm(report: Report, n: int, at_most: float | None, seconds: float) -> None:
    problem = probabilities(n)
    column = problem.scores.detach().reshape(n, 1).clone().requires_grad_()
    times = interleaved(
        {
            "fairness": forward_backward(layer(), problem.scores, problem.gradient, problem.groups),
            "batch norm": forward_backward(
                torch.nn.BatchNorm1d(1), column, problem.gradient.reshape(n, 1)
            ),
        },
        seconds=seconds,
    )
    report.add(
        f"FairnessLayer / BatchNorm1d, n = {n:,}",
        ratio(times, "fairness", "batch norm"),
        at_most=at_most,
        detail="forward + backward",
    )
    for name, label in (("fairness", "FairnessLayer"), ("batch norm", "BatchNorm1d")):
        report.add(f"{label}, n = {n:,}", Spread.of(times[name]).scaled(1e3), "ms")


def growth_with_samples(report: Report, seconds: float) -> None:
    small, large = probabilities(1_000_000), probabilities(10_000_000)
    times = interleaved(
        {
            "small": forward_backward(layer(), small.scores, small.gradient, small.groups),
            "large": forward_backward(layer(), large.scores, large.gradient, large.groups),
        },
        seconds=seconds,
        calls={"small": 5},
    )
    report.add("n = 10,000,000 / n = 1,000,000", ratio(times, "large", "small"), at_most=13)
    report.add("FairnessLayer, n = 10,000,000", Spread.of(times["large"]).scaled(1e3), "ms")


def memory(report: Report) -> None:
    n = 10_000_000
    arrays = [fresh(MEMORY, str(n))["extra"] / (8 * n) for _ in range(3)]
    report.add(
        f"extra peak memory, n = {n:,}",
        Spread.of(arrays),
        "float64 arrays of n",
        at_most=4,
        detail="peak resident set in a fresh process, minus what was resident with the inputs in "
        "place; the returned tensor and the scores' gradient (float32, half an array each) count",
    )


def growth_with_groups(report: Report, seconds: float) -> None:
    n = 100_000
    two, many = probabilities(n), probabilities(n, groups=14)
    times = interleaved(
        {
            "two": forward_backward(layer(), two.scores, two.gradient, two.groups),
            "many": forward_backward(layer(), many.scores, many.gradient, many.groups),
        },
        seconds=seconds,
    )
    report.add(
        f"14 groups, all 91 pairs / two groups, n = {n:,}", ratio(times, "many", "two"), at_most=4
    )
    for name, label in (("two", "two groups"), ("many", "14 groups")):
        report.add(f"{label}, n = {n:,}", Spread.of(times[name]).scaled(1e3), "ms")


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("layer_speed", (__doc__ or "").strip())
    for n, at_most in ((64, None), (10_000, 0.5), (1_000_000, 0.15)):
        against_batch_norm(report, n, at_most, options.seconds)
    growth_with_groups(report, options.seconds)
    growth_with_samples(report, options.seconds)
    memory(report)
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
