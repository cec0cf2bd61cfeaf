"""Files of a stream: a lock, marks of how far they were read, and the lines of an input."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fairopt.errors import ProblemError

BLOCK = 1 << 18
LONGEST_LINE = 1 << 24


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, beside whatever it protects; it falls when the process ends, however.

    Raises:
        ProblemError: another process holds it.
        OSError: the file cannot be opened.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not lock(handle):
            holder = os.read(handle, 32).decode("ascii", "replace").strip()
            raise ProblemError(
                f"{path}: expected a state that no other process uses, got one that process "
                f"{holder or '(unknown)'} holds; wait for it, or take another state"
            )
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


def lock(handle: int) -> bool:
    """Whether the lock on an open file could be had; the system takes it back at its end."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Mark:
    """How far a file was read: the number of bytes and lines, and the CRC-32 of the bytes."""

    length: int = 0
    lines: int = 0
    crc: int = 0

    def after(self, data: bytes, lines: int = 0) -> Mark:
        """Behind these bytes too."""
        return Mark(self.length + len(data), self.lines + lines, zlib.crc32(data, self.crc))


NOTHING = Mark()


class Readable(Protocol):
    """A binary file that can hand out what is there without waiting for more."""

    def read1(self, size: int, /) -> bytes: ...

    def seek(self, offset: int, /) -> int: ...


def compare(file: Readable, mark: Mark) -> tuple[bool, bytes, bytes]:
    """Read what a mark covers: whether it is the same, its first line and its last byte."""
    left, crc, first, last = mark.length, 0, b"", b""
    while left:
        data = file.read1(min(BLOCK, left))
        if not data:
            return False, first, last
        if not first.endswith(b"\n") and len(first) <= LONGEST_LINE:
            piece, end, _ = data.partition(b"\n")
            first += piece + end
        crc, left, last = zlib.crc32(data, crc), left - len(data), data[-1:]
    return crc == mark.crc, first, last


class Source:
    """The lines of an input.

    Args:
        file: where they come from.
        path: its name, if it is a file that can be read once more; ``None`` for a pipe or a
            terminal, whose lines are handed out as they come.
        wait: entered while waiting for input.

    Attributes:
        mark: how far lines were consumed.
        ended: whether all that there is was read.
    """

    def __init__(
        self,
        file: Readable,
        path: Path | None = None,
        wait: AbstractContextManager[object] | None = None,
    ) -> None:
        self.path = path
        self.mark = Mark()
        self.ended = False
        self._file = file
        self._wait = nullcontext() if wait is None else wait
        self._lines: list[bytes] = []
        self._rest = b""
        self._cut = False
        self._seen = 0  # of the lines at hand, how many were handed out before

    def skip(self, mark: Mark) -> bytes | None:
        """Go on behind a mark: the first line of what is skipped, or ``None`` if that is other."""
        with self._wait:
            same, first, last = compare(self._file, mark)
        if not same:
            return None
        self.mark = mark
        self._cut = last not in (b"", b"\n")
        return first

    def rewind(self) -> None:
        """Begin at the beginning, after ``skip`` found something else there."""
        self._file.seek(0)

    def fill(self, most: int) -> None:
        """Fetch so many lines, or all that exist, or, from a pipe, at least one new line."""
        if self.path is None and len(self._lines) > self._seen:
            return
        while len(self._lines) < most and not self.ended:
            with self._wait:
                data = self._file.read1(BLOCK)
            if not data:
                self.ended = True
                if self._rest:
                    self._lines.append(self._rest)
                    self._rest = b""
                return
            if self._cut:
                data = self._after_the_cut(data)
            *whole, self._rest = (self._rest + data).split(b"\n")
            self._lines += [line + b"\n" for line in whole]
            if len(self._rest) > LONGEST_LINE:
                raise ProblemError(
                    f"line {self.mark.lines + len(self._lines) + 1}: expected at most "
                    f"{LONGEST_LINE} bytes on a line, got more"
                )
            if whole and self.path is None:
                return

    def _after_the_cut(self, data: bytes) -> bytes:
        """What follows a last line without an end, which was counted as it was."""
        for end in (b"\n", b"\r\n"):
            if data.startswith(end):
                self._cut = False
                self.mark = self.mark.after(end)
                return data[len(end) :]
        raise ProblemError(
            f"line {self.mark.lines}: expected its end, for it was counted when it was the last "
            f"line, got more of it: {data[:40]!r}; write whole lines only"
        )

    def lines(self, most: int) -> list[bytes]:
        """The next lines, with their ends; they stay at hand."""
        self._seen = max(self._seen, min(most, len(self._lines)))
        return self._lines[:most]

    def all_at_hand(self, most: int) -> bool:
        """Whether nothing comes behind the next so many lines."""
        return self.ended and len(self._lines) <= most

    def consume(self, count: int) -> None:
        """Count the next lines and let go of them."""
        self.mark = self.mark.after(b"".join(self._lines[:count]), count)
        self._seen = max(0, self._seen - count)
        del self._lines[:count]
