"""Linear objectives: optimal by an LP written independently, differentiable with smoothing, exact
after they were read back into predictions."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from agreeing import QUADRATIC, inputs_agree
from hypothesis import given
from hypothesis import strategies as st
from objectives import INF, LINEAR, PAIR, PARITY, SCORES, Case, Linear, notions, numbers, value
from torch import Tensor

from fairopt import (
    Budget,
    ConvergenceError,
    Covariance,
    DemographicParity,
    EqualizedOdds,
    FairnessLayer,
    ImpactRatio,
    MeanResidual,
    MinimumRate,
    NotDifferentiableError,
    backends,
    formulate,
    project,
)
from fairopt.backends import Backend
from fairopt.formulation import objectives
from fairopt.programs.solution import RowValues

# ---------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "value"), [("l1", 1.0), ("linf", 0.25)])
@pytest.mark.usefixtures("_highs")
def test_by_hand_changes(objective: Linear, value: float) -> None:
    """The gap of 0.6 must fall by 0.5; a change of one sample moves it by half of itself, so 1 in
    total; if all four move alike, 0.25 each."""
    x = project(SCORES, PAIR, PARITY, bounds=(0, 1), objective=objective)
    change = (x - SCORES).abs()
    assert float(change.sum() if objective == "l1" else change.max()) == pytest.approx(value)
    means = x[:2].mean(), x[2:].mean()
    assert float(means[0] - means[1]) == pytest.approx(0.1, abs=1e-15)


@pytest.mark.usefixtures("_highs")
def test_by_hand_utility() -> None:
    """Two of four under parity of the selection rates: the best of each group."""
    x = project(
        SCORES, PAIR, [DemographicParity(tolerance=0.0), Budget(total=2.0)],
        bounds=(0, 1), objective="utility",
    )  # fmt: skip
    assert x.tolist() == pytest.approx([1, 0, 1, 0], abs=1e-15)
    # With a tolerance of 0.5 one selection may move from the second group to the first.
    x = project(
        SCORES, PAIR, [DemographicParity(tolerance=0.5), Budget(total=2.0)],
        bounds=(0, 1), objective="utility",
    )  # fmt: skip
    assert x.tolist() == pytest.approx([1, 0.5, 0.5, 0], abs=1e-15)


def test_by_hand_smoothed() -> None:
    """ "l1" moves by a threshold: of |d| + d^2 / 2 s, all that move move alike."""
    x = project(SCORES, PAIR, PARITY, bounds=(0, 1), objective="l1", smoothing=0.5)
    assert x.tolist() == pytest.approx([0.65, 0.45, 0.55, 0.35], abs=1e-14)
    # "utility" is the projection of scores / s.
    x = project(SCORES, PAIR, PARITY, bounds=(0, 1), objective="utility", smoothing=2.0)
    near = project(SCORES / 2, PAIR, PARITY, bounds=(0, 1))
    assert torch.allclose(x, near, rtol=0, atol=1e-15)


@pytest.mark.parametrize("objective", ["l1", "linf"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.usefixtures("_highs")
def test_scores_that_hold_stay_as_they_are(objective: Linear, smoothing: float) -> None:
    scores = numbers(0.31, 0.29, 0.3, 0.28)
    x = project(scores, PAIR, PARITY, bounds=(0, 1), objective=objective, smoothing=smoothing)
    assert torch.equal(x, scores)


@pytest.mark.usefixtures("_highs")
def test_zero_change_with_a_row_that_is_met_exactly() -> None:
    """The optimum of the program is exactly zero, and so are the sides of its row."""
    scores = numbers(0.5, 0.25, 0.5, 0.25)
    zero = DemographicParity(tolerance=0.0)
    for name in ("highs", *QUADRATIC):
        if backends.is_available(name):
            for objective in ("l1", "linf"):
                smoothing = 0.1 if name in QUADRATIC else 0.0
                x = project(
                    scores, PAIR, zero, bounds=(0, 1), objective=objective, smoothing=smoothing,
                    backend=name,
                )  # fmt: skip
                assert torch.equal(x, scores), (name, objective)


@pytest.mark.usefixtures("_highs")
def test_a_change_that_the_bounds_force_gives_the_others_room() -> None:
    scores = numbers(1.4, 0.7, 0.3, 0.1)
    x = project(scores, PAIR, PARITY, bounds=(0, 1), objective="linf")
    assert float((x - scores).abs().max()) == pytest.approx(0.4, abs=1e-15)
    x = project(scores, PAIR, PARITY, bounds=(0, 1), objective="linf", smoothing=1e-3)
    assert float((x - scores).abs().max()) == pytest.approx(0.4, abs=1e-15)
    # Without the first, which may not move further down, the others share what parity needs.
    assert (x - scores.clamp(0, 1)).tolist() == pytest.approx([0, -1.1 / 3, 1.1 / 3, 1.1 / 3])


# ---------------------------------------------------------------------------------------------
# The optimum, by HiGHS on a program in x written here
# ---------------------------------------------------------------------------------------------


def bounds_of(kind: str, rng: np.random.Generator, batch: int, n: int) -> Any:
    low, high = rng.uniform(-0.2, 0.3, n), rng.uniform(0.5, 1.2, (batch, n))
    return {
        "none": None,
        "unit": (0, 1),
        "lower": (0.1, None),
        "upper": (None, 0.8),
        "each": (torch.from_numpy(low), torch.from_numpy(high)),
        "mixed": (
            torch.from_numpy(np.where(rng.random(n) < 0.3, -INF, low)),
            torch.from_numpy(np.where(rng.random((batch, n)) < 0.3, INF, high)),
        ),
    }[kind]


@st.composite
def cases(draw: st.DrawFn, kinds: tuple[str, ...]) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, groups = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    n = draw(st.integers(groups, 14))
    code = np.concatenate([np.arange(groups), rng.integers(0, groups, n - groups)])
    scores = rng.uniform(-0.5, 1.5, (batch, n))
    if draw(st.booleans()):
        scores = np.round(4 * scores) / 4  # ties
    weights = None
    if draw(st.booleans()):
        # Multiples of a tenth; those of weight zero leave their group with the first sample.
        weights = torch.from_numpy(rng.integers(0, 20, n) / 10)
        weights[:groups] += 0.1
    return Case(
        torch.from_numpy(scores),
        torch.from_numpy(code),
        weights,
        bounds_of(draw(st.sampled_from(kinds)), rng, batch, n),
        draw(st.sampled_from([0.0, 0.01, 0.1, 0.3])),
        draw(st.sampled_from([(-INF, 0.45), (0.4, 0.4), (-INF, INF)])),
    )


def limits(case: Case) -> tuple[np.ndarray, np.ndarray]:
    low, high = (None, None) if case.bounds is None else case.bounds
    like = np.zeros(case.scores.shape)
    return (
        like + np.asarray(-INF if low is None else low),
        like + np.asarray(INF if high is None else high),
    )


def optimum(case: Case, objective: Linear, b: int) -> float:
    """HiGHS's, of the LP in x and what bounds the changes."""
    from scipy.optimize import linprog

    s, code = case.scores[b].numpy(), case.groups.numpy()
    n = len(s)
    w = np.ones(n) if case.weights is None else case.weights.numpy()
    low, high = (bound[b] for bound in limits(case))
    means = [np.where(code == g, w, 0) / w[code == g].sum() for g in range(code.max() + 1)]
    rows: list[np.ndarray] = []
    sides: list[float] = []
    for one, other in combinations(means, 2):
        rows += [one - other, other - one]
        sides += [case.tolerance] * 2
    extra = {"l1": n, "linf": 1, "utility": 0}[objective]
    if objective == "utility":
        for sign, side in zip((1, -1), (case.mean[1], -case.mean[0]), strict=True):
            if math.isfinite(side):
                rows.append(sign * w / w.sum())
                sides.append(side)
        cost = -w * s
    else:
        cost = np.concatenate([np.zeros(n), w if objective == "l1" else [1.0]])
    A = np.hstack([np.array(rows), np.zeros((len(rows), extra))])
    if extra:
        eye = np.eye(n)[w > 0]
        size = np.eye(n)[w > 0] if objective == "l1" else np.ones((len(eye), 1))
        A = np.vstack([A, np.hstack([eye, -size]), np.hstack([-eye, -size])])
        sides = [*sides, *s[w > 0], *-s[w > 0]]
    found = linprog(
        cost, A_ub=A, b_ub=sides,
        bounds=[*zip(low, high, strict=True)] + [(0, None)] * extra,
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )  # fmt: skip
    assert found.status == 0, found.message
    return float(found.fun)


