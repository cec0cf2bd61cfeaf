"""Predictions of several classes: on the simplex, each notion for each class, one projection."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from agreeing import inputs_agree, skip_without
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fairopt import (
    QP,
    BlockRows,
    Budget,
    Constraint,
    ConvergenceError,
    Covariance,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    FairnessLayer,
    GroupCalibration,
    ImpactRatio,
    InfeasibleError,
    MeanResidual,
    MinimumRate,
    PredictiveEquality,
    ProblemError,
    UnsupportedProblemError,
    audit,
    cross_validate,
    formulate,
    project,
    residuals,
    solve,
)
from fairopt.backends import Numba, get
from fairopt.optimality.certificates import proves_infeasible
from fairopt.optimality.derivative import adjoint

NOTIONS = (DemographicParity, EqualOpportunity, PredictiveEquality, EqualizedOdds, MeanResidual)


@st.composite
def calls(
    draw: st.DrawFn, largest: int = 100, most_classes: int = 10, decades: int = 3
) -> tuple[Constraint, dict[str, Any]]:
    """A notion and the arguments of ``formulate``, the nasty ones included."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, draw(st.sampled_from([1, 2, 3, 5, 8, 13, 30, largest]))))
    C = draw(st.integers(2, most_classes))
    groups = rng.integers(0, draw(st.integers(1, 5)), n)
    kind = draw(
        st.sampled_from(["simplex", "uniform", "ties", "normal", "corners", "constant", "shifted"])
    )
    scale = 10.0 ** draw(st.integers(-6, 3)) if draw(st.booleans()) else 1.0
    scores = {
        "simplex": lambda: rng.dirichlet(np.full(C, 0.5), n),
        "uniform": lambda: rng.random((n, C)),
        "ties": lambda: rng.integers(0, 3, (n, C)) / 2.0,
        "normal": lambda: 3 * rng.normal(size=(n, C)),
        "corners": lambda: np.eye(C)[rng.integers(0, C, n)],
        "constant": lambda: np.full((n, C), 1.0 / C),
        "shifted": lambda: rng.random((n, C)) + 0.3 * np.eye(C)[groups % C],
    }[kind]() * scale
    weights = None
    if draw(st.booleans()):
        weights = torch.from_numpy(10.0 ** rng.uniform(-decades, decades, n))
        if draw(st.booleans()):
            weights[torch.from_numpy(rng.random(n) < 0.1)] = 0.0
    notion = draw(st.sampled_from(NOTIONS))
    tolerance = draw(st.sampled_from([0.0, 0.0, 1e-9, 1e-3, 0.01, 0.1, 0.5]))
    compare = draw(st.sampled_from(["pairwise", "overall"]))
    return notion(tolerance, None, compare), {
        "scores": torch.from_numpy(scores),
        "groups": torch.from_numpy(groups),
        "targets": torch.from_numpy(rng.integers(0, C, n)),
        "weights": weights,
        "classes": C,
        "bounds": (0, 1),
    }


