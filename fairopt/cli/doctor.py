"""``fairopt doctor``: which backends are installed, and whether they work."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    """Put the arguments among those of ``fairopt``."""
    doctor = commands.add_parser(
        "doctor",
        help="say which backends are installed, what each can do, and how to get the others",
        description="Check this installation: versions, threads, devices, caches, and one small "
        "solve with every installed backend.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of text")
    doctor.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    from fairopt.cli.diagnosis import diagnose

    diagnosis = diagnose()
    print(json.dumps(diagnosis.as_dict(), indent=2) if arguments.json else diagnosis)
    return 0 if diagnosis.healthy else 1
