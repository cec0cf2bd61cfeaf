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


def meet(streams: list[OnlineParity]) -> None:
    """What ``synchronize`` does in as many workers, in one process."""
    parts = [stream._part(f"rank {k}") for k, stream in enumerate(streams)]
    common = meeting(streams[0].constraints, parts)
    for stream in streams:
        stream._begin(common.state.copy(), common)
