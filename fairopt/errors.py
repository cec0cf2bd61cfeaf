"""The exceptions. Every error that fairopt raises on purpose is one of these.

Each message says what was expected, what came, and what to do next.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BackendNotFoundError",
    "ConvergenceError",
    "FairoptError",
    "InfeasibleError",
    "NotDifferentiableError",
    "ProblemError",
    "SolveError",
    "UnboundedError",
    "UnsupportedProblemError",
]


class FairoptError(Exception):
    """Base class of all errors raised by fairopt."""


class ProblemError(FairoptError, ValueError):
    """The data of a problem are malformed: wrong shape, dtype, device, sign or value."""


class SolveError(FairoptError):
    """Some problem of the batch has no acceptable solution; base class of the three ways.

    Attributes:
        batch: index of the first such problem in its batch.
        rows: names of the rows in conflict, where that is what is wrong.
        solution: the ``Solution`` that the backend returned, detached, if it returned one: its
            ``status`` tells each problem of the batch, and those that are solved are right.
    """

    def __init__(
        self,
        message: str,
        *,
        batch: int = 0,
        rows: tuple[str, ...] = (),
        solution: Any = None,
    ) -> None:
        super().__init__(message)
        self.batch = batch
        self.rows = rows
        self.solution = solution


class InfeasibleError(SolveError):
    """No point satisfies all rows and bounds."""


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
