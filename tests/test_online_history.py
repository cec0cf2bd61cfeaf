"""history: how a stream went, in bounded memory, without changing it."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch

from fairopt import DemographicParity, EqualizedOdds, OnlineParity, ProblemError, audit
from fairopt.online import History

PARITY = DemographicParity(0.05)
COLUMNS = ("value", "lower", "upper", "excess", "multiplier")


def made(notion=PARITY, **options):
    return OnlineParity(notion, bounds=(0, 1), **options)


def drawn(n=400, seed=0, groups=2):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, groups, (n,), generator=generator)
    scores = torch.rand(n, generator=generator, dtype=torch.float64)
    return (0.8 * scores + 0.2 * codes / groups).clamp(0, 1), codes


def state_of(stream):
    return {k: v.clone() for k, v in stream.state_dict().items() if k != "history"}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_history(a, b):
    return (
        (a.names, a.notions) == (b.names, b.notions)
        and np.array_equal(a.samples, b.samples)
        and all(np.array_equal(getattr(a, k), getattr(b, k), equal_nan=True) for k in COLUMNS)
    )


# ---------------------------------------------------------------------------------------------
# It changes nothing, and says what was
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ["pooled", "hard", "batch"])
@pytest.mark.parametrize("batch", [1, 3, 64, 1000])
def test_a_stream_with_a_history_is_the_same_to_the_last_bit(feedback, batch):
    scores, codes = drawn(300 if batch < 3 and feedback != "pooled" else 700)
    plain = made(feedback=feedback)
    run, calls, named = (made(feedback=feedback, history=11) for _ in range(3))
    x = plain.run(scores, codes, batch_size=batch)
    assert torch.equal(run.run(scores, codes, batch_size=batch), x)
    parts = zip(scores.split(batch), codes.split(batch), strict=True)
    assert torch.equal(torch.cat([calls(s, g) for s, g in parts]), x)
    # The long way, which reads its input: groups by name, weights of one.
    served = [
        named.run(s, {"group": g}, batch_size=batch, weights=torch.ones_like(s))
        for s, g in zip(scores.split(5 * batch), codes.split(5 * batch), strict=True)
    ]
    assert torch.equal(torch.cat(served), x)
    assert same_state(state_of(plain), state_of(run))
    assert same_state(state_of(plain), state_of(calls))
    for other in (calls, named):
        assert same_history(run.history, other.history)
    assert run.history.names == ("group: 0 vs 1",)
    assert run.history.notions == ("DemographicParity",)


@pytest.mark.parametrize("batch", [1, 7])
def test_it_is_what_an_audit_finds_at_those_moments(batch):
    scores, codes = drawn(600)
    stream = made(history=20)
    x = stream.run(scores, codes, batch_size=batch)
    history = stream.history
    assert len(history.samples) > 8
    for t, n in enumerate(history.samples.tolist()):
        row = audit(x[:n], codes[:n], PARITY).rows[0]
        assert history.value[t, 0] == pytest.approx(row.value, abs=1e-13)
        assert history.excess[t, 0] == pytest.approx(row.excess, abs=1e-13)
        assert (history.lower[t, 0], history.upper[t, 0]) == (-0.05, 0.05)
        # The multiplier is that of a stream that has come so far.
        other = made()
        other.run(scores[:n], codes[:n], batch_size=batch)
        assert history.multiplier[t, 0] == other.report().rows[0].multiplier


@pytest.mark.parametrize("batch", [1, 3, 50])
@pytest.mark.parametrize("most", [2, 3, 20])
def test_it_covers_the_whole_stream_in_bounded_memory(batch, most):
    n = 20_000
    scores, codes = drawn(n)
    stream = made(history=most)
    for s, g in zip(scores.split(5000), codes.split(5000), strict=True):
        stream.run(s, g, batch_size=batch)
        samples = stream.history.samples
        assert 1 <= len(samples) <= most
        assert samples[-1] == stream.report().samples
    assert (np.diff(samples) > 0).all()
    if most == 20:  # evenly, but for the factor of two that halving costs, and batches
        assert len(samples) >= 9
        assert np.diff([0, *samples]).max() <= 2 * n / 9 + batch


def test_rows_that_come_later_are_nan_before():
    scores, codes = drawn(300, groups=3)
    early = codes % 2
    stream = made(history=1000)
    assert stream.history.samples.shape == (0,) and stream.history.value.shape == (0, 0)
    stream.run(scores[:100], torch.zeros(100, dtype=torch.long))  # one group: no rows
    assert stream.history.value.shape == (100, 0)
    stream.run(scores[100:200], early[100:200])
    one = stream.history
    assert one.names == ("group: 0 vs 1",)
    stream.run(scores[200:], codes[200:] + (codes[200:] == 2) * 5)
    history = stream.history
    assert history.names == ("group: 0 vs 1", "group: 0 vs 7", "group: 1 vs 7")
    assert np.array_equal(history.value[:200, 0], one.value[:, 0], equal_nan=True)
    first = 100 + int((early[100:200] == 1).nonzero()[0])
    assert np.isnan(history.value[:first, 0]).all() and np.isfinite(history.value[first:, 0]).all()
    seven = 200 + int((codes[200:] == 2).nonzero()[0])
    for name in COLUMNS:
        assert np.isnan(getattr(history, name)[:seven, 1:]).all()
    assert np.isfinite(history.value[seven:, 1]).all()


def test_targets_that_come_later():
    scores, codes = drawn(200)
    targets = (scores > 0.5).long()
    notion = EqualizedOdds(0.05)
    stream, plain = made(notion, history=1000), made(notion)
    x = stream.run(scores, codes)
    assert torch.equal(plain.run(scores, codes), x)
    before = stream.history
    assert before.samples[-1] == 200 and np.isnan(before.value).all()
    stream.observe(targets, x, codes, scores=scores)
    plain.observe(targets, x, codes, scores=scores)
    after = stream.history
    # Nothing was served: the present, which is the last, is what has changed.
    assert np.array_equal(after.samples, before.samples) and np.isnan(after.value[:-1]).all()
    assert after.value[-1].tolist() == [row.value for row in stream.report().rows]
    assert torch.equal(stream.run(scores, codes, targets), plain.run(scores, codes, targets))


@pytest.mark.parametrize("feedback", ["pooled", "batch"])
def test_what_others_served_is_recorded_when_it_is_counted(feedback):
    scores, codes = drawn(300)
    stream, plain = made(feedback=feedback, history=1000), made(feedback=feedback)
    for each in (stream, plain):
        each.run(scores[:100], codes[:100], batch_size=10)
        each.count(scores[100:200].reshape(4, 25), codes[100:200].reshape(4, 25))
        each.run(scores[200:], codes[200:], batch_size=20)
    assert same_state(state_of(plain), state_of(stream))
    moments = [*range(10, 101, 10), 125, 150, 175, 200, *range(220, 301, 20)]
    assert stream.history.samples.tolist() == moments
    short = made(feedback=feedback, history=5)
    short.count(scores.reshape(100, 3), codes.reshape(100, 3))
    assert len(short.history.samples) <= 5 and short.history.samples[-1] == 300


def test_what_is_not_served_is_not_recorded():
    scores, codes = drawn()
    stream = made(history=50)
    stream.run(scores, codes)
    before = stream.history
    stream.run(scores, codes, update=False)
    stream(scores, codes + 4, update=False)
    with pytest.raises(ProblemError):
        stream.run(torch.cat([scores, torch.tensor([math.nan])]), torch.cat([codes, codes[:1]]))
    assert same_history(before, stream.history)
    assert made().history is None


def test_reset_and_merge():
    scores, codes = drawn()
    stream, other = made(history=50), made(history=30)
    stream.run(scores, codes)
    other.run(scores, codes)
    before = stream.history
    stream.merge(other)  # history is no part of the rule, and is each stream's own
    after = stream.history
    kept = before.samples < 400
    assert np.array_equal(after.samples[:-1][: kept.sum()], before.samples[kept])
    assert after.samples[-1] == 800 and after.value[-1, 0] == stream.report().rows[0].value
    stream.reset()
    assert len(stream.history.samples) == 0
    stream.run(scores, codes)
    assert same_history(stream.history, before)


# ---------------------------------------------------------------------------------------------
# State as data
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle", "file"])
def test_it_is_saved_and_goes_on(how, tmp_path):
    scores, codes = drawn(3000)
    whole, stream = made(history=25), made(history=25)
    whole.run(scores, codes)
    stream.run(scores[:1234], codes[:1234])
    if how == "deepcopy":
        other = copy.deepcopy(stream)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(stream))
    else:
        other = made(history=25)
        if how == "state_dict":
            other.load_state_dict(stream.state_dict())
        else:
            stream.save(tmp_path / "state")
            other.load(tmp_path / "state")
    assert same_history(stream.history, other.history)
    other.run(scores[1234:], codes[1234:])
    assert same_history(whole.history, other.history)


def test_a_state_of_another_length_or_of_none(tmp_path):
    scores, codes = drawn(3000)
    stream = made(history=100)
    stream.run(scores, codes)
    samples, value = stream.history.samples, stream.history.value
    stream.save(tmp_path / "state")
    for load in (
        lambda other: other.load(tmp_path / "state"),
        lambda other: other.load_state_dict(stream.state_dict()),
    ):
        shorter, longer, none = made(history=10), made(history=500), made()
        for other in (shorter, longer, none):
            load(other)
            assert same_state(state_of(stream), state_of(other))
        assert same_history(longer.history, stream.history)
        found = shorter.history
        assert 4 <= len(found.samples) <= 10 and set(found.samples) <= set(samples)
        places = np.searchsorted(samples, found.samples)
        assert np.array_equal(found.value, value[places], equal_nan=True)
        assert none.history is None and "history" not in none.state_dict()
    # From a state without a history, it begins.
    none.run(scores, codes)
    longer.load_state_dict(none.state_dict())
    assert longer.history.samples.tolist() == [6000]
    longer(scores[:5], codes[:5])
    longer(scores[:5], codes[:5])
    assert longer.history.samples.tolist() == [6005, 6010]


def test_damaged_ones_are_refused():
    scores, codes = drawn(50)
    stream, other = made(history=100), made(history=100)
    stream.run(scores, codes)
    other.run(scores[:9], codes[:9])
    before, history = state_of(other), other.history
    good = stream.state_dict()
    torn = good["history"][:-8]
    for damaged in (torn, torch.zeros(4, dtype=torch.uint8), good["history"].flip(0)):
        with pytest.raises(RuntimeError, match="expected"):
            other.load_state_dict({**good, "history": damaged})
        assert same_state(before, state_of(other)) and same_history(history, other.history)


@pytest.mark.parametrize("value", [0, 1, -5, True, 2.5, "all"])
def test_lengths_that_are_refused(value):
    with pytest.raises(ProblemError, match="history: expected how many moments to keep, at least"):
        made(history=value)


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def test_it_is_plain_data():
    scores, codes = drawn(30)
    stream = made(history=100)
    stream.run(scores, codes)
    assert isinstance(stream.history, History)
    found = json.loads(json.dumps(stream.history.to_dict()))
    assert found["samples"] == list(range(1, 31)) and found["names"] == ["group: 0 vs 1"]
    assert found["value"][0] == [None] and found["value"][-1] == [stream.report().rows[0].value]
    with pytest.raises(AttributeError):
        stream.history.names = ()


def test_it_is_drawn(tmp_path):
    from matplotlib.figure import Figure

    scores, codes = drawn(300, groups=3)
    stream = made(history=40)
    for history in (stream.history, None):  # nothing yet, then something
        if history is None:
            stream.run(scores, codes)
            history = stream.history
        history.plot(tmp_path / "a.png")
        history.plot(str(tmp_path / "a.svg"))
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        text = (tmp_path / "a.svg").read_text()
        assert "multiplier" in text or "<svg" in text
    ax = Figure().subplots()
    history.plot(ax)
    labels = {line.get_label(): line for line in ax.get_lines()}
    assert set(history.names) <= set(labels)
    x, y = labels[history.names[1]].get_data()
    assert np.array_equal(x, history.samples)
    assert np.array_equal(y, history.value[:, 1], equal_nan=True)
    sides = [line.get_ydata() for line in ax.get_lines() if line.get_linestyle() == ":"]
    assert {float(np.nanmax(side)) for side in sides} == {-0.05, 0.05}


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    stream = made(history=40)
    stream.run(*drawn(30))
    with pytest.raises(ImportError, match=r"pip install 'fairopt\[demo\]'"):
        stream.history.plot(tmp_path / "a.png")
