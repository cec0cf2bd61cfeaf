"""Processes of ``fairopt stream`` that are to be killed, without a start of Python for each.

This file run as a program imports everything, serves something, and then forks a child for each
line of JSON that it reads: ``arguments`` of ``fairopt stream``, and ``bomb``, the number of the
input or output operation before which the child kills itself, or null. It writes the child's number
at once, and, when the child is gone, how it ended.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Nursery:
    """Starts children; one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, arguments: list[str], bomb: int | None = None) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"arguments": arguments, "bomb": bomb}) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """How the child ended: its exit status, or minus the number of a signal."""
        return int(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@contextmanager
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    try:
        yield made
    finally:
        made.close()


def arm(number: int) -> None:
    """SIGKILL before, or in the midst of, the operation of this number."""
    from fairopt.cli.records import FileOutput

    count = itertools.count()

    def due() -> bool:
        return next(count) == number

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace, append = os.fsync, Path.replace, FileOutput._append

    def killing_fsync(handle: int) -> None:
        if due():
            kill()
        fsync(handle)

    def killing_replace(self: Path, target: Path) -> Path:
        if due():
            kill()
        return replace(self, target)

    def killing_append(self: FileOutput, data: bytes) -> None:
        if due():
            append(self, data[: len(data) // 2])  # half of it, and that in the midst of a line
            kill()
        append(self, data)

    os.fsync = killing_fsync
    Path.replace = killing_replace  # type: ignore[method-assign]
    FileOutput._append = killing_append  # type: ignore[method-assign]


def main() -> None:
    import torch

    from fairopt import DemographicParity, OnlineParity
    from fairopt.cli import main as fairopt
    from fairopt.cli import stream  # noqa: F401

    torch.set_num_threads(1)
    parity = OnlineParity(DemographicParity(0.05), bounds=(0, 1))
    parity.run(torch.rand(9), {"sex": torch.arange(9) % 2})
    parity.report()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            quiet = os.open(os.devnull, os.O_RDWR)
            for handle in (0, 1, 2):
                os.dup2(quiet, handle)
            if order["bomb"] is not None:
                arm(order["bomb"])
            os._exit(fairopt(["stream", *order["arguments"]]))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
