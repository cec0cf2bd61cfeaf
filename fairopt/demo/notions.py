"""The notions as the demo shows them, each with its gap as an auditor would compute it.

The gaps are deliberately apart from the code that builds and solves the projection: means by group,
from predictions, codes and targets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fairopt.errors import ProblemError

Gap: TypeAlias = Callable[[Tensor, Tensor, Tensor], float]


@dataclass(frozen=True)
class Shown:
    """How the demo shows one notion of the table of names.

    Attributes:
        words: its meaning for the demo's data, with a place for the tolerance.
        gap: of predictions, targets and group codes, all ``(n,)``; the notion holds if the gap is
            at most the tolerance.
    """

    words: str
    gap: Gap


def group_means(values: Tensor, mass: Tensor, codes: Tensor) -> Tensor:
    """The mean of each group that has any mass, each sample counting by its mass."""
    total = codes.bincount(weights=mass)
    return (codes.bincount(weights=mass * values) / total)[total > 0]


def spread(values: Tensor, mass: Tensor, codes: Tensor) -> float:
    """The largest difference between two of these means; 0 where no group has any mass."""
    means = group_means(values, mass, codes)
    return float(means.max() - means.min()) if len(means) else 0.0


def shortfall(x: Tensor, y: Tensor, codes: Tensor) -> float:
    """How far the lowest mean is below the highest, as a share of it."""
    means = group_means(x, torch.ones_like(x), codes)
    return 1.0 - float(means.min() / means.max())


def positives(x: Tensor, y: Tensor, codes: Tensor) -> float:
    return spread(x, y, codes)


def negatives(x: Tensor, y: Tensor, codes: Tensor) -> float:
    return spread(x, 1 - y, codes)


def everyone(value: Callable[[Tensor, Tensor], Tensor]) -> Gap:
    return lambda x, y, codes: spread(value(x, y), torch.ones_like(x), codes)


# fmt: off
SHOWN: Mapping[str, Shown] = {
    "demographic-parity": Shown(
        "mean predictions of any two groups differ by at most {:g}", everyone(lambda x, y: x)),
    "equal-opportunity": Shown(
        "among those who earn more, mean predictions of any two groups differ by at most {:g}",
        positives),
    "predictive-equality": Shown(
        "among those who earn less, mean predictions of any two groups differ by at most {:g}",
        negatives),
    "equalized-odds": Shown(
        "among those who earn more, and among those who earn less, mean predictions of any two "
        "groups differ by at most {:g}",
        lambda x, y, codes: max(positives(x, y, codes), negatives(x, y, codes))),
    "error-parity": Shown(
        "expected errors of any two groups differ by at most {:g}",
        everyone(lambda x, y: y * (1 - x) + (1 - y) * x)),
    "mean-residual": Shown(
        "mean residuals of any two groups differ by at most {:g}", everyone(lambda x, y: y - x)),
    "impact-ratio": Shown(
        "the lowest mean prediction of a group is at most a share of {:g} below the highest",
        shortfall),
}
# fmt: on


def check_choice(what: str, chosen: Sequence[str], offered: Sequence[str]) -> None:
    """Raise unless these are different names among those offered, at least one."""
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(offered):
        raise ProblemError(
            f"{what}: expected one or more of {', '.join(offered)}, each once, got "
            f"{', '.join(chosen) or 'none'}"
        )


def gaps_of(
    predictions: Tensor, targets: Tensor, groups: Mapping[str, Tensor], notions: Sequence[str]
) -> dict[str, float]:
    """Per attribute, the largest gap of these notions, in float64.

    Args:
        predictions, targets: ``(n,)``; targets are 0 and 1, or chances of 1.
        groups: attribute name to codes, ``(n,)``.
    """
    x, y = predictions.detach().double(), targets.detach().double()
    return {
        name: max(SHOWN[notion].gap(x, y, codes) for notion in notions)
        for name, codes in groups.items()
    }
