"""Arguments, and types of arguments, that several commands share."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairopt.errors import ProblemError
from fairopt.notions.names import COMPARING

# Exit statuses.
USAGE_ERROR = 2
INTERRUPTED = 130

DRAWING = ("groups", "notion", "comparison", "tolerance", "batch", "bounds", "dtype", "seed")


@contextmanager
def file_errors(failed: str = "cannot open", remedy: str = "name another file") -> Iterator[None]:
    """Raise a ``ProblemError`` that names the file in place of an ``OSError``."""
    try:
        yield
    except OSError as error:
        raise ProblemError(f"{failed} {error.filename}: {error.strerror}; {remedy}") from error


def write_json(figures: dict[str, Any], path: Path) -> None:
    """Write figures to a file."""
    path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def at_least(smallest: int) -> Callable[[str], int]:
    """The type of an argument: a whole number of at least this."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {smallest}, not {text!r}"
            )
        return value

    return parse


def finite(text: str) -> float:
    """The type of an argument: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number such as 0.05, not {text!r}")
    return value


def bound(text: str) -> float | None:
    """The type of an argument: a finite number, or none."""
    return None if text.lower() == "none" else finite(text)


def names(text: str) -> list[str]:
    """The type of an argument: names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def add_drawing(parser: Any, groups: int = 3) -> None:
    """The arguments of a parity problem to draw, but for its size; ``drawing`` reads them."""
    # fmt: off
    option = parser.add_argument
    option("--groups", type=at_least(1), metavar="COUNT", help=f"default: {groups}")
    option("--notion", choices=COMPARING, help="of parity; default: demographic-parity")
    option("--comparison", choices=("pairwise", "overall"),
        help="each pair of groups, or each group with all; default: pairwise")
    option("--tolerance", type=finite, metavar="GAP", help="default: 0.05")
    option("--batch", type=at_least(1), metavar="COUNT", help="problems; default: 1")
    option("--bounds", type=bound, nargs=2, metavar=("LOWER", "UPPER"),
        help="numbers, or none; default: 0 1")
    option("--dtype", choices=("float64", "float32"), help="default: float64")
    option("--seed", type=at_least(0), help="default: 0")
    # fmt: on


def drawing(arguments: argparse.Namespace, *others: str) -> dict[str, Any]:
    """Which of these, and of others, were given; the rest has its default in ``Drawn``."""
    chosen = {name: getattr(arguments, name) for name in (*others, *DRAWING)}
    return {name: value for name, value in chosen.items() if value is not None}
