"""The pooled statistic of a stream is what audit() finds in everything that was served."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairopt import (
    Budget,
    ConditionalParity,
    Covariance,
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    ErrorParity,
    GroupCalibration,
    ImpactRatio,
    MeanResidual,
    MinimumRate,
    OnlineParity,
    PredictiveEquality,
    ProblemError,
    UnsupportedProblemError,
    audit,
)
from fairopt.kernels.stream import accumulate
from fairopt.kernels.stream_records import Samples

NOTIONS = {
    "parity": DemographicParity(0.05, on="a"),
    "every attribute": DemographicParity(0.05),
    "intersections": DemographicParity(0.05, on=("a", "b")),
    "overall": DemographicParity(0.05, on="a", compare="overall"),
    "reference": DemographicParity(0.05, on="a", compare="reference", reference=1),
    "opportunity": EqualOpportunity(0.05, on="a"),
    "negatives": PredictiveEquality(0.05, on="a"),
    "odds": EqualizedOdds(0.05, on="b"),
    "strata": ConditionalParity(0.05, on="a", given="b"),
    "residual": MeanResidual(0.05, on="a"),
    "error": ErrorParity(0.05, on="a"),
    "ratio": ImpactRatio(0.8, on="a"),
    "floor": MinimumRate(0.4, on="a"),
    "calibration": GroupCalibration(0.05, bins=3, on="a"),
    "budget": Budget(mean=(0.3, 0.45)),
    "two": (DemographicParity(0.02, on="a"), EqualOpportunity(0.03, on="b")),
}
FEEDBACKS = ("pooled", "hard")


def drawn(seed: int, n: int = 300) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 3, (n,), generator=generator)
    b = torch.randint(0, 2, (n,), generator=generator)
    scores = (
        torch.randn(n, generator=generator, dtype=torch.float64) + 0.5 * a - 0.3 * b
    ).sigmoid()
    targets = (torch.rand(n, generator=generator) < scores).long()
    weights = torch.rand(n, generator=generator, dtype=torch.float64) * 2
    return {"a": a, "b": b, "scores": scores, "targets": targets, "weights": weights}


def check_against_audit(stream, served, groups, notions, targets, weights, scores, precise=1e-12):
    found = {(r.notion, r.name): r for r in stream.report().rows}
    rows = audit(served, groups, notions, targets, weights=weights, scores=scores).rows
    for row in rows:
        mine = found.pop((row.notion, row.name))
        assert mine.value == pytest.approx(row.value, rel=precise, abs=precise), row.name
        assert (mine.lower, mine.upper) == (row.lower, row.upper)
        assert mine.excess == pytest.approx(row.excess, abs=precise)
    assert not found


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("name", NOTIONS)
@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**31),
    weighted=st.booleans(),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8),
)
def test_every_notion(name, feedback, seed, weighted, sizes):
    data, notion = drawn(seed), NOTIONS[name]
    n = min(300, sum(sizes))
    stream = OnlineParity(notion, bounds=(0, 1), feedback=feedback)
    groups = {"a": data["a"], "b": data["b"]}
    served, first = [], 0
    for size in sizes:
        part = slice(first, min(first + size, n))
        if part.start >= n:
            break
        x = stream(
            data["scores"][part], {k: v[part] for k, v in groups.items()}, data["targets"][part],
            weights=data["weights"][part] if weighted else None,
        )  # fmt: skip
        assert x.min() >= 0 and x.max() <= 1
        served.append(x)
        first = part.stop
    check_against_audit(
        stream, torch.cat(served), {k: v[:first] for k, v in groups.items()}, notion,
        data["targets"][:first], data["weights"][:first] if weighted else None,
        data["scores"][:first],
    )  # fmt: skip
    assert stream.report().samples == first


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feedback", ["pooled", "hard", "batch"])
def test_what_is_counted_is_what_is_returned(dtype, feedback):
    data = drawn(1)
    stream = OnlineParity(DemographicParity(0.05), bounds=(0.1, 0.9), feedback=feedback)
    scores = data["scores"].to(dtype)
    x = stream.run(scores, data["a"], batch_size=7)
    assert x.dtype == dtype and x.shape == scores.shape
    # The bounds are never exceeded, not by the rounding of the dtype either.
    assert float(x.double().min()) >= 0.1 and float(x.double().max()) <= 0.9
    row = stream.report().rows[0]
    assert row.value == pytest.approx(
        float(x[data["a"] == 0].double().mean() - x[data["a"] == 1].double().mean()), abs=1e-14
    )


def test_soft_groups_and_soft_targets():
    data = drawn(3)
    chances = torch.rand(300, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    chances = chances / chances.sum(1, keepdim=True)
    soft = data["scores"].clamp(0.1, 0.8)
    notion = EqualizedOdds(0.02, on="a")
    stream = OnlineParity(notion, bounds=(0, 1))
    x = stream.run(data["scores"], {"a": chances}, soft, batch_size=5)
    check_against_audit(stream, x, {"a": chances}, notion, soft, None, None)
    assert stream.report().worst.excess < 0.01
    with pytest.raises(ProblemError, match="expected chances, as the stream began with, got codes"):
        stream(data["scores"], {"a": data["a"]}, soft)
    with pytest.raises(ProblemError, match="expected chances of 3 groups"):
        stream(data["scores"], {"a": torch.full((300, 2), 0.5)}, soft)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("given", [None, "b"])
def test_covariance_with_a_continuous_attribute(given, weighted):
    data = drawn(5, 3000)
    age = 40 + 10 * torch.randn(3000, dtype=torch.float64) + 5 * data["a"]
    notion = Covariance(0.05, on="age", given=given)
    groups = {"age": age, "b": data["b"]} if given else {"age": age}
    scores = (data["scores"] + 0.01 * (age - 40)).clamp(0, 1)
    weights = data["weights"] if weighted else None
    before = audit(scores, groups, notion, weights=weights).worst.excess
    stream = OnlineParity(notion, bounds=(0, 1))
    x = stream.run(scores, groups, batch_size=4, weights=weights)
    check_against_audit(stream, x, groups, notion, None, weights, None, 1e-10)
    assert before > 0.2 and stream.report().worst.excess < 0.01


def test_groups_seen_late_keep_what_was():
    data = drawn(6, 600)
    codes = data["a"] * 100  # codes with gaps, the last one first seen half-way
    first, last = codes[:300] % 200, codes[300:]
    stream = OnlineParity(DemographicParity(0.03), bounds=(0, 1))
    x1 = stream.run(data["scores"][:300], first, batch_size=3)
    before = {r.name: r for r in stream.report().rows}
    assert list(before) == ["group: 0 vs 100"]
    x2 = stream.run(data["scores"][300:], last, batch_size=3)
    groups = torch.cat([first, last])
    x = torch.cat([x1, x2])
    found = {r.name: r.value for r in stream.report().rows}
    assert set(found) == {"group: 0 vs 100", "group: 0 vs 200", "group: 100 vs 200"}
    for name, value in found.items():
        a, b = (int(word) for word in name.removeprefix("group: ").split(" vs "))
        assert value == pytest.approx(
            float(x[groups == a].mean() - x[groups == b].mean()), abs=1e-14
        )


def test_one_group_is_served_as_it_is():
    scores = torch.rand(50, dtype=torch.float64)
    stream = OnlineParity(DemographicParity(0.0), bounds=(0, 1))
    assert torch.equal(stream.run(scores, torch.zeros(50, dtype=torch.long)), scores)
    assert stream.report().skipped == ("group: only one group",)


def test_weight_zero_counts_for_nothing():
    data = drawn(7)
    weights = (torch.arange(300) % 3 > 0).double()
    stream = OnlineParity(DemographicParity(0.02), bounds=(0, 0.9))
    x = stream.run(data["scores"], data["a"], weights=weights)
    none = weights == 0
    assert torch.equal(x[none], data["scores"][none].clamp(0, 0.9))
    check_against_audit(stream, x, data["a"], DemographicParity(0.02), None, weights, None)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_units_do_not_matter(factor):
    """Scores, bounds and tolerance in other units; weights in other units: to the last bit."""
    data = drawn(8, 900)
    x = OnlineParity(DemographicParity(0.05), bounds=(0, 1)).run(data["scores"], data["a"])
    other = OnlineParity(DemographicParity(0.05 * factor), bounds=(0, factor))
    assert torch.equal(other.run(data["scores"] * factor, data["a"]) / factor, x)
    heavy = OnlineParity(DemographicParity(0.05), bounds=(0, 1))
    weights = torch.full((900,), factor, dtype=torch.float64)
    assert torch.equal(heavy.run(data["scores"], data["a"], weights=weights), x)


# ---------------------------------------------------------------------------------------------
# Sums
# ---------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e12, 1e12, allow_subnormal=False), min_size=1, max_size=200),
    st.lists(st.sampled_from([1.0, 0.1, 3.7, 1e-3]), min_size=1, max_size=200),
)
def test_sums_are_exact(values, weights):
    n = min(len(values), len(weights))
    x = np.array(values[:n])
    w = np.array(weights[:n])
    sums = np.zeros((2, 5, 1))
    samples = Samples(
        np.array(x), np.zeros(n, np.int64), np.zeros((0, 0)), w, np.zeros(0), np.zeros((n, 0)),
        False,
    )  # fmt: skip
    accumulate(sums, np.zeros(1, np.int64), 1.0, 1.0, samples, x, 0, n)
    exact = sum((Fraction(a) * Fraction(b) for a, b in zip(w, x, strict=True)), Fraction(0))
    size = sum((abs(Fraction(a) * Fraction(b)) for a, b in zip(w, x, strict=True)), Fraction(0))
    got = Fraction(sums[0, 1, 0]) + Fraction(sums[1, 1, 0])
    assert abs(got - exact) <= size * Fraction(n + 2, 2**100) + Fraction(1, 10**300)


@pytest.mark.slow
def test_ten_million_samples():
    n = 10_000_000
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(n, generator=generator, dtype=torch.float64)
    groups = (torch.rand(n, generator=generator) < 0.3).long()
    stream = OnlineParity(DemographicParity(0.01), bounds=(0, 1))
    sizes = {name: tensor.numel() for name, tensor in stream.state_dict().items()}
    x = stream.run(scores[:4_000_000], groups[:4_000_000], batch_size=1)
    saved = {name: tensor.clone() for name, tensor in stream.state_dict().items()}
    rest = stream.run(scores[4_000_000:], groups[4_000_000:], batch_size=1)
    other = OnlineParity(DemographicParity(0.01), bounds=(0, 1))
    other.load_state_dict(saved)
    assert torch.equal(other.run(scores[4_000_000:], groups[4_000_000:]), rest)
    for name, tensor in stream.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
        assert tensor.numel() <= max(100, sizes[name])
    served = torch.cat([x, rest]).numpy()
    for g in (0, 1):
        exact = math.fsum(served[groups.numpy() == g])
        state = stream.state_dict()["sums"][:, 1, g].tolist()
        assert math.fsum(state) == exact
        assert int(stream.state_dict()["counts"][g]) == int((groups == g).sum())


# ---------------------------------------------------------------------------------------------
# State as data
# ---------------------------------------------------------------------------------------------


def state_of(stream):
    return {name: tensor.clone() for name, tensor in stream.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("feedback", ["pooled", "hard", "batch"])
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle", "file"])
def test_going_on_from_a_saved_state_is_bit_identical(how, feedback, tmp_path):
    data = drawn(9)
    make = lambda: OnlineParity(  # noqa: E731
        DemographicParity(0.03), bounds=(0, 1), feedback=feedback
    )
    stream = make()
    stream.run(data["scores"][:150], data["a"][:150], batch_size=2)
    if how == "state_dict":
        other = make()
        other.load_state_dict(state_of(stream))
    elif how == "deepcopy":
        other = copy.deepcopy(stream)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(stream))
    else:
        stream.save(tmp_path / "state")
        other = make()
        other.load(tmp_path / "state")
    assert same_state(state_of(stream), state_of(other))
    rest = data["scores"][150:], data["a"][150:]
    assert torch.equal(stream.run(*rest), other.run(*rest))
    assert same_state(state_of(stream), state_of(other))
    assert stream.report().to_dict() == other.report().to_dict()  # NaN as None, which is equal


def test_one_call_per_batch_is_the_same_as_run():
    data = drawn(10)
    one = OnlineParity(DemographicParity(0.03), bounds=(0, 1))
    many = OnlineParity(DemographicParity(0.03), bounds=(0, 1), group_counts=3)
    named = OnlineParity(DemographicParity(0.03), bounds=(0, 1), group_counts=3)
    all_at_once = many.run(data["scores"], data["a"], batch_size=4)
    parts = [one(data["scores"][i : i + 4], data["a"][i : i + 4]) for i in range(0, 300, 4)]
    long_way = [
        named(data["scores"][i : i + 4, None], {"group": data["a"][i : i + 4]})
        for i in range(0, 300, 4)
    ]
    assert torch.equal(torch.cat(parts), all_at_once)
    assert torch.equal(torch.cat(long_way)[:, 0], all_at_once)


def test_other_layouts_and_kinds_of_groups():
    data = drawn(15, 400)
    pairs = [
        (data["scores"], data["b"]),
        (data["scores"].repeat_interleave(2)[::2], data["b"].repeat_interleave(2)[::2]),
        (data["scores"].clone().requires_grad_(), data["b"].bool()),
        (torch.nn.Parameter(data["scores"].clone()), data["b"].to(torch.uint8)),
    ]
    found = []
    for scores, groups in pairs:
        stream = OnlineParity(DemographicParity(0.03), bounds=(0, 1))
        parts = [stream(scores[:1], groups[:1]), stream(scores[1:], groups[1:])]
        assert not any(part.requires_grad for part in parts)
        found.append(torch.cat(parts))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_an_infinite_tolerance_and_one_of_zero():
    data = drawn(16, 3000)
    free = OnlineParity(DemographicParity(float("inf")), bounds=(0, 1))
    assert torch.equal(free.run(data["scores"], data["a"]), data["scores"])
    equal = OnlineParity(DemographicParity(0.0), bounds=(0, 1))
    equal.run(data["scores"], data["a"])
    assert 0 < equal.report().worst.excess < 0.005  # no margin is possible: noise is left


def test_conversions_leave_the_state_alone():
    data = drawn(11)
    model = torch.nn.Sequential(OnlineParity(DemographicParity(0.03), bounds=(0, 1)))
    model[0](data["scores"], data["a"])
    before = state_of(model)
    model.half().to(torch.bfloat16).float().to("cpu")
    assert same_state(before, state_of(model))
    assert model.state_dict()["0.sums"].dtype == torch.float64
    assert {name for name, _ in model.named_buffers()} == set(before)
    model[0](data["scores"], data["a"])
    assert int(model.state_dict()["0.counts"].sum()) == 600  # buffers are the state, not copies


def test_an_unused_stream_can_be_saved_and_loaded(tmp_path):
    stream = OnlineParity(DemographicParity(0.03), bounds=(0, 1))
    other = OnlineParity(DemographicParity(0.03), bounds=(0, 1))
    other(torch.rand(4), torch.tensor([0, 1, 0, 1]))
    other.load_state_dict(stream.state_dict())
    assert other.report().samples == 0
    stream.save(tmp_path / "s")
    other.load(tmp_path / "s")
    other(torch.rand(4), torch.tensor([0, 1, 0, 1]))


def test_reset():
    data = drawn(12)
    stream = OnlineParity(DemographicParity(0.03), bounds=(0, 1))
    first = stream.run(data["scores"], data["a"])
    stream.reset()
    assert stream.report().samples == 0
    assert torch.equal(stream.run(data["scores"], data["a"]), first)


@given(seed=st.integers(0, 2**31), cut=st.integers(1, 299))
@settings(max_examples=20)
def test_merge_is_exact(seed, cut):
    data = drawn(seed)
    notion = EqualizedOdds(0.03, on="a")
    left, right = (OnlineParity(notion, bounds=(0, 1)) for _ in range(2))
    served = [
        stream.run(data["scores"][part], {"a": data["a"][part]}, data["targets"][part])
        for stream, part in ((left, slice(0, cut)), (right, slice(cut, 300)))
    ]
    before = state_of(right)
    left.merge(right)
    assert same_state(before, state_of(right))
    assert left.report().samples == 300
    check_against_audit(
        left, torch.cat(served), {"a": data["a"]}, notion, data["targets"], None, None
    )
    assert int(left.state_dict()["counts"].sum()) == 300


def test_merge_into_nothing_and_of_nothing():
    data = drawn(13)
    a, b = (OnlineParity(DemographicParity(0.03), bounds=(0, 1)) for _ in range(2))
    b.run(data["scores"], data["a"])
    a.merge(b)
    assert same_state(state_of(a), state_of(b))
    before = state_of(b)
    b.merge(OnlineParity(DemographicParity(0.03), bounds=(0, 1)))
    assert same_state(before, state_of(b))


def test_tensors_among_the_parameters_are_read_anew():
    data = drawn(14, 2000)
    tolerance = torch.tensor(0.5, dtype=torch.float64)
    stream = OnlineParity(DemographicParity(tolerance), bounds=(0, 1))
    stream.run(data["scores"][:1000], data["b"][:1000])
    assert stream.report().rows[0].upper == 0.5
    tolerance.fill_(0.01)
    assert stream.report().rows[0].upper == pytest.approx(0.01)
    stream.run(data["scores"][1000:], data["b"][1000:])
    assert stream.report().worst.excess < 0.01


def test_what_a_stream_cannot_hold():
    scores = torch.rand(4, dtype=torch.float64)
    with pytest.raises(ProblemError, match="expected means, got a total, which grows"):
        OnlineParity(Budget(total=3.0), bounds=(0, 1))(scores, torch.tensor([0, 1, 0, 1]))
    many = OnlineParity(DemographicParity(0.1, on=("a", "b")), bounds=(0, 1), group_counts=100)
    groups = {"a": torch.tensor([0, 1, 0, 1]), "b": torch.tensor([0, 1, 0, 1])}
    with pytest.raises(UnsupportedProblemError, match="expected at most 4096 combinations"):
        many(scores, groups)
    assert many.report().samples == 0
