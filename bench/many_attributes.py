"""What do 20 attributes at once cost: hundreds of dependent rows, thousands of cells?

float32 probabilities, bounds (0, 1), demographic parity of every attribute, backend "numba". The
attributes have from 2 to 20 values, 220 in all. They are correlated through a few latent profiles,
so that the samples occupy thousands of combinations (cells) and not 10^18.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIZES = (2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 19, 20, 20)


@dataclass(frozen=True)
class Many:
    """Probabilities, many attributes, and the gradient that the loss will send back."""

    scores: Tensor  # (n,) float32, a leaf that requires grad
    groups: dict[str, Tensor]  # (n,) int64 each
    gradient: Tensor  # (n,)


def many(
    n: int,
    *,
    cells: int | None = 4_000,
    sizes: tuple[int, ...] = SIZES,
    profiles: int = 8,
    seed: int = 0,
) -> Many:
    """n probabilities whose means differ between the values of every attribute.

    A combination of values is drawn by profile: each profile prefers two values of an attribute in
    three cases of four. There are at most ``cells`` combinations, with frequencies like 1/rank^0.5;
    without ``cells`` each sample draws its own.
    """
    generator = torch.Generator().manual_seed(seed)
    count = n if cells is None else cells
    profile = torch.randint(0, profiles, (count,), generator=generator)
    codes = []
    for size in sizes:
        liked = torch.randint(0, size, (profiles, 2), generator=generator)
        pick = torch.randint(0, 2, (count,), generator=generator)
        any_ = torch.randint(0, size, (count,), generator=generator)
        prefers = torch.rand(count, generator=generator) < 0.75
        codes.append(torch.where(prefers, liked[profile, pick], any_))
    combination = torch.stack(codes)  # (attributes, count)
    which = torch.arange(n)
    if cells is not None:
        share = torch.arange(1, cells + 1, dtype=torch.float64).rsqrt()
        which = torch.multinomial(share, n, replacement=True, generator=generator)
    taken = combination[:, which]
    logit = 1.5 * torch.randn(n, generator=generator)
    for size, code in zip(sizes, taken, strict=True):
        effect = 0.3 * torch.randn(size, generator=generator)
        logit += effect[code]
    gradient = torch.randn(n, generator=generator)
    groups = {f"a{i}": code.contiguous() for i, code in enumerate(taken)}
    return Many(logit.sigmoid().requires_grad_(), groups, gradient)
