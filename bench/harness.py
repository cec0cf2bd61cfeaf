"""How everything here is measured, and how the figures are written down.

Two things are compared by running them in turn, A B A B ..., in one process after a warm-up: a
machine that slows down or is shared slows both. Each ratio is the median of the ratios within the
rounds, given with its quartiles.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.lower * factor, self.upper * factor, self.count)


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    warmup: int = 3,
    most_rounds: int = 2000,
    fewest_rounds: int = 5,
    calls: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each function, one entry per round; all functions run once in each round.

    calls: how often a function is called within its turn (1 by default), for one so short that the
    clock would show. The garbage collector runs before, not during.
    """
    calls = calls or {}
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for done in range(most_rounds):
            if done >= fewest_rounds and time.perf_counter() > end:
                break
            for name, function in functions.items():
                repeat = calls.get(name, 1)
                began = time.perf_counter()
                for _ in range(repeat):
                    function()
                times[name].append((time.perf_counter() - began) / repeat)
    finally:
        if enabled:
            gc.enable()
    return times


def ratio(times: Mapping[str, Sequence[float]], numerator: str, denominator: str) -> Spread:
    """numerator / denominator, round by round."""
    pairs = zip(times[numerator], times[denominator], strict=True)
    return Spread.of([a / b for a, b in pairs])


# ---------------------------------------------------------------- where it was measured


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fairopt")
    except OSError:  # no git
        return "unknown"
    return (commit or "unknown") + (" with changes" if changed else "")


def machine(packages: Sequence[str]) -> dict[str, object]:
    """Processor, threads, versions and date: what a figure is worth nothing without."""
    import torch

    versions = {}
    for package in ("torch", "numpy", "numba", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": cores,
        "torch threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "fairopt commit": _commit(),
    }


@dataclass(frozen=True)
class Load:
    """Processor seconds of the whole machine and of this process with its children, so far."""

    clock: float
    machine: float | None  # None where the system does not tell
    own: float

    @classmethod
    def now(cls) -> Load:
        machine = None
        stat = Path("/proc/stat")
        if stat.exists():
            ticks = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
            busy = sum(ticks) - ticks[3] - ticks[4]  # neither idle nor waiting for a disk
            machine = busy / os.sysconf("SC_CLK_TCK")
        return cls(time.perf_counter(), machine, sum(os.times()[:4]))

    def others(self) -> float | None:
        """Cores that others kept busy since then, on average; above about 0.2 figures mislead."""
        now = Load.now()
        if self.machine is None or now.machine is None:
            return None
        busy = (now.machine - self.machine) - (now.own - self.own)
        return max(0.0, busy / (now.clock - self.clock))


# ---------------------------------------------------------------- what is written down


@dataclass(frozen=True)
class Row:
    """One figure, and the target it has to meet if there is one."""

    what: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    lower: float | None = None
    upper: float | None = None
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.at_most is None and self.at_least is None:
            return ""
        met = (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )
        return "met" if met else "NOT MET"

    @property
    def target(self) -> str:
        if self.at_most is not None:
            return f"≤ {_number(self.at_most)}"
        return f"≥ {_number(self.at_least)}" if self.at_least is not None else ""


@dataclass
class Report:
    """The figures of one script: printed as they come, written as JSON and as a table by `save`."""

    name: str
    question: str
    packages: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)
    began: Load = field(default_factory=Load.now)

    def add(
        self,
        what: str,
        value: Spread | float,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        detail: str = "",
    ) -> None:
        spread = value if isinstance(value, Spread) else None
        row = Row(
            what,
            spread.median if spread else float(value),  # type: ignore[arg-type]
            unit,
            at_most,
            at_least,
            spread.lower if spread and spread.count > 1 else None,
            spread.upper if spread and spread.count > 1 else None,
            detail,
        )
        self.rows.append(row)
        print(" | ".join(cell for cell in _cells(row) if cell), flush=True)

    def save(self, folder: Path | None) -> None:
        """Write NAME.json and NAME.md; without a folder only say whether the machine was quiet."""
        where = machine(self.packages) | {"cores busy with other work": self.disturbance()}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "name": self.name,
            "question": self.question,
            "machine": where,
            "figures": [asdict(row) | {"verdict": row.verdict} for row in self.rows],
        }
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (folder / f"{self.name}.json").write_text(text + "\n", "utf-8")
        (folder / f"{self.name}.md").write_text(self.table(where), "utf-8")

    def disturbance(self) -> float | None:
        """How many cores other processes took while this was measured; warns if it matters."""
        others = self.began.others()
        if others is not None and others > 0.2:
            print(f"warning: other processes kept {others:.1f} cores busy; measure again alone")
        return None if others is None else round(others, 2)

    def table(self, where: Mapping[str, object]) -> str:
        head = ["what", "figure", "quartiles", "target", "verdict", "how"]
        rows = [head, ["---"] * len(head), *(_cells(row) for row in self.rows)]
        versions = where["versions"]
        assert isinstance(versions, dict)
        listed = ", ".join(f"{package} {version}" for package, version in versions.items())
        return "\n".join(
            [
                f"# {self.name}",
                "",
                self.question,
                "",
                *("| " + " | ".join(row) + " |" for row in rows),
                "",
                f"{where['date']}; {where['cpu']}, {where['cores']} cores, "
                f"{where['torch threads']} torch threads, {where['system']}, "
                f"{where['cores busy with other work']} cores busy with other work; "
                f"Python {where['python']}, {listed}; fairopt at {where['fairopt commit']}.",
                "",
            ]
        )


def _number(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 9)}f}" if digits < 9 else f"{value:.1e}"


def _cells(row: Row) -> list[str]:
    quartiles = ""
    if row.lower is not None and row.upper is not None:
        quartiles = f"{_number(row.lower)} to {_number(row.upper)}"
    figure = f"{_number(row.value)} {row.unit}".strip()
    return [row.what, figure, quartiles, row.target, row.verdict, row.detail]


def arguments(description: str) -> argparse.Namespace:
    """The options that all scripts share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each comparison")
    parser.add_argument("--no-save", action="store_true", help="print only, keep bench/results/")
    return parser.parse_args()


def fresh(code: str, *extra: str, timeout: float = 600) -> dict[str, float]:
    """Run code in a fresh Python; what it prints last is a JSON object of figures."""
    done = subprocess.run(
        [sys.executable, "-c", code, *extra],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError(f"a measuring process failed:\n{done.stderr}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer
