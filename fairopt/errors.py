"""The exceptions. Every error that fairopt raises on purpose is one of these.

Each message says what was expected, what came, and what to do next.
"""

from __future__ import annotations

__all__ = [
    "BackendNotFoundError",
    "ConvergenceError",
    "FairoptError",
    "InfeasibleError",
    "NotDifferentiableError",
    "ProblemError",
    "UnsupportedProblemError",
]


class FairoptError(Exception):
    """Base class of all errors raised by fairopt."""


class ProblemError(FairoptError, ValueError):
    """The data of a problem are malformed: wrong shape, dtype, device, sign or value."""


class InfeasibleError(FairoptError):
    """No point satisfies all rows and bounds.

    Attributes:
        batch: index of the problem in its batch.
        rows: names of rows that contradict each other under the bounds.
    """

    def __init__(self, message: str, *, batch: int = 0, rows: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.batch = batch
        self.rows = rows


class BackendNotFoundError(FairoptError, LookupError):
    """No backend of that name is registered, or the package it needs is not installed."""


class UnsupportedProblemError(FairoptError):
    """The backend cannot solve a problem of this kind; the message says which part."""


class ConvergenceError(FairoptError):
    """The solver stopped before our residuals reached the promised precision.

    Attributes:
        batch: index of the problem in its batch.
    """

    def __init__(self, message: str, *, batch: int = 0) -> None:
        super().__init__(message)
        self.batch = batch


class NotDifferentiableError(FairoptError):
    """A gradient was asked for where the solution map has none."""
