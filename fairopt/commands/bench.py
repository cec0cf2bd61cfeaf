"""``fairopt bench``: how long each backend takes on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fairopt.commands.arguments import at_least, bound, finite, names, write_json
from fairopt.commands.compare import NOTIONS

__all__ = ["add"]


def add(commands: Any) -> None:
    """Put the arguments among those of ``fairopt``."""
    bench = commands.add_parser(
        "bench",
        help="time the backends on this machine, side by side",
        description="Time a projection, forward and backward, with each backend in turn, for "
        "parity problems drawn at random.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.add_argument(
        "--samples", type=counts, default="100,1000,10000", metavar="COUNT,...",
        help="in a problem; a line of the table for each",
    )  # fmt: skip
    bench.add_argument(
        "--backends", type=names, metavar="NAME,...", default=argparse.SUPPRESS,
        help="by default all that are installed; `fairopt doctor` lists them",
    )  # fmt: skip
    bench.add_argument("--groups", type=at_least(1), default=2, metavar="COUNT", help="of people")
    bench.add_argument("--notion", choices=NOTIONS, default="demographic-parity", help="of parity")
    bench.add_argument(
        "--comparison", choices=("pairwise", "overall"), default="pairwise",
        help="each pair of groups, or each group with all",
    )  # fmt: skip
    bench.add_argument("--tolerance", type=finite, default=0.05, metavar="GAP", help="of the rows")
    bench.add_argument("--batch", type=at_least(1), default=1, metavar="COUNT", help="of problems")
    bench.add_argument(
        "--bounds", type=bound, nargs=2, default=[0.0, 1.0], metavar=("LOWER", "UPPER"),
        help="numbers, or none",
    )  # fmt: skip
    bench.add_argument(
        "--dtype", choices=("float64", "float32"), default="float64", help="of the scores"
    )
    bench.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, ...")
    bench.add_argument("--seed", type=at_least(0), default=0, help="of scores and groups")
    bench.add_argument(
        "--seconds", type=finite, default=1.0, metavar="NUMBER",
        help="for each line; a backend that takes longer has one turn",
    )  # fmt: skip
    bench.add_argument(
        "--json", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="for all figures, too"
    )
    bench.set_defaults(command=_bench, backends=None, json=None)


def counts(text: str) -> list[int]:
    """Numbers with commas between them."""
    return [at_least(1)(part) for part in names(text)]


def _bench(arguments: argparse.Namespace) -> int:
    from fairopt.compare import Drawn
    from fairopt.timing import time_backends

    if arguments.json is not None:
        arguments.json.touch()  # what would fail at the end fails at the start
    drawn = Drawn(
        groups=arguments.groups,
        notion=arguments.notion,
        comparison=arguments.comparison,
        tolerance=arguments.tolerance,
        batch=arguments.batch,
        bounds=tuple(arguments.bounds),
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    found = time_backends(
        drawn,
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
