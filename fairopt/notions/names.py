"""The names of parity notions: one table for the command line, the demo, streams and the docs.

It holds the notions that a tolerance and an attribute are enough to state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fairopt.notions.catalogue import (
    Constraint,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    ErrorParity,
    ImpactRatio,
    MeanResidual,
    Parity,
    PredictiveEquality,
)


@dataclass(frozen=True)
class NamedNotion:
    """One notion of the table.

    Attributes:
        notion: its class.
        label: its name in running text.
        needs_targets: whether it speaks of outcomes.
    """

    notion: type[Constraint]
    label: str
    needs_targets: bool

    def make(self, tolerance: float, on: str | tuple[str, ...] | None) -> Constraint:
        """The constraint on an attribute; a tuple of names stands for their intersections.

        For ``ImpactRatio`` the tolerance is the share that the lowest mean may be below the
        highest.
        """
        if self.notion is ImpactRatio:
            return ImpactRatio(1 - tolerance, on)
        assert issubclass(self.notion, Parity)
        return self.notion(tolerance, on)


NOTIONS: Mapping[str, NamedNotion] = {
    "demographic-parity": NamedNotion(DemographicParity, "demographic parity", False),
    "equal-opportunity": NamedNotion(EqualOpportunity, "equal opportunity", True),
    "predictive-equality": NamedNotion(PredictiveEquality, "predictive equality", True),
    "equalized-odds": NamedNotion(EqualizedOdds, "equalized odds", True),
    "error-parity": NamedNotion(ErrorParity, "error parity", True),
    "mean-residual": NamedNotion(MeanResidual, "mean residual", True),
    "impact-ratio": NamedNotion(ImpactRatio, "impact ratio", False),
}

# Those of the table that have a choice of what is compared with what.
COMPARING: Mapping[str, type[Parity]] = {
    name: each.notion for name, each in NOTIONS.items() if issubclass(each.notion, Parity)
}
