"""What a backend is: a solver, and what it says it can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fairopt.errors import UnsupportedProblemError
from fairopt.optimality.derivative import Adjoint
from fairopt.optimality.derivative import adjoint as shared_adjoint
from fairopt.programs.problem import LP, QP, Problem
from fairopt.programs.solution import Solution


@dataclass(frozen=True)
class Capabilities:
    """What a backend solves. The default of every field is the safe one: nothing.

    Attributes:
        quadratic: forms of P among "diagonal", "dense", "sparse".
        linear: whether it solves LPs.
        rows: names of the forms of rows that it takes: "dense", "sparse", "cells", "blocks", ...
        devices: torch device types its tensors may be on.
        certifies: whether it vouches for what it returns: rows and bounds checked in float64, as
            returned, and optimality made sure of by its method; ``solve`` then does not check.
    """

    quadratic: frozenset[str] = field(default_factory=frozenset)
    linear: bool = False
    rows: frozenset[str] = field(default_factory=frozenset)
    devices: frozenset[str] = field(default_factory=frozenset)
    certifies: bool = False

    def missing(self, problem: Problem) -> str | None:
        """Why a problem cannot be solved, in words; ``None`` if it can."""
        if isinstance(problem, LP):
            if not self.linear:
                return "linear programs (give solve(..., smoothing=...) a positive value)"
        elif problem.quadratic_form not in self.quadratic:
            return f"a {problem.quadratic_form} P (it takes: {words(self.quadratic)})"
        if problem.rows.name not in self.rows:
            return f"rows in {problem.rows.name} form (it takes: {words(self.rows)})"
        if (device := problem.l.device.type) not in self.devices:
            return f"tensors on {device!r} (it runs on: {words(self.devices)})"
        return None


def words(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "none"


class Backend(ABC):
    """A solver behind the one interface. It knows nothing of fairness and nothing of autograd.

    Options are typed arguments of the constructor; ``get("name")`` is the one with defaults.
    """

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def __repr__(self) -> str:
        options = (f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({', '.join(options)})"

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """Solve a batch of detached problems that ``capabilities`` covers.

        A problem that cannot be solved is told by its status, so that it does not spoil the others;
        ``fairopt.solve`` turns it into our error. For ``INFEASIBLE`` its row_dual is the proof.

        Raises:
            UnsupportedProblemError: the problem is one the solver cannot take, for a reason that
                ``capabilities`` cannot tell; ``backend="auto"`` then tries another.
        """

    def vjp(self, problem: QP, solution: Solution, grad_x: Tensor) -> Adjoint:
        """The adjoint variables for dL/dx = ``grad_x``, ``(B, n)``; by default the shared rule.

        Both are new tensors: the caller may overwrite them.
        """
        return shared_adjoint(problem, solution, grad_x)

    def check(self, problem: Problem) -> None:
        """Raise ``UnsupportedProblemError`` unless ``capabilities`` covers the problem."""
        missing = self.capabilities.missing(problem)
        if missing is not None:
            raise UnsupportedProblemError(
                f"backend {self.name!r} does not solve {missing}; choose another backend or "
                'backend="auto"'
            )
