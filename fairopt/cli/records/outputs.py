"""Where answers go: a file that in the end holds each exactly once, or a pipe.

The state that is saved before a chunk's answers are written holds them too, as ``Written.pending``,
and how long the file was before them. So whoever goes on after a kill knows what is missing.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from fairopt.cli.records.files import BLOCK, NOTHING, Mark, compare
from fairopt.errors import ProblemError
from fairopt.online.persistence import sync_folder


@dataclass(frozen=True)
class Written:
    """The content of an output.

    Attributes:
        header: what comes before its first answer, without the end of line; ``b""`` for nothing.
        mark: how much of the file was written before ``pending``, with the header.
        pending: the answers of the last chunk, written or not; ``b""`` once they surely are.
        in_file: whether they went to a file.
    """

    header: bytes = b""
    mark: Mark = NOTHING
    pending: bytes = b""
    in_file: bool = False


class Output:
    """Takes answers. This one takes none: what an output before it held stays as it is.

    Attributes:
        written: its content.
    """

    def __init__(self) -> None:
        self.written = Written()

    def resume(self, written: Written) -> bytes:
        """Go on where the run before ended, and write those of its answers that are known missing.

        Returns:
            Answers that have to be promised and written once more.
        """
        self.written = written
        return b""

    def begin(self, header: bytes) -> None:
        """Answers with this header follow; raises ``ProblemError`` if others came before."""

    def promise(self, answers: bytes) -> Written:
        """The content that the state must record before these answers are written."""
        return self.written

    def write(self, answers: bytes) -> None:
        """Write the promised answers."""

    def settle(self) -> None:
        """Everything written is where it stays; nothing is pending."""


class Writable(Protocol):
    """A binary file; it may take less than all it is given, and says how much."""

    def write(self, data: memoryview, /) -> int: ...


class PipeOutput(Output):
    """Standard output, or whatever takes bytes and gives none back.

    After a kill nobody knows how much of the last chunk was read, so all of it comes again.

    Args:
        file: without a buffer, so that nothing is left in one when a write is given up.
        wait: entered while waiting for who reads.
    """

    def __init__(self, file: Writable, wait: AbstractContextManager[object] | None = None) -> None:
        super().__init__()
        self._file = file
        self._wait = nullcontext() if wait is None else wait
        self._headed = False

    def resume(self, written: Written) -> bytes:
        self.written = replace(written, pending=b"", in_file=False)
        return written.pending

    def begin(self, header: bytes) -> None:
        if self._headed:
            check_header("standard output", header, self.written.header)
        self.written = replace(self.written, header=header)

    def promise(self, answers: bytes) -> Written:
        return replace(self.written, pending=answers)

    def write(self, answers: bytes) -> None:
        header = self.written.header
        head = header + b"\n" if header and not self._headed else b""
        left = memoryview(head + answers)
        while left:
            with self._wait:
                written = self._file.write(left)
            left = left[written:]  # a signal can make it less than all
        self._headed = True


class FileOutput(Output):
    """A file, in which each answer stands once, whenever the process was killed."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        super().__init__()
        self._path = path
        self._stack = stack

    def resume(self, written: Written) -> bytes:
        self._file = self._stack.enter_context(self._path.open("ab+"))
        size = self._file.seek(0, os.SEEK_END)
        if size == 0:
            sync_folder(self._path.parent)  # the file itself may be new
        if size == 0 and not (written.in_file and written.mark.length == 0):
            # Another file than before, or the first one.
            self.written = Written(written.header, in_file=True)
            return written.pending
        self._file.seek(0)
        same, _, _ = compare(self._file, written.mark)
        expected = self._with_header(written, written.pending)
        there = self._file.read(len(expected) + 1) if same else b""
        known = same and expected.startswith(there) and (written.in_file or not there)
        if not known:
            raise ProblemError(
                f"{self._path}: expected an empty file, or the answers that were written before, "
                f"{written.mark.length} bytes of them, got {size} other bytes; move it away, or "
                "name another output"
            )
        self.written = replace(written, pending=b"", in_file=True)
        if not written.in_file:
            return written.pending
        self._append(expected[len(there) :])
        self.written = replace(self.written, mark=written.mark.after(expected))
        return b""

    def begin(self, header: bytes) -> None:
        if self.written.mark.length:
            check_header(str(self._path), header, self.written.header)
        self.written = replace(self.written, header=header)

    def promise(self, answers: bytes) -> Written:
        self.settle()  # what the state is about to forget must be on the disk
        return replace(self.written, pending=answers)

    def write(self, answers: bytes) -> None:
        whole = self._with_header(self.written, answers)
        self._append(whole)
        self.written = replace(self.written, mark=self.written.mark.after(whole))

    def settle(self) -> None:
        os.fsync(self._file.fileno())

    def _append(self, data: bytes) -> None:
        for first in range(0, len(data), BLOCK):
            self._file.write(data[first : first + BLOCK])
        self._file.flush()

    @staticmethod
    def _with_header(written: Written, answers: bytes) -> bytes:
        head = written.header and answers and not written.mark.length
        return (written.header + b"\n" if head else b"") + answers


def check_header(name: str, header: bytes, before: bytes) -> None:
    """Raise unless the answers have the columns of those before."""
    if header != before:
        was, came = (h.decode("utf-8", "replace") or "JSON lines" for h in (before, header))
        raise ProblemError(
            f"{name}: expected answers like those before, {was}, got {came}; name another output"
        )
