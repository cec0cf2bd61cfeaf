"""Streams that the tests of fairopt.online share."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fairopt import OnlineParity
from fairopt.datasets import load_adult
from fairopt.online.sharing import meeting


@lru_cache(maxsize=1)
def adult_scores() -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Probabilities of a logistic regression for the Adult test set, groups and targets."""
    data = load_adult()
    X = torch.cat([data.train.features.double(), torch.ones(len(data.train), 1).double()], 1)
    y = data.train.targets.double()
    w = torch.zeros(X.shape[1], dtype=torch.float64)
    ridge = 1e-4 * len(X) * torch.eye(X.shape[1], dtype=torch.float64)
    for _ in range(12):  # Newton
        p = torch.sigmoid(X @ w)
        gradient = X.T @ (p - y) + ridge @ w
        hessian = (X.T * (p * (1 - p))) @ X + ridge
        step = torch.linalg.solve(hessian, gradient)
        w = w - step
    assert float(step.abs().max()) < 1e-6
    test = torch.cat([data.test.features.double(), torch.ones(len(data.test), 1).double()], 1)
    return torch.sigmoid(test @ w), dict(data.test.groups), data.test.targets.double()


def order(seed: int, n: int) -> Tensor:
    """A random order."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(n))


def running_gap(x: Tensor, groups: Tensor, batch: int) -> np.ndarray:
    """Largest difference of running group means, after each batch; 0 until two groups are there."""
    values, codes = x.double().numpy(), groups.numpy()
    means = []
    for g in np.unique(codes):
        count = np.cumsum(codes == g)
        with np.errstate(invalid="ignore"):
            means.append(np.cumsum(np.where(codes == g, values, 0.0)) / count)
    stack = np.stack(means)
    gap = np.nan_to_num(np.nanmax(stack, 0) - np.nanmin(stack, 0))
    ends = np.minimum(np.arange(batch, len(values) + batch, batch), len(values)) - 1
    return gap[ends]


def regression(seed: int, n: int = 20_000) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of a regression that favours a group, by three units of 10; groups, targets."""
    generator = torch.Generator().manual_seed(seed)
    groups = (torch.rand(n, generator=generator) < 0.3).long()
    targets = 50 + 10 * torch.randn(n, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return 0.7 * targets + 15 + 4 * noise + 3 * groups, groups, targets


def served_late(
    stream: OnlineParity, scores: Tensor, groups: Tensor, targets: Tensor, delay: int, batch: int
) -> Tensor:
    """Serve all; the targets of each sample come ``delay`` samples later, the last at the end."""
    n, seen, x = len(scores), 0, torch.empty_like(scores)
    for first in range(0, n, 64):
        last = min(first + 64, n)
        part = slice(first, last)
        x[part] = stream.run(scores[part], groups[part], batch_size=batch)
        until = n if last == n else max(seen, last - delay)
        if until > seen:
            old = slice(seen, until)
            stream.observe(targets[old], x[old], groups[old], scores=scores[old])
            seen = until
    return x


KINDS = (
    "exchangeable",
    "by group",
    "by score",
    "by score, falling",
    "shares and scores change",
    "one group absent at first",
    "extremes that turn",
)


def orders_of(kind: str, seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Streams that nature or an adversary may send, of two groups, between 0 and 1."""
    rng = np.random.default_rng(seed)
    groups = (rng.random(n) < rng.uniform(0.1, 0.9)).astype(np.int64)
    scores = rng.beta(2, 3, n) * 0.7 + 0.3 * groups
    if kind == "by group":
        at = np.argsort(groups, kind="stable")
        scores, groups = scores[at], groups[at]
    elif kind == "by score":
        at = np.argsort(scores)
        scores, groups = scores[at], groups[at]
    elif kind == "by score, falling":
        at = np.argsort(-scores)
        scores, groups = scores[at], groups[at]
    elif kind == "shares and scores change":
        late = np.arange(n) >= n // 2
        groups = np.where(late, rng.random(n) < 0.8, rng.random(n) < 0.2).astype(np.int64)
        scores = np.where(late, 0.6 * rng.random(n) + 0.4 * (1 - groups), 0.5 * scores)
    elif kind == "one group absent at first":
        groups[: n // 2] = 0
    elif kind == "extremes that turn":
        scores = ((np.arange(n) // rng.integers(1, 200)) % 2 == groups).astype(float)
    return torch.from_numpy(scores.clip(0, 1)), torch.from_numpy(groups)


def meet(streams: list[OnlineParity]) -> None:
    """What ``synchronize`` does in as many workers, in one process."""
    parts = [stream._part(f"rank {k}") for k, stream in enumerate(streams)]
    common = meeting(streams[0].constraints, parts)
    for stream in streams:
        stream._begin(common.state.copy(), common)
