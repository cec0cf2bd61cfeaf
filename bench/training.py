"""What does a training step cost with each backend, and does it matter to the result which is used?

The demo's network, on the demo's data and constraints (demographic parity on sex and on race, 11
rows, tolerance 0.05, bounds), in float64 with batches of 256. All backends start from the same
weights and see the same batches. The learning rate is five times the demo's: rows then bind after a
few steps, and the gradients pass through them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import torch
from torch.nn import functional

from bench.harness import RESULTS, Report, Spread, arguments, interleaved, ratio
from bench.problems import able
from fairopt.backends import Backend
from fairopt.datasets import Adult, Split, load_adult
from fairopt.demo import Settings as DemoSettings
from fairopt.demo.training import BOUNDS, batches_of, layer_of, network
from fairopt.formulation.program import formulate

STEPS = 20
BATCH_SIZE = 256
TOLERANCE = 0.05
LEARNING_RATE = 1e-2


def batches(data: Split, size: int, seed: int) -> Iterator[Split]:
    """The demo's batches in float64, epoch after epoch."""
    sampler = batches_of(data, DemoSettings(), size, seed)
    for indices in itertools.chain.from_iterable(itertools.repeat(sampler)):
        batch = data.take(indices)
        yield Split(batch.features.double(), batch.targets.double(), batch.groups)


class Training:
    """The demo's model, trained one step at a time.

    Args:
        backend: of its fairness layer.
        adult: the data.
        tolerance: of the layer.
        batch_size: samples per step.
        seed: of the first weights and the batches.

    Attributes:
        losses: of the batch of each step.
        binding: how many of the layer's rows held the predictions back in each step.
        layer_seconds: forward and backward of the layer in each step.
    """

    def __init__(
        self,
        backend: str | Backend,
        adult: Adult,
        *,
        tolerance: float = TOLERANCE,
        batch_size: int = BATCH_SIZE,
        seed: int = 0,
    ) -> None:
        self.layer = layer_of(DemoSettings(), tolerance, adult)
        self.layer.backend = backend
        self.network = network(adult.train.features.shape[1], seed).double()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)
        self.batches = batches(adult.train, batch_size, seed)
        self.losses: list[float] = []
        self.binding: list[int] = []
        self.layer_seconds: list[float] = []

    def step(self) -> None:
        batch = next(self.batches)
        scores = self.network(batch.features)
        begun = time.perf_counter()
        fair = self.layer(scores, batch.groups)
        forward = time.perf_counter() - begun
        clock = [0.0, 0.0]
        fair.register_hook(lambda _: clock.__setitem__(0, time.perf_counter()))
        scores.register_hook(lambda _: clock.__setitem__(1, time.perf_counter()))
        loss = functional.binary_cross_entropy(fair, batch.targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        assert self.layer.last is not None
        self.losses.append(loss.item())
        self.binding.append(int(self.layer.last.row_dual.count_nonzero()))
        self.layer_seconds.append(forward + clock[1] - clock[0])


def capable(adult: Adult, batch_size: int = BATCH_SIZE) -> tuple[str, ...]:
    """The installed backends that solve what the layer asks, in the order of ``"auto"``."""
    batch = next(batches(adult.train, batch_size, 0))
    return able(
        formulate(DemoSettings().constraints(TOLERANCE), batch.targets, batch.groups, bounds=BOUNDS)
    )


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("training", (__doc__ or "").strip(), ("scipy", "osqp", "qpth"))
    adult = load_adult()
    trainings = {name: Training(name, adult) for name in capable(adult)}
    for training in trainings.values():
        for _ in range(STEPS):
            training.step()
    losses = {name: training.losses[-1] for name, training in trainings.items()}
    bound = next(iter(trainings.values())).binding
    for name, loss in losses.items():
        report.add(f"loss after {STEPS} steps, {name}", loss, "nats")
    report.add(
        f"largest difference of the losses after {STEPS} steps",
        max(losses.values()) - min(losses.values()),
        "nats",
        at_most=1e-4,
        detail=f"rows held predictions back in {sum(map(bool, bound))} of the steps",
    )

    times = interleaved(
        {name: training.step for name, training in trainings.items()},
        seconds=options.seconds * len(trainings),
        warmup=1,
        fewest_rounds=10,
    )
    for name, training in trainings.items():
        rounds = len(times[name])
        report.add(f"a step with {name}", Spread.of(times[name]).scaled(1e3), "ms")
        layer = Spread.of(training.layer_seconds[-rounds:]).scaled(1e3)
        report.add(f"of it the layer, {name}", layer, "ms", detail="forward + backward")
    first = next(iter(times))
    for name in times:
        if name != first:
            report.add(f"a step with {name} / with {first}", ratio(times, name, first), "times")
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
