"""The demo's stream: the test rows served one after the other, and the pooled gap as it goes."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fairopt.datasets import Split
from fairopt.demo.notions import NOTIONS, constraints, group_gaps
from fairopt.errors import ProblemError
from fairopt.layer.module import project
from fairopt.notions.catalogue import Constraint
from fairopt.online import OnlineParity

__all__ = ["Streamed", "Streaming", "serve_all"]

BATCHES = (1, 8, 64)
RULES: dict[str, Literal["batch", "pooled"]] = {
    "the paper's rule": "batch",
    "the pooled rule": "pooled",
}
RAW = "raw scores"
SETTLED = 2000  # samples after which the largest gap is reported
LOOKS = 240  # how often the gap is computed, about


@dataclass(frozen=True)
class Streamed:
    """The test rows under one rule, in one order.

    Attributes:
        rule: its name; ``"raw scores"`` for none.
        batch_size: samples per batch.
        samples: after how many samples the gap was computed, rising, at ends of batches.
        gap: the largest gap between two groups then, of all chosen notions and attributes, in all
            that was served so far.
        end: the gap after the last sample.
        largest: the largest of ``gap`` from ``Streaming.settled`` samples on.
        change: mean squared change of a prediction, over that of the offline optimum; ``None``
            where the optimum changes nothing.
    """

    rule: str
    batch_size: int
    samples: tuple[int, ...]
    gap: tuple[float, ...]
    end: float
    largest: float
    change: float | None


@dataclass(frozen=True)
class Streaming:
    """All rules, for all sizes of batches.

    Attributes:
        notions, attributes, tolerance: of the constraints, as in ``Settings``.
        settled: see ``Streamed.largest``.
        runs: one for each rule and size.
        optimum: mean squared change of the projection of all rows at once, which knows them all.
        left_out: why the paper's rule is not among them; ``None`` where it is.
        needs_targets: whether a notion speaks of outcomes.
        seconds: all of it.
    """

    notions: tuple[str, ...]
    attributes: tuple[str, ...]
    tolerance: float
    settled: int
    runs: tuple[Streamed, ...]
    optimum: float
    left_out: str | None
    needs_targets: bool
    seconds: float

    def __str__(self) -> str:
        sizes = sorted({run.batch_size for run in self.runs})
        head = ["batches of one" if size == 1 else f"batches of {size}" for size in sizes]
        columns = f"{'end':>7} {'largest':>7} {'change':>6}"
        lines = [
            "The test rows as a stream, in random order: the gap in all that was served so far.",
            "",
            f"{'':16}" + "".join(f"   {each:^{len(columns)}}" for each in head),
            f"{'rule':16}" + f"   {columns}" * len(sizes),
        ]
        lines.append("-" * len(lines[-1]))
        for rule in dict.fromkeys(run.rule for run in self.runs):
            line = f"{rule:16}"
            for run in self.runs:
                if run.rule == rule:
                    change = "-" if run.change is None else f"{run.change:.2f}"
                    line += f"   {run.end:7.4f} {run.largest:7.4f} {change:>6}"
            lines.append(line)
        lines.append("")
        optimum = f" ({self.optimum:.2e})" if self.optimum > 0.0 else ", which changes nothing"
        entries = {
            "end": "the gap after the last row",
            "largest": f"the largest gap after {self.settled:,} rows or more",
            "change": "mean squared change of a prediction, over that of a projection of all rows "
            f"at once{optimum}",
        }
        for term, meaning in entries.items():
            lines += textwrap.wrap(f"{term:10} {meaning}", 100, subsequent_indent=" " * 11)
        if self.needs_targets:
            lines.append("Here each label is known with its row: the paper's rule needs it then.")
        if self.left_out is not None:
            lines += textwrap.wrap(f"The paper's rule is left out. {self.left_out}", 100)
        return "\n".join(lines)


def serve_all(
    scores: Tensor,
    data: Split,
    notions: Sequence[str],
    attributes: Sequence[str],
    tolerance: float,
    bounds: tuple[float, float],
    seed: int,
) -> Streaming:
    """Serve the rows of ``data`` by each rule, in batches of each size.

    Args:
        scores: ``(n,)``, of the rows in their order; they are shuffled.
        seed: decides the order.
    """
    began = time.perf_counter()
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    rows, scores = data.take(order), scores[order]
    groups = {name: rows.groups[name] for name in attributes}
    made = constraints(notions, attributes, tolerance)
    targets = rows.targets if any(NOTIONS[name].needs_targets for name in notions) else None
    settled = min(SETTLED, len(scores) // 2)

    # Elastic: where labels make it impossible, the nearest to it is what one can compare with.
    best = project(scores, groups, made, targets, bounds=bounds, elastic=True)
    optimum = mean_square(best - scores)

    def measured(rule: str, x: Tensor, size: int) -> Streamed:
        at = looks(len(x), size, settled)
        gaps = []
        for n in at:
            seen = {name: codes[:n] for name, codes in groups.items()}
            gaps.append(
                max(group_gaps(x[:n], rows.targets[:n], seen, notions, attributes).values())
            )
        largest = max(gap for n, gap in zip(at, gaps, strict=True) if n >= settled)
        change = mean_square(x - scores) / optimum if optimum > 0.0 else None
        return Streamed(rule, size, at, tuple(gaps), gaps[-1], largest, change)

    left_out = refusal(made, bounds, scores[:4], {k: v[:4] for k, v in groups.items()}, targets)
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
        notions=tuple(notions),
        attributes=tuple(attributes),
        tolerance=tolerance,
        settled=settled,
        runs=tuple(runs),
        optimum=optimum,
        left_out=left_out,
        needs_targets=targets is not None,
        seconds=time.perf_counter() - began,
    )


def refusal(
    made: list[Constraint],
    bounds: tuple[float, float],
    scores: Tensor,
    groups: dict[str, Tensor],
    targets: Tensor | None,
) -> str | None:
    """Why the paper's rule does not take these constraints; ``None`` where it does."""
    stream = OnlineParity(made, bounds=bounds, feedback="batch")
    try:
        stream(scores, groups, None if targets is None else targets[: len(scores)])
    except ProblemError as error:
        return str(error)
    return None


def looks(n: int, size: int, settled: int) -> tuple[int, ...]:
    """Ends of batches at which to look: evenly on a logarithmic axis, and evenly once settled."""
    wanted = [np.geomspace(2, n, LOOKS // 2), np.linspace(settled, n, LOOKS // 2)]
    ends = np.minimum(np.ceil(np.concatenate(wanted) / size) * size, n)
    return tuple(int(end) for end in np.unique(ends))


def mean_square(change: Tensor) -> float:
    return float(change.double().square().mean())