def check_guarantee(case: Case, x: Tensor, precision: float = 1e-12) -> None:
    """Parity and bounds, recomputed in float64 from what was returned."""
    low, high = (torch.from_numpy(bound) for bound in limits(case))
    x = x.double()
    assert bool(((x >= low) & (x <= high)).all())
    w = torch.ones_like(x) if case.weights is None else case.weights.expand_as(x)
    means = torch.stack(
        [
            (w * x)[:, case.groups == g].sum(-1) / w[:, case.groups == g].sum(-1)
            for g in range(int(case.groups.max()) + 1)
        ]
    )
    gap = means.amax(0) - means.amin(0)
    scale = 2 * x.abs().amax(-1) + case.tolerance
    assert bool((gap <= case.tolerance + precision * scale + 1e-16).all())


EVERY = ("none", "unit", "lower", "upper", "each", "mixed")


@pytest.mark.parametrize("objective", ["l1", "linf"])
@given(case=cases(EVERY))
@pytest.mark.usefixtures("_highs")
def test_least_change_is_highs_optimum(objective: Linear, case: Case) -> None:
    x = project(
        case.scores, case.groups, notions(case, objective), bounds=case.bounds,
        weights=case.weights, objective=objective,
    )  # fmt: skip
    check_guarantee(case, x)
    found = value(case, objective, x)
    for b in range(len(x)):
        best = optimum(case, objective, b)
        assert abs(float(found[b]) - best) <= 1e-8 * max(1e-3, abs(best))


