"""``fairopt demo``: fair models on the bundled census data, a table and two plots."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from fairopt.cli.arguments import at_least, file_errors, finite, names, write_json
from fairopt.notions.names import NOTIONS


def add(commands: Any) -> None:
    """Put the arguments among those of ``fairopt``."""
    demo = commands.add_parser(
        "demo",
        help="train fair models on bundled census data and show what the layer does",
        description="Train a small network on the UCI Adult data three ways - unconstrained, with "
        "post-hoc projection, with a fairness layer - and compare them. About one minute on two "
        "cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # fmt: off
    option = demo.add_argument
    option("--tolerance", type=finite, default=0.05, metavar="GAP",
        help="the largest gap allowed between two groups")
    option("--notions", type=names, default="demographic-parity", metavar="NAME,...",
        help=f"of parity, all at once: {', '.join(NOTIONS)}")
    option("--attributes", type=names, default="sex,race", metavar="NAME,...",
        help="on which they hold: sex, race")
    option("--backend", default="numba", metavar="NAME",
        help="solver of the projections; `fairopt doctor` lists them")
    option("--epochs", type=at_least(1), default=12, help="passes over the training rows per model")
    option("--batch-size", type=at_least(2), default=1024, metavar="ROWS",
        help="rows per training batch")
    option("--seed", type=at_least(0), default=0, help="of weights and batches")
    option("--limit", type=at_least(200), metavar="ROWS", default=argparse.SUPPRESS,
        help="use only so many training and test rows, drawn in proportion, for a quick look")
    option("--repeats", type=at_least(1), default=3, metavar="COUNT",
        help="networks per point of the tolerance plot")
    option("--threads", type=at_least(1), default=1, metavar="COUNT",
        help="threads of torch; more hardly pay for so small a network")
    option("--streaming", action="store_true",
        help="also serve the test rows as a stream, by the paper's online rule and by the "
             "pooled one, and plot the gap of everything served so far; a few seconds more")
    option("--output", type=Path, default=Path("fairopt-demo"), metavar="FOLDER",
        help="for the plots")
    option("--json", type=Path, metavar="FILE", default=argparse.SUPPRESS,
        help="also write all figures to this file")
    # fmt: on
    demo.set_defaults(command=run, limit=None, json=None)


def run(arguments: argparse.Namespace) -> int:
    from fairopt import demo

    # What would fail at the end should fail at the start.
    folder: Path = arguments.output
    with file_errors("cannot write to", "choose another place with --output or --json"):
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.touch()
    chosen = {each.name: getattr(arguments, each.name) for each in fields(demo.Settings)}
    settings = demo.Settings(**chosen)
    report = demo.run_demo(settings, Progress(sys.stderr))
    print(report)
    print()
    try:
        training, tolerance = demo.plot(report, folder)
        stream = None
        if report.streaming is not None:
            stream = demo.plot_streaming(report.streaming, folder / "streaming.png")
    except ImportError as error:
        plots: list[str] = []
        print(f"No plots: {error.name} is not installed. Get it with:  pip install 'fairopt[demo]'")
    else:
        plots = [str(training), str(tolerance)]
        print(f"Plots: {training}   (gap and log loss over epochs)")
        print(f"       {tolerance}   (accuracy and log loss against tolerance)")
        if stream is not None:
            plots.append(str(stream))
            print(f"       {stream}   (gap of everything served so far)")
    if arguments.json is not None:
        write_json(report.as_dict() | {"plots": plots}, arguments.json)
        print(f"Figures: {arguments.json}")
    print(f"All of it took {report.seconds:.0f} seconds.")
    return 0 if report.within_tolerance else 1


class Progress:
    """One line that is rewritten on a terminal; a plain line now and then elsewhere."""

    SECONDS_BETWEEN_PLAIN_LINES = 5.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._last = time.monotonic()

    def __call__(self, line: str, done: bool) -> None:
        if self._is_terminal:
            self._stream.write(f"\r\x1b[K{line}" + ("\n" if done else ""))
        else:
            now = time.monotonic()
            if not done and now - self._last < self.SECONDS_BETWEEN_PLAIN_LINES:
                return
            self._last = now
            self._stream.write(f"{line}\n")
        self._stream.flush()
