"""``fairopt bench``: how long each backend takes on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fairopt.cli.arguments import (
    add_drawing,
    at_least,
    drawing,
    file_errors,
    finite,
    names,
    write_json,
)

GROUPS = 2


def add(commands: Any) -> None:
    """Put the arguments among those of ``fairopt``."""
    bench = commands.add_parser(
        "bench",
        help="time the backends on this machine, side by side",
        description="Time a projection, forward and backward, with each backend in turn, for "
        "parity problems drawn at random.",
    )
    # fmt: off
    option = bench.add_argument
    option("--samples", type=counts, default="100,1000,10000", metavar="COUNT,...",
        help="in a problem; a line of the table for each; default: 100,1000,10000")
    option("--backends", type=names, metavar="NAME,...",
        help="by default all that are installed; `fairopt doctor` lists them")
    add_drawing(bench, GROUPS)
    option("--device", default="cpu", metavar="NAME", help="cuda, cuda:1, ...; default: cpu")
    option("--seconds", type=finite, default=1.0, metavar="NUMBER",
        help="for each line; a backend that takes longer has one turn, and none in larger "
             "problems; default: 1")
    option("--json", type=Path, metavar="FILE", help="for all figures, too")
    # fmt: on
    bench.set_defaults(command=run)


def counts(text: str) -> list[int]:
    """Numbers with commas between them."""
    return [at_least(1)(part) for part in names(text)]


def run(arguments: argparse.Namespace) -> int:
    from fairopt.cli.drawing import Drawn
    from fairopt.cli.timing import time_backends

    if arguments.json is not None:
        with file_errors():  # What would fail at the end fails at the start.
            arguments.json.touch()
    found = time_backends(
        Drawn(**{"groups": GROUPS} | drawing(arguments)),
        arguments.samples,
        arguments.backends,
        device=arguments.device,
        seconds=arguments.seconds,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(found)
    if arguments.json is not None:
        write_json(found.to_dict(), arguments.json)
    return 0
