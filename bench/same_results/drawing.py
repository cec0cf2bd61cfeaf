"""Samples, notions and rows at random, the same for one seed on every version."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairopt import (
    Budget,
    ConditionalParity,
    Constraint,
    Covariance,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    ErrorParity,
    GroupCalibration,
    ImpactRatio,
    MeanResidual,
    MinimumRate,
    PredictiveEquality,
)

PARITY = (
    DemographicParity, EqualOpportunity, PredictiveEquality, EqualizedOdds, MeanResidual,
    ErrorParity,
)  # fmt: skip


MOST_GROUPS = 30  # of an intersection


class Draw:
    """Random choices for one problem."""

    def __init__(self, seed: int, number: int) -> None:
        self.rng = np.random.default_rng([seed, number])

    def one(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def size(self, least: int, most: int) -> int:
        """A whole number whose logarithm is uniform."""
        low, high = math.log(least), math.log(most + 1)
        return min(most, int(math.exp(self.rng.uniform(low, high))))

    def tensor(self, values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.from_numpy(np.array(values)).to(dtype)

    def normal(self, *shape: int) -> Tensor:
        return self.tensor(self.rng.normal(size=shape))


@dataclass
class Samples:
    """The arguments of a call of the layer."""

    scores: Tensor
    groups: dict[str, Tensor]
    targets: Tensor
    weights: Tensor | None
    bounds: Any
    leaves: dict[str, Tensor]


def draw_scores(draw: Draw, shape: tuple[int, ...], shift: Any) -> Any:
    rng = draw.rng
    kind = draw.one("uniform", "shifted", "shifted", "shifted", "steps", "normal", "constant")
    if kind == "uniform":
        return rng.random(shape)
    if kind == "shifted":
        return np.clip(rng.beta(2, 3, shape) * 0.8 + 0.3 * shift, 0, 1.1)
    if kind == "steps":
        return rng.integers(0, 3, shape) / 2
    if kind == "normal":
        return 0.5 + 2 * rng.normal(size=shape)
    return np.full(shape, 0.5)


def draw_samples(draw: Draw, most: int, *, hard: bool = False, batched: bool = True) -> Samples:
    """Scores, groups, targets, weights and bounds.

    Args:
        hard: no soft groups, no soft targets.
        batched: whether several problems may be drawn at once.
    """
    rng = draw.rng
    n = draw.size(draw.one(1, 8, 8, 8), most)
    batch = int(rng.integers(2, 5)) if batched and draw.chance(0.25) else None
    shape = (n,) if batch is None else (batch, n)
    group_shape = (n,) if draw.chance(0.5) else shape
    groups: dict[str, Tensor] = {}
    for name in ("sex", "race", "region")[: draw.one(1, 1, 1, 2, 2, 3)]:
        count = draw.one(2, 2, 3, 5, 9)
        codes = rng.integers(0, count, group_shape)
        if draw.chance(0.15):
            codes = np.minimum(rng.geometric(0.6, group_shape) - 1, count - 1)
        dtype = draw.one(torch.int64, torch.int64, torch.int32, torch.uint8)
        groups[name] = torch.from_numpy(codes).to(dtype)
    first = groups["sex"].numpy()
    leaves: dict[str, Tensor] = {}
    if not hard and draw.chance(0.15):
        count = draw.one(2, 3)
        chances = rng.dirichlet(np.full(count, draw.one(0.2, 1.0, 10.0)), group_shape)
        groups["race"] = draw.tensor(chances / chances.sum(-1, keepdims=True))
    dtype = draw.one(torch.float64, torch.float64, torch.float64, torch.float32)
    values = draw_scores(draw, shape, np.broadcast_to(first, shape))
    scale = draw.one(1.0, 1.0, 1.0, 1.0, 1e-3, 1e4)
    scores = draw.tensor(values * scale, dtype)
    column = batch is None and draw.chance(0.05)
    scores = scores.unsqueeze(-1) if column else scores
    leaves["scores"] = scores
    soft = not hard and draw.chance(0.2)
    outcome = rng.random(shape) if soft else rng.integers(0, 2, shape).astype(float)
    targets = draw.tensor(outcome)
    targets = targets.unsqueeze(-1) if column else targets
    if soft:
        leaves["targets"] = targets
    weights = None
    if draw.chance(0.3):
        weights = draw.tensor(10.0 ** rng.uniform(-1, 1, n))
        if draw.chance(0.3):
            weights[torch.from_numpy(rng.random(n) < 0.1)] = 0.0
        if draw.chance(0.7):
            leaves["weights"] = weights
    limits = draw.one("both", "both", "both", "lower", "none", "samples", "tensors", "fixed")
    bounds: Any = {"both": (0, scale), "lower": (0.0, None), "none": None}.get(limits)
    if limits == "samples":
        low = 0.3 * rng.random(n)
        bounds = (draw.tensor(low * scale, dtype), draw.tensor((low + 0.6) * scale, dtype))
        leaves["lower"], leaves["upper"] = bounds
    elif limits == "tensors":
        bounds = (draw.tensor(0.0, dtype), draw.tensor(0.9 * scale, dtype))
        leaves["lower"], leaves["upper"] = bounds
    elif limits == "fixed":
        upper = np.where(rng.random(n) < 0.2, 0.25, 1.0) * scale
        bounds = (draw.tensor(np.full(n, 0.25 * scale), dtype), draw.tensor(upper, dtype))
    for leaf in leaves.values():
        leaf.requires_grad_()
    return Samples(scores, groups, targets, weights, bounds, leaves)


def count_of(groups: Tensor) -> int:
    """How many groups an attribute can have."""
    return groups.shape[-1] if groups.is_floating_point() else int(groups.max()) + 1


def draw_notion(draw: Draw, samples: Samples, kind: type[Constraint] | None = None) -> Constraint:
    """A notion of any kind with a parameter that may or may not be feasible."""
    kinds = (
        *PARITY, *PARITY, ConditionalParity, ImpactRatio, MinimumRate, Covariance,
        GroupCalibration, Budget,
    )  # fmt: skip
    kind = draw.one(*kinds) if kind is None else kind
    scale = float(samples.scores.detach().abs().max()) or 1.0
    names = [name for name in samples.groups if name != "age"]
    crossed = names
    while math.prod(count_of(samples.groups[name]) for name in crossed) > MOST_GROUPS:
        crossed = crossed[:-1]  # all pairs of hundreds of groups take minutes
    on = draw.one(None, None, names[0], names[-1], tuple(crossed))
    tolerance: Any = draw.one(0.0, 0.0, 1e-6, 0.01, 0.03, 0.05, 0.1, 0.3, math.inf) * scale
    if math.isfinite(tolerance) and draw.chance(0.25):
        tolerance = draw.tensor(tolerance)
        samples.leaves[f"tolerance {len(samples.leaves)}"] = tolerance.requires_grad_()
    if kind is MinimumRate:
        return MinimumRate(draw.one(0.1, 0.3, 0.45, 0.6) * scale, on)
    if kind is ImpactRatio:
        return ImpactRatio(draw.one(0.0, 0.6, 0.8, 0.95, 1.0), on)
    if kind is Budget:
        limits = draw.one(0.4 * scale, (0.2 * scale, 0.5 * scale), (None, 0.3 * scale))
        return Budget(mean=limits, on=draw.one(None, None, names[0]))
    if kind is Covariance:
        if "age" not in samples.groups:
            n = samples.scores.shape[-1] if samples.scores.dim() > 1 else len(samples.scores)
            n = len(samples.scores) if samples.scores.shape[-1:] == (1,) else n
            samples.groups["age"] = draw.tensor(20 + 50 * draw.rng.random(n))
        return Covariance(tolerance, "age", draw.one(None, None, names[0]))
    if kind is GroupCalibration:
        return GroupCalibration(tolerance, draw.one(2, 3, [0.3, 0.5]), on)
    if kind is ConditionalParity:
        return ConditionalParity(tolerance, on, draw.one("pairwise", "overall"), given=names[-1])
    if draw.chance(0.1) and isinstance(on, str):
        return kind(tolerance, on, "reference", reference=0)
    if draw.chance(0.1) and isinstance(on, tuple):
        return kind(tolerance, on, "reference", reference=(0,) * len(on))
    return kind(tolerance, on, draw.one("pairwise", "pairwise", "overall"))


def draw_notions(draw: Draw, samples: Samples) -> Constraint | list[Constraint]:
    count = draw.one(1, 1, 1, 2, 2, 3)
    found = [draw_notion(draw, samples) for _ in range(count)]
    return found[0] if count == 1 and draw.chance(0.5) else found


def bare(draw: Draw, groups: dict[str, Tensor], notions: object) -> Any:
    """The groups, without a name where there is one attribute that no notion names."""
    named = list(groups) != ["sex"] or "'sex'" in repr(notions) or draw.chance(0.5)
    return groups if named else groups["sex"]
