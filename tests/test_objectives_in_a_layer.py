"""Linear objectives in a layer: what is solved, shapes, dtypes, copies and refusals."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from objectives import INF, LINEAR, PAIR, PARITY, SCORES, Case, Linear, notions, numbers, value

from fairopt import (
    LP,
    QP,
    Budget,
    DemographicParity,
    FairnessLayer,
    InfeasibleError,
    ProblemError,
    UnboundedError,
    UnsupportedProblemError,
    backends,
    formulate,
    project,
    solve,
)
from fairopt.programs.rows.cells import CellRows
from fairopt.programs.rows.sparse import SparseRows

# ---------------------------------------------------------------------------------------------
# What is solved
# ---------------------------------------------------------------------------------------------


def test_programs_as_formulated() -> None:
    scores = SCORES.float()
    program = formulate(PARITY, scores, PAIR, bounds=(0, 1), objective="l1")
    assert isinstance(program, LP) and isinstance(program.rows, CellRows)
    assert program.shape == (1, 1, 8)
    assert program.c.dtype == torch.float64
    assert program.rows.to_dense().matrix[0].tolist() == [
        [0.5, 0.5, -0.5, -0.5, -0.5, -0.5, 0.5, 0.5]
    ]
    program = formulate(PARITY, scores, PAIR, bounds=(0, 1), objective="linf")
    assert isinstance(program, LP) and isinstance(program.rows, SparseRows)
    assert program.shape == (1, 9, 5)
    assert len(program.row_names) == 9
    program = formulate(PARITY, scores, PAIR, bounds=(0, 1), objective="utility")
    assert isinstance(program, LP) and isinstance(program.rows, CellRows)
    assert program.shape == (1, 1, 4)
    assert torch.equal(program.c[0], -scores)
    assert isinstance(formulate(PARITY, scores, PAIR, bounds=(0, 1), objective="l2"), QP)


@pytest.mark.parametrize("objective", LINEAR)
def test_the_layer_is_formulate_and_solve(objective: Linear) -> None:
    layer = FairnessLayer(PARITY, bounds=(0, 1), objective=objective, smoothing=0.2)
    x = layer(SCORES, PAIR)
    program = formulate(PARITY, SCORES, PAIR, bounds=(0, 1), objective=objective)
    z = solve(program, smoothing=0.2).x[0]
    assert layer.last is not None and torch.equal(layer.last.x[0], z)
    read = {
        "l1": lambda: SCORES + z[:4] - z[4:], "linf": lambda: SCORES + z[:4], "utility": lambda: z
    }  # fmt: skip
    assert torch.allclose(x, read[objective](), rtol=0, atol=1e-15)
    assert layer.last.residuals.worst <= 1e-9


def test_the_closed_form_serves_the_smoothed_ones() -> None:
    for objective in ("l1", "utility"):
        layer = FairnessLayer(PARITY, bounds=(0, 1), objective=objective, smoothing=0.2)
        layer(SCORES, PAIR)
        assert layer.last is not None and layer.last.backend == "numba"


def test_many_rows_are_not_for_the_closed_form() -> None:
    scores, groups = torch.rand(200).double(), torch.arange(200) % 2
    with pytest.raises(UnsupportedProblemError, match="is for few rows; expected at most 256"):
        project(
            scores, groups, PARITY, bounds=(0, 1), objective="linf", smoothing=0.1, backend="numba"
        )
    if backends.is_available("osqp"):
        project(scores, groups, PARITY, bounds=(0, 1), objective="linf", smoothing=0.1)


def test_without_a_solver_of_lps_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "is_available", lambda name: name == "numba")
    with pytest.raises(
        UnsupportedProblemError, match=r"give solve\(\.\.\., smoothing=.*fairopt\[highs\]"
    ):
        project(SCORES, PAIR, PARITY, bounds=(0, 1), objective="l1")
    project(SCORES, PAIR, PARITY, bounds=(0, 1), objective="l1", smoothing=0.1)


# ---------------------------------------------------------------------------------------------
# Shapes, dtypes, modules
# ---------------------------------------------------------------------------------------------


def layer_of(objective: Linear) -> FairnessLayer:
    also = [Budget(mean=(None, 0.4))] if objective == "utility" else []
    return FairnessLayer([PARITY, *also], bounds=(0, 1), objective=objective, smoothing=0.1)


@pytest.mark.parametrize("objective", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(12,), (12, 1), (3, 12)])
def test_shapes_and_dtypes(objective: Linear, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    scores = torch.rand(shape).mul(1.5).sub(0.2).to(dtype).requires_grad_()
    x = layer_of(objective)(scores, torch.arange(12) % 2)
    assert x.shape == scores.shape and x.dtype == dtype
    assert 0 <= x.min() and x.max() <= 1
    precision = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    flat = x.detach().double()
    flat = flat.reshape(-1, 12) if shape != (12, 1) else flat.mT
    gap = (flat[:, ::2].mean(-1) - flat[:, 1::2].mean(-1)).abs()
    assert bool((gap <= 0.1 + precision * (2 * flat.amax(-1) + 0.1)).all())
    x.float().square().sum().backward()
    assert scores.grad is not None and scores.grad.dtype == dtype
    assert bool(torch.isfinite(scores.grad).all()) and scores.grad.abs().max() > 0


@pytest.mark.parametrize("objective", LINEAR)
def test_autocast_and_grad_modes(objective: Linear) -> None:
    layer = layer_of(objective)
    groups = torch.arange(12) % 2
    scores = torch.rand(12)
    plain = layer(scores, groups)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(scores, groups), plain)
    with torch.no_grad():
        assert torch.equal(layer(scores.requires_grad_(), groups), plain)
    with torch.inference_mode():
        assert torch.equal(layer(scores.detach(), groups), plain)


@pytest.mark.parametrize("objective", LINEAR)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(objective: Linear, copied: Callable[[FairnessLayer], FairnessLayer]) -> None:
    layer = layer_of(objective)
    scores, groups = torch.rand(12, requires_grad=True), torch.arange(12) % 2
    x = layer(scores, groups)
    other = copied(layer)
    assert torch.equal(other(scores, groups), x)
    assert repr(other) == repr(layer)
    assert f"objective={objective!r}, smoothing=0.1" in repr(layer)


def test_a_tolerance_is_learned_through_l1() -> None:
    tolerance = torch.nn.Parameter(numbers(0.3)[0])
    layer = FairnessLayer(
        DemographicParity(tolerance=tolerance), bounds=(0, 1), objective="l1", smoothing=0.1
    )
    (layer(SCORES, PAIR) - SCORES).square().sum().backward()
    assert tolerance.grad is not None and float(tolerance.grad) < -0.1  # looser costs less


@pytest.mark.parametrize("objective", LINEAR)
def test_a_sample_of_weight_zero_is_only_clipped(objective: Linear) -> None:
    scores = torch.cat([SCORES, numbers(1.7, 0.4)])
    weights = numbers(1, 1, 1, 1, 0, 0)
    groups = torch.cat([PAIR, PAIR[:2]])
    options: Any = {"bounds": (0, 1), "objective": objective, "smoothing": 0.1}
    x = project(scores, groups, PARITY, weights=weights, **options)
    alone = project(SCORES, PAIR, PARITY, **options)
    assert torch.allclose(x[:4], alone, rtol=0, atol=1e-12)
    if objective != "utility":
        assert x[4:].tolist() == [1, 0.4]
        if backends.is_available("highs"):
            options["smoothing"] = 0.0
            assert project(scores, groups, PARITY, weights=weights, **options)[4:].tolist() == [
                1, 0.4,
            ]  # fmt: skip


@pytest.mark.usefixtures("_highs")
def test_a_weight_of_two_is_two_samples() -> None:
    scores, groups = torch.rand(10, dtype=torch.float64), torch.arange(10) % 2
    weights = torch.ones(10, dtype=torch.float64)
    weights[:3] = 2
    for objective in LINEAR:
        case = Case(scores[None], groups, weights, (0, 1), 0.02, (-INF, INF))
        twice = Case(
            torch.cat([scores, scores[:3]])[None], torch.cat([groups, groups[:3]]), None, (0, 1),
            0.02, (-INF, INF),
        )  # fmt: skip
        values = [
            float(value(c, objective, project(
                c.scores, c.groups, notions(c, objective), bounds=c.bounds, weights=c.weights,
                objective=objective,
            )))
            for c in (case, twice)
        ]  # fmt: skip
        assert values[0] == pytest.approx(values[1], rel=1e-12)


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["L1", "l3", "", None, 2, ["l1"], torch.zeros(2)])
def test_an_unknown_objective(objective: Any) -> None:
    message = r"objective: expected one of 'l2', 'l1', 'linf', 'utility', got"
    with pytest.raises(ProblemError, match=message):
        FairnessLayer(PARITY, bounds=(0, 1), objective=objective)
    with pytest.raises(ProblemError, match=message):
        project(SCORES, PAIR, PARITY, bounds=(0, 1), objective=objective)
    with pytest.raises(ProblemError, match=message):
        formulate(PARITY, SCORES, PAIR, bounds=(0, 1), objective=objective)


@pytest.mark.parametrize("smoothing", [-1, -1e-9, math.nan, INF, "0.1", None, True])
def test_a_smoothing_that_is_none(smoothing: Any) -> None:
    message = "smoothing: expected 0 for none or a positive finite number, got"
    with pytest.raises(ProblemError, match=message):
        FairnessLayer(PARITY, bounds=(0, 1), objective="l1", smoothing=smoothing)
    with pytest.raises(ProblemError, match=message):
        project(SCORES, PAIR, PARITY, bounds=(0, 1), objective="l1", smoothing=smoothing)


def test_smoothing_of_the_distance() -> None:
    message = r"smoothing: expected 0 with objective='l2', which is a QP and needs none, got 0\.1"
    with pytest.raises(ProblemError, match=message):
        FairnessLayer(PARITY, bounds=(0, 1), smoothing=0.1)
    with pytest.raises(ProblemError, match=message):
        project(SCORES, PAIR, PARITY, bounds=(0, 1), smoothing=0.1)
    layer = FairnessLayer(PARITY, bounds=(0, 1))
    layer.smoothing = 0.1
    with pytest.raises(ProblemError, match=message):
        layer(SCORES, PAIR)


@pytest.mark.usefixtures("_highs")
def test_utility_without_an_end() -> None:
    with pytest.raises(UnboundedError, match="bound the variables"):
        project(SCORES, PAIR, PARITY, bounds=None, objective="utility")
    x = project(SCORES, PAIR, PARITY, bounds=None, objective="utility", smoothing=1.0)
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("objective", LINEAR)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.usefixtures("_highs")
def test_rows_in_conflict_are_named(objective: Linear, smoothing: float) -> None:
    lower = numbers(0.6, 0.6, 0, 0)
    upper = numbers(1, 1, 0.3, 0.3)
    with pytest.raises(InfeasibleError) as caught:
        project(
            SCORES, PAIR, PARITY, bounds=(lower, upper), objective=objective, smoothing=smoothing
        )
    assert "group: 0 vs 1" in caught.value.rows
