"""A layer with a stream: projection while training and for large batches, the stream below.

And ``OnlineParity.count``, by which a stream knows of predictions that it did not serve.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairopt import (
    Constraint,
    Covariance,
    DemographicParity,
    EqualizedOdds,
    FairnessLayer,
    GroupCalibration,
    InfeasibleError,
    MeanResidual,
    MinimumRate,
    OnlineParity,
    ProblemError,
    audit,
    project,
)

PARITY = DemographicParity(0.05)
ODDS = EqualizedOdds(0.05)
MINIMUM = 50
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layer_of(notion: Constraint | list[Constraint] = PARITY, **changes: Any) -> FairnessLayer:
    """A layer with its stream, ready to serve."""
    online = changes.pop("online", None) or OnlineParity(
        notion, bounds=(0, 1), **changes.pop("stream", {})
    )
    options = {"bounds": (0, 1), "minimum_batch": MINIMUM, "online": online, **changes}
    return FairnessLayer(notion, **options).eval()


def sample(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores with a gap of about 0.23, and groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = (torch.rand(n, generator=generator) < 0.3).long()
    return (torch.rand(n, generator=generator, dtype=torch.float64) + 0.3 * groups) / 1.3, groups


def state_of(stream: OnlineParity) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stream.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows_of(stream: OnlineParity) -> list[float]:
    return [row.value for row in stream.report().rows]


def audited(x: Tensor, groups: Any, notion: Any, targets: Tensor | None = None, **more: Any) -> Any:
    return pytest.approx([row.value for row in audit(x, groups, notion, targets, **more).rows],
                         abs=1e-13)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Which of them serves
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, MINIMUM - 1, MINIMUM, 300])
def test_in_training_every_batch_is_projected_and_the_stream_stays(n: int) -> None:
    layer, plain = layer_of().train(), FairnessLayer(PARITY, bounds=(0, 1))
    before = state_of(layer.online)
    results = []
    for each in (layer, plain):
        scores, groups = sample(n)
        fair = each(scores.requires_grad_(), groups)
        fair.square().sum().backward()
        results.append((fair.detach(), scores.grad, each.last.row_dual))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)
    assert same_state(before, state_of(layer.online))


@pytest.mark.parametrize("feedback", ["pooled", "hard", "batch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_eval_mode_the_size_decides_and_all_is_counted(
    dtype: torch.dtype, feedback: str
) -> None:
    """The same numbers as project, OnlineParity and count called by hand; audit finds the same."""
    layer = layer_of(stream={"feedback": feedback})
    by_hand = OnlineParity(PARITY, bounds=(0, 1), feedback=feedback)
    scores, groups = sample(700)
    scores, first = scores.to(dtype), 0
    served = []
    for size in (1, 2, MINIMUM - 1, MINIMUM, 1, 200, 7, 390):
        s, g = scores[first : first + size], groups[first : first + size]
        x = layer(s, g)
        if size < MINIMUM:
            expected = by_hand(s, g)
            assert layer.last is None
        else:
            expected = project(s, g, PARITY, bounds=(0, 1))
            by_hand.count(expected, g, scores=s)
            assert torch.equal(layer.last.x[0], x)
        assert (x.dtype, x.shape) == (dtype, s.shape)
        assert torch.equal(x, expected)
        served.append(x)
        first += size
    assert first == 700
    assert same_state(state_of(layer.online), state_of(by_hand))
    report = layer.online.report()
    assert (report.samples, report.batches) == (700, 8)
    assert rows_of(layer.online) == audited(torch.cat(served), groups, PARITY)


def test_the_modes_follow_train_and_eval() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())
    model.fair = layer_of()
    assert model.train().fair.online.training
    assert not model.eval().fair.online.training
    scores, groups = sample(10)
    model.train().fair(scores, groups)
    assert model.fair.online.report().samples == 0
    model.eval().fair(scores, groups)
    assert model.fair.online.report().samples == 10


def test_trained_through_the_layer_and_served_one_by_one() -> None:
    """The whole way: train, forget the validation set, serve; what an auditor then finds."""
    generator = torch.Generator().manual_seed(1)
    groups = (torch.rand(6000, generator=generator) < 0.4).long()
    features = torch.randn(6000, 4, generator=generator) + 0.8 * groups[:, None]
    noise = torch.randn(6000, generator=generator)
    targets = (features[:, 0] + 0.5 * noise > 0.5).float()

    model = nn.Linear(4, 1)
    layer = layer_of().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for epoch in range(3):
        layer.train()
        for at in torch.randperm(3000, generator=generator).split(250):
            fair = layer(model(features[at]).squeeze(1).sigmoid(), groups[at])
            assert audit(fair.detach(), groups[at], PARITY).worst.excess <= 1e-6
            loss = nn.functional.mse_loss(fair, targets[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        layer.eval()
        with torch.no_grad():
            valid = layer(model(features[:3000]).squeeze(1).sigmoid(), groups[:3000])
        losses.append(float(nn.functional.mse_loss(valid, targets[:3000])))
        assert layer.online.report().samples == 3000 * (epoch + 1)
    assert losses[-1] < losses[0]

    layer.online.reset()
    scores = model(features[3000:]).squeeze(1).sigmoid().detach()
    assert audit(scores, groups[3000:], PARITY).worst.excess > 0.1
    sizes = [1] * 1500 + [20] * 35 + [400] * 2
    with torch.no_grad():
        parts = torch.arange(3000).split(sizes)
        served = [layer(scores[at], groups[3000 + at]) for at in parts]
    found = audit(torch.cat(served), groups[3000:], PARITY)
    assert found.worst.excess <= 0.001
    assert layer.online.report().worst.value == pytest.approx(found.worst.value, abs=1e-12)


def test_gaps_within_batches_are_not_the_pooled_one_and_the_stream_mends_that() -> None:
    """Simpson: two projected batches, each without a gap; 0.48 pooled; then single samples."""
    layer = layer_of(DemographicParity(0.02))
    big = torch.cat([torch.zeros(90), torch.ones(10)]).long()
    low, high = torch.full((100,), 0.2).double(), torch.full((100,), 0.8).double()
    layer(low, big)
    layer(high, 1 - big)
    assert abs(rows_of(layer.online)[0]) > 0.45
    scores, groups = sample(6000)
    for at in range(6000):
        layer(scores[at : at + 1], groups[at : at + 1])
    assert layer.online.report().worst.excess <= 0.002


# ---------------------------------------------------------------------------------------------
# Shapes, targets, weights
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 60], ids=["streamed", "projected"])
@pytest.mark.parametrize("shape", ["column", "one problem"])
def test_other_shapes_of_one_batch(shape: str, n: int) -> None:
    results = []
    for view in ((n,), (n, 1) if shape == "column" else (1, n)):
        layer, (scores, groups) = layer_of([PARITY, ODDS]), sample(n)
        targets, weights = (scores > 0.5).long(), torch.linspace(0.5, 2, n)
        x = layer(scores.view(view), groups.view(view), targets.view(view),
                  weights=weights.view(view))  # fmt: skip
        assert x.shape == view
        results.append((x.flatten(), state_of(layer.online)))
    assert torch.equal(results[0][0], results[1][0])
    assert same_state(results[0][1], results[1][1])


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "of each"])
def test_several_problems_are_as_many_batches(shared: bool) -> None:
    layer, n = layer_of([PARITY, ODDS], stream={"feedback": "pooled"}), 60
    scores = torch.stack([sample(n, seed)[0] for seed in range(3)])
    groups = torch.stack([sample(n, seed)[1] for seed in range(3)])
    targets, weights = (scores > 0.5).long(), torch.rand(3, n).double() + 0.5
    if shared:
        groups, targets, weights = groups[0], targets[0], weights[0]
    x = layer(scores, groups, targets, weights=weights)
    assert torch.equal(x, project(scores, groups, [PARITY, ODDS], targets, weights=weights,
                                  bounds=(0, 1)))  # fmt: skip
    report = layer.online.report()
    assert (report.samples, report.batches) == (3 * n, 3)
    flat = [each.expand(3, n).flatten() for each in (groups, targets, weights)]
    one = OnlineParity([PARITY, ODDS], bounds=(0, 1))
    for part in range(3):
        at = slice(part * n, part * n + n)
        one.count(x[part], flat[0][at], flat[1][at], weights=flat[2][at])
    assert [row.value for row in report.rows] == pytest.approx(rows_of(one), abs=1e-14)
    assert [report.rows[0].value] == audited(x.flatten(), flat[0], PARITY, weights=flat[2])


def test_several_problems_that_are_too_small_are_refused() -> None:
    layer = layer_of()
    scores, groups = sample(20)
    with pytest.raises(ProblemError, match=r"minimum_batch=50 samples.*got 2 problems of 10"):
        layer(scores.view(2, 10), groups.view(2, 10))
    assert layer.online.report().samples == 0
    assert layer.train()(scores.view(2, 10), groups.view(2, 10)).shape == (2, 10)


@pytest.mark.parametrize("notion", [ODDS, MeanResidual(0.05)], ids=["labels", "real"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_without_targets_all_are_forecast_and_observed_later(
    notion: Constraint, dtype: torch.dtype
) -> None:
    layer, (scores, groups) = layer_of(notion), sample(200)
    scores = scores.to(dtype)
    parts = torch.arange(200).split([20, 100, 1, 79])
    x = torch.cat([layer(scores[at], groups[at]) for at in parts])
    report = layer.online.report()
    assert (report.samples, report.pending) == (0, 200)
    at = parts[1]
    assert torch.equal(x[at], project(scores[at], groups[at], notion, scores[at], bounds=(0, 1)))
    targets = (scores > 0.6).long()
    order = torch.randperm(200)
    for at in order.split(64):
        layer.online.observe(targets[at], x[at], groups[at], scores=scores[at])
    report = layer.online.report()
    assert (report.samples, report.pending) == (200, 0)
    assert rows_of(layer.online) == audited(x, groups, notion, targets)


def test_targets_that_are_known_are_used_at_both_sizes() -> None:
    layer, (scores, groups) = layer_of(ODDS), sample(200)
    targets = (scores > 0.6).long()
    parts = torch.arange(200).split([20, 180])
    x = torch.cat([layer(scores[at], groups[at], targets[at]) for at in parts])
    assert audit(x[20:], groups[20:], ODDS, targets[20:]).worst.excess <= 1e-12
    assert layer.online.report().pending == 0
    assert rows_of(layer.online) == audited(x, groups, ODDS, targets)


def test_several_attributes_weights_and_bins() -> None:
    notions = [DemographicParity(0.05, on="sex"), DemographicParity(0.1, on=("sex", "race")),
               GroupCalibration(0.2, bins=2, on="race")]  # fmt: skip
    layer, (scores, sex) = layer_of(notions), sample(300)
    groups = {"sex": sex, "race": torch.arange(300) % 3}
    targets = (torch.rand(300) < scores).double()
    x = []
    for at in torch.arange(300).split([30, 240, 30]):
        part = {name: codes[at] for name, codes in groups.items()}
        x.append(layer(scores[at], part, targets[at]))
    assert rows_of(layer.online) == audited(torch.cat(x), groups, notions, targets, scores=scores)


# ---------------------------------------------------------------------------------------------
# Gradients and modes of torch
# ---------------------------------------------------------------------------------------------


def test_only_what_is_projected_carries_a_gradient() -> None:
    layer, (scores, groups) = layer_of(), sample(100)
    scores.requires_grad_()
    assert not layer(scores[:10], groups[:10]).requires_grad
    fair = layer(scores, groups)
    plain = FairnessLayer(PARITY, bounds=(0, 1))(scores, groups)
    v = torch.arange(100).double()
    (mine,) = torch.autograd.grad(fair @ v, scores)
    (theirs,) = torch.autograd.grad(plain @ v, scores)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("feedback", ["pooled", "hard", "batch"])
def test_autocast_and_inference_mode_change_nothing(feedback: str) -> None:
    notions = [DemographicParity(0.05), MeanResidual(0.4)]
    results = []
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        layer, (scores, groups) = layer_of(notions, stream={"feedback": feedback}), sample(200)
        scores, targets = scores.float(), (scores > 0.6).float()
        with mode:
            x = [layer(scores[at], groups[at], targets[at])
                 for at in torch.arange(200).split([1, 30, 120, 49])]  # fmt: skip
        after = layer(scores[:10], groups[:10], targets[:10])
        results.append((torch.cat(x).clone(), after, state_of(layer.online)))
        assert same_state(state_of(copy.deepcopy(layer).online), state_of(layer.online))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])
        assert same_state(results[0][2], other[2])


# ---------------------------------------------------------------------------------------------
# As a module
# ---------------------------------------------------------------------------------------------


def used() -> FairnessLayer:
    layer, (scores, groups) = layer_of(), sample(100)
    layer(scores[:10], groups[:10])
    layer(scores[10:], groups[10:])
    return layer


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), lambda layer: layer.half()],
    ids=["deepcopy", "pickle", "half"],
)
def test_copies_go_on_alike(copied: Any) -> None:
    layer = used()
    other = copied(copy.deepcopy(layer))
    assert same_state(state_of(layer.online), state_of(other.online))
    scores, groups = sample(10, 5)
    x = layer(scores, groups)
    assert torch.equal(x, other(scores, groups))
    assert same_state(state_of(layer.online), state_of(other.online))


def test_the_stream_is_in_the_state_dict() -> None:
    layer, other = used(), layer_of()
    model, fresh = nn.Sequential(layer), nn.Sequential(other)
    assert "0.online.sums" in model.state_dict()
    assert all(name.startswith("0.online.") for name in model.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert same_state(state_of(layer.online), state_of(other.online))
    assert torch.equal(layer(*sample(10, 5)), other(*sample(10, 5)))
    assert not FairnessLayer(PARITY, bounds=(0, 1)).state_dict()


def test_the_layer_says_what_it_is() -> None:
    text = repr(layer_of())
    assert "minimum_batch=50" in text
    assert "(online): OnlineParity(" in text
    assert "minimum_batch" not in repr(FairnessLayer(PARITY, bounds=(0, 1)))


def test_the_stream_hands_its_constraints_and_bounds_to_the_layer() -> None:
    """Also no bounds, and a tolerance that is trained: both follow it."""
    tolerance = nn.Parameter(torch.tensor(0.01, dtype=torch.float64))
    online = OnlineParity(DemographicParity(tolerance), bounds=None)
    layer = FairnessLayer(
        online.constraints, bounds=online.bounds, online=online, minimum_batch=MINIMUM
    ).eval()
    scores, groups = sample(4000)
    with torch.no_grad():
        tolerance.fill_(0.15)
        for each in (layer, copy.deepcopy(layer)):
            x = each(scores[:200], groups[:200])
            assert audit(x, groups[:200], DemographicParity(0.15)).worst.excess <= 1e-12
            for at in range(200, 4000, 40):
                each(scores[at : at + 40], groups[at : at + 40])
            report = each.online.report()
            assert 0.12 < abs(report.rows[0].value) <= 0.152
            assert report.rows[0].upper == 0.15


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------

STREAM = OnlineParity(PARITY, bounds=(0, 1))
TENSOR = torch.tensor(0.05)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no minimum": ({"minimum_batch": None}, "minimum_batch: expected a whole number .* got None"),
    "zero": ({"minimum_batch": 0}, "minimum_batch: expected a whole number of at least 1"),
    "a bool": ({"minimum_batch": True}, "minimum_batch: .* got True"),
    "a float": ({"minimum_batch": 8.0}, "minimum_batch: .* got 8.0"),
    "no stream": ({"online": None}, "minimum_batch: expected None without online, got 50"),
    "no such stream": ({"online": "pooled"}, "online: expected an OnlineParity, got str"),
    "classes": ({"classes": 3}, "online: expected None with classes=3"),
    "objective": ({"objective": "l1"}, "online: expected objective='l2', got 'l1'"),
    "tolerance": (
        {"constraints": DemographicParity(0.1)},
        r"tolerance=0.1.*, got .*tolerance=0.05.*constraints=online.constraints",
    ),
    "notion": ({"constraints": ODDS}, "expected the constraints of the layer, EqualizedOdds"),
    "more notions": ({"constraints": [PARITY, ODDS]}, "expected the constraints of the layer"),
    "tensors": (
        {"constraints": DemographicParity(TENSOR),
         "online": OnlineParity(DemographicParity(TENSOR.clone()), bounds=(0, 1))},
        "with other tensors, of the same values now",
    ),
    "bounds": ({"bounds": (0, None)}, r"bounds of the layer, \(0.0, None\), got \(0.0, 1.0\)"),
    "no bounds": ({"bounds": None}, r"bounds of the layer, \(None, None\), got \(0.0, 1.0\)"),
    "tensor bounds": ({"bounds": (0, torch.tensor(1.0))}, "bounds: expected numbers with online"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_and_a_stream_that_do_not_fit_are_refused(name: str) -> None:
    changes, message = REFUSED[name]
    good = {"constraints": PARITY, "bounds": (0, 1), "online": STREAM, "minimum_batch": MINIMUM}
    FairnessLayer(**good)
    with pytest.raises(ProblemError, match=message):
        FairnessLayer(**{**good, **changes})


@pytest.mark.parametrize("n", [3, 60], ids=["streamed", "projected"])
def test_a_batch_that_is_refused_is_not_counted(n: int) -> None:
    layer = layer_of(stream={"group_counts": 2, "unknown_group": "raise"})
    layer(*sample(100))
    last, before = layer.last, state_of(layer.online)
    scores, groups = sample(n)
    bad: list[tuple[Any, ...]] = [
        (scores, groups + 5), (scores * math.nan, groups), (scores, {"sex": groups}),
        (scores, groups[:2]), (scores.tolist(), groups), (scores.long(), groups),
    ]  # fmt: skip
    for arguments in bad:
        with pytest.raises(ProblemError):
            layer(*arguments)
    with pytest.raises(ProblemError, match="weights"):
        layer(scores, groups, weights=-scores)
    assert layer.last is last
    assert same_state(before, state_of(layer.online))


def test_missing_groups_are_refused_where_a_batch_is_projected() -> None:
    layer = layer_of(missing_group="raise", group_counts=3)
    scores, groups = sample(100)  # of groups 0 and 1
    layer(scores[:10], groups[:10])
    with pytest.raises(ProblemError, match="2"):
        layer(scores, groups)
    assert layer.online.report().samples == 10


def test_a_projection_that_fails_is_not_counted_and_elastic_is() -> None:
    notions = [MinimumRate(0.9), PARITY]  # with bounds up to 0.5: impossible
    scores, groups = sample(60)
    for elastic in (False, True):
        online = OnlineParity(notions, bounds=(0, 0.5))
        layer = FairnessLayer(
            notions, bounds=(0, 0.5), online=online, minimum_batch=MINIMUM, elastic=elastic
        ).eval()
        if not elastic:
            with pytest.raises(InfeasibleError):
                layer(scores, groups)
            assert online.report().samples == 0
            continue
        x = layer(scores, groups)
        assert layer.last.exceeded
        assert rows_of(online) == audited(x, groups, notions)


# ---------------------------------------------------------------------------------------------
# Predictions that others served
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_counted_is_pooled(weighted: bool, dtype: torch.dtype) -> None:
    """Beside what the stream serves, and also outside the bounds: the values as they are."""
    stream, (scores, groups) = OnlineParity(PARITY, bounds=(0, 1)), sample(300)
    scores, groups = scores.to(dtype), groups + torch.arange(300) // 200 * 3  # groups come late
    weights = torch.rand(300) + 0.1 if weighted else None
    x = []
    for number, at in enumerate(torch.arange(300).split(50)):
        w = None if weights is None else weights[at]
        if number % 2:
            x.append(stream(scores[at], groups[at], weights=w))
        else:
            x.append(scores[at] * 3 - 1)
            stream.count(x[-1], groups[at], weights=w)
    assert (stream.report().samples, stream.report().batches) == (300, 6)
    assert rows_of(stream) == audited(torch.cat(x), groups, PARITY, weights=weights)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [20, 60], ids=["streamed", "projected"])
def test_chances_of_membership_and_continuous_attributes(n: int, weighted: bool) -> None:
    notions = [DemographicParity(0.05, on="race"), Covariance(0.02, on="age")]
    layer, scores = layer_of(notions), sample(2 * n)[0]
    groups = {"race": torch.rand(2 * n, 3).double(), "age": torch.randn(2 * n).double()}
    groups["race"] /= groups["race"].sum(1, keepdim=True)
    weights = torch.rand(2 * n) + 0.1 if weighted else None
    x = []
    for at in torch.arange(2 * n).split(n):
        part = {name: each[at] for name, each in groups.items()}
        x.append(layer(scores[at], part, weights=None if weights is None else weights[at]))
    assert rows_of(layer.online) == audited(torch.cat(x), groups, notions, weights=weights)
    assert layer.online.report().samples == 2 * n


def test_the_stream_makes_up_for_what_was_counted() -> None:
    """Half of the predictions are served raw elsewhere: the other half brings the pooled gap in."""
    stream, (scores, groups) = OnlineParity(PARITY, bounds=(0, 1)), sample(6000)
    x = scores.clone()
    for first in range(0, 6000, 20):
        elsewhere, here = slice(first, first + 10), slice(first + 10, first + 20)
        stream.count(x[elsewhere], groups[elsewhere])
        x[here] = stream.run(scores[here], groups[here])
    assert audit(scores[::2], groups[::2], PARITY).worst.excess > 0.1
    assert audit(x, groups, PARITY).worst.excess <= 0.002


def test_the_memory_does_not_take_what_was_counted_for_its_own_steps() -> None:
    """After 5,000 raw samples one single sample is one step, not one of 5,000 samples."""
    scores, groups = sample(5001)
    stream = OnlineParity(PARITY, bounds=(0, 1))
    stream.count(scores[:5000], groups[:5000])
    (row,) = stream.report().rows
    assert (row.multiplier, row.memory, row.bound) == (0.0, 0.0, math.inf)
    assert row.excess > 0.1
    stream(scores[5000:], groups[5000:])
    (row,) = stream.report().rows
    assert abs(row.multiplier) > 1.0  # the excess times the root of the count
    assert 0.0 < abs(row.memory) < 0.01 * abs(row.multiplier)
    assert row.excess <= row.bound < math.inf


def test_the_hard_rule_holds_after_what_was_counted() -> None:
    stream, (scores, groups) = OnlineParity(PARITY, bounds=(0, 1), feedback="hard"), sample(3000)
    stream.count(scores[:100], groups[:100])
    assert stream.report().worst.excess > 0.1
    x = torch.cat([scores[:100], stream(scores[100:], groups[100:])])
    assert audit(x, groups, PARITY).worst.excess <= 1e-9


def test_the_papers_multiplier_answers_to_what_was_counted() -> None:
    """By hand; and its theorem holds whoever served the batches."""
    step, eps = 0.02, 0.05
    stream = OnlineParity(PARITY, bounds=(0, 1), feedback="batch", step_size=step)
    scores, groups = sample(400)
    multiplier, total = 0.0, 0.0
    for t, at in enumerate(torch.arange(400).split(20), start=1):
        x, g = scores[at], groups[at]
        if t % 3:
            stream.count(x, g)
        else:
            x = stream(x, g)
        gap = abs(float(x[g == 0].mean() - x[g == 1].mean())) if 0 < g.sum() < 20 else 0.0
        total += 20 * gap
        multiplier = max(0.0, multiplier + step / math.sqrt(t) * 20 * (gap - eps))
        assert float(stream.state_dict()["paper"][0]) == pytest.approx(multiplier, abs=1e-12)
    report = stream.report()
    assert report.batch_gap == pytest.approx(total / 400, abs=1e-12)
    assert eps < report.batch_gap <= report.batch_bound


def test_counted_forecasts_are_observed() -> None:
    stream, (scores, groups) = OnlineParity(ODDS, bounds=(0, 1)), sample(100)
    targets = (scores > 0.6).long()
    stream.count(scores[:40], groups[:40], targets[:40])
    stream.count(scores[40:], groups[40:], scores=scores[40:])
    assert (stream.report().samples, stream.report().pending) == (40, 60)
    stream.observe(targets[40:], scores[40:], groups[40:], scores=scores[40:])
    assert rows_of(stream) == audited(scores, groups, ODDS, targets)


COUNTS: dict[str, tuple[Any, str]] = {
    "a list": (lambda s, x, g: s.count(x.tolist(), g), "predictions: expected a floating.* list"),
    "integers": (lambda s, x, g: s.count(g, g), "predictions: .* got torch.int64"),
    "NaN": (lambda s, x, g: s.count(x / 0 * 0, g), "predictions: expected finite values"),
    "NaN for scores": (
        lambda s, x, g: s.count(x * math.nan, g, scores=x), "predictions: expected finite values",
    ),
    "NaN in scores": (lambda s, x, g: s.count(x, g, scores=x * math.nan), "scores: expected fin"),
    "length": (
        lambda s, x, g: s.count(x[:3], g, scores=x),
        r"predictions: expected the shape of the scores, \(10,\), got \(3,\)",
    ),
    "nobody": (lambda s, x, g: s.count(x[:0], g[:0]), "at least one sample"),
    "groups": (lambda s, x, g: s.count(x, g[:2]), "groups: expected shape"),
    "attributes": (lambda s, x, g: s.count(x, {"a": g}), "that the stream began with"),
    "no scores": (
        lambda s, x, g: s.count(x, g), "scores: expected .* got none; forecasts stand for targets",
    ),
    "no bins": (
        lambda s, x, g: s.count(x, g, g), "scores: expected .* got none; bins of scores",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_counts_that_are_refused_leave_the_state(name: str) -> None:
    call, message = COUNTS[name]
    notions = {"no scores": ODDS, "no bins": GroupCalibration(0.2, bins=2)}
    stream = OnlineParity(notions.get(name, PARITY), bounds=(0, 1))
    scores, groups = sample(10)
    stream(scores, groups, (scores > 0.5).long())
    before = state_of(stream)
    with pytest.raises(ProblemError, match=message):
        call(stream, scores, groups)
    assert same_state(before, state_of(stream))


@pytest.mark.parametrize("after", ["count", "observe"])
def test_a_state_without_a_bound_is_saved_and_loaded(after: str, tmp_path: Any) -> None:
    """Until the next step the bound is infinite; this is no damage."""
    stream, (scores, groups) = OnlineParity(ODDS, bounds=(0, 1)), sample(50)
    targets = (scores > 0.5).long()
    x = stream.run(scores, groups)
    stream.observe(targets, x, groups, scores=scores)
    if after == "count":
        stream.count(x, groups, targets)
    stream.save(tmp_path / "state")
    loaded, other = OnlineParity(ODDS, bounds=(0, 1)), OnlineParity(ODDS, bounds=(0, 1))
    loaded.load(tmp_path / "state")
    other.load_state_dict(stream.state_dict())
    copies = [loaded, other, pickle.loads(pickle.dumps(stream))]
    assert stream.report().rows[0].bound == math.inf
    want = stream(scores, groups, targets)
    for each in copies:
        assert each.report().rows[0].bound == math.inf
        assert torch.equal(each(scores, groups, targets), want)
        assert each.report().rows[0].bound < math.inf
