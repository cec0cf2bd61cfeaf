"""Settings and figures of the demo, and the table that shows them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fairopt.demo.notions import SHOWN, gaps_of
from fairopt.notions.catalogue import Constraint
from fairopt.notions.names import NOTIONS
from fairopt.tolerances import ROW_PRECISION

WIDTH = 100
ROUNDING = ROW_PRECISION[torch.float32]  # of predictions that are float32


@dataclass(frozen=True)
class Settings:
    """The choices of the user.

    Attributes:
        tolerance: the largest gap allowed between two groups.
        notions: keys of ``fairopt.notions.names.NOTIONS``; all hold at once.
        attributes: on which they hold, of those in the data.
        backend: name of the backend that solves the projections.
        epochs: passes over the training rows, for every model.
        batch_size: samples per training batch; each batch keeps the group proportions.
        seed: decides the network's first weights and the batches.
        limit: if given, only so many training and test rows, drawn in proportion.
        streaming: whether the test rows are also served as a stream.
        repeats: networks per point of the tolerance plot, with consecutive seeds.
        threads: threads of torch while the demo runs. For so small a network a second one gains a
            fifth on an idle machine, and where cores are shared it can cost a hundredfold, as
            each operation waits for it.
    """

    tolerance: float = 0.05
    notions: Sequence[str] = ("demographic-parity",)
    attributes: Sequence[str] = ("sex", "race")
    backend: str = "numba"
    epochs: int = 12
    batch_size: int = 1024
    seed: int = 0
    limit: int | None = None
    streaming: bool = False
    repeats: int = 3
    threads: int = 1

    @property
    def needs_targets(self) -> bool:
        """Whether a chosen notion speaks of outcomes."""
        return any(NOTIONS[notion].needs_targets for notion in self.notions)

    def constraints(self, tolerance: float) -> list[Constraint]:
        """Every chosen notion on every chosen attribute."""
        every = product(self.notions, self.attributes)
        return [NOTIONS[notion].make(tolerance, on) for notion, on in every]

    def compared(self, groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The codes of the chosen attributes."""
        return {name: groups[name] for name in self.attributes}

    def gaps(
        self, predictions: Tensor, targets: Tensor, groups: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Per chosen attribute the largest gap of the chosen notions."""
        return gaps_of(predictions, targets, self.compared(groups), self.notions)


@dataclass(frozen=True)
class Quality:
    """How good and how even predictions on the test rows are.

    Attributes:
        accuracy: share of the rows on the right side of one half.
        auc: area under the ROC curve, a tie counting one half.
        log_loss: mean negative log likelihood, in nats.
        gap: attribute name to the largest gap of the chosen notions, with the true labels.
    """

    accuracy: float
    auc: float
    log_loss: float
    gap: Mapping[str, float]


@dataclass(frozen=True)
class Epoch:
    """The test rows after one epoch: as the network predicts, and as the model answers."""

    epoch: int
    raw: Quality
    fair: Quality


@dataclass(frozen=True, kw_only=True)
class Model:
    """One row of the table.

    Attributes:
        name: of the model.
        projected: whether its answers pass through a projection.
        history: one entry per epoch; the last one is the trained model.
        excess_on_test: largest amount by which a constraint is exceeded on the test rows, all
            projected in one call; negative if all are slack.
        excess_in_training: the same over every training batch; None if training has no constraints.
        batches_checked: number of training batches that ``excess_in_training`` covers.
        batches_missing_a_group: in how many of them a group was absent, hence unconstrained.
        seconds_per_epoch: median over epochs; without tests and checks.
        layer_share: the layer's part, forward and backward, of a training step (forward, loss,
            backward, update).
        projection_seconds: for the projection of all test rows in one call.
    """

    name: str
    projected: bool
    history: Sequence[Epoch]
    excess_on_test: float
    excess_in_training: float | None = None
    batches_checked: int = 0
    batches_missing_a_group: int = 0
    seconds_per_epoch: float
    layer_share: float | None = None
    projection_seconds: float | None = None

    @property
    def final(self) -> Epoch:
        """The trained model."""
        return self.history[-1]

    @property
    def worst_excess(self) -> float:
        """Over the test rows and, where training is constrained, every training batch."""
        if self.excess_in_training is None:
            return self.excess_on_test
        return max(self.excess_on_test, self.excess_in_training)


@dataclass(frozen=True)
class SweepPoint:
    """Both fair ways at one tolerance, one entry per seed."""

    tolerance: float
    post_hoc: Sequence[Quality]
    layer: Sequence[Quality]


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
        lines += glossary(entries)
        if self.needs_targets:
            lines.append("Here each label is known with its row: the paper's rule needs it then.")
        if self.left_out is not None:
            lines += textwrap.wrap(f"The paper's rule is left out. {self.left_out}", WIDTH)
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """All figures of one run. ``str(report)`` is the table with its explanations.

    Attributes:
        settings: the choices that were run.
        environment: versions and threads.
        rows: number of rows per split.
        constraints: the readable name of each constraint.
        models: the rows of the table.
        unconstrained: the unconstrained networks that ``sweep`` compares with, one per seed.
        sweep: the tolerance plot.
        streaming: the test rows as a stream; ``None`` where none was asked for.
        warm_up_seconds: until the backend answered its first call; compilation is in it.
        seconds: all of it, without drawing.
    """

    settings: Settings
    environment: Mapping[str, str | int]
    rows: Mapping[str, int]
    constraints: Sequence[str]
    models: Sequence[Model]
    unconstrained: Sequence[Quality]
    sweep: Sequence[SweepPoint]
    streaming: Streaming | None
    warm_up_seconds: float
    seconds: float

    @property
    def within_tolerance(self) -> bool:
        """Whether both fair models hold every constraint wherever it was measured."""
        return all(model.worst_excess <= ROUNDING for model in self.models if model.projected)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        figures = asdict(self)
        for row, model in zip(figures["models"], self.models, strict=True):
            row["worst_excess"] = model.worst_excess
        return figures

    def __str__(self) -> str:
        return table(self)


def table(report: Report) -> str:
    tolerance = report.settings.tolerance
    attributes = list(report.models[0].final.raw.gap)
    lines = [
        f"Income above 50,000 dollars (UCI Adult): {report.rows['train']:,} people to train on, "
        f"{report.rows['test']:,} to test on."
    ]
    for notion in report.settings.notions:
        words = f"{NOTIONS[notion].label.capitalize()} on {' and on '.join(attributes)}: "
        lines += textwrap.wrap(f"{words}{SHOWN[notion].words.format(tolerance)}.", WIDTH)
    lines.append("")
    gap_heads = "".join(f"   {'gap: ' + name:^13}" for name in attributes)
    gap_columns = "   " + "   ".join(f"{'raw':>6} {'fair':>6}" for _ in attributes)
    lines.append(f"{'':19} {'':>8} {'':>6} {'':>8}{gap_heads}   {'worst':>8}   {'training':>7}")
    lines.append(
        f"{'model':19} {'accuracy':>8} {'AUC':>6} {'log loss':>8}{gap_columns}   "
        f"{'excess':>8}   {'s/epoch':>7}  {'layer':>5}"
    )
    lines.append("-" * len(lines[-1]))
    for model in report.models:
        quality = model.final.fair
        gaps = "".join(
            f"   {model.final.raw.gap[name]:6.3f} "
            + (f"{quality.gap[name]:6.3f}" if model.projected else f"{'-':>6}")
            for name in attributes
        )
        share = "-" if model.layer_share is None else f"{model.layer_share:.0%}"
        lines.append(
            f"{model.name:19} {quality.accuracy:8.4f} {quality.auc:6.4f} {quality.log_loss:8.4f}"
            f"{gaps}   {model.worst_excess:8.1e}   {model.seconds_per_epoch:7.2f}  {share:>5}"
        )
    lines += ["", *explanations(report), "", *verdict(report)]
    if report.streaming is not None:
        lines += ["", str(report.streaming)]
    return "\n".join(lines)


def explanations(report: Report) -> list[str]:
    layer = report.models[-1]
    gap = "the largest between two groups on the test rows"
    after, checked = "after the projection", "on the test rows"
    if tuple(report.settings.notions) == ("demographic-parity",):
        gap = "largest difference between mean predictions of two groups on the test rows"
    if report.settings.needs_targets:
        gap += ", with their true labels"
        after += ", which cannot know these labels"
        checked += " (with the network's chances for their labels)"
    entries = {
        "accuracy, AUC, log loss": "  of the model's answers for all test rows",
        "gap": f"{gap}: raw = as the network says it, fair = {after}",
        "excess": "the most by which any constraint is broken (negative: none is even reached), "
        f"{checked} and, for the fairness layer, in each of its {layer.batches_checked:,} "
        "training batches",
        "s/epoch": "seconds per pass over the training rows; layer = the part of a training step "
        "that the fairness layer takes, forward and backward",
    }
    return glossary(entries)


def glossary(entries: Mapping[str, str]) -> list[str]:
    """Terms with their meanings, a hanging indent for each."""
    return [
        line
        for term, meaning in entries.items()
        for line in textwrap.wrap(f"{term:10} {meaning}", WIDTH, subsequent_indent=" " * 11)
    ]


def verdict(report: Report) -> list[str]:
    layer, tolerance = report.models[-1], report.settings.tolerance
    if layer.worst_excess <= ROUNDING:
        lines = [
            f"The fairness layer is within its tolerance of {tolerance:g} on every one of its "
            f"{len(report.constraints)} constraints, in every",
            f"training batch and on the whole test set (worst excess {layer.worst_excess:.1e}; "
            f"rounding of float32 allows {ROUNDING:.0e}).",
        ]
    else:
        lines = [
            f"The fairness layer is NOT within its tolerance of {tolerance:g}: some constraint is "
            f"exceeded by {layer.worst_excess:.1e},",
            f"more than the {ROUNDING:.0e} that rounding of float32 explains. Please report this.",
        ]
    if layer.batches_missing_a_group:
        lines.append(
            f"In {layer.batches_missing_a_group} of {layer.batches_checked} batches a group was "
            "absent, and its constraints did not apply; larger batches avoid it."
        )
    post_hoc = report.models[-2].final.fair
    loss = layer.final.fair.log_loss - post_hoc.log_loss
    accuracy = layer.final.fair.accuracy - post_hoc.accuracy
    lines.append(
        f"Against post-hoc projection, training through the layer changed the log loss, which it "
        f"minimises, by {loss:+.4f},\nand the accuracy, which it does not, by {accuracy:+.4f}."
    )
    if layer.projection_seconds is not None:
        lines.append(
            f"Projecting all {report.rows['test']:,} test predictions in one call took "
            f"{layer.projection_seconds * 1e3:.1f} ms."
        )
    return lines
