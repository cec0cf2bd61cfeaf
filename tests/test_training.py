"""Training through the layer: the same model comes out whatever the backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.training import STEPS, Training, capable
from fairopt import backends
from fairopt.backends import Adjoint, Numba
from fairopt.datasets import Adult, load_adult
from fairopt.programs.problem import QP
from fairopt.programs.solution import Solution


@pytest.fixture(scope="module")
def adult() -> Adult:
    return load_adult()


def trained(backend: str | Numba, adult: Adult, tolerance: float) -> Training:
    training = Training(backend, adult, tolerance=tolerance, batch_size=128)
    for _ in range(STEPS):
        training.step()
    return training


@pytest.fixture(scope="module")
def reference(adult: Adult) -> dict[float, Training]:
    return {tolerance: trained("numba", adult, tolerance) for tolerance in (0.05, 0.0)}


@pytest.mark.parametrize("backend", ["osqp", "qpth"])
@pytest.mark.parametrize("tolerance", [0.05, 0.0], ids=["tolerance 0.05", "equal means"])
def test_training_ends_at_the_same_loss(
    backend: str, tolerance: float, adult: Adult, reference: dict[float, Training]
) -> None:
    if backend not in backends.available():  # found, not imported: qpth would import CVXPY
        pytest.skip(f"the package {backend} is not installed")
    expected = reference[tolerance]
    assert sum(map(bool, expected.binding)) >= STEPS / 2, "else any backend would do"
    torch.set_num_threads(1)  # a second one is in the way where the machine is shared
    found = trained(backend, adult, tolerance)
    assert found.losses == pytest.approx(expected.losses, abs=1e-4, rel=0)
    assert found.losses[-1] < found.losses[0] - 0.1, "it has learnt"


def test_every_backend_that_can_is_measured(adult: Adult) -> None:
    names = capable(adult)
    assert "numba" in names
    assert "highs" not in names, "it solves linear programs"


class Deaf(Numba):
    """Gradients as if there were no rows."""

    def vjp(self, problem: QP, solution: Solution, grad_x: Tensor) -> Adjoint:
        adjoint = super().vjp(problem, solution, grad_x)
        free = (solution.x > problem.lb) & (solution.x < problem.ub)
        return replace(adjoint, v=-grad_x.double() * free)


def test_another_gradient_ends_at_another_loss(
    adult: Adult, reference: dict[float, Training]
) -> None:
    found = trained(Deaf(), adult, 0.05)
    assert abs(found.losses[-1] - reference[0.05].losses[-1]) > 1e-4
