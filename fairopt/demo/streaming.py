"""The demo's stream: the test rows served one after the other, and the pooled gap as it goes."""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fairopt.datasets import Split
from fairopt.demo.report import Settings, Streamed, Streaming
from fairopt.errors import ProblemError
from fairopt.layer.module import project
from fairopt.online.module import OnlineParity

BATCHES = (1, 8, 64)
RULES: dict[str, Literal["batch", "pooled"]] = {
    "the paper's rule": "batch",
    "the pooled rule": "pooled",
}
RAW = "raw scores"
SETTLED = 2000  # samples after which the largest gap is reported
LOOKS = 240  # how often the gap is computed, about


def serve_all(
    scores: Tensor, data: Split, settings: Settings, bounds: tuple[float, float]
) -> Streaming:
    """Serve the rows of ``data`` by each rule, in batches of each size.

    Args:
        scores: ``(n,)``, of the rows in their order; they are shuffled by the seed.
    """
    began = time.perf_counter()
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(settings.seed))
    rows, scores = data.take(order), scores[order]
    groups = settings.compared(rows.groups)
    made = settings.constraints(settings.tolerance)
    targets = rows.targets if settings.needs_targets else None
    settled = min(SETTLED, len(scores) // 2)

    # Elastic: where labels make parity impossible, the nearest predictions serve for comparison.
    best = project(scores, groups, made, targets, bounds=bounds, elastic=True)
    optimum = mean_square(best - scores)

    def measured(rule: str, x: Tensor, size: int) -> Streamed:
        at = looks(len(x), size, settled)
        gaps = []
        for n in at:
            seen = {name: codes[:n] for name, codes in groups.items()}
            gaps.append(max(settings.gaps(x[:n], rows.targets[:n], seen).values()))
        largest = max(gap for n, gap in zip(at, gaps, strict=True) if n >= settled)
        change = mean_square(x - scores) / optimum if optimum > 0.0 else None
        return Streamed(rule, size, at, tuple(gaps), gaps[-1], largest, change)

    left_out = None
    try:
        few = {name: codes[:4] for name, codes in groups.items()}
        paper = OnlineParity(made, bounds=bounds, feedback="batch")
        paper(scores[:4], few, None if targets is None else targets[:4])
    except ProblemError as error:  # Not all notions have a meaning for the paper's rule.
        left_out = str(error)
    runs = []
    for size in BATCHES:
        runs.append(measured(RAW, scores, size))
        for rule, feedback in RULES.items():
            if feedback == "batch" and left_out is not None:
                continue
            stream = OnlineParity(made, bounds=bounds, feedback=feedback)
            served = stream.run(scores, groups, targets, batch_size=size)
            runs.append(measured(rule, served, size))
    return Streaming(
        notions=tuple(settings.notions),
        attributes=tuple(settings.attributes),
        tolerance=settings.tolerance,
        settled=settled,
        runs=tuple(runs),
        optimum=optimum,
        left_out=left_out,
        needs_targets=targets is not None,
        seconds=time.perf_counter() - began,
    )


def looks(n: int, size: int, settled: int) -> tuple[int, ...]:
    """Ends of batches at which to look: evenly on a logarithmic axis, and evenly once settled."""
    wanted = [np.geomspace(2, n, LOOKS // 2), np.linspace(settled, n, LOOKS // 2)]
    ends = np.minimum(np.ceil(np.concatenate(wanted) / size) * size, n)
    return tuple(int(end) for end in np.unique(ends))


def mean_square(change: Tensor) -> float:
    return float(change.double().square().mean())
