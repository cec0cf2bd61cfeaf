"""One network trained, with or without a fairness layer, and every batch checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fairopt.datasets import Adult, Split
from fairopt.demo.report import Quality, Settings
from fairopt.layer.module import FairnessLayer
from fairopt.sampler import StratifiedBatchSampler

BOUNDS = (1e-3, 1.0 - 1e-3)
LEARNING_RATE = 2e-3


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
        gap=settings.gaps(values, targets, data.groups),
    )


class LayerClock:
    """Times the layer inside a training step: its forward directly, its backward between hooks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def run(
        self, layer: FairnessLayer, scores: Tensor, *others: Mapping[str, Tensor] | Tensor | None
    ) -> Tensor:
        self._start()
        fair: Tensor = layer(scores, *others)
        self._stop()
        # The gradient arrives from the loss, and leaves for the network.
        fair.register_hook(lambda _: self._start())
        scores.register_hook(lambda _: self._stop())
        return fair

    def _start(self) -> None:
        self._started = time.perf_counter()

    def _stop(self) -> None:
        self.seconds += time.perf_counter() - self._started


def layer_of(settings: Settings, tolerance: float, adult: Adult) -> FairnessLayer:
    """The layer that training and serving go through."""
    return FairnessLayer(
        settings.constraints(tolerance),
        bounds=BOUNDS,
        backend=settings.backend,
        group_counts={name: len(adult.group_names[name]) for name in settings.attributes},
    )


def batches_of(data: Split, settings: Settings, size: int, seed: int) -> StratifiedBatchSampler:
    """Batches that keep the proportions of the groups that the notions compare."""
    # Race first: the sampler is exact for the first attribute, and race has the smallest groups.
    race = data.groups["race"]
    if settings.needs_targets:  # Then a group's part with one outcome is compared.
        race = 2 * race + data.targets.long()
    return StratifiedBatchSampler({"race": race, "sex": data.groups["sex"]}, size, seed=seed)


def network(features: int, seed: int) -> nn.Module:
    """A small multilayer perceptron with probabilities as its output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()
        return nn.Sequential(*hidden, nn.Linear(32, 1), nn.Flatten(0), nn.Sigmoid())


@dataclass
class Training:
    """The figures that are collected while a network trains."""

    raw: list[Tensor]  # test predictions of the network, one tensor per epoch
    fair: list[Tensor]  # the same after the layer
    epoch_seconds: list[float]
    step_seconds: list[float]
    layer_seconds: list[float]
    projection_seconds: float = 0.0
    worst_excess: float = -float("inf")
    batches: int = 0
    batches_missing_a_group: int = 0


def train(
    adult: Adult,
    settings: Settings,
    tolerance: float | None,
    seed: int,
    announce: Callable[[str], None],
) -> Training:
    """Train one network, through a fairness layer if there is a tolerance, and check each batch."""
    data = adult.train
    layer = None if tolerance is None else layer_of(settings, tolerance, adult)
    net = network(data.features.shape[1], seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    sampler = batches_of(data, settings, settings.batch_size, seed)
    training = Training([], [], [], [], [])

    for epoch in range(settings.epochs):
        clock, epoch_seconds, step_seconds = LayerClock(), 0.0, 0.0
        for indices in sampler:
            fetched = time.perf_counter()
            batch = data.take(indices)
            groups = settings.compared(batch.groups)
            targets = batch.targets if settings.needs_targets else None

            started = time.perf_counter()
            scores = net(batch.features)
            predictions = scores if layer is None else clock.run(layer, scores, groups, targets)
            loss = functional.binary_cross_entropy(predictions, batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            finished = time.perf_counter()
            epoch_seconds += finished - fetched
            step_seconds += finished - started

            if layer is not None and tolerance is not None:
                gaps = settings.gaps(predictions, batch.targets, batch.groups)
                training.worst_excess = max(training.worst_excess, max(gaps.values()) - tolerance)
                training.batches += 1
                assert layer.last is not None
                training.batches_missing_a_group += bool(layer.last.skipped)

        training.epoch_seconds.append(epoch_seconds)
        training.step_seconds.append(step_seconds)
        training.layer_seconds.append(clock.seconds)
        with torch.no_grad():
            raw = net(adult.test.features)
            training.raw.append(raw)
            if layer is not None:
                started = time.perf_counter()
                training.fair.append(layer(raw, *known_when_serving(raw, adult.test, settings)))
                training.projection_seconds = time.perf_counter() - started
        shown = (training.fair or training.raw)[-1]
        gaps = settings.gaps(shown, adult.test.targets, adult.test.groups)
        listed = ", ".join(f"{name} {gap:.3f}" for name, gap in gaps.items())
        announce(
            f"epoch {epoch + 1}/{settings.epochs}   test log loss "
            f"{functional.binary_cross_entropy(shown, adult.test.targets):.4f}   "
            f"gaps {listed}   {epoch_seconds:.2f} s"
        )
    return training


def known_when_serving(
    raw: Tensor, data: Split, settings: Settings
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The knowledge when test rows are predicted: groups and, for labels, the chances ``raw``."""
    return settings.compared(data.groups), raw if settings.needs_targets else None
