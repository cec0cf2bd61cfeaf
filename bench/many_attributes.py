"""What do 20 attributes at once cost: hundreds of dependent rows, thousands of cells?

float32 probabilities, bounds (0, 1), demographic parity of every attribute, backend "numba",
forward and backward. The attributes have from 2 to 20 values, 214 in all, and are correlated
through 8 latent profiles, so that the samples occupy 4,000 combinations (cells) and not all 6e18.
Every layer sees two batches in turn; nothing is remembered of either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.harness import RESULTS, Report, Spread, arguments, interleaved
from fairopt import DemographicParity, FairnessLayer, audit, formulate
from fairopt.backends import Numba
from fairopt.formulation import template
from fairopt.programs.rows.partitioned import PartitionedRows

SIZES = (2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 19, 20, 20)


@dataclass(frozen=True)
class Many:
    """Probabilities, many attributes, and the gradient that the loss will send back."""

    scores: Tensor  # (n,) float32, a leaf that requires grad
    groups: dict[str, Tensor]  # (n,) int64 each
    gradient: Tensor  # (n,)


def many(
    n: int,
    *,
    cells: int | None = 4_000,
    sizes: tuple[int, ...] = SIZES,
    profiles: int = 8,
    seed: int = 0,
) -> Many:
    """n probabilities whose means differ between the values of every attribute.

    A combination of values is drawn by profile: each profile prefers two values of an attribute in
    three cases of four. There are at most ``cells`` combinations, with frequencies like 1/rank^0.5;
    without ``cells`` each sample draws its own.
    """
    generator = torch.Generator().manual_seed(seed)
    count = n if cells is None else cells
    profile = torch.randint(0, profiles, (count,), generator=generator)
    codes = []
    for size in sizes:
        liked = torch.randint(0, size, (profiles, 2), generator=generator)
        pick = torch.randint(0, 2, (count,), generator=generator)
        any_ = torch.randint(0, size, (count,), generator=generator)
        prefers = torch.rand(count, generator=generator) < 0.75
        codes.append(torch.where(prefers, liked[profile, pick], any_))
    combination = torch.stack(codes)  # (attributes, count)
    which = torch.arange(n)
    if cells is not None:
        share = torch.arange(1, cells + 1, dtype=torch.float64).rsqrt()
        which = torch.multinomial(share, n, replacement=True, generator=generator)
    taken = combination[:, which]
    logit = 1.5 * torch.randn(n, generator=generator)
    for size, code in zip(sizes, taken, strict=True):
        effect = 0.3 * torch.randn(size, generator=generator)
        logit += effect[code]
    gradient = torch.randn(n, generator=generator)
    groups = {f"a{i}": code.contiguous() for i, code in enumerate(taken)}
    return Many(logit.sigmoid().requires_grad_(), groups, gradient)


def layer(compare: Literal["overall", "pairwise"], tolerance: float) -> FairnessLayer:
    parity = DemographicParity(tolerance, compare=compare)
    return FairnessLayer(parity, bounds=(0, 1), backend="numba")


def step(made: FairnessLayer, problem: Many) -> None:
    """Forward, backward, and the gradient dropped again."""
    made(problem.scores, problem.groups).backward(problem.gradient)
    problem.scores.grad = None


def in_turn(made: FairnessLayer, problems: list[Many]) -> Callable[[], None]:
    """A step with the next of several batches at each call."""
    calls = 0

    def next_step() -> None:
        nonlocal calls
        step(made, problems[calls % len(problems)])
        calls += 1

    return next_step


def describe(made: FairnessLayer, problem: Many) -> str:
    """How large the problem was, and that the rows hold, recomputed by ``audit``."""
    with torch.no_grad():
        fair = made(problem.scores, problem.groups)
    solution = made.last
    assert solution is not None
    rows = solution.problem.rows
    assert isinstance(rows, PartitionedRows)
    worst = max(row.excess for row in audit(fair, problem.groups, made.constraints).rows)
    assert worst <= 1e-6
    return (
        f"{rows.shape[1]:,} rows, {int((solution.row_dual != 0).sum())} with a multiplier, "
        f"{rows.cells:,} cells, {solution.iterations[0]} passes; recomputed, a row exceeds its "
        f"tolerance by {max(worst, 0):.0e} at most"
    )


def headline(
    report: Report, n: int, cells: int | None, seconds: float, target: float | None
) -> None:
    """Every combination of rows and tolerance on one kind of samples."""
    problems = [many(n, cells=cells, seed=seed) for seed in (0, 1)]
    kinds: list[tuple[Literal["overall", "pairwise"], float]] = [
        ("overall", 0.02), ("overall", 0.0), ("pairwise", 0.02), ("pairwise", 0.0),
    ]  # fmt: skip
    made = {
        f"{compare}, tolerance {tolerance:g}": layer(compare, tolerance)
        for compare, tolerance in kinds
    }
    times = interleaved(
        {name: in_turn(one, problems) for name, one in made.items()}, seconds=4 * seconds
    )
    occupied = "each sample a cell" if cells is None else f"{cells:,} cells"
    for name, one in made.items():
        report.add(
            f"n = {n:,}, {occupied}, {name}",
            Spread.of(times[name]).scaled(1e3),
            "ms",
            at_most=target if name.startswith("overall") else None,
            detail=describe(one, problems[0]),
        )


def breakdown(report: Report, cells: int | None, seconds: float) -> None:
    """Where the time goes, with tolerance 0.02 and each group against everyone."""
    problem = many(100_000, cells=cells)
    parity, backend = DemographicParity(0.02, compare="overall"), Numba()
    parts: dict[str, list[float]] = {"formulate": [], "solve": [], "backward": []}
    gradient = problem.gradient.unsqueeze(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(parts["solve"]) < 8:
        began = time.perf_counter()
        written = formulate(parity, problem.scores, problem.groups, bounds=(0, 1)).detach()
        formulated = time.perf_counter()
        solution = backend.solve(written)
        solved = time.perf_counter()
        backend.vjp(written, solution, gradient)
        parts["formulate"].append(formulated - began)
        parts["solve"].append(solved - formulated)
        parts["backward"].append(time.perf_counter() - solved)
    occupied = "each sample a cell" if cells is None else f"{cells:,} cells"
    for name, times in parts.items():
        report.add(f"of that, {name}, {occupied}", Spread.of(times[3:]).scaled(1e3), "ms")


def reading(report: Report) -> None:
    """A lower bound: to read the groups once."""
    problem = many(100_000)
    codes = list(problem.groups.values())
    times = interleaved({"read": lambda: [torch.aminmax(code) for code in codes]}, seconds=1.0)
    report.add(
        "smallest and largest code of each attribute, n = 100,000",
        Spread.of(times["read"]).scaled(1e3),
        "ms",
        detail="what no layer can do without: to read 16 MB of groups once",
    )


def first_call(report: Report) -> None:
    """With groups whose codes were not seen before: the rows are traced once."""
    problem = many(100_000)
    made = layer("overall", 0.02)
    step(made, problem)
    times = []
    for _ in range(5):
        template.row_template.cache_clear()
        template.partition.cache_clear()
        began = time.perf_counter()
        step(made, problem)
        times.append(time.perf_counter() - began)
    report.add("first call with new codes, overall", Spread.of(times).scaled(1e3), "ms")


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("many_attributes", (__doc__ or "").strip())
    headline(report, 100_000, 4_000, options.seconds, target=50)
    breakdown(report, 4_000, options.seconds)
    headline(report, 100_000, None, options.seconds, target=None)
    breakdown(report, None, options.seconds)
    headline(report, 1_000, 500, options.seconds, target=None)
    headline(report, 1_000_000, 4_000, options.seconds, target=None)
    first_call(report)
    reading(report)
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