@given(case=cases(("unit", "each")))
@pytest.mark.usefixtures("_highs")
def test_utility_is_highs_optimum(case: Case) -> None:
    x = project(
        case.scores, case.groups, notions(case, "utility"), bounds=case.bounds,
        weights=case.weights, objective="utility",
    )  # fmt: skip
    check_guarantee(case, x)
    found = value(case, "utility", x)
    for b in range(len(x)):
        best = optimum(case, "utility", b)
        assert abs(float(found[b]) - best) <= 1e-8 * max(1e-3, abs(best))


@pytest.mark.parametrize("objective", LINEAR)
@given(case=cases(("unit", "each")))
@pytest.mark.usefixtures("_highs")
def test_small_smoothing_finds_an_optimum(objective: Linear, case: Case) -> None:
    """The finite perturbation property; with the dependencies that fairopt always has."""
    x = project(
        case.scores, case.groups, notions(case, objective), bounds=case.bounds,
        weights=case.weights, objective=objective, smoothing=1e-5, backend="numba",
    )  # fmt: skip
    check_guarantee(case, x)
    found = value(case, objective, x)
    for b in range(len(x)):
        best = optimum(case, objective, b)
        assert abs(float(found[b]) - best) <= 1e-8 * max(1.0, abs(best))


@pytest.mark.parametrize("objective", LINEAR)
@given(case=cases(EVERY))
def test_the_guarantee_holds_with_any_smoothing(objective: Linear, case: Case) -> None:
    for smoothing in (1e-6, 1e-3, 1.0):
        for dtype, precision in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            x = project(
                case.scores.to(dtype), case.groups, notions(case, objective), bounds=case.bounds,
                weights=None if case.weights is None else case.weights.to(dtype),
                objective=objective, smoothing=smoothing, backend="numba",
            )  # fmt: skip
            assert x.dtype == dtype
            check_guarantee(case, x, precision)


@pytest.mark.usefixtures("_highs")
def test_rows_that_the_clipped_scores_meet_but_for_rounding() -> None:
    """(0.7 * 1 + 1.1 * 0.1) / 1.8 is 0.45, and 0.75 less that is 0.3, each with its rounding."""
    met = (numbers(0.75, 1.0, 0.0), numbers(0.6, 0.7, 1.1), 0.3, (0.1, None))
    clipped = (numbers(0.04, -0.42, -0.47), numbers(1.3, 0.4, 1.6), 0.0, (0.1, None))
    for scores, weights, tolerance, bounds in (met, clipped):
        for objective, smoothing in (("l1", 0.0), ("linf", 0.0), ("l1", 0.1), ("linf", 0.1)):
            x = project(
                scores, torch.tensor([0, 1, 1]), DemographicParity(tolerance=tolerance),
                bounds=bounds, weights=weights, objective=objective, smoothing=smoothing,
            )  # fmt: skip
            near = scores.clamp(min=0.1)
            largest = (x - scores).abs().max() - (near - scores).abs().max()
            assert abs(float(largest)) <= 1e-15
            if objective == "l1" or smoothing:  # else all may move as far as one must
                assert torch.equal(x, near)


