"""The measurements of ``fairopt bench``: how long each backend takes on this machine."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fairopt import backends
from fairopt.cli.drawing import Drawn, people
from fairopt.errors import ProblemError, UnsupportedProblemError
from fairopt.layer.module import project
from fairopt.notions.names import COMPARING

FEWEST = 3  # rounds of what takes no longer than the time that is given


@dataclass(frozen=True)
class Timing:
    """One backend on one problem.

    Attributes:
        samples: n.
        backend: its name.
        median, lower, upper: seconds of ``project`` and its backward pass, with quartiles; NaN
            where the backend does not take the problem.
        first: seconds of the first call, which may load and compile.
        rounds: how often it was measured.
        refusal: why the backend does not take the problem, or was left out; else ``""``.
    """

    samples: int
    backend: str
    median: float
    lower: float
    upper: float
    first: float
    rounds: int
    refusal: str = ""


@dataclass(frozen=True)
class Timings:
    """``str(timings)`` is a table: a line for each number of samples, a column for each backend."""

    problem: Drawn
    device: str
    threads: int
    timings: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; None where nothing was measured."""
        found = asdict(self)
        for each in found["timings"]:
            each.update({key: None for key, value in each.items() if value != value})
        return found

    def __str__(self) -> str:
        names = tuple(dict.fromkeys(each.backend for each in self.timings))
        widths = [max(len(name), 10) for name in names]
        lines = [
            f"median ms of a projection, forward + backward ({self.device}, {self.threads} "
            f"threads, torch {torch.__version__})",
            f"{'samples':>9}  " + "  ".join(map(str.rjust, names, widths)),
        ]
        for samples in dict.fromkeys(each.samples for each in self.timings):
            line = {each.backend: each for each in self.timings if each.samples == samples}
            best = min((t.median for t in line.values() if not t.refusal), default=0.0)
            cells = (
                shown(line[name], best).rjust(w) for name, w in zip(names, widths, strict=True)
            )
            lines.append(f"{samples:>9,}  " + "  ".join(cells))
        lines.append(
            "*: the fastest" + "; -: not timed" * any(each.refusal for each in self.timings)
        )
        lines += dict.fromkeys(
            f"{each.backend}: {each.refusal}" for each in self.timings if each.refusal
        )
        return "\n".join(lines)


def shown(timing: Timing, best: float) -> str:
    if timing.refusal:
        return "-"
    return f"{1e3 * timing.median:.4g}" + ("*" if timing.median == best else " ")


def time_backends(
    problem: Drawn,
    samples: Sequence[int],
    names: Sequence[str] | None = None,
    *,
    device: str = "cpu",
    seconds: float = 1.0,
    progress: Callable[[str], None] = lambda line: None,
) -> Timings:
    """Time ``project`` and its backward pass.

    All backends take turns, round after round: a machine that slows down slows all alike.

    Args:
        problem: what to draw, but for the number of samples.
        samples: the numbers of samples.
        names: of backends; those that are installed if ``None``.
        device: of the tensors.
        seconds: for each number of samples, about. What takes longer has one turn, after its
            first call, and is left out of larger problems; the others have at least three.
        progress: called with a line of text before each number of samples.

    Raises:
        ProblemError: an argument makes no sense, or none of the backends takes the problem.
        BackendNotFoundError: a backend is unknown, or not installed.
    """
    if not samples or min(samples) < 1:
        raise ProblemError(f"samples: expected numbers of at least 1, got {list(samples)}")
    if not seconds > 0:
        raise ProblemError(f"seconds: expected a number above 0, got {seconds}")
    place = the_device(device)
    found: list[Timing] = []
    for n in samples:
        progress(f"{n:,} samples")
        refusals: dict[str, str] = {}
        steps = {}
        for name in names or backends.available():
            steps[name] = step(replace(problem, samples=n), name, place)
            for earlier in found:
                if earlier.backend == name and earlier.samples < n and earlier.median > seconds:
                    refusals[name] = (
                        f"left out of more than {earlier.samples:,} samples, where a call took "
                        f"{earlier.median:.2g} s; give it more --seconds"
                    )
        found += times_of(n, steps, seconds, refusals)
    if all(each.refusal for each in found):
        raise ProblemError("backends: expected one that takes the problem; " + found[0].refusal)
    device = torch.cuda.get_device_name(place) if place.type == "cuda" else str(place)
    return Timings(problem, device, torch.get_num_threads(), tuple(found))


def the_device(name: str) -> torch.device:
    """The device of that name, if it can be used."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ProblemError(
            f"device: expected one that is here, such as cpu, got {name!r}"
        ) from error
    return device


def step(drawn: Drawn, backend: str, device: torch.device) -> Callable[[], None]:
    """One projection and its backward pass."""
    backends.get(backend)  # An unknown name raises now.
    scores, groups, targets = (each.to(device) for each in people(drawn))
    constraint = COMPARING[drawn.notion](drawn.tolerance, compare=drawn.comparison)
    scores.requires_grad_()
    direction = torch.linspace(-1, 1, drawn.samples, dtype=scores.dtype, device=device)

    def once() -> None:
        scores.grad = None
        x = project(scores, groups, constraint, targets, bounds=drawn.bounds, backend=backend)
        x.backward(direction.expand_as(x))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return once


def times_of(
    n: int, steps: dict[str, Callable[[], None]], seconds: float, refusals: dict[str, str]
) -> list[Timing]:
    """All of them in turn; what takes longer than ``seconds`` has one turn.

    Args:
        refusals: why some are left out; those that refuse the problem are added.
    """
    first: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    for name, once in steps.items():
        if name in refusals:
            continue
        try:
            first[name], times[name] = clocked(once), [clocked(once)]
        except UnsupportedProblemError as error:
            refusals[name] = str(error)
    quick = [name for name, (taken,) in times.items() if taken <= seconds]
    times |= {name: [] for name in quick}
    gc.collect()
    began, rounds = time.perf_counter(), 0
    while quick and (rounds < FEWEST or time.perf_counter() - began < seconds):
        for name in quick:
            times[name].append(clocked(steps[name]))
        rounds += 1
    nothing = (math.nan,) * 4
    return [
        Timing(n, name, *nothing, 0, refusals[name])
        if name in refusals
        else Timing(n, name, *spread(times[name]), first[name], len(times[name]))
        for name in steps
    ]


def spread(times: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return median, lower, upper


def clocked(once: Callable[[], None]) -> float:
    began = time.perf_counter()
    once()
    return time.perf_counter() - began
