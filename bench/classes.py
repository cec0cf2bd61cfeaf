"""How long does the layer take for predictions of several classes, forward and backward?

float32 softmax probabilities of 10 classes, n = 10,000 samples in 5 groups, backend "numba": all 10
pairs of groups for each class are 100 rows, of which 36 are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness import RESULTS, Report, Spread, arguments, interleaved
from bench.problems import forward_backward
from fairopt import Constraint, DemographicParity, EqualizedOdds, EqualOpportunity, FairnessLayer

CLASSES, GROUPS = 10, 5


def softmax(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores that require grad, the gradient sent back, groups and targets."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, GROUPS, (n,), generator=generator)
    shift = torch.randn(GROUPS, CLASSES, generator=generator).mul_(0.5)
    logits = torch.randn(n, CLASSES, generator=generator).mul_(1.5).add_(shift[groups])
    targets = torch.randint(0, CLASSES, (n,), generator=generator)
    gradient = torch.randn(n, CLASSES, generator=generator)
    return logits.softmax(-1).requires_grad_(), gradient, groups, targets


def main() -> None:
    options = arguments(__doc__ or "")
    report = Report("classes", (__doc__ or "").strip())
    notions: dict[str, tuple[Constraint, int, float | None]] = {
        "demographic parity, tolerance 0.05": (DemographicParity(0.05), 10_000, 30.0),
        "demographic parity, tolerance 0.01": (DemographicParity(0.01), 10_000, 30.0),
        "demographic parity, tolerance 0": (DemographicParity(0.0), 10_000, 30.0),
        "equal opportunity, tolerance 0.05": (EqualOpportunity(0.05), 10_000, None),
        "equalized odds, tolerance 0.05": (EqualizedOdds(0.05), 10_000, None),
        "demographic parity, tolerance 0.05, n = 1,000": (DemographicParity(0.05), 1_000, None),
        "demographic parity, tolerance 0.05, n = 100,000": (DemographicParity(0.05), 100_000, None),
    }
    steps = {}
    for name, (notion, n, _) in notions.items():
        scores, gradient, groups, targets = softmax(n)
        layer = FairnessLayer(notion, bounds=(0, 1), backend="numba", classes=CLASSES)
        steps[name] = forward_backward(layer, scores, gradient, groups, targets)
    times = interleaved(steps, seconds=options.seconds)
    for name, (_, _, at_most) in notions.items():
        spread = Spread.of(times[name]).scaled(1e3)
        report.add(name, spread, "ms", at_most=at_most, detail="forward + backward")
    report.save(None if options.no_save else RESULTS)


if __name__ == "__main__":
    main()
