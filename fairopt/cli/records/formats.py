"""Records in two formats, one on a line: CSV with a header, and JSON objects.

An answer is the line as it came, with one more column or key. Lines are read here only, and a line
that is refused is named by its number.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fairopt.errors import ProblemError

Format = Literal["csv", "jsonl"]


class Refusal(ProblemError):
    """Lines that are refused; nothing of them was counted."""


@dataclass(frozen=True)
class Columns:
    """The columns, or keys, that are read, and the one that is added.

    Attributes:
        score: of the scores.
        groups: the attributes.
        target, weight: of targets and weights, if there are.
        adjusted: of the adjusted scores.
        observed: whether ``adjusted`` is read, because the records were served before.
    """

    score: str
    groups: tuple[str, ...]
    target: str | None = None
    weight: str | None = None
    adjusted: str = "adjusted"
    observed: bool = False

    def wanted(self) -> tuple[str, ...]:
        """All that are read, in this order: numbers first, then the groups."""
        served = self.adjusted if self.observed else None
        numbers = (self.score, self.target, self.weight, served)
        return (*(name for name in numbers if name is not None), *self.groups)


class Lines(Protocol):
    """How the records of one format are read and answered.

    Attributes:
        header: what comes before the first answer, without its end of line; ``b""`` for nothing.
        heading: whether the first line of the input is a header.
    """

    header: bytes
    heading: bool

    def values(self, line: str) -> Sequence[Any]:
        """The wanted values as they stand in a line; raises ``ProblemError``."""

    def number(self, name: str, value: Any) -> float:
        """One of them as a number; raises ``ProblemError``."""

    def answer(self, body: bytes, x: float) -> bytes:
        """The line with its adjusted score, ready to be written."""


class CsvLines:
    """Comma-separated values, quoted as RFC 4180 has it, but one record on a line."""

    heading = True

    def __init__(self, first: bytes, columns: Columns) -> None:
        body = first.rstrip(b"\r\n")
        names = [name.strip() for name in split(decoded(body).removeprefix("\ufeff"))]
        self.width = len(names)
        for name in columns.wanted():
            if names.count(name) != 1:
                raise ProblemError(
                    f"the header: expected one column {name!r}, got {', '.join(names) or 'none'}"
                )
        if not columns.observed and columns.adjusted in names:
            raise ProblemError(taken(columns.adjusted))
        self.places = [names.index(name) for name in columns.wanted()]
        self.header = body + b"," + quoted(columns.adjusted).encode()

    def values(self, line: str) -> Sequence[str]:
        row = split(line)
        if len(row) != self.width:
            raise ProblemError(f"expected {self.width} fields, as in the header, got {len(row)}")
        return [row[place] for place in self.places]

    def number(self, name: str, value: str) -> float:
        try:
            found = math.nan if "_" in value else float(value)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise ProblemError(f"{name}: expected a finite number, got {shown(value)}")
        return found

    def answer(self, body: bytes, x: float) -> bytes:
        return b"%b,%b\n" % (body, repr(x).encode())


class JsonLines:
    """One JSON object on each line."""

    heading = False
    header = b""

    def __init__(self, columns: Columns) -> None:
        self.wanted = columns.wanted()
        self.taken = None if columns.observed else columns.adjusted
        self.adjusted = columns.adjusted
        self.key = json.dumps(columns.adjusted, ensure_ascii=False).encode()

    def values(self, line: str) -> Sequence[Any]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProblemError(f"expected a JSON object, got {shown(line)} ({error})") from error
        if not isinstance(found, dict):
            raise ProblemError(f"expected a JSON object, got {shown(line)}")
        if self.taken in found:
            raise ProblemError(taken(self.adjusted))
        return [found.get(name) for name in self.wanted]

    def number(self, name: str, value: object) -> float:
        found = math.nan
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                found = float(value)
            except OverflowError:  # an integer of hundreds of digits
                found = math.inf
        if not math.isfinite(found):
            raise ProblemError(f"{name}: expected a finite number, got {shown(value)}")
        return found

    def answer(self, body: bytes, x: float) -> bytes:
        return b"%b, %b: %b}\n" % (body.rstrip()[:-1].rstrip(), self.key, repr(x).encode())


@dataclass
class Records:
    """Records in numbers and labels, in order.

    Attributes:
        columns: what was read.
        ends: for each record, how many of the lines end with it.
        bodies: its text, without the end of line.
        values: by column, a number for each; for an attribute, a label.
    """

    columns: Columns
    ends: list[int] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    values: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ends)

    def part(self, first: int, last: int) -> Records:
        """Some of them."""
        values = {name: each[first:last] for name, each in self.values.items()}
        return Records(self.columns, self.ends[first:last], self.bodies[first:last], values)


def read(
    lines: Sequence[bytes], how: Lines, columns: Columns, before: int
) -> tuple[Records, Refusal | None]:
    """The records of some lines, up to the first that is refused, and why it is.

    Blank lines are no records.

    Args:
        before: how many lines of the input came before these.
    """
    wanted = columns.wanted()
    count = len(wanted) - len(columns.groups)
    found = Records(columns, values={name: [] for name in wanted})
    places = [found.values[name] for name in wanted]
    for number, line in enumerate(lines, start=1):
        body = line.rstrip(b"\r\n")
        if not body.strip():
            continue
        try:
            values = how.values(decoded(body))
            row: list[Any] = []
            for name, value in zip(wanted[:count], values[:count], strict=True):
                row.append(present(name, how.number, value))
            if columns.weight is not None and row[wanted.index(columns.weight)] < 0.0:
                raise ProblemError(
                    f"{columns.weight}: expected a weight of at least 0, got "
                    f"{row[wanted.index(columns.weight)]}"
                )
            for name, value in zip(columns.groups, values[count:], strict=True):
                row.append(present(name, label, value))
        except ProblemError as error:
            return found, Refusal(f"line {before + number}: {error}")
        for place, value in zip(places, row, strict=True):
            place.append(value)
        found.ends.append(number)
        found.bodies.append(body)
    return found, None


def present(name: str, convert: Any, value: object) -> Any:
    """A value that is there, converted."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ProblemError(f"{name}: expected a value, got none")
    return convert(name, value)


def label(name: str, value: object) -> str:
    """The label of a group: text, a whole number, true or false, all as text."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    raise ProblemError(
        f"{name}: expected the label of a group, text, a whole number, true or false, got "
        f"{shown(value)}"
    )


def split(line: str) -> list[str]:
    """The fields of a line of CSV."""
    try:
        return next(csv.reader((line,), strict=True))
    except csv.Error as error:
        raise ProblemError(
            f"expected a record of CSV on one line, got {shown(line)} ({error})"
        ) from error


def quoted(name: str) -> str:
    """A field of CSV, in quotes if it needs them."""
    return '"' + name.replace('"', '""') + '"' if set(name) & set(',"\r\n') else name


def decoded(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise ProblemError(f"expected UTF-8, got {shown(body)}") from error


def taken(adjusted: str) -> str:
    return (
        f"expected no column {adjusted!r}, which is to be added, got one; choose another name for "
        "the adjusted scores"
    )


def shown(value: object) -> str:
    """The value that came, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
