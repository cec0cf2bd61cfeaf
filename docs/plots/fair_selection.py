"""The plot of docs/fair-selection.md: ``python docs/plots/fair_selection.py`` writes it beside.

Utility against tolerance for the choice of 2,000 people of the Adult test set. It needs matplotlib
and scipy; half a minute on one core.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fairopt import Budget, Constraint, DemographicParity, ImpactRatio, project
from fairopt.datasets import Adult, load_adult

CHOSEN = 2000
TOLERANCES = (0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2)


def chances(adult: Adult) -> Tensor:
    """Of the test rows: logistic regression, trained on the training rows."""
    model = torch.nn.Linear(adult.train.features.shape[1], 1)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    loss = torch.nn.BCEWithLogitsLoss()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value: Tensor = loss(model(adult.train.features).squeeze(-1), adult.train.targets)
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        return model(adult.test.features).squeeze(-1).sigmoid().double()


def main() -> None:
    import matplotlib.pyplot as plt

    adult = load_adult()
    chance, groups = chances(adult), adult.test.groups

    def utility(*constraints: Constraint) -> float:
        x = project(
            chance, groups, [Budget(total=CHOSEN), *constraints], bounds=(0, 1), objective="utility"
        )
        return float(chance @ x)

    def curve(*on: str | tuple[str, ...]) -> list[float]:
        return [
            utility(*(DemographicParity(tolerance=t, on=name) for name in on)) for t in TOLERANCES
        ]

    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=110)
    lines = {
        "parity on sex": (curve("sex"), "-o"),
        "parity on race": (curve("race"), "-s"),
        "parity on both": (curve("sex", "race"), "-^"),
        "parity on the intersections": (curve(("sex", "race")), "-v"),
    }
    for name, (values, style) in lines.items():
        axes.plot(TOLERANCES, values, style, label=name, markersize=4, linewidth=1.2)
    ratio = utility(ImpactRatio(threshold=0.8, on="sex"), ImpactRatio(threshold=0.8, on="race"))
    free = utility()
    axes.axhline(free, color="black", linewidth=0.8, linestyle=":", label="no parity")
    axes.axhline(
        ratio, color="gray", linewidth=0.8, linestyle="--", label="four-fifths rule on both"
    )
    axes.set_xlabel("tolerance: largest difference of selection rates")
    axes.set_ylabel(f"expected number above 50,000 dollars of {CHOSEN:,}")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[1] / "fair-selection.png", metadata={"Software": None})
    for name, (values, _) in lines.items():
        print(name, *(f"{value:.1f}" for value in values))
    print(f"no parity {free:.1f}, four-fifths rule {ratio:.1f}")


if __name__ == "__main__":
    main()