def test_little_smoothing_does_not_stall() -> None:
    """Rounding of -c/s once made the values jump: a fifth of these found no point."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        n, groups = 300, 2 + seed % 3
        code = torch.arange(n) % groups
        scores = torch.rand(n, generator=generator, dtype=torch.float64) + 0.2 * code
        weights = 0.1 + torch.rand(n, generator=generator, dtype=torch.float64)
        for smoothing in (1e-6, 1e-8):
            x = project(
                scores, code, [PARITY, Budget(mean=(None, 0.3))], bounds=(0, 1), weights=weights,
                objective="utility", smoothing=smoothing, backend="numba",
            )  # fmt: skip
            assert float((weights * x).sum() / weights.sum()) == pytest.approx(0.3)


@pytest.mark.parametrize("objective", ["l1", "linf"])
@pytest.mark.usefixtures("_highs")
def test_scores_far_outside_the_bounds_cost_no_digits(objective: Linear) -> None:
    generator = torch.Generator().manual_seed(5)
    scores = 1e8 * torch.randn(40, generator=generator, dtype=torch.float64)
    scores[::3] = torch.rand(14, generator=generator, dtype=torch.float64)
    groups = torch.arange(40) % 2
    case = Case(scores[None], groups, None, (0, 1), 0.01, (-INF, INF))
    for options in ({}, {"smoothing": 0.1}):
        x = project(scores, groups, notions(case, objective), bounds=(0, 1), objective=objective,
                    **options)  # fmt: skip
        check_guarantee(case, x[None])


@given(case=cases(("none", "unit")))
def test_predictions_far_smaller_than_the_scores(case: Case) -> None:
    """1e8 + change has no digit left at 1e-9, where the rows ask for that."""
    scores = 1e8 * case.scores
    for bounds in (None, (-1e-8, 1e-8)):
        x = project(
            scores, case.groups, [Budget(total=1e-9, on="group")], bounds=bounds, objective="l1",
            smoothing=0.1,
        )  # fmt: skip
        for g in range(int(case.groups.max()) + 1):
            total = x[:, case.groups == g].sum(-1)
            size = (case.groups == g).sum() * x.abs().amax(-1) + 1e-9
            assert bool(((total - 1e-9).abs() <= 1e-12 * size).all())


def test_predictions_that_miss_the_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "refine", lambda problem, x, y: (x, y))
    with pytest.raises(ConvergenceError, match=r"a row exceeds its side by .*; the scores may be"):
        project(
            numbers(1e8 + 0.1, -1e8 - 0.3), torch.arange(2), Budget(total=1e-9, on="group"),
            bounds=None, objective="l1", smoothing=0.1,
        )  # fmt: skip


def test_a_group_that_goes_to_zero() -> None:
    """The least change brings all to 0; 1 - (1 - rounding) is not 0, and nothing is large."""
    scores = numbers(-0.3287, -0.0264, 1.1025)
    for smoothing in (1e-8, 1e-3):
        x = project(
            scores, torch.arange(3), DemographicParity(tolerance=0.0), bounds=(0, 1),
            objective="l1", smoothing=smoothing,
        )  # fmt: skip
        assert torch.equal(x, torch.zeros_like(x))


# ---------------------------------------------------------------------------------------------
# Backends and gradients
# ---------------------------------------------------------------------------------------------


def inputs(n: int = 24, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "scores": 1.2 * rand(2, n) - 0.2 + 0.3 * (torch.arange(n) % 3 == 0),
        "tolerance": numbers(0.05)[0],
        "lower": 0.2 * rand(n) - 0.05,
        "upper": 0.7 + 0.4 * rand(2, n),
        "weights": 0.5 + rand(n),
    }


def answer(objective: Linear, backend: str | Backend, smoothing: float, given: dict[str, Tensor]
           ) -> Tensor:  # fmt: skip
    n = given["scores"].shape[-1]
    also = [Budget(mean=(None, 0.3))] if objective == "utility" else []
    return project(
        given["scores"], torch.arange(n) % 3,
        [DemographicParity(tolerance=given["tolerance"]), *also],
        bounds=(given["lower"], given["upper"]), weights=given["weights"],
        objective=objective, smoothing=smoothing, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("objective", LINEAR)
@pytest.mark.parametrize("smoothing", [0.05, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_capable_backends_agree(objective: Linear, smoothing: float, seed: int) -> None:
    given = {name: tensor.requires_grad_() for name, tensor in inputs(seed=seed).items()}
    able = [name for name in QUADRATIC if backends.is_available(name)]
    g = torch.randn(given["scores"].shape, generator=torch.Generator().manual_seed(1)).double()
    grads = inputs_agree(lambda name: answer(objective, name, smoothing, given), given, g, able)
    assert max(grad.abs().max() for grad in grads.values()) > 1e-3


@pytest.mark.parametrize("objective", LINEAR)
@pytest.mark.parametrize("name", inputs())
def test_gradcheck(objective: Linear, name: str) -> None:
    plain = inputs(n=9, seed=4)

    def of(value: Tensor) -> Tensor:
        return answer(objective, "numba", 0.3, {**plain, name: value})

    variable = plain[name].clone().requires_grad_()
    assert torch.autograd.gradcheck(of, (variable,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", LINEAR)
def test_gradcheck_of_targets(objective: Linear) -> None:
    scores = inputs(n=9, seed=4)["scores"]

    def of(targets: Tensor) -> Tensor:
        return project(
            scores, torch.arange(9) % 2, MeanResidual(tolerance=0.02), targets, bounds=(-1, 2),
            objective=objective, smoothing=0.4,
        )  # fmt: skip

    targets = torch.rand(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (targets,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", LINEAR)
def test_a_parameter_that_the_batch_shares_gets_the_sum(objective: Linear) -> None:
    given = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    answer(objective, "numba", 0.3, given).square().sum().backward()
    for name in ("tolerance", "lower", "weights"):
        parts = []
        for b in (0, 1):
            one = {
                k: (t.detach()[b] if t.dim() == 2 else t.detach()).requires_grad_()
                for k, t in given.items()
            }
            answer(objective, "numba", 0.3, one).square().sum().backward()
            parts.append(one[name].grad)
        assert torch.allclose(given[name].grad, parts[0] + parts[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", LINEAR)
@pytest.mark.usefixtures("_highs")
def test_without_smoothing_there_is_no_gradient(objective: Linear) -> None:
    scores = SCORES.clone().requires_grad_()
    layer = FairnessLayer(PARITY, bounds=(0, 1), objective=objective)
    with pytest.raises(NotDifferentiableError, match=r"pass smoothing=.*torch\.no_grad"):
        layer(scores, PAIR)
    assert layer.last is None
    with torch.no_grad():
        x = layer(scores, PAIR)
    assert not x.requires_grad
    assert torch.equal(x, layer(scores.detach(), PAIR))


@pytest.mark.parametrize("objective", LINEAR)
def test_dense_rows(objective: Linear) -> None:
    """Soft groups and a continuous attribute: no cells."""
    n = 20
    chance = torch.rand(n, dtype=torch.float64)
    groups = {
        "group": torch.stack([chance, 1 - chance], -1), "age": torch.randn(n, dtype=torch.float64)
    }  # fmt: skip
    scores = (0.2 + 0.6 * chance).requires_grad_()
    given = {"scores": scores}
    constraints = [PARITY, Covariance(0.01, on="age")]

    def by(backend: str) -> Tensor:
        return project(
            scores, groups, constraints, bounds=(0, 1), objective=objective, smoothing=0.2,
            backend=backend,
        )  # fmt: skip

    inputs_agree(by, given, torch.randn(n).double(), [b for b in QUADRATIC if b in
                                                      backends.available()])  # fmt: skip
    if backends.is_available("highs"):
        plain = project(scores.detach(), groups, constraints, bounds=(0, 1), objective=objective)
        problem = formulate(constraints, scores.detach(), groups, bounds=(0, 1))
        assert bool((RowValues.at(problem, plain[None]).relative <= 1e-12).all())


@pytest.mark.parametrize("objective", LINEAR)
@pytest.mark.parametrize(
    "constraints",
    [
        [EqualizedOdds(tolerance=0.05)],
        [ImpactRatio(threshold=0.8), MinimumRate(0.2)],
        [DemographicParity(tolerance=0.02, compare="overall"), Budget(mean=0.4)],
    ],
    ids=lambda c: type(c[0]).__name__,
)
def test_other_notions(objective: Linear, constraints: list[Any]) -> None:
    scores, groups = torch.rand(30, dtype=torch.float64), torch.arange(30) % 3
    scores = (0.5 * scores + 0.2 * groups).requires_grad_()
    targets = (torch.arange(30) % 2).double()
    x = project(
        scores, groups, constraints, targets, bounds=(0, 1), objective=objective, smoothing=0.1
    )
    problem = formulate(constraints, scores.detach(), groups, targets, bounds=(0, 1))
    assert bool((RowValues.at(problem, x[None].detach()).relative <= 1e-12).all())
    x.square().sum().backward()
    assert scores.grad is not None and bool(torch.isfinite(scores.grad).all())
