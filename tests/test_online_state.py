"""The state as data: safetensors, larger models, a billion samples, what may be restored."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from streams import adult_scores, meet, order

from fairopt import (
    DemographicParity,
    EqualizedOdds,
    MeanResidual,
    OnlineParity,
    ProblemError,
    audit,
)
from fairopt.online.sharing import Common, origin_of

PARITY = DemographicParity(0.03)


def made(notion=PARITY, **options):
    return OnlineParity(notion, bounds=(0, 1), **options)


def drawn(n=300, seed=0, groups=3):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, groups, (n,), generator=generator)
    scores = torch.rand(n, generator=generator, dtype=torch.float64)
    return (0.8 * scores + 0.2 * codes / groups).clamp(0, 1), codes


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


class Model(torch.nn.Module):
    """A model that serves through a stream."""

    def __init__(self, **options):
        super().__init__()
        self.linear = torch.nn.Linear(3, 1)
        self.head = torch.nn.ModuleDict({"fair": made(**options)})

    def forward(self, features, groups):
        return self.head["fair"](torch.sigmoid(self.linear(features)[:, 0]), groups)


# ---------------------------------------------------------------------------------------------
# safetensors
# ---------------------------------------------------------------------------------------------


def used():
    stream = made()
    stream.run(*drawn())
    return stream


def with_late_targets():
    stream = made(EqualizedOdds(0.05))
    scores, codes = drawn()
    x = stream.run(scores, codes)
    stream.observe((scores > 0.5).long()[:100], x[:100], codes[:100], scores=scores[:100])
    return stream


def shared():
    streams = made(), made(), made()
    for k, stream in enumerate(streams):
        stream.run(*drawn(seed=k))
    meet(streams)
    streams[0].run(*drawn(seed=9))
    return streams[0]


def with_history():
    stream = made(history=20)
    stream.run(*drawn())
    return stream


def by_the_paper():
    stream = made(feedback="batch")
    stream.run(*drawn(), batch_size=30)
    return stream


STREAMS = {"unused": made, "used": used, "late targets": with_late_targets, "shared": shared,
           "history": with_history, "batch": by_the_paper}  # fmt: skip


def like(stream):
    return OnlineParity(
        stream.constraints, bounds=stream.bounds, feedback=stream.feedback, history=20
    )


@pytest.mark.parametrize("name", STREAMS)
def test_safetensors(name, tmp_path):
    """Bit for bit, whatever sizes the state has and the other had before."""
    stream = STREAMS[name]()
    save_file(stream.state_dict(), tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    assert same_state(state_of(stream), loaded)
    for before in (0, 1):
        other = like(stream)
        if before:
            other.run(*drawn(40, seed=5, groups=2), torch.ones(40, dtype=torch.long))
        other.load_state_dict(loaded)
        found = state_of(other)
        found.pop("history", None)
        expected = state_of(stream)
        expected.pop("history", None)
        assert same_state(expected, found)
        scores, codes = drawn(seed=6)
        targets = (scores > 0.3).long()
        again = copy.deepcopy(stream)
        assert torch.equal(again.run(scores, codes, targets), other.run(scores, codes, targets))


def test_safetensors_of_a_larger_model(tmp_path):
    model = Model()
    features, codes = torch.randn(50, 3), drawn(50)[1]
    model(features, codes)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert {"linear.weight", "head.fair.sums", "head.fair.layout"} <= set(loaded)
    other = Model()
    assert not other.load_state_dict(loaded).missing_keys
    assert same_state(state_of(model), state_of(other))
    assert torch.equal(model(features, codes), other(features, codes))


# ---------------------------------------------------------------------------------------------
# Within a model
# ---------------------------------------------------------------------------------------------

WAYS = {
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "meta": lambda model: model.to("meta"),  # the stream keeps its numbers
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_around_it_is_converted(way):
    model = Model(history=10)
    features, codes = torch.randn(50, 3), drawn(50)[1]
    model(features, codes)
    before = state_of(model.head)
    other = WAYS[way](model)
    assert same_state(before, state_of(other.head))
    stream, expected = other.head["fair"], copy.deepcopy(model.head["fair"])
    scores, codes = drawn(seed=3)
    assert torch.equal(stream.run(scores, codes), expected.run(scores, codes))
    assert int(other.state_dict()["head.fair.counts"].sum()) == 350


# ---------------------------------------------------------------------------------------------
# What may be restored, and what is claimed
# ---------------------------------------------------------------------------------------------


def test_a_state_saved_right_after_observe_can_be_loaded(tmp_path):
    stream = with_late_targets()
    assert stream.report().worst.bound == math.inf
    other = made(EqualizedOdds(0.05))
    other.load_state_dict(stream.state_dict())
    stream.save(tmp_path / "state")
    other.load(tmp_path / "state")
    assert same_state(state_of(stream), state_of(other))


def test_what_is_merged_claims_no_bound_until_the_next_step():
    broken = 0
    for seed in range(5):
        one, other = made(DemographicParity(0.0)), made(DemographicParity(0.0))
        scores, codes = drawn(seed=seed, groups=2)
        one.run(scores, codes)
        other.run(scores.flip(0), codes)
        claimed = one.report().worst.bound
        one.merge(other)
        worst = one.report().worst
        assert worst.bound == math.inf
        broken += worst.excess > claimed
        one(scores, codes)
        worst = one.report().worst
        assert worst.excess <= worst.bound + 1e-14 and worst.bound < math.inf
    assert broken  # what was claimed before would have been wrong
    batch, second = by_the_paper(), by_the_paper()
    assert math.isfinite(batch.report().batch_bound)
    batch.merge(second)
    assert batch.report().batch_bound == math.inf
    assert batch.report().batch_gap == pytest.approx(second.report().batch_gap)


def test_merge_refuses_what_would_count_twice():
    stream = used()
    a, b = made(), made()
    for other in (a, b):
        other.load_state_dict(stream.state_dict())
    a.run(*drawn(seed=1))
    before = state_of(a)
    with pytest.raises(ProblemError, match="got this stream and the other that were both"):
        a.merge(b)
    assert same_state(before, state_of(a))
    b.reset()
    b.run(*drawn(seed=2))
    a.merge(b)
    assert a.report().samples == 900
    # After a meeting the common part is known to be so.
    meet([a, b])
    a.run(*drawn(seed=3))
    b.run(*drawn(seed=4))
    c = made()
    c.load_state_dict(b.state_dict())
    a.merge(c)
    assert a.report().samples == 900 + 300 + 600
    meet([b, made()])
    with pytest.raises(
        ProblemError, match="last met at the same time, got this stream, which knew"
    ):
        a.merge(b)


def test_a_damaged_common_part_is_refused():
    stream, other = shared(), used()
    good, before = stream.state_dict(), state_of(other)
    assert "common" in good
    for damaged in (good["common"][:-8], good["common"][:40], good["common"].flip(0)):
        with pytest.raises(RuntimeError, match="expected"):
            other.load_state_dict({**good, "common": damaged})
        assert same_state(before, state_of(other))


# ---------------------------------------------------------------------------------------------
# Workers, in one process; tests/test_online_shared.py has them in four
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3, 7])
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_each_makes_up_for_its_share_only(workers, tolerance):
    """If each made up for all of an excess, the next meeting would find it on the other side."""
    notion = DemographicParity(tolerance)
    streams = [made(notion) for _ in range(workers)]
    gaps = []
    for turn in range(40):
        for k, stream in enumerate(streams):
            stream.run(*drawn(100, seed=1000 * turn + k, groups=2))
        meet(streams)
        gaps.append(abs(streams[0].report().rows[0].value))
    raw, codes = drawn(20_000, groups=2)
    assert abs(float(raw[codes == 0].mean() - raw[codes == 1].mean())) > 0.09
    assert max(gaps[10:]) < tolerance + 0.005
    assert streams[0].report().samples == workers * 4000


@pytest.mark.parametrize("feedback", ["pooled", "hard"])
@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("notion", [EqualizedOdds(0.02), MeanResidual(0.02)], ids=["odds", "mean"])
def test_a_share_is_steered_like_a_stream(notion, workers, feedback, monkeypatch):
    """Where all serve the same, the share of each is what it served: alone it would do the same.

    But for how early it is, which the samples of all say.
    """
    monkeypatch.setattr("fairopt.online.feedback.pooled.Method.early", 0.0)
    alone, *streams = (made(notion, feedback=feedback) for _ in range(workers + 1))
    for turn in range(4):
        scores, codes = drawn(seed=turn, groups=3 if turn > 1 else 2)
        targets = (scores.square() > 0.2).long()  # of which the scores are biased forecasts
        expected = alone.run(scores, codes, batch_size=5)
        for stream in streams:
            x = stream.run(scores, codes, batch_size=5)
            assert torch.allclose(x, expected, rtol=0.0, atol=1e-9)
        for stream in (alone, *streams):
            stream.observe(targets[:200], expected[:200], codes[:200], scores=scores[:200])
        meet(streams)
    assert streams[0].report().pending == workers * 400


def test_how_early_it_is_the_samples_of_all_workers_say():
    """16 workers of 125 samples each are 2,000 samples late, not 125."""
    scores, groups, _ = adult_scores()
    at = order(0, len(scores))[:4096]
    scores, codes = scores[at], groups["sex"][at]
    streams = [OnlineParity(DemographicParity(0.05), bounds=(0, 1)) for _ in range(16)]
    gaps = []
    for first in range(0, 4096, 256):
        for k, stream in enumerate(streams):
            part = slice(first + 16 * k, first + 16 * (k + 1))
            stream.run(scores[part], codes[part])
        meet(streams)
        gaps.append(abs(streams[0].report().rows[0].value))
    assert max(gaps[7:]) < 0.065


@pytest.mark.parametrize("seed", range(8))
def test_what_the_shares_say_of_all(seed):
    """However groups are distributed over the workers: the bound of docs/streaming.md."""
    rng = np.random.default_rng(seed)
    workers = int(rng.integers(2, 6))
    streams = [made(DemographicParity(0.02)) for _ in range(workers)]
    share_of_1 = rng.beta(0.3, 0.3, workers)  # in some nearly none, in others nearly all
    common = np.zeros(2)
    for _ in range(6):
        for k, stream in enumerate(streams):
            n = int(rng.integers(20, 200))
            codes = torch.from_numpy((rng.random(n) < share_of_1[k]).astype(np.int64))
            scores = torch.from_numpy(np.clip(rng.random(n) + 0.3 * codes.numpy() - 0.1, 0, 1))
            stream.run(scores, codes)
        values = []
        for stream in streams:
            sums = stream._state.sums.sum(0)
            if stream._state.shared:
                sums = sums - stream._state.others[: len(sums)]
            if sums.shape[1] == 2 and sums[0].all():
                means = sums[1] / sums[0]
                values.append(abs(means[0] - means[1]))
        meet(streams)
        counts = streams[0].state_dict()["counts"].numpy()
        new = (counts - common) / counts
        gap = abs(streams[0].report().rows[0].value)
        if len(values) == workers:
            assert gap <= max(values) + new.max() + 1e-12
        common = counts.copy()


def test_a_worker_that_stays_away_or_joins():
    streams = [made(), made(), made()]
    for k, stream in enumerate(streams):
        stream.run(*drawn(seed=k))
    meet(streams[:2])
    assert [s.report().samples for s in streams] == [600, 600, 300]
    meet(streams)
    assert [s.report().samples for s in streams] == [900] * 3
    streams[1].run(*drawn(seed=8))
    meet(streams[1:])  # the first stays away, and may not come back with what it knew
    assert [s.report().samples for s in streams] == [900, 1200, 1200]
    with pytest.raises(ProblemError, match="rank 0, which knew of 900 samples then, and rank 1"):
        meet(streams)
    streams[0].reset()
    meet(streams)
    assert all(same_state(state_of(streams[0]), state_of(s)) for s in streams)
    assert streams[0].report().samples == 1200


def test_serving_does_not_wait_for_the_others(monkeypatch):
    """While the workers exchange what they know, calls are answered; they count the next time."""
    stream, other = made(), made()
    other.run(*drawn(seed=1))
    stream.run(*drawn(seed=2))
    alone, (scores, codes) = copy.deepcopy(stream), drawn(30, seed=3)
    codes = codes + (codes == 2) * 5  # with a group that is new to both
    served = []

    def exchange(data, group):
        thread = threading.Thread(target=lambda: served.append(stream.run(scores, codes)))
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        return [data, other._part("rank 1").to_bytes(other.configuration())]

    monkeypatch.setattr("fairopt.online.module.gather", exchange)
    stream.synchronize()
    assert torch.equal(served[0], alone.run(scores, codes))
    assert stream.report().samples == 630 and stream.report().worst.bound == math.inf
    monkeypatch.setattr("fairopt.online.module.gather", lambda data, group: [data])
    stream.synchronize()
    assert stream.report().samples == 630
    x = torch.cat([made().run(*drawn(seed=k)) for k in (1, 2)] + served)
    groups = torch.cat([drawn(seed=1)[1], drawn(seed=2)[1], codes])
    assert {row.name: row.value for row in stream.report().rows} == pytest.approx(
        {row.name: row.value for row in audit(x, groups, PARITY).rows}, abs=1e-13
    )


def test_a_failed_exchange_changes_nothing(monkeypatch):
    stream = shared()
    before = state_of(stream)

    def lost(data, group):
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr("fairopt.online.module.gather", lost)
    with pytest.raises(RuntimeError, match="connection closed"):
        stream.synchronize()
    assert same_state(before, state_of(stream))
    stream.run(*drawn(seed=3))
    stream.reset()
    assert stream.report().samples == 0


def test_nothing_to_share():
    streams = [made(), made()]
    meet(streams)
    meet(streams)
    assert same_state(state_of(streams[0]), state_of(made()))
    assert Common().to_bytes() == b"" and origin_of(made()._state, Common()) == ""


# ---------------------------------------------------------------------------------------------
# A billion samples
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["run", "calls", "merge", "meeting"])
def test_exact_after_a_billion_samples(way):
    """From the counts and sums of 10^9 samples, which are known exactly, go on by single ones."""
    n = 10**9
    scores, codes = drawn(500, seed=4, groups=2)
    stream = made(DemographicParity(math.inf))  # serves the scores as they are
    stream.run(scores, codes)
    state = state_of(stream)
    counts = [n // 3, n - n // 3]
    exact = []
    for g, count in enumerate(counts):
        total = Fraction(count) * Fraction(1 + g, 7)  # of means 1/7 and 2/7
        high = float(total)
        low = float(total - Fraction(high))
        exact.append(Fraction(high) + Fraction(low))
        assert low != 0.0
        state["sums"][:, :, g] = 0.0
        state["sums"][0, 0, g], state["counts"][g] = count, count
        state["sums"][0, 1, g], state["sums"][1, 1, g] = high, low
        state["sums"][0, 2, g] = high
    state["totals"][:2] = n
    stream = made(DemographicParity(math.inf))
    stream.load_state_dict(state)
    naive = [float(each) for each in exact]
    other = made(DemographicParity(math.inf))
    if way == "run":
        stream.run(scores, codes)
    elif way == "calls":
        for i in range(500):
            stream(scores[i : i + 1], codes[i : i + 1])
    else:
        other.run(scores, codes)
        if way == "merge":
            stream.merge(other)
        else:
            meet([stream, other])
    for x, g in zip(scores.tolist(), codes.tolist(), strict=True):
        exact[g] += Fraction(x)
        naive[g] += x
    found = stream.state_dict()
    assert found["totals"].tolist() == [n + 500, n + 500, 0]
    for g in (0, 1):
        assert int(found["counts"][g]) == counts[g] + int((codes == g).sum())
        assert found["sums"][:, 0, g].tolist() == [int(found["counts"][g]), 0.0]
        high, low = found["sums"][:, 1, g].tolist()
        error = abs(Fraction(high) + Fraction(low) - exact[g])
        assert error <= exact[g] * 500 / 2**104  # what rounding the low parts may cost
        assert high == float(exact[g])
        assert abs(Fraction(naive[g]) - exact[g]) > 10**6 * exact[g] * 500 / 2**104
    means = [exact[g] / int(found["counts"][g]) for g in (0, 1)]
    report = stream.report()
    assert report.samples == n + 500
    assert [group.mean for group in report.groups] == [
        pytest.approx(float(mean), rel=2.3e-16) for mean in means
    ]
    assert report.rows[0].value == pytest.approx(float(means[0] - means[1]), abs=2e-16)
