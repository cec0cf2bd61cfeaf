"""What does fairopt cost before the first result, in a fresh process?"""

from __future__ import annotations

from bench.harness import RESULTS, Report, Spread, arguments, fresh

IMPORT = """
import json, time
began = time.perf_counter()
import torch
with_torch = time.perf_counter()
import fairopt
done = time.perf_counter()
print(json.dumps({"torch": with_torch - began, "fairopt": done - with_torch}))
"""

FIRST = """
import json, time
began = time.perf_counter()
import torch
with_torch = time.perf_counter()
from fairopt import DemographicParity, FairnessLayer
layer = FairnessLayer(DemographicParity(tolerance=0.05), bounds=(0, 1), backend="numba")
scores = torch.linspace(0, 1, 1000).requires_grad_()
groups = (torch.arange(1000) > 400).long()
fair = layer(scores, groups)
forward = time.perf_counter()
fair.sum().backward()
done = time.perf_counter()
print(json.dumps({
    "whole": done - began, "after torch": done - with_torch, "forward": forward - with_torch,
}))
"""


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("import_time", (__doc__ or "").strip())
    rounds = max(5, int(options.seconds * 4))

    fresh(IMPORT)  # the disk's cache is warm from here on
    imports = [fresh(IMPORT) for _ in range(rounds)]
    report.add(
        "import fairopt, over import torch",
        Spread.of([run["fairopt"] for run in imports]),
        "s",
        at_most=0.2,
    )
    report.add("import torch", Spread.of([run["torch"] for run in imports]), "s")

    fresh(FIRST)  # compiles the kernels, if they are not in the cache yet
    firsts = [fresh(FIRST) for _ in range(rounds)]
    report.add(
        "first projection, kernels cached",
        Spread.of([run["after torch"] for run in firsts]),
        "s",
        at_most=1,
        detail="import fairopt, numba, forward and backward; after import torch",
    )
    report.add(
        "the same with import torch", Spread.of([run["whole"] for run in firsts]), "s", at_most=None
    )
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