def sample(n: int, C: int, G: int = 2, seed: int = 0, dtype: Any = torch.float64) -> Any:
    """Probabilities, groups and targets with gaps that bind."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(n) % G
    logits = torch.randn(n, C, generator=generator, dtype=torch.float64)
    logits = logits + torch.randn(G, C, generator=generator, dtype=torch.float64)[groups]
    targets = torch.randint(0, C, (n,), generator=generator)
    return logits.softmax(-1).to(dtype), groups, targets


# ---------------------------------------------------------------------------------------------
# What must hold
# ---------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(calls())
def test_every_answer_is_optimal_on_the_simplex_and_fair(call: Any) -> None:
    notion, arguments = call
    problem = formulate(notion, **arguments)
    solution = solve(problem, backend="numba")
    n, C = arguments["scores"].shape
    x = solution.x.view(n, C)
    assert (x >= 0).all()
    assert (x.sum(-1) - 1).abs().max() <= 1e-12
    found = residuals(problem, solution.x, solution.row_dual, solution.bound_dual)
    assert float(found.primal) <= 1e-12
    assert found.worst <= 1e-10, str(found)


@settings(max_examples=200)
@given(calls(largest=20, most_classes=5, decades=1))
def test_osqp_finds_the_same(call: Any) -> None:
    skip_without("osqp")
    notion, arguments = call
    problem = formulate(notion, **arguments)
    ours = solve(problem, backend="numba").x
    try:
        theirs = solve(problem, backend="osqp").x
    except ConvergenceError:
        assume(False)  # Hypothesis draws another one in its place: 200 are compared
    assert (ours - theirs).abs().max() <= 1e-7


@settings(max_examples=60)
@given(calls(largest=60))
def test_gaps_recomputed_by_hand_hold(call: Any) -> None:
    """Demographic parity and equal opportunity, from the predictions alone."""
    notion, arguments = call
    groups, targets, weights = (arguments[name] for name in ("groups", "targets", "weights"))
    weights = torch.ones(len(groups)).double() if weights is None else weights
    tolerance, C = notion.tolerance, arguments["classes"]
    for kind in (DemographicParity, EqualOpportunity):
        x = project(constraints=kind(tolerance), **arguments)
        for c in range(C):
            inside = weights.clone()
            if kind is EqualOpportunity:
                inside[targets != c] = 0.0
            means = []
            for g in groups.unique():
                mass = inside[groups == g]
                if mass.sum() > 0:
                    means.append(float((mass * x[groups == g, c]).sum() / mass.sum()))
            assert not means or max(means) - min(means) <= tolerance + 1e-9


@settings(max_examples=100)
@given(calls(most_classes=2, largest=60))
def test_two_classes_equal_the_binary_layer(call: Any) -> None:
    """|x_1 - s_1|^2 + |x_2 - s_2|^2 = 2 |x - (s_2 - s_1 + 1) / 2|^2 + a constant, x = x_2.

    Equal opportunity for both classes is, for two, equalized odds.
    """
    notion, arguments = call
    s = arguments["scores"]
    two = project(constraints=notion, **arguments)
    binary = {**arguments, "scores": (s[:, 1] - s[:, 0] + 1) / 2}
    binary["targets"] = arguments["targets"].double()
    del binary["classes"]
    if isinstance(notion, (EqualOpportunity, PredictiveEquality)):
        notion = EqualizedOdds(notion.tolerance, None, notion.compare)
    one = project(constraints=notion, **binary)
    kept = slice(None) if arguments["weights"] is None else arguments["weights"] > 0
    scale = max(1.0, float(s.abs().max()))
    gap = (two[:, 1] - one)[kept].abs()
    assert gap.numel() == 0 or float(gap.max()) <= 1e-9 * scale


def test_probabilities_of_two_classes_equal_the_binary_layer_with_gradients() -> None:
    p = sample(40, 2)[0][:, 1].clone().requires_grad_()
    groups = torch.arange(40) % 2
    both = FairnessLayer(DemographicParity(0.01), bounds=None, classes=2)(
        torch.stack([1 - p, p], -1), groups
    )
    one = FairnessLayer(DemographicParity(0.01), bounds=(0, 1))(p, groups)
    assert (both[:, 1] - one).abs().max() <= 1e-12
    g = torch.randn(40, generator=torch.Generator().manual_seed(1)).double()
    (a,) = torch.autograd.grad((both[:, 1] * g).sum(), p)
    (b,) = torch.autograd.grad((one * g).sum(), p)
    assert (a - b).abs().max() <= 1e-12


# ---------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notion", [*NOTIONS, ImpactRatio], ids=lambda n: n.__name__)
def test_gradcheck(notion: Any) -> None:
    scores, groups, targets = sample(12, 3, seed=3)
    scores.requires_grad_()
    tolerance = torch.tensor(0.8 if notion is ImpactRatio else 0.03, dtype=torch.float64)
    tolerance.requires_grad_()
    weights = (0.5 + torch.rand(12, generator=torch.Generator().manual_seed(2))).double()
    weights.requires_grad_()

    def layer(s: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return project(s, groups, notion(t), targets, bounds=(0, 1), weights=w, classes=3)

    assert torch.autograd.gradcheck(layer, (scores, tolerance, weights), eps=1e-7, atol=1e-5)


@settings(max_examples=100)
@given(calls(largest=20, most_classes=5), st.integers(0, 1000))
def test_our_adjoint_is_the_shared_one(call: Any, seed: int) -> None:
    notion, arguments = call
    problem = formulate(notion, **arguments)
    solution = solve(problem, backend="numba")
    g = torch.randn(problem.q.shape, generator=torch.Generator().manual_seed(seed)).double()
    ours = get("numba").vjp(problem, solution, g).v
    shared = adjoint(problem, solution, g).v
    d = problem.diagonal()
    # Where a class is at zero without a multiplier, to rounding, either may call it free.
    push = -(problem.q.double() + problem.rows.transpose_apply(solution.row_dual)) / d
    near = (push.abs() < 1e-9 * (1 + problem.q.double().abs().max())) & (solution.x.abs() < 1e-9)
    m = problem.rows.blocks[0]  # type: ignore[union-attr]
    y = solution.row_dual[:, :m]
    value = problem.rows.apply(solution.x)[:, :m]
    l, u = problem.l[:, :m], problem.u[:, :m]
    tied = ((y.abs() < 1e-9) & (torch.minimum(u - value, value - l) < 1e-9) & (l < u)).any()
    assume(not bool(near.any()) and not bool(tied))
    assert ((ours - shared) * d.sqrt()).abs().max() <= 1e-8 * (g / d.sqrt()).norm()


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    "notion",
    [
        DemographicParity(0.02), EqualOpportunity(0.02), EqualizedOdds(0.02), MeanResidual(0.02),
        GroupCalibration(0.05, bins=2), MinimumRate(0.28), Budget(mean=(0.32, 0.345)),
        ImpactRatio(0.9), Covariance(0.01, on="age"),
    ],
    ids=lambda n: type(n).__name__,
)  # fmt: skip
def test_all_capable_backends_agree(notion: Constraint, soft: bool) -> None:
    scores, sex, targets = sample(18, 3, seed=5)
    scores = (1.1 * scores).requires_grad_()  # sums that are 1 already have no multiplier
    groups: dict[str, Tensor] = {"sex": sex}
    if soft:
        groups["sex"] = 0.8 * torch.nn.functional.one_hot(sex).double() + 0.1
        targets = 0.7 * torch.nn.functional.one_hot(targets, 3).double() + 0.1
    if isinstance(notion, Covariance):
        groups["age"] = torch.rand(18, generator=torch.Generator().manual_seed(4)).double()
    weights = 0.5 + torch.rand(18, generator=torch.Generator().manual_seed(2)).double()
    problem = formulate(notion, scores, groups, targets, bounds=(0, 1), weights=weights, classes=3)
    agreement = cross_validate(problem, inputs={"scores": scores}, repeats=0)
    assert agreement.agree, str(agreement)
    moved = solve(problem).x.detach().view(18, 3) - scores.detach()
    assert moved.abs().max() > 1e-3  # or there was nothing to agree about


def test_a_batch_with_shared_groups_equals_its_problems() -> None:
    parts = [sample(14, 4, seed=s) for s in range(3)]
    scores = torch.stack([p[0] for p in parts]).requires_grad_()
    targets = torch.stack([p[2] for p in parts])
    groups = parts[0][1]
    tolerance = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    layer = FairnessLayer(EqualizedOdds(tolerance), bounds=(0, 1), classes=4)
    whole = layer(scores, groups, targets)
    assert whole.shape == (3, 14, 4)
    g = torch.randn(3, 14, 4, generator=torch.Generator().manual_seed(0)).double()
    together = torch.autograd.grad((whole * g).sum(), (scores, tolerance))
    total = torch.zeros(())
    for b in range(3):
        one = layer(scores[b], groups, targets[b])
        assert (one - whole[b]).abs().max() <= 1e-12
        alone = torch.autograd.grad((one * g[b]).sum(), (scores, tolerance))
        assert (alone[0][b] - together[0][b]).abs().max() <= 1e-10
        total = total + alone[1]
    assert float((total - together[1]).abs()) <= 1e-9 * float(1 + total.abs())


def test_a_large_batch_is_shared_by_threads_and_comes_out_the_same() -> None:
    scores = torch.stack([sample(1_000, 5, seed=s)[0] for s in range(9)])  # see tests/conftest.py
    groups = torch.arange(1_000) % 3
    problem = formulate(DemographicParity(0.01), scores, groups, bounds=(0, 1), classes=5)
    several, one = (solve(problem, backend=Numba(threads=t)) for t in (2, 1))
    assert torch.equal(several.x, one.x)
    assert torch.equal(several.row_dual, one.row_dual)


def test_backends_have_the_same_gradients_of_all_inputs() -> None:
    scores, groups, targets = sample(12, 3, seed=8)
    inputs = {
        "scores": scores.requires_grad_(),
        "tolerance": torch.tensor(0.02, dtype=torch.float64, requires_grad=True),
    }

    def by(backend: str) -> Tensor:
        notion = EqualizedOdds(inputs["tolerance"])
        return project(
            inputs["scores"], groups, notion, targets, bounds=(0, 1), backend=backend, classes=3
        )

    g = torch.randn(12, 3, generator=torch.Generator().manual_seed(6)).double()
    inputs_agree(by, inputs, g, ("numba", "osqp", "qpth"))


# ---------------------------------------------------------------------------------------------
# Semantics
# ---------------------------------------------------------------------------------------------


def test_rows_are_named_by_class() -> None:
    scores, groups, _ = sample(12, 3)
    targets = torch.arange(12) // 2 % 3
    problem = formulate(
        EqualOpportunity(0.1), scores, {"sex": groups}, targets, bounds=(0, 1), classes=3
    )
    assert problem.row_names[:3] == tuple(f"class {c} | sex: 0 vs 1 | y = 1" for c in range(3))
    assert problem.row_names[3] == "sample 0: the classes sum to 1"
    assert len(problem.row_names) == 3 + 12
    assert isinstance(problem.rows, BlockRows)


def test_a_class_that_a_group_lacks_is_skipped_by_name() -> None:
    scores, groups, _ = sample(6, 3)
    targets = torch.tensor([0, 0, 1, 2, 2, 0])  # class 1 in group 0 only, class 2 in both
    layer = FairnessLayer(EqualOpportunity(0.0), bounds=(0, 1), classes=3)
    layer(scores, groups, targets)
    assert layer.last is not None
    assert layer.last.skipped == ("class 1 | group: 0 vs 1 | y = 1: a group has no samples",)
    strict = FairnessLayer(EqualOpportunity(0.0), bounds=(0, 1), classes=3, missing_group="raise")
    with pytest.raises(ProblemError, match="lacks a group"):
        strict(scores, groups, targets)


def test_one_hot_and_chances_of_one_are_classes() -> None:
    scores, groups, targets = sample(12, 3)
    one_hot = torch.nn.functional.one_hot(targets, 3)
    layer = FairnessLayer(EqualizedOdds(0.01), bounds=None, classes=3)
    hard = layer(scores, groups, targets)
    assert torch.equal(layer(scores, groups, one_hot), hard)
    assert torch.equal(layer(scores, groups, one_hot.double()), hard)
    almost = one_hot.double().requires_grad_()  # chances with a history: sample by sample
    assert (layer(scores, groups, almost) - hard).abs().max() <= 1e-12


def test_scores_on_the_simplex_that_are_fair_stay() -> None:
    scores = torch.tensor([[0.25, 0.25, 0.5]]).double().expand(6, 3)
    fair = project(scores, torch.arange(6) % 2, DemographicParity(0.0), bounds=(0, 1), classes=3)
    assert (fair - scores).abs().max() <= 1e-15


def test_any_real_scores_are_projected() -> None:
    scores = torch.tensor([[3.0, 1.0, -2.0], [0.5, 0.7, 0.6]]).double()
    x = project(scores, torch.tensor([0, 0]), DemographicParity(0.0), bounds=None, classes=3)
    by_hand = torch.tensor([[1.0, 0.0, 0.0], [0.5 - 0.8 / 3, 0.7 - 0.8 / 3, 0.6 - 0.8 / 3]])
    assert (x - by_hand.double()).abs().max() <= 1e-7


def test_a_corner_that_all_samples_are_in() -> None:
    scores = 50.0 * torch.eye(4, dtype=torch.float64)[torch.full((9,), 2)]
    x = project(scores, torch.arange(9) % 3, DemographicParity(0.0), bounds=(0, 1), classes=4)
    assert torch.equal(x, torch.eye(4, dtype=torch.float64)[torch.full((9,), 2)])


def test_opposite_corners_meet_in_the_middle() -> None:
    """Two samples of two groups, each sure of another class: parity makes both even."""
    scores = torch.eye(2, dtype=torch.float64)
    x = project(scores, torch.tensor([0, 1]), DemographicParity(0.0), bounds=(0, 1), classes=2)
    assert (x - 0.5).abs().max() <= 1e-15


@pytest.mark.parametrize("backend", ["numba", "osqp", "qpth"])
def test_what_cannot_hold_is_proven(backend: str) -> None:
    skip_without(backend)
    scores, groups, _ = sample(8, 3)
    with pytest.raises(InfeasibleError, match="class 0") as caught:
        project(scores, groups, MinimumRate(0.4), bounds=(0, 1), backend=backend, classes=3)
    solution = caught.value.solution
    assert bool(proves_infeasible(solution.problem, solution.row_dual).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    scores, groups, targets = sample(30, 5, dtype=dtype)
    scores.requires_grad_()
    layer = FairnessLayer(EqualizedOdds(0.02), bounds=(0, 1), classes=5)
    x = layer(scores, groups, targets)
    assert x.dtype == dtype and x.shape == scores.shape
    wide = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-12}
    assert (x.double().sum(-1) - 1).abs().max() <= wide[dtype]
    assert (x >= 0).all()
    x.sum().backward()
    assert scores.grad is not None and scores.grad.dtype == dtype
    if dtype == torch.float32:
        assert layer.last is not None
        assert float(layer.last.residuals.primal) <= 1e-6


def test_many_classes_and_groups_in_single_precision() -> None:
    """As large as batches are: 100 rows of rank 36, each recomputed from what is returned."""
    scores, groups, targets = sample(4_000, 10, 5, dtype=torch.float32)
    for notion in (DemographicParity(0.0), DemographicParity(0.01), EqualizedOdds(0.02)):
        layer = FairnessLayer(notion, bounds=(0, 1), classes=10)
        x = layer(scores, groups, targets)
        assert layer.last is not None and max(layer.last.iterations) <= 40
        assert (x.double().sum(-1) - 1).abs().max() <= 1e-6 and (x >= 0).all()
        assert audit(x, groups, notion, targets, classes=10).holds
        assert layer.last.residuals.worst <= 1e-6


def test_weights_of_zero_only_project() -> None:
    scores, groups, _ = sample(10, 3)
    scores = scores * 2
    weights = torch.ones(10).double()
    weights[3] = 0.0
    x = project(scores, groups, DemographicParity(0.0), bounds=(0, 1), weights=weights, classes=3)
    alone = project(scores[3:4], groups[3:4], DemographicParity(0.0), bounds=(0, 1), classes=3)
    assert (x[3] - alone[0]).abs().max() <= 1e-15


def test_the_layer_says_how_many_classes() -> None:
    layer = FairnessLayer(DemographicParity(0.1), bounds=(0, 1), classes=3)
    assert "classes=3" in repr(layer)
    assert "classes" not in repr(FairnessLayer(DemographicParity(0.1), bounds=(0, 1)))


def test_the_audit_recomputes_every_class() -> None:
    scores, sex, targets = sample(60, 3, seed=2)
    notion = EqualizedOdds(0.02)
    before = audit(scores, {"sex": sex}, notion, targets, classes=3)
    assert not before.holds and len(before.rows) == 6
    for row in before.rows:
        c, y = int(row.name[6]), int(row.name[-1])
        inside = (targets == c) == bool(y)
        means = [scores[inside & (sex == g), c].mean() for g in (0, 1)]
        assert row.name == f"class {c} | sex: 0 vs 1 | y = {y}"
        assert row.value == pytest.approx(float(means[0] - means[1]), abs=1e-14)
        assert row.samples == min(int((inside & (sex == g)).sum()) for g in (0, 1))
    fair = project(scores, {"sex": sex}, notion, targets, bounds=(0, 1), classes=3)
    assert audit(fair, {"sex": sex}, notion, targets, classes=3).holds
    single = project(scores.float(), {"sex": sex}, notion, targets, bounds=(0, 1), classes=3)
    assert audit(single, {"sex": sex}, notion, targets, classes=3).holds
    assert before.groups == {"sex": {"0": 30.0, "1": 30.0}}
    with pytest.raises(ProblemError, match="one by one"):
        audit(scores[None], sex, notion, targets, classes=3)


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------

S = torch.full((4, 3), 1.0 / 3)
G = torch.arange(4) % 2
DP, EO = DemographicParity(0.1), EqualOpportunity(0.1)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "bounds": ({"bounds": (0, 2)}, r"bounds: with classes.*expected \(0, 1\) or None"),
    "a lower bound": ({"bounds": (0.1, 1)}, "point of the simplex"),
    "one class": ({"classes": 1}, "classes: expected a whole number of at least 2"),
    "classes by name": ({"classes": "three"}, "classes: expected a whole number"),
    "another number": ({"classes": 4}, r"scores: expected shape \(n, 4\).*got \(4, 3\)"),
    "one score": ({"scores": S[:, 0]}, r"scores: expected shape \(n, 3\)"),
    "integers": ({"scores": S.long()}, "scores: expected a floating-point tensor"),
    "a list": ({"scores": [[0.5, 0.5]]}, "scores: expected a tensor, got list"),
    "nothing": ({"scores": S[:0], "groups": G[:0]}, "at least one sample"),
    "NaN": ({"scores": S * torch.nan}, "scores: expected finite values"),
    "no targets": ({"constraints": EO}, "EqualOpportunity needs them, got none; pass the class"),
    "real targets": (
        {"constraints": EO, "targets": S[:, 0]},
        "targets: expected classes, integers",
    ),
    "a target too large": ({"constraints": EO, "targets": G + 2}, "classes from 0 to 2, got 3"),
    "a negative target": ({"constraints": EO, "targets": G - 1}, "classes from 0 to 2, got -1"),
    "too few targets": ({"constraints": EO, "targets": G[:3]}, r"targets: expected shape \(4,\)"),
    "chances beyond 1": ({"constraints": EO, "targets": 4 * S}, "chances of the classes from 0"),
    "chances that lack": ({"constraints": EO, "targets": 0.5 * S}, "sum to 1 for each sample"),
    "listed targets": ({"constraints": EO, "targets": [0, 1]}, "targets: expected a tensor"),
    "too few groups": ({"groups": G[:3]}, r"groups: expected shape \(4,\)"),
    "negative weights": ({"weights": -torch.ones(4)}, "weights: expected finite numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    changes, message = BAD[name]
    arguments: dict[str, Any] = {
        "scores": S, "groups": G, "constraints": DP, "bounds": (0, 1), "classes": 3, **changes,
    }  # fmt: skip
    with pytest.raises(ProblemError, match=message):
        project(**arguments)


def test_gradients_of_tolerances_of_large_batches_are_refused_not_tried() -> None:
    scores, groups, _ = sample(5_000, 6)
    tolerance = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    notion = DemographicParity(tolerance)
    x = project(scores, groups, notion, bounds=(0, 1), classes=6)
    with pytest.raises(UnsupportedProblemError, match="take them from smaller batches"):
        x[0, 0].backward()


def test_blocks_that_are_no_simplices_are_for_other_backends() -> None:
    rows = BlockRows(torch.zeros(1, 1, 2).double(), torch.zeros(3).long(), torch.ones(3).double())
    one = torch.ones(4, dtype=torch.float64)
    P, q = torch.ones(6).double(), torch.randn(6, generator=torch.Generator().manual_seed(0))
    sums = torch.tensor([0.0, 2.0, 1.0, 1.0]).double()
    problem = QP(P, q.double(), rows, sums, sums, 0.0)
    with pytest.raises(UnsupportedProblemError, match="on simplices only"):
        solve(problem, backend="numba")
    skip_without("osqp")
    assert (solve(problem).x.view(3, 2).sum(-1) - sums[1:]).abs().max() <= 1e-12
    low = torch.tensor([0.0, 1.0, 1.0, 1.0]).double()
    uneven = QP(P * torch.arange(1, 7), q.double(), rows, low, one, 0.0)
    with pytest.raises(UnsupportedProblemError, match="the same for all variables of a block"):
        solve(uneven, backend="numba")


def test_many_attributes_at_once() -> None:
    """So many combinations that a binary layer takes its rows over partitions."""
    torch.manual_seed(0)
    n, classes = 600, 3
    groups = {f"a{i}": torch.randint(0, 6, (n,)) for i in range(8)}
    shift = torch.stack([groups["a0"], groups["a1"], groups["a2"]], 1)
    scores = torch.softmax(torch.randn(n, classes).double() + 0.3 * shift, -1).requires_grad_()
    parity = DemographicParity(0.02, compare="overall")
    fair = project(scores, groups, parity, bounds=None, classes=classes)
    assert not audit(scores.detach(), groups, parity, classes=classes).holds
    assert audit(fair.detach(), groups, parity, classes=classes).holds
    assert (fair.sum(-1) - 1).abs().max() <= 1e-15
    assert fair.min() >= 0
    (gradient,) = torch.autograd.grad(fair.square().sum(), scores)
    assert gradient.sum(-1).abs().max() <= 1e-12  # along the simplex
