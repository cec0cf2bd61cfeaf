"""Is any figure worse than at another commit?

    python -m bench.before_after CHECKOUT [SCRIPT ...] [--rounds 5] [--seconds 2]

CHECKOUT is a working tree of the other commit. Each script runs there and here in turn, each time
in a fresh process with this interpreter and the checkout's own ``bench`` and ``fairopt``; a
figure's ratio (here over there) is the median of the ratios of the rounds. Only figures that are
measured in seconds or in samples per second are compared: a ratio above 1 means slower here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.harness import RESULTS, ROOT, Report, Spread

SCRIPTS = ("layer_speed", "backends", "streaming", "classes", "many_attributes")
SLOWER = {"s": 1.0, "ms": 1.0, "us": 1.0, "million samples per second": -1.0}

# The figures of a script, as JSON in the last line. Of the streaming benchmark only the speed: its
# other figures are results, which do not depend on the machine.
CODE = """
import dataclasses, importlib, json, sys
from bench import harness
kept = []
harness.Report.save = lambda self, folder: kept.append(self)
name, seconds = sys.argv.pop(1), sys.argv.pop(1)
sys.argv[1:] = ["--no-save", "--seconds", seconds]
script = importlib.import_module("bench." + name)
if name == "streaming":
    report = harness.Report(name, "")
    script.speed(report)
    kept.append(report)
else:
    script.main()
print(json.dumps([[row.what, row.value, row.unit] for row in kept[0].rows]))
"""


def figures(checkout: Path, script: str, seconds: float) -> dict[str, tuple[float, str]]:
    """The figures of one script in one checkout, by name: value and unit."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, script, str(seconds)],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed in {checkout}:\n{done.stderr}")
    return {
        what: (value, unit)
        for what, value, unit in json.loads(done.stdout.splitlines()[-1])
        if unit in SLOWER
    }


def compare(report: Report, there: Path, script: str, rounds: int, seconds: float) -> None:
    """Add the ratio of each figure of one script."""
    pairs: dict[str, list[float]] = {}
    units: dict[str, str] = {}
    for _ in range(rounds):
        before, after = (figures(each, script, seconds) for each in (there, ROOT))
        for what, (value, unit) in after.items():
            if what in before:
                ratio = value / before[what][0]
                pairs.setdefault(what, []).append(ratio if SLOWER[unit] > 0 else 1 / ratio)
                units[what] = unit
    for what, ratios in pairs.items():
        report.add(f"{script}: {what}", Spread.of(ratios), at_most=1.03, detail=units[what])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a working tree of the commit to compare with")
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), help="which benchmarks")
    parser.add_argument("--rounds", type=int, default=5, help="times that each script runs there")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each comparison")
    parser.add_argument("--no-save", action="store_true", help="print only, keep bench/results/")
    options = parser.parse_args()
    report = Report("before_after", (__doc__ or "").strip())
    for script in options.scripts:
        compare(report, options.checkout.resolve(), script, options.rounds, options.seconds)
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
