"""The demo: three ways to predict income on the UCI Adult data, side by side.

A small network learns who earns more than 50,000 dollars a year

1. unconstrained;
2. with *post-hoc projection*: the same network, its test predictions projected once, afterwards;
3. with a *fairness layer*: every training batch passes through the projection, so that the network
   learns knowing that its output will be moved.

Both fair ways hold the chosen notions on the chosen attributes at once; unless told otherwise,
demographic parity on sex and on race: for any two groups ``g`` and ``h`` of either attribute

    |mean prediction of g − mean prediction of h| ≤ tolerance.

Notions that speak of outcomes see the labels of training batches. The labels of the test rows are
unknown when they are predicted: a projection that read them would tell them. There the network's
own prediction serves as the chance of each label, the notion holds in expectation over these
chances, and the gaps with the true labels are reported beside it.

Predictions are kept in [0.001, 0.999], not in [0, 1]. A projection onto [0, 1] returns exact zeros
and ones, for which the log loss is infinite where they are wrong. Clamping inside the loss would
score predictions that nobody made; bounds of the projection itself keep loss, predictions and
guarantee about one and the same numbers. A confident right prediction loses about 0.001 nats by it.

``run_demo`` returns the figures as a ``Report`` and prints nothing; its command: ``fairopt demo``.
"""

from __future__ import annotations

import platform
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import fairopt
from fairopt.constraints import Constraint
from fairopt.datasets import Adult, Split, load_adult
from fairopt.demo_notions import NOTIONS, check_choice, constraints, group_gaps
from fairopt.formulate import formulate
from fairopt.layer import FairnessLayer, project
from fairopt.sampler import StratifiedBatchSampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Epoch", "Model", "Quality", "Report", "Settings", "SweepPoint", "plot", "run_demo"]

Progress = Callable[[str, bool], None]

WIDTH = 100
BOUNDS = (1e-3, 1.0 - 1e-3)
LEARNING_RATE = 2e-3
SWEEP = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2)
# A row of float32 predictions, recomputed in float64, holds to this: the precision that fairopt
# promises for float32.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Settings:
    """What the user may choose.

    Attributes:
        tolerance: the largest gap allowed between two groups.
        notions: keys of ``demo_notions.NOTIONS``; all hold at once.
        attributes: on which they hold, of those in the data.
        backend: name of the backend that solves the projections.
        epochs: passes over the training rows, for every model.
        batch_size: samples per training batch; each batch keeps the group proportions.
        seed: decides the network's first weights and the batches.
        limit: if given, only so many training and test rows, drawn in proportion.
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
    repeats: int = 3
    threads: int = 1


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


@dataclass(frozen=True)
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
    excess_in_training: float | None
    batches_checked: int
    batches_missing_a_group: int
    seconds_per_epoch: float
    layer_share: float | None
    projection_seconds: float | None

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
class Report:
    """All figures of one run. ``str(report)`` is the table with its explanations.

    Attributes:
        settings: what was run.
        environment: versions and threads.
        rows: number of rows per split.
        constraints: the readable name of each constraint.
        models: the rows of the table.
        unconstrained: the unconstrained networks that ``sweep`` compares with, one per seed.
        sweep: the tolerance plot.
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
        return _table(self)


# ---------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------


def area_under_curve(scores: Tensor, targets: Tensor) -> float:
    """Probability that a random positive scores above a random negative, ties counting one half."""
    _, inverse, counts = np.unique(scores.numpy(), return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2.0  # ranks from 1, equal scores share theirs
    positive = targets.numpy() > 0.5
    n_positive = int(positive.sum())
    n_negative = positive.size - n_positive
    above = mean_rank[inverse][positive].sum() - n_positive * (n_positive + 1) / 2.0
    return float(above / (n_positive * n_negative))


def measure(predictions: Tensor, data: Split, settings: Settings) -> Quality:
    """Accuracy, AUC, log loss and gaps of predictions for all rows of ``data``."""
    values, targets = predictions.double(), data.targets.double()
    return Quality(
        accuracy=float(((values >= 0.5) == (targets >= 0.5)).double().mean()),
        auc=area_under_curve(values, targets),
        log_loss=float(functional.binary_cross_entropy(values, targets)),
        gap=_gaps(values, targets, data, settings),
    )


def _gaps(
    predictions: Tensor, targets: Tensor, data: Split, settings: Settings
) -> dict[str, float]:
    return group_gaps(predictions, targets, data.groups, settings.notions, settings.attributes)


def _needs_targets(settings: Settings) -> bool:
    return any(NOTIONS[notion].needs_targets for notion in settings.notions)


class _LayerClock:
    """Times the layer inside a training step: its forward directly, its backward between hooks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def run(
        self,
        layer: FairnessLayer,
        scores: Tensor,
        groups: Mapping[str, Tensor],
        targets: Tensor | None,
    ) -> Tensor:
        self._start()
        fair: Tensor = layer(scores, groups, targets)
        self._stop()
        # The gradient arrives from the loss, and leaves for the network.
        fair.register_hook(lambda _: self._start())
        scores.register_hook(lambda _: self._stop())
        return fair

    def _start(self) -> None:
        self._started = time.perf_counter()

    def _stop(self) -> None:
        self.seconds += time.perf_counter() - self._started


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def _notions(settings: Settings, tolerance: float) -> list[Constraint]:
    return constraints(settings.notions, settings.attributes, tolerance)


def _layer(settings: Settings, tolerance: float, adult: Adult) -> FairnessLayer:
    return FairnessLayer(
        _notions(settings, tolerance),
        bounds=BOUNDS,
        backend=settings.backend,
        group_counts={name: len(adult.group_names[name]) for name in settings.attributes},
    )


def _batches(data: Split, settings: Settings, size: int, seed: int) -> StratifiedBatchSampler:
    # Race first: the sampler is exact for the first attribute, and race has the smallest groups.
    strata = {"race": data.groups["race"], "sex": data.groups["sex"]}
    if _needs_targets(settings):  # then what is compared is a group's part with one outcome
        outcome = data.targets.long()
        strata = {"race": 2 * data.groups["race"] + outcome, "sex": data.groups["sex"]}
    return StratifiedBatchSampler(strata, size, seed=seed)


def _network(features: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(features, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 1),
            nn.Flatten(0),
            nn.Sigmoid(),
        )


@dataclass
class _Training:
    """What is collected while a network trains."""

    raw: list[Tensor]  # test predictions of the network, one tensor per epoch
    fair: list[Tensor]  # the same after the layer
    epoch_seconds: list[float]
    step_seconds: list[float]
    layer_seconds: list[float]
    projection_seconds: float = 0.0
    worst_excess: float = -float("inf")
    batches: int = 0
    batches_missing_a_group: int = 0


def _train(
    adult: Adult,
    settings: Settings,
    tolerance: float | None,
    seed: int,
    announce: Callable[[str], None],
) -> _Training:
    """Train one network, through a fairness layer if there is a tolerance, and check each batch."""
    data = adult.train
    layer = None if tolerance is None else _layer(settings, tolerance, adult)
    attributes, outcomes = settings.attributes, _needs_targets(settings)
    network = _network(data.features.shape[1], seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    sampler = _batches(data, settings, settings.batch_size, seed)
    training = _Training([], [], [], [], [])

    for epoch in range(settings.epochs):
        clock, epoch_seconds, step_seconds = _LayerClock(), 0.0, 0.0
        for indices in sampler:
            fetched = time.perf_counter()
            batch = data.take(indices)
            groups = {name: batch.groups[name] for name in attributes}
            targets = batch.targets if outcomes else None

            started = time.perf_counter()
            scores = network(batch.features)
            predictions = scores if layer is None else clock.run(layer, scores, groups, targets)
            loss = functional.binary_cross_entropy(predictions, batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            finished = time.perf_counter()
            epoch_seconds += finished - fetched
            step_seconds += finished - started

            if layer is not None and tolerance is not None:
                gaps = _gaps(predictions, batch.targets, batch, settings)
                training.worst_excess = max(training.worst_excess, max(gaps.values()) - tolerance)
                training.batches += 1
                assert layer.last is not None
                training.batches_missing_a_group += bool(layer.last.skipped)

        training.epoch_seconds.append(epoch_seconds)
        training.step_seconds.append(step_seconds)
        training.layer_seconds.append(clock.seconds)
        with torch.no_grad():
            raw = network(adult.test.features)
            training.raw.append(raw)
            if layer is not None:
                started = time.perf_counter()
                training.fair.append(layer(raw, *_serving(raw, adult.test, settings)))
                training.projection_seconds = time.perf_counter() - started
        shown = (training.fair or training.raw)[-1]
        gaps = _gaps(shown, adult.test.targets, adult.test, settings)
        announce(
            f"epoch {epoch + 1}/{settings.epochs}   test log loss "
            f"{functional.binary_cross_entropy(shown, adult.test.targets):.4f}   "
            f"gaps {_named(gaps, 3)}   {epoch_seconds:.2f} s"
        )
    return training


def _serving(
    raw: Tensor, data: Split, settings: Settings
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What is known when test rows are predicted: groups and, for labels, the chances ``raw``."""
    groups = {name: data.groups[name] for name in settings.attributes}
    return groups, raw if _needs_targets(settings) else None


def run_demo(settings: Settings, progress: Progress = lambda message, done: None) -> Report:
    """Train all models and measure them.

    Args:
        settings: what to run.
        progress: called with a line of text, and whether a stage ends with it.

    Raises:
        FairoptError: a setting that makes no sense, such as a negative tolerance; an unknown
            notion, attribute or backend, or one whose solver is not installed.
    """
    check_choice("notions", settings.notions, tuple(NOTIONS))
    check_choice("attributes", settings.attributes, Settings.attributes)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _run(settings, progress)
    finally:
        torch.set_num_threads(threads)


def _run(settings: Settings, progress: Progress) -> Report:
    began = time.perf_counter()
    progress("loading the data", False)
    adult = _load(settings)
    progress("preparing the backend (its kernels are compiled once, then cached)", True)
    warm_up_seconds = _warm_up(adult, settings)
    progress(f"backend {settings.backend} ready in {warm_up_seconds:.1f} s", True)

    # The models of the table come first, then what only the tolerance plot needs.
    tolerances = sorted({*SWEEP, settings.tolerance})
    seeds = range(settings.seed, settings.seed + settings.repeats)
    plan: dict[tuple[float | None, int], str] = {
        (None, settings.seed): "unconstrained",
        (settings.tolerance, settings.seed): "fairness layer",
    }
    for seed in seeds:
        plan.setdefault((None, seed), f"for the plot: unconstrained, seed {seed}")
        for each in tolerances:
            plan.setdefault((each, seed), f"for the plot: tolerance {each:g}, seed {seed}")

    trained: dict[tuple[float | None, int], _Training] = {}
    for number, ((tolerance, seed), name) in enumerate(plan.items(), start=1):
        head, last = f"[{number}/{len(plan)}] {name}", f"epoch {settings.epochs}/"
        ends = number <= 2 or number == len(plan)

        def announce(line: str, head: str = head, last: str = last, ends: bool = ends) -> None:
            progress(f"{head}   {line}", ends and line.startswith(last))

        trained[tolerance, seed] = _train(adult, settings, tolerance, seed, announce)

    def quality(predictions: Tensor) -> Quality:
        return measure(predictions, adult.test, settings)

    def answers(seed: int, tolerance: float) -> tuple[Quality, Quality]:
        post_hoc = _project(trained[None, seed].raw[-1], adult.test, tolerance, settings)
        return quality(post_hoc), quality(trained[tolerance, seed].fair[-1])

    sweep = []
    for each in tolerances:
        post_hoc, layer = zip(*(answers(seed, each) for seed in seeds), strict=True)
        sweep.append(SweepPoint(each, post_hoc, layer))
    raw = trained[None, settings.seed].raw[-1]
    problem = formulate(
        _notions(settings, settings.tolerance),
        raw,
        *_serving(raw, adult.test, settings),
        bounds=BOUNDS,
    )
    return Report(
        settings=settings,
        environment={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fairopt": fairopt.__version__,
            "threads": settings.threads,
        },
        rows={"train": len(adult.train), "test": len(adult.test)},
        constraints=problem.row_names,
        models=_models(
            adult,
            settings,
            plain=trained[None, settings.seed],
            through=trained[settings.tolerance, settings.seed],
        ),
        unconstrained=tuple(quality(trained[None, seed].raw[-1]) for seed in seeds),
        sweep=tuple(sweep),
        warm_up_seconds=warm_up_seconds,
        seconds=time.perf_counter() - began,
    )


def _load(settings: Settings) -> Adult:
    adult = load_adult()
    if settings.limit is None:
        return adult

    def part(data: Split) -> Split:
        size = min(settings.limit or len(data), len(data))
        return data.take(next(iter(_batches(data, settings, size, settings.seed))))

    return Adult(part(adult.train), part(adult.test), adult.feature_names, adult.group_names)


def _warm_up(adult: Adult, settings: Settings) -> float:
    """One forward and backward, so that compilation is in no later figure."""
    started = time.perf_counter()
    size = min(settings.batch_size, len(adult.train))
    batch = adult.train.take(next(iter(_batches(adult.train, settings, size, settings.seed))))
    scores = torch.linspace(0.1, 0.9, size).requires_grad_()
    layer = _layer(settings, settings.tolerance, adult)
    layer(scores, *_serving(batch.targets, batch, settings)).sum().backward()
    return time.perf_counter() - started


def _named(gaps: Mapping[str, float], digits: int) -> str:
    return ", ".join(f"{name} {gap:.{digits}f}" for name, gap in gaps.items())


def _project(scores: Tensor, data: Split, tolerance: float, settings: Settings) -> Tensor:
    groups, targets = _serving(scores, data, settings)
    return project(
        scores,
        groups,
        _notions(settings, tolerance),
        targets,
        bounds=BOUNDS,
        backend=settings.backend,
    )


def _models(
    adult: Adult, settings: Settings, plain: _Training, through: _Training
) -> tuple[Model, ...]:
    data, tolerance = adult.test, settings.tolerance
    projected, projection_seconds = [], 0.0
    for scores in plain.raw:
        started = time.perf_counter()
        projected.append(_project(scores, data, tolerance, settings))
        projection_seconds = time.perf_counter() - started

    def history(raw: Sequence[Tensor], fair: Sequence[Tensor]) -> tuple[Epoch, ...]:
        return tuple(
            Epoch(number + 1, measure(before, data, settings), measure(after, data, settings))
            for number, (before, after) in enumerate(zip(raw, fair, strict=True))
        )

    def excess(predictions: Tensor, raw: Tensor) -> float:
        _, chances = _serving(raw, data, settings)
        targets = data.targets if chances is None else chances
        return max(_gaps(predictions, targets, data, settings).values()) - tolerance

    # The first epoch pays for caches and allocators; where there are more, it does not count.
    steady = slice(1 if settings.epochs > 1 else 0, None)
    share = sum(through.layer_seconds[steady]) / sum(through.step_seconds[steady])
    plain_seconds = float(np.median(plain.epoch_seconds[steady]))
    return (
        Model(
            name="unconstrained",
            projected=False,
            history=history(plain.raw, plain.raw),
            excess_on_test=excess(plain.raw[-1], plain.raw[-1]),
            excess_in_training=None,
            batches_checked=0,
            batches_missing_a_group=0,
            seconds_per_epoch=plain_seconds,
            layer_share=None,
            projection_seconds=None,
        ),
        Model(
            name="post-hoc projection",
            projected=True,
            history=history(plain.raw, projected),
            excess_on_test=excess(projected[-1], plain.raw[-1]),
            excess_in_training=None,
            batches_checked=0,
            batches_missing_a_group=0,
            seconds_per_epoch=plain_seconds,
            layer_share=None,
            projection_seconds=projection_seconds,
        ),
        Model(
            name="fairness layer",
            projected=True,
            history=history(through.raw, through.fair),
            excess_on_test=excess(through.fair[-1], through.raw[-1]),
            excess_in_training=through.worst_excess,
            batches_checked=through.batches,
            batches_missing_a_group=through.batches_missing_a_group,
            seconds_per_epoch=float(np.median(through.epoch_seconds[steady])),
            layer_share=share,
            projection_seconds=through.projection_seconds,
        ),
    )


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


def _table(report: Report) -> str:
    tolerance = report.settings.tolerance
    attributes = list(report.models[0].final.raw.gap)
    lines = [
        f"Income above 50,000 dollars (UCI Adult): {report.rows['train']:,} people to train on, "
        f"{report.rows['test']:,} to test on.",
        *(
            line
            for notion in report.settings.notions
            for line in textwrap.wrap(
                f"{notion.replace('-', ' ').capitalize()} on {' and on '.join(attributes)}: "
                f"{NOTIONS[notion].words.format(tolerance)}.",
                WIDTH,
            )
        ),
        "",
    ]
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
    lines += ["", *_explanations(report), "", *_verdict(report)]
    return "\n".join(lines)


def _explanations(report: Report) -> list[str]:
    layer = report.models[-1]
    gap = "the largest between two groups on the test rows"
    after, checked = "after the projection", "on the test rows"
    if tuple(report.settings.notions) == ("demographic-parity",):
        gap = "largest difference between mean predictions of two groups on the test rows"
    if _needs_targets(report.settings):
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
    lines: list[str] = []
    for term, meaning in entries.items():
        lines += textwrap.wrap(f"{term:10} {meaning}", WIDTH, subsequent_indent=" " * 11)
    return lines


def _verdict(report: Report) -> list[str]:
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


# ---------------------------------------------------------------------------------------------
# The plots
# ---------------------------------------------------------------------------------------------

# From the palette of Okabe and Ito, whose colours stay apart for colour-blind readers; markers and
# dashes say the same again without colour.
_STYLES: dict[str, dict[str, Any]] = {
    "unconstrained": {"color": "#000000", "marker": "s", "linestyle": "-", "markersize": 4},
    # Open and larger: where both models sit on the tolerance, its markers still show.
    "post-hoc projection": {
        "color": "#E69F00",
        "marker": "^",
        "linestyle": "--",
        "markersize": 9,
        "markerfacecolor": "none",
    },
    "fairness layer": {"color": "#0072B2", "marker": "o", "linestyle": "-", "markersize": 4},
}
_BEFORE_LAYER: dict[str, Any] = {"color": "#56B4E9", "marker": "", "linestyle": ":"}
_LIMIT: dict[str, Any] = {
    "color": "#D55E00",
    "linewidth": 1.2,
    "linestyle": (0, (6, 3)),
    "zorder": 1,
}


def plot(report: Report, folder: Path) -> tuple[Path, Path]:
    """Save both plots as PNG files into ``folder`` and return their paths.

    Raises:
        ImportError: matplotlib is not installed; ``pip install 'fairopt[demo]'`` brings it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "training.png", folder / "tolerance.png"
    _plot_training(report).savefig(paths[0], dpi=150)
    _plot_tolerance(report).savefig(paths[1], dpi=150)
    return paths


def _figure(panels: int, title: str, subtitle: str) -> tuple[Figure, list[Axes]]:
    # Figure, not pyplot: no window, no global state, and any thread may draw.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * panels, 4.3), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        ax.set_axisbelow(True)
    figure.supxlabel(subtitle, fontsize=9, color="#444444", x=0.01, ha="left")
    return figure, axes


def _plot_training(report: Report) -> Figure:
    from matplotlib.ticker import MaxNLocator

    tolerance = report.settings.tolerance
    attributes = list(report.models[0].final.raw.gap)
    figure, axes = _figure(
        1 + len(attributes),
        "Test set after each epoch",
        f"gap: the largest between two groups ({', '.join(report.settings.notions)}"
        f"{'; true labels' if _needs_targets(report.settings) else ''}).\n"
        f"All {report.rows['test']:,} test predictions are projected in one call.",
    )
    epochs = [entry.epoch for entry in report.models[0].history]
    common: dict[str, Any] = {"linewidth": 1.6}
    for model in report.models:
        style = {**common, **_STYLES[model.name], "label": model.name}
        axes[0].plot(epochs, [entry.fair.log_loss for entry in model.history], **style)
        for ax, name in zip(axes[1:], attributes, strict=True):
            ax.plot(epochs, [entry.fair.gap[name] for entry in model.history], **style)
    for ax, name in zip(axes[1:], attributes, strict=True):
        before = [entry.raw.gap[name] for entry in report.models[-1].history]
        ax.plot(epochs, before, **common, **_BEFORE_LAYER, label="its network, before the layer")
        ax.axhline(tolerance, **_LIMIT, label=f"tolerance {tolerance:g}")
        ax.set_title(f"gap: {name}", loc="left", fontsize=11)
        ax.set_ylim(bottom=0.0)
    axes[0].set_title("log loss (nats)", loc="left", fontsize=11)
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes[1].get_legend_handles_labels()
    ncols = len(labels) if len(axes) > 2 else 2
    figure.legend(
        handles, labels, loc="outside upper right", ncols=ncols, frameon=False, fontsize=9
    )
    return figure


def _plot_tolerance(report: Report) -> Figure:
    from matplotlib.ticker import MaxNLocator

    count = len(report.unconstrained)
    figure, axes = _figure(
        2,
        "Quality and tolerance",
        f"The layer's networks are trained at each tolerance for {report.settings.epochs} epochs."
        + (f" Lines: mean of {count} seeds; shades: their range." if count > 1 else ""),
    )
    tolerances = [point.tolerance for point in report.sweep]
    curves: tuple[tuple[Axes, str, Callable[[Quality], float]], ...] = (
        (axes[0], "accuracy on the test set", lambda quality: quality.accuracy),
        (axes[1], "log loss on the test set (nats)", lambda quality: quality.log_loss),
    )
    for ax, title, value in curves:
        ways: dict[str, Sequence[Sequence[Quality]]] = {
            "unconstrained": [report.unconstrained] * len(tolerances),
            "post-hoc projection": [point.post_hoc for point in report.sweep],
            "fairness layer": [point.layer for point in report.sweep],
        }
        for name, points in ways.items():
            style = dict(_STYLES[name], linewidth=1.6, label=name)
            if name == "unconstrained":
                style["marker"] = ""
            values = np.array([[value(quality) for quality in point] for point in points])
            ax.plot(tolerances, values.mean(axis=1), **style)
            low, high = values.min(axis=1), values.max(axis=1)
            ax.fill_between(tolerances, low, high, color=style["color"], alpha=0.12, linewidth=0)
        ax.axvline(report.settings.tolerance, **_LIMIT, label="tolerance of the table")
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_xlabel("tolerance: largest gap allowed between two groups")
        ax.xaxis.set_major_locator(MaxNLocator(5))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure
