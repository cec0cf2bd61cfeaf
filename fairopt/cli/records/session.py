"""A stream of records with its state in a file: chunk after chunk, each counted once.

A chunk is some consecutive lines. It is served in memory; then state, position in the input and
answers are saved in one file, which replaces the one before; then the answers are written. A line
is *acknowledged* when its answer is written (or, where targets are observed, when it is saved).
Killed at any moment, the file is of one chunk or of the next, and holds every line that was
acknowledged; a next session reads in it what is still to be written and where to go on.

What is saved depends on the lines and on where chunks end, not on the clock, the process, or on
how often it was killed. Of a file, chunks end after every ``chunk`` lines; of a pipe, with whatever
has come. The answers do not depend on the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairopt.cli.records.files import NOTHING, Mark, Source, locked
from fairopt.cli.records.formats import (
    Columns,
    CsvLines,
    Format,
    JsonLines,
    Lines,
    Records,
    Refusal,
    read,
    shown,
)
from fairopt.cli.records.outputs import Output, Written
from fairopt.errors import FairoptError, ProblemError
from fairopt.online.module import OnlineParity
from fairopt.online.persistence import differences, sweep
from fairopt.online.report import OnlineReport

CHUNK = 8192
SERVED, OBSERVED = "served", "observed"


@dataclass(frozen=True)
class Progress:
    """How far records were counted.

    Attributes:
        records: how many, of all inputs.
        path: of the last input; ``""`` if it had none.
        marks: by path, how much of each input; of those without one, of the last.
        options: how lines were read.
    """

    records: int = 0
    path: str = ""
    marks: Mapping[str, Mark] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, path: str, mark: Mark) -> Progress:
        """With an input that was read so far."""
        return replace(self, path=path, marks={**self.marks, path: mark})


class Session:
    """Serves records, or observes their targets, and keeps the state in a file.

    Args:
        parity: what serves; its configuration must be that of the state. Its own state is replaced.
        columns: what to read.
        state: the file; made if there is none. Beside it a lock file will stand.
        output: takes the answers.
        kind: the format of the records; ``None`` to go by the first line.
        batch_size: how many records are a batch of the rule. One that is not full waits for more
            records, or for the end of the input, which closes it.
        chunk: at most so many lines are saved at a time, if a batch is not longer.
        labels: groups declared, for some attributes; their codes are 0, 1, ... in this order.
            Others get theirs as they come.

    Attributes:
        found: whether there was a state.
        repeated: whether the last answers of a run that was cut short came a second time.

    Raises:
        ProblemError: another process uses the state, it is of another configuration or damaged, or
            the output is not the one that was written before.
        OSError: a file cannot be opened or written.
    """

    def __init__(
        self,
        parity: OnlineParity,
        columns: Columns,
        *,
        state: Path,
        output: Output,
        kind: Format | None = None,
        batch_size: int = 1,
        chunk: int = CHUNK,
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.parity = parity
        self._columns = columns
        self._path = state
        self._output = output
        self._kind = kind
        self._batch_size = 1 if columns.observed else batch_size
        self._chunk = max(chunk, self._batch_size)
        declared = {name: tuple((labels or {}).get(name, ())) for name in columns.groups}
        self._codes = {name: numbered(declared[name]) for name in columns.groups}
        self._mode = OBSERVED if columns.observed else SERVED
        self._options = asdict(columns) | {"batch_size": batch_size, "labels": declared}
        self._options = plain(self._options)
        self._progress = {SERVED: Progress(), OBSERVED: Progress()}
        self._lock = locked(state.with_name(f"{state.name}.lock"))
        self._lock.__enter__()
        try:
            sweep(state)
            self.found = state.exists()
            written = self._load() if self.found else Written()
            again = self._output.resume(written)
            self.repeated = bool(again)
            self._unsettled, self._delivered = bool(written.pending), True
            if again:
                self._answer(again)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the state for others."""
        self._lock.__exit__(None, None, None)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def records(self) -> int:
        """How many were served, or observed, in all runs."""
        return self._progress[self._mode].records

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """The labels of each attribute's codes 0, 1, ..."""
        return {name: tuple(codes) for name, codes in self._codes.items()}

    def report(self) -> OnlineReport:
        """The report of the stream, with groups by their labels."""
        return self.parity.report(self.labels)

    # -----------------------------------------------------------------------------------------
    # Lines
    # -----------------------------------------------------------------------------------------

    def run(
        self,
        source: Source,
        *,
        from_start: bool = False,
        new_input: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Count the lines of an input, behind those of it that were counted before.

        Args:
            from_start: the input has no path, and begins with the first line of the last one that
                had none: what was counted of it is skipped. Inputs with a path always are taken so.
            new_input: if the input has other lines than those that were counted under its path,
                count it from its start.
            stopped: asked between two chunks whether to end here.

        Raises:
            Refusal: a line is refused; all before it are counted and answered.
            ProblemError: the input is not what was counted before.
        """
        first = self._begin(source, from_start, new_input)
        try:
            self._all_chunks(source, first, stopped)
        except BaseException:
            if self._unsettled and self._delivered:
                self._settle()
            raise
        self._settle()

    def _all_chunks(self, source: Source, first: bytes | None, stopped: Callable[[], bool]) -> None:
        lines: Lines | None = None
        most = self._chunk
        while not stopped():
            source.fill(most)
            if lines is None:
                first = first or b"".join(source.lines(1))
                if not first:
                    break  # nothing at all
                lines = self._lines_of(first)
                self._output.begin(lines.header)
                if lines.heading and not source.mark.length:
                    source.consume(1)
            waiting, last = source.lines(most), source.all_at_hand(most)
            if waiting and self._count(source, lines, waiting, last):
                most = self._chunk
            elif not last and len(waiting) == most:
                most += self._chunk  # less than a batch among so many lines
            if last:
                break

    def _begin(self, source: Source, from_start: bool, new_input: bool) -> bytes | None:
        """Go to where the input goes on; its first line, if some of it was counted."""
        before = self._progress[self._mode]
        options = before.options if before.options else self._options
        different = differences(self._options, options)
        if different:
            raise ProblemError(
                f"{self._path}: expected the options that its records were read with, got others: "
                + "; ".join(different)
            )
        path = "" if source.path is None else str(source.path.resolve())
        before = replace(before, options=self._options)
        known = before.marks.get(path)
        if not path and not from_start:
            self._progress[self._mode] = before.at(path, NOTHING)
            return None
        if known is None and path:  # the last one under another name, maybe
            known = before.marks.get(before.path) if before.path else None
        mark = known or NOTHING
        first = source.skip(mark)
        if first is not None:
            self._progress[self._mode] = before.at(path, mark)
            return first
        if not path or (path in before.marks and not new_input):
            raise ProblemError(
                f"{path or 'the input'}: expected the {mark.length} bytes that were counted "
                "before, got others; restore them, or say that it is new input, to be counted from "
                "its start"
            )
        source.rewind()
        self._progress[self._mode] = before.at(path, NOTHING)
        return None

    def _lines_of(self, first: bytes) -> Lines:
        kind = self._kind
        if kind is None:
            bare = first.removeprefix(b"\xef\xbb\xbf").lstrip()
            kind = "jsonl" if bare.startswith(b"{") else "csv"
        try:
            return JsonLines(self._columns) if kind == "jsonl" else CsvLines(first, self._columns)
        except ProblemError as error:
            raise Refusal(f"line 1: {error}") from error

    def _count(self, source: Source, lines: Lines, waiting: list[bytes], last: bool) -> bool:
        """Count and answer the whole batches among these lines; return whether there was one.

        Raises:
            Refusal: a line is refused; all before it are counted.
        """
        size = self._batch_size
        if len(waiting) < size and not last:
            return False
        records, refusal = read(waiting, lines, self._columns, source.mark.lines)
        whole = len(records) if last and not refusal else len(records) // size * size
        values, error = self._serve(records.part(0, whole))
        if error is not None:
            whole = len(values)
            numbers = [source.mark.lines + n for n in records.ends[whole : whole + size]]
            named = " to ".join(map(str, sorted({numbers[0], numbers[-1]})))
            refusal = Refusal(f"line{'s' * (len(numbers) > 1)} {named}: {error}")
            refusal.__cause__ = error
        if whole:
            source.consume(len(waiting) if whole == len(records) and last and not refusal
                           else records.ends[whole - 1])  # fmt: skip
            answers = b"".join(map(lines.answer, records.bodies[:whole], values))
            self._commit(source, whole, b"" if self._columns.observed else answers)
        if refusal is not None:
            raise refusal
        return whole > 0

    # -----------------------------------------------------------------------------------------
    # Numbers
    # -----------------------------------------------------------------------------------------

    def _serve(self, records: Records) -> tuple[list[float], FairoptError | None]:
        """Adjusted scores of all records; or of those before a batch that is refused, and why."""
        if not len(records):
            return [], None
        try:
            return self._all(records), None
        except FairoptError:
            found: list[float] = []
        for first in range(0, len(records), self._batch_size):
            try:
                found += self._all(records.part(first, first + self._batch_size))
            except FairoptError as error:  # noqa: PERF203 - only until the first
                return found, error
        return found, None

    def _all(self, records: Records) -> list[float]:
        """Serve or observe records; if they are refused, everything is as before."""
        columns, values = self._columns, records.values
        codes = {name: dict(known) for name, known in self._codes.items()}
        groups = {
            name: torch.tensor([codes[name].setdefault(v, len(codes[name])) for v in values[name]])
            for name in columns.groups
        }
        if self.parity.unknown_group == "raise":
            self._check_known(codes)

        def tensor(name: str | None) -> Tensor | None:
            return None if name is None else torch.tensor(values[name], dtype=torch.float64)

        scores = torch.tensor(values[columns.score], dtype=torch.float64)
        targets, weights = tensor(columns.target), tensor(columns.weight)
        if columns.observed:
            x = torch.tensor(values[columns.adjusted], dtype=torch.float64)
            if targets is None:
                raise ProblemError("observing needs the column of the targets, got none")
            self.parity.observe(targets, x, groups, scores=scores, weights=weights)
        else:
            x = self.parity.run(
                scores, groups, targets, weights=weights, batch_size=self._batch_size
            )
        self._codes = codes
        found: list[float] = x.tolist()
        return found

    def _check_known(self, codes: Mapping[str, Mapping[str, int]]) -> None:
        """Raise where there are labels that were not declared."""
        for name, known in self._codes.items():
            for label in tuple(codes[name])[len(known) :]:
                raise ProblemError(
                    f"{name}: expected one of the labels declared, {', '.join(known)}, got "
                    f"{shown(label)}; correct it, or declare it in a stream with another state"
                )

    # -----------------------------------------------------------------------------------------
    # The file
    # -----------------------------------------------------------------------------------------

    def _commit(self, source: Source, count: int, answers: bytes) -> None:
        """Count some records and answer them."""
        now = self._progress[self._mode]
        now = replace(now, records=now.records + count)
        self._progress[self._mode] = now.at(now.path, source.mark)
        self._answer(answers)

    def _answer(self, answers: bytes) -> None:
        """Save the state with these answers; then write them."""
        promised = self._output.promise(answers)
        self._unsettled, self._delivered = True, False
        self._save(promised)
        self._output.write(answers)
        self._delivered = True

    def _settle(self) -> None:
        """Save that nothing is pending."""
        self._output.settle()
        self._save(self._output.written)
        self._unsettled = False

    def _save(self, written: Written) -> None:
        self.parity.save(
            self._path,
            notes={
                "stream": {
                    "codes": {name: list(codes) for name, codes in self._codes.items()},
                    "progress": {mode: plain(asdict(p)) for mode, p in self._progress.items()},
                    "output": plain(asdict(written)),
                }
            },
        )

    def _load(self) -> Written:
        """Take over the state in the file."""
        notes = self.parity.load(self._path)
        try:
            stream = notes["stream"]
            codes = {name: numbered(labels) for name, labels in stream["codes"].items()}
            for mode, saved in stream["progress"].items():
                marks = {path: Mark(**mark) for path, mark in saved["marks"].items()}
                self._progress[mode] = Progress(**saved | {"marks": marks})
            output = stream["output"]
            written = Written(
                output["header"].encode(),
                Mark(**output["mark"]),
                output["pending"].encode(),
                output["in_file"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ProblemError(
                f"{self._path}: expected a state of a stream of records, got one that does not say "
                "what its groups are called, or how far they were read; take another file"
            ) from error
        if tuple(codes) != self._columns.groups:
            raise ProblemError(
                f"{self._path}: expected the attributes {', '.join(codes)}, in this order, got "
                f"{', '.join(self._columns.groups)}; name those"
            )
        self._codes = codes
        return written


def numbered(labels: Sequence[str]) -> dict[str, int]:
    """The code of each label."""
    return {label: code for code, label in enumerate(labels)}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON gives them back."""

    def one(value: Any) -> Any:
        if isinstance(value, Mapping):
            return plain(value)
        if isinstance(value, bytes):
            return value.decode()
        return [one(each) for each in value] if isinstance(value, (tuple, list)) else value

    return {key: one(value) for key, value in values.items()}
