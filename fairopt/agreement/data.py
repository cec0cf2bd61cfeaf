"""The data that a comparison works on: answers of backends, and quantities that they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fairopt.programs.solution import Solution, Status

if TYPE_CHECKING:
    from fairopt.agreement.degeneracy import Standing
    from fairopt.backends import Backend

# Labels of answers that no backend gave.
REFERENCE = "reference"
ORACLE = "finite differences"
DEFINITE = (Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED, Status.NONCONVEX)


class Allowed(NamedTuple):
    """Relative differences that are allowed: of x and the objective; of gradients, multipliers."""

    solution: float
    gradient: float


@dataclass(eq=False)
class Answer:
    """The answer of one backend.

    Attributes:
        status: one per problem; None where it raised instead.
        claimed: ``(B,)`` bool, where it says that x is the solution.
        accepted: ``(B,)`` bool, where our residuals agree with that.
        gradients: by parameter, ``(C, B, ...)``, float64; zero where it is not accepted.
    """

    label: str
    backend: Backend | None
    status: tuple[Status | None, ...]
    claimed: Tensor
    accepted: Tensor
    solution: Solution | None = None
    row_dual: Tensor | None = None
    bound_dual: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    forward: float | None = None
    backward: float | None = None
    message: str = ""

    @property
    def residual(self) -> float:
        """The worst of our residuals where it claims a solution; infinite if there is none."""
        found = self.residuals()
        return math.inf if found is None else float(found.max())

    def residuals(self) -> Tensor | None:
        """The worst of our residuals for each problem that it claims to have solved."""
        if self.solution is None or self.row_dual is None or not bool(self.claimed.any()):
            return None
        worst = torch.stack(tuple(vars(self.solution.residuals).values())).amax(0)[self.claimed]
        return torch.where(worst.isnan(), torch.inf, worst)


@dataclass(eq=False)
class Quantity:
    """One quantity that several answers have.

    Attributes:
        values: by label, ``(B, E)``.
        present: by label, ``(B,)`` bool.
        unit: ``(B, E)``, by which values are divided.
        floor: ``(B,)``, the least that differences are compared with, in units.
        tolerance: ``(B,)``.
        counts: ``(B,)`` bool, where a difference is a disagreement.
        place: the words for element e.
        whole: whether B = 1 stands for the whole batch.
    """

    name: str
    values: dict[str, Tensor]
    present: dict[str, Tensor]
    unit: Tensor
    floor: Tensor
    tolerance: Tensor
    counts: Tensor
    place: Callable[[int], str]
    whole: bool = False

    def difference(self, a: str, b: str) -> tuple[Tensor, Tensor]:
        """Relative difference of two, ``(B,)``, NaN where one has none, and where it is worst."""
        one, other = self.values[a], self.values[b]
        gap = (one - other).abs()
        gap = torch.where(gap == 0, 0.0, gap / self.unit)
        gap = torch.where(gap.isnan(), torch.inf, gap)
        worst, at = gap.max(-1)
        size = torch.stack([torch.where(v == 0, 0.0, v.abs() / self.unit) for v in (one, other)])
        size = torch.where(size.isfinite(), size, 0.0).amax((0, 2))
        scale = torch.maximum(size, self.floor)
        relative = torch.where(worst == 0, 0.0, worst / scale)
        return torch.where(self.present[a] & self.present[b], relative, torch.nan), at


@dataclass(frozen=True, eq=False)
class Merged:
    """For each problem the best answer, to take units from, and how it stands."""

    x: Tensor
    row_dual: Tensor
    bound_dual: Tensor
    solved: Tensor
    standing: Standing
