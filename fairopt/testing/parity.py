"""A layer of demographic parity for two groups, whose answer has a closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fairopt.backends import Backend
from fairopt.formulation.program import formulate
from fairopt.layer.module import FairnessLayer
from fairopt.notions.catalogue import DemographicParity
from fairopt.testing.judging import distance, expect
from fairopt.tolerances import AGREEMENT, GRADIENT_AGREEMENT

GROUPS = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1])
TOLERANCE = 0.05


def example(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(len(GROUPS), generator=generator, dtype=torch.float64)
    return (scores + 0.3 * GROUPS).to(dtype)


def parity(backend: Backend | str, dtype: torch.dtype) -> FairnessLayer:
    """A layer with this backend, which must be able to solve what it asks for."""
    constraint = DemographicParity(tolerance=TOLERANCE)
    if isinstance(backend, Backend):
        problem = formulate(constraint, example(dtype), GROUPS, bounds=None)
        missing = backend.capabilities.missing(problem)
        if missing is not None:
            pytest.skip(f"the backend does not solve {missing}, which parity on the CPU needs")
    return FairnessLayer(constraint, bounds=None, backend=backend)


def in_closed_form(layer: FairnessLayer, dtype: torch.dtype) -> None:
    """Two groups, no bounds: both are shifted until their means differ by the tolerance.

    With a the difference of the means as a row, x = s - a (a.s - tolerance) / a.a and the gradient
    is g - a (a.g) / a.a.
    """
    scores = example(dtype).requires_grad_()
    weights = [-1.0 / int((GROUPS == 0).sum()), 1.0 / int((GROUPS == 1).sum())]
    a = torch.tensor(weights, dtype=torch.float64)[GROUPS]
    g = torch.linspace(-1, 1, len(a), dtype=torch.float64)
    fair = layer(scores, GROUPS)
    (fair.double() * g).sum().backward()
    assert scores.grad is not None
    s = scores.detach().double()
    x = s - a * (a @ s - TOLERANCE) / (a @ a)
    for name, found, expected in (
        ("predictions", fair.detach(), x),
        ("gradient", scores.grad, g - a * (a @ g) / (a @ a)),
    ):
        gap = distance(found, expected)
        tolerance = (AGREEMENT if name == "predictions" else GRADIENT_AGREEMENT)[dtype]
        expect(gap <= tolerance, f"FairnessLayer: the {name} are off by {gap:.1e}")
