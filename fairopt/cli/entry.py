"""The program itself: which command was meant, and what an error of ours looks like."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from fairopt.cli import bench, compare, demo, doctor, stream
from fairopt.cli.arguments import INTERRUPTED, USAGE_ERROR
from fairopt.errors import FairoptError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``fairopt``; those of the process if ``None``.

    Returns:
        The exit status: 0, 1 where a check that the command makes fails, 2 for unusable input.
    """
    parsed = parser_of_commands().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except FairoptError as error:
        print(f"fairopt: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("\nfairopt: interrupted", file=sys.stderr)
        return INTERRUPTED


def parser_of_commands() -> argparse.ArgumentParser:
    from fairopt import __version__

    parser = argparse.ArgumentParser(
        prog="fairopt",
        description="Fairness layers for PyTorch: predictions moved as little as possible so that "
        "a chosen notion of parity holds.",
    )
    version = f"fairopt {__version__}"
    parser.add_argument(
        "--version", action="version", version=version, help="print the version and stop"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (demo, doctor, compare, bench, stream):
        module.add(commands)
    return parser
