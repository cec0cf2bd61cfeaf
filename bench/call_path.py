"""Which files does a call of the layer go through? ``python -m bench.call_path`` prints them.

One forward and backward pass of the plainest layer (two groups, demographic parity, bounds), after
a first call that compiles and remembers. Whoever reads along has to move from file to file as often
as the code does, and to keep as many open: both numbers are held by tests/test_architecture.py.
Compiled code is not seen, nor is torch: only Python functions of fairopt.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import fairopt
from fairopt import DemographicParity, FairnessLayer

PACKAGE = Path(fairopt.__file__).parent


@dataclass(frozen=True)
class Call:
    """A function of the package that was called."""

    file: str
    function: str


def calls_of_layer(n: int = 64) -> list[Call]:
    """The functions called by one forward and backward pass, in order."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(n) % 2
    scores = torch.rand(n, generator=generator) * 0.5 + 0.4 * groups
    scores.requires_grad_()
    layer = FairnessLayer(DemographicParity(0.05), bounds=(0, 1), backend="numba")
    for _ in range(3):
        layer(scores, groups).sum().backward()

    seen: list[Call] = []
    folder = f"{PACKAGE}/"

    def profiler(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(folder):
            seen.append(Call(path[len(folder) :], frame.f_code.co_name))

    threading.setprofile(profiler)  # autograd may run the backward in a thread of its own
    sys.setprofile(profiler)
    try:
        layer(scores, groups).sum().backward()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return seen


def files(calls: list[Call]) -> list[str]:
    """The different files, in the order in which they are first met."""
    return list(dict.fromkeys(call.file for call in calls))


def moves(calls: list[Call]) -> int:
    """How often one call is of another file than the one before."""
    return sum(a.file != b.file for a, b in pairwise(calls))


def main() -> None:
    calls = calls_of_layer()
    last = ""
    for call in calls:
        print(f"{call.file if call.file != last else '':40} {call.function}")
        last = call.file
    print(f"\n{len(calls)} calls in {len(files(calls))} files, {moves(calls)} moves between files")


if __name__ == "__main__":
    main()
