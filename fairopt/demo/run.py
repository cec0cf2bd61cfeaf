"""All models trained, measured and put side by side."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fairopt.datasets import Adult, Split, load_adult
from fairopt.demo.notions import check_choice
from fairopt.demo.report import Epoch, Model, Quality, Report, Settings, SweepPoint
from fairopt.demo.training import (
    BOUNDS,
    Training,
    batches_of,
    known_when_serving,
    layer_of,
    measure,
    train,
)
from fairopt.formulation.program import formulate
from fairopt.layer.module import project
from fairopt.notions.names import NOTIONS

Progress = Callable[[str, bool], None]
SWEEP = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2)


def run_demo(settings: Settings, progress: Progress = lambda message, done: None) -> Report:
    """Train all models and measure them.

    Args:
        settings: the choices to run.
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
        return run_all(settings, progress)
    finally:
        torch.set_num_threads(threads)


def run_all(settings: Settings, progress: Progress) -> Report:
    from fairopt import __version__

    began = time.perf_counter()
    progress("loading the data", False)
    adult = loaded(settings)
    progress("preparing the backend (its kernels are compiled once, then cached)", True)
    warm_up_seconds = warm_up(adult, settings)
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

    trained: dict[tuple[float | None, int], Training] = {}
    for number, ((tolerance, seed), name) in enumerate(plan.items(), start=1):
        head, last = f"[{number}/{len(plan)}] {name}", f"epoch {settings.epochs}/"
        ends = number <= 2 or number == len(plan)

        def announce(line: str, head: str = head, last: str = last, ends: bool = ends) -> None:
            progress(f"{head}   {line}", ends and line.startswith(last))

        trained[tolerance, seed] = train(adult, settings, tolerance, seed, announce)

    def quality(predictions: Tensor) -> Quality:
        return measure(predictions, adult.test, settings)

    def answers(seed: int, tolerance: float) -> tuple[Quality, Quality]:
        post_hoc = projected_by(trained[None, seed].raw[-1], adult.test, tolerance, settings)
        return quality(post_hoc), quality(trained[tolerance, seed].fair[-1])

    sweep = []
    for each in tolerances:
        post_hoc, layer = zip(*(answers(seed, each) for seed in seeds), strict=True)
        sweep.append(SweepPoint(each, post_hoc, layer))
    plain, through = trained[None, settings.seed], trained[settings.tolerance, settings.seed]
    raw = plain.raw[-1]
    known = known_when_serving(raw, adult.test, settings)
    problem = formulate(settings.constraints(settings.tolerance), raw, *known, bounds=BOUNDS)
    streaming = None
    if settings.streaming:
        from fairopt.demo.streaming import serve_all

        progress("serving the test rows as a stream", True)
        streaming = serve_all(raw, adult.test, settings, BOUNDS)
    return Report(
        settings=settings,
        environment={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fairopt": __version__,
            "threads": settings.threads,
        },
        rows={"train": len(adult.train), "test": len(adult.test)},
        constraints=problem.row_names,
        models=models_of(adult, settings, plain, through),
        unconstrained=tuple(quality(trained[None, seed].raw[-1]) for seed in seeds),
        sweep=tuple(sweep),
        streaming=streaming,
        warm_up_seconds=warm_up_seconds,
        seconds=time.perf_counter() - began,
    )


def loaded(settings: Settings) -> Adult:
    adult = load_adult()
    if settings.limit is None:
        return adult

    def part(data: Split) -> Split:
        size = min(settings.limit or len(data), len(data))
        return data.take(next(iter(batches_of(data, settings, size, settings.seed))))

    return Adult(part(adult.train), part(adult.test), adult.feature_names, adult.group_names)


def warm_up(adult: Adult, settings: Settings) -> float:
    """One forward and backward, so that compilation is in no later figure."""
    started = time.perf_counter()
    size = min(settings.batch_size, len(adult.train))
    batch = adult.train.take(next(iter(batches_of(adult.train, settings, size, settings.seed))))
    scores = torch.linspace(0.1, 0.9, size).requires_grad_()
    layer = layer_of(settings, settings.tolerance, adult)
    layer(scores, *known_when_serving(batch.targets, batch, settings)).sum().backward()
    return time.perf_counter() - started


def projected_by(scores: Tensor, data: Split, tolerance: float, settings: Settings) -> Tensor:
    groups, targets = known_when_serving(scores, data, settings)
    made = settings.constraints(tolerance)
    return project(scores, groups, made, targets, bounds=BOUNDS, backend=settings.backend)


def models_of(
    adult: Adult, settings: Settings, plain: Training, through: Training
) -> tuple[Model, ...]:
    data, tolerance = adult.test, settings.tolerance
    projected, projection_seconds = [], 0.0
    for scores in plain.raw:
        started = time.perf_counter()
        projected.append(projected_by(scores, data, tolerance, settings))
        projection_seconds = time.perf_counter() - started

    def history(raw: Sequence[Tensor], fair: Sequence[Tensor]) -> tuple[Epoch, ...]:
        return tuple(
            Epoch(number + 1, measure(before, data, settings), measure(after, data, settings))
            for number, (before, after) in enumerate(zip(raw, fair, strict=True))
        )

    def excess(predictions: Tensor, raw: Tensor) -> float:
        _, chances = known_when_serving(raw, data, settings)
        targets = data.targets if chances is None else chances
        return max(settings.gaps(predictions, targets, data.groups).values()) - tolerance

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
            seconds_per_epoch=plain_seconds,
        ),
        Model(
            name="post-hoc projection",
            projected=True,
            history=history(plain.raw, projected),
            excess_on_test=excess(projected[-1], plain.raw[-1]),
            seconds_per_epoch=plain_seconds,
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
