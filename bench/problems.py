"""The inputs that the scripts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairopt import QP, backends


@dataclass(frozen=True)
class Problem:
    """Probabilities whose group means differ, and the gradient that the loss will send back."""

    scores: Tensor  # (n,) float32, a leaf that requires grad
    groups: Tensor  # (n,) int64
    gradient: Tensor  # (n,)


def probabilities(n: int, groups: int = 2, *, seed: int = 0) -> Problem:
    """n probabilities; group means from about 0.42 to 0.58, so that a tolerance of 0.05 binds."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(0, groups, (n,), generator=generator)
    scores = torch.randn(n, generator=generator).mul_(1.5)
    scores.add_(code, alpha=1.0 / (groups - 1)).sub_(0.5).sigmoid_()
    gradient = torch.randn(n, generator=generator)
    return Problem(scores.requires_grad_(), code, gradient)


def forward_backward(
    layer: Callable[..., Tensor], scores: Tensor, gradient: Tensor, *rest: Tensor
) -> Callable[[], Tensor]:
    """One training step's share of a layer: forward, backward, and the gradient dropped again."""

    def step() -> Tensor:
        fair = layer(scores, *rest)
        fair.backward(gradient)
        scores.grad = None
        return fair

    return step


def able(problem: QP) -> tuple[str, ...]:
    """The installed backends whose capabilities cover a problem, in the order of ``"auto"``."""
    return tuple(
        name
        for name in backends.available()
        if backends.get(name).capabilities.missing(problem) is None
    )
