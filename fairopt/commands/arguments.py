"""What the arguments of several commands have in common."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["INTERRUPTED", "USAGE_ERROR", "at_least", "bound", "finite", "names", "write_json"]

# Exit statuses.
USAGE_ERROR = 2
INTERRUPTED = 130


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
