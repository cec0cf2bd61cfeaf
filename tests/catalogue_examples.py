"""People whom the tests of the catalogue share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SEX = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
RACE = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
Y = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0, 1, 0])
SCORES = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
WEIGHTS = torch.tensor([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], dtype=torch.float64)
AGE = torch.tensor([20.0, 30, 40, 50, 60, 20, 30, 40, 50, 60], dtype=torch.float64)
PEOPLE = {"sex": SEX, "race": RACE}


CHANCE = torch.tensor([0.9, 0.2, 0.7, 0.1, 0.6, 0.8, 0.3, 0.0, 1.0, 0.5], dtype=torch.float64)
MIXED = torch.stack([torch.linspace(0.05, 0.95, 10, dtype=torch.float64)] * 2, -1)
MIXED[:, 1] = 1 - MIXED[:, 0]


def soft_mean(x: Tensor, chance: Tensor) -> float:
    mass = math.fsum(chance.tolist())
    return math.fsum((chance * x).tolist()) / mass
