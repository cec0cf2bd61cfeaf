"""The exceptions. Every error that fairopt raises on purpose is one of these.

Each message says what was expected, what came, and what to do next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


class FairoptError(Exception):
    """Base class of all errors raised by fairopt."""


class ProblemError(FairoptError, ValueError):
    """The data of a problem are malformed: wrong shape, dtype, device, sign or value."""


class SolveError(FairoptError):
    """Some problem of the batch has no acceptable solution; base class of the three ways.

    Attributes:
        batch: index of the first such problem in its batch.
        rows: names of the rows in conflict, if rows are in conflict.
        solution: the ``Solution`` that the backend returned, detached, if it returned one: its
            ``status`` tells each problem of the batch, and those that are solved are right.
    """

    def __init__(
        self, message: str, *, batch: int = 0, rows: tuple[str, ...] = (), solution: Any = None
    ) -> None:
        super().__init__(message)
        self.batch = batch
        self.solution = solution
        self._rows = rows

    @property
    def rows(self) -> tuple[str, ...]:
        return self._rows


@dataclass(frozen=True)
class Conflict:
    """Why a problem has no solution, and what would give it one.

    A *tolerance* is half the distance between the two sides of a row, both finite and apart.

    Attributes:
        rows: names of rows that cannot hold together within the bounds, though any of them left
            out, the others can.
        smallest: whether no smaller set of rows is in conflict. Certain where all smaller sets
            could be tried, as they always are for up to 12 rows.
        factor: the least number by which all tolerances of the problem, multiplied around the
            middle of their sides, let all rows hold; ``None`` where none does, because rows without
            a tolerance are in conflict.
        addition: the least number that, added to every side of every row, lets all rows hold. There
            always is one. Equals the least possible largest excess of a row.
        tolerances: of each of ``rows``: 0 for an equality, infinite for a row with one side.
    """

    rows: tuple[str, ...]
    smallest: bool
    factor: float | None
    addition: float
    tolerances: tuple[float, ...]

    def __str__(self) -> str:
        shown = listed(self.rows)
        if self.factor is None:
            return (
                f"the rows in conflict are {shown}; no multiple of the tolerances would do, but "
                f"{up(self.addition)} added to every side would"
            )
        wide = [t for t in self.tolerances if 0 < t < math.inf][:1]
        example = "".join(f" ({t:.4g} becomes {up(t * self.factor)})" for t in wide)
        return (
            f"the rows in conflict are {shown}; {up(self.factor)} times the tolerances would "
            f"do{example}"
        )


def listed(rows: tuple[str, ...]) -> str:
    """The first eight names in quotes."""
    return ", ".join(f"'{row}'" for row in rows[:8]) + ", ..." * (len(rows) > 8)


def up(number: float) -> str:
    """Four digits, rounded up: the advised number must suffice."""
    shown = f"{number:.3e}"
    mantissa, exponent = shown.split("e")
    if float(shown) < number * (1 - 1e-12):
        shown = f"{float(mantissa) + 1e-3:.3f}e{exponent}"
    return f"{float(shown):.4g}"


class InfeasibleError(SolveError):
    """No point satisfies all rows and bounds.

    Which rows are in conflict, and what would let them hold, is worked out when first asked for,
    by ``rows``, ``conflict`` or the message: catching the error costs nothing.

    Attributes:
        rows: names of the rows in conflict: ``conflict.rows``, or those of the backend's proof
            where ``conflict`` is ``None``.
        conflict: the whole answer, a ``Conflict``; ``None`` if it could not be worked out.
    """

    def __init__(
        self,
        message: str,
        *,
        batch: int = 0,
        rows: tuple[str, ...] = (),
        solution: Any = None,
        explain: Callable[[], Conflict | None] | None = None,
    ) -> None:
        super().__init__(message, batch=batch, rows=rows, solution=solution)
        self._explain = explain
        self._conflict: Conflict | None = None

    @property
    def conflict(self) -> Conflict | None:
        if self._explain is not None:
            explain, self._explain = self._explain, None
            with suppress(FairoptError):  # the first failure is the one to report
                self._conflict = explain()
        return self._conflict

    @property
    def rows(self) -> tuple[str, ...]:
        return self._rows if self.conflict is None else self.conflict.rows

    @property
    def factor(self) -> float | None:
        """``conflict.factor``: what to multiply all tolerances with."""
        return None if self.conflict is None else self.conflict.factor

    @property
    def addition(self) -> float | None:
        """``conflict.addition``: what to add to every side."""
        return None if self.conflict is None else self.conflict.addition

    def __str__(self) -> str:
        if self.conflict is not None:
            return f"{super().__str__()}; {self.conflict}"
        return f"{super().__str__()}; the rows in conflict are {listed(self._rows) or 'not known'}"


class UnboundedError(SolveError):
    """The objective falls without end within rows and bounds."""


class ConvergenceError(SolveError):
    """The solver stopped before our residuals reached the promised precision."""


class BackendNotFoundError(FairoptError, LookupError):
    """No backend of that name is registered, or the package it needs is not installed."""


class UnsupportedProblemError(FairoptError):
    """The backend cannot solve a problem of this kind; the message says which part."""


class NotDifferentiableError(FairoptError):
    """A gradient was asked for where the solution map has none."""


def whole_number(name: str, value: object, least: int, expected: str = "", advice: str = "") -> int:
    """The value, if it is an ``int`` of at least ``least``; else raise ``ProblemError``.

    Args:
        expected: what to say was expected, if it is more than that.
        advice: follows what came.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        expected = expected or f"a whole number of at least {least}"
        raise ProblemError(f"{name}: expected {expected}, got {value!r}{advice}")
    return value
