"""Streams in service: threads, files, refusals, dry runs."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from fairopt import (
    DemographicParity,
    EqualizedOdds,
    GroupCalibration,
    ImpactRatio,
    MeanResidual,
    OnlineParity,
    ProblemError,
    audit,
)

NAN = float("nan")


def parity(**options):
    return OnlineParity(DemographicParity(0.05), **{"bounds": (0, 1), **options})


def state_of(stream):
    return {name: tensor.clone() for name, tensor in stream.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def sample(n=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 2, (n,), generator=generator)
    return (torch.rand(n, generator=generator, dtype=torch.float64) + 0.3 * groups) / 1.3, groups


@pytest.mark.parametrize("feedback", ["pooled", "batch", "hard"])
def test_no_update_is_lost_between_threads(feedback):
    stream = parity(feedback=feedback, group_counts=2)
    workers, calls, size = 8, 60, 3
    served, failures = [[] for _ in range(workers)], []
    barrier = threading.Barrier(workers)

    def work(k):
        try:
            scores, groups = sample(calls * size, seed=k)
            barrier.wait()
            for i in range(0, calls * size, size):
                x = stream(scores[i : i + size], groups[i : i + size])
                served[k].append((x, groups[i : i + size]))
                stream.report()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    x = torch.cat([part for worker in served for part, _ in worker])
    groups = torch.cat([part for worker in served for _, part in worker])
    report = stream.report()
    assert (report.samples, report.batches) == (workers * calls * size, workers * calls)
    assert report.worst.value == pytest.approx(
        audit(x, groups, DemographicParity(0.05)).worst.value, abs=1e-13
    )


def test_threads_that_merge_into_each_other_do_not_block():
    a, b = parity(), parity()
    for stream in (a, b):
        stream(*sample())

    def work(one, other):
        for _ in range(20):
            one.merge(other)

    threads = [threading.Thread(target=work, args=pair) for pair in ((a, b), (b, a))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("feedback", ["pooled", "batch", "hard"])
def test_a_dry_run_changes_nothing(feedback):
    stream = parity(feedback=feedback)
    scores, groups = sample()
    stream.run(scores, groups, batch_size=2)
    before = state_of(stream)
    new = torch.where(groups == 1, 7, groups)  # a group never seen
    stream(scores, new, update=False)
    tried = stream.run(scores, groups, batch_size=5, update=False)
    assert same_state(before, state_of(stream))
    assert torch.equal(stream.run(scores, groups, batch_size=5), tried)


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------

ZERO = torch.zeros(3, dtype=torch.long)
GOOD = torch.tensor([0.1, 0.2, 0.3])

REFUSED = {
    "NaN": (lambda s: s(torch.tensor([0.1, NAN, 0.2]), ZERO), "expected finite values, got 1 NaN"),
    "infinite": (lambda s: s(torch.tensor([0.1, -torch.inf, 0.2]), ZERO), "expected finite values"),
    "NaN in a run": (
        lambda s: s.run(torch.tensor([0.1, 0.2, NAN]), ZERO), "first at index \\(2,\\)",
    ),
    "integers": (lambda s: s(ZERO, ZERO), "expected a floating-point tensor"),
    "a list": (lambda s: s([0.1, 0.2, 0.3], ZERO), "expected a tensor, got list"),
    "nothing": (lambda s: s(GOOD[:0], ZERO[:0]), "expected at least one sample"),
    "a batch of problems": (lambda s: s(torch.rand(2, 3), ZERO), "a stream has no batch"),
    "other lengths": (lambda s: s(GOOD, ZERO[:2]), "groups: expected shape"),
    "negative codes": (lambda s: s(GOOD, ZERO - 1), "expected codes of at least 0, got -1"),
    "real groups": (lambda s: s(GOOD, GOOD), "expected integer or bool codes"),
    "other attributes": (lambda s: s(GOOD, {"sex": ZERO}), "that the stream began with, 'group'"),
    "weights": (lambda s: s(GOOD, ZERO, weights=-GOOD), "weights: expected finite numbers of at"),
    "batch size": (lambda s: s.run(GOOD, ZERO, batch_size=0), "batch_size: expected a whole"),
    "an unknown group": (lambda s: s(GOOD, ZERO + 5), "expected codes below 2, the number of"),
    "unknown within": (
        lambda s: s.run(GOOD, torch.tensor([0, 1, 2])), "expected codes below 2",
    ),
    "not observable": (
        lambda s: s.observe(GOOD, GOOD, ZERO, scores=GOOD), "got one that needs none",
    ),
    "merge": (lambda s: s.merge(3), "expected an OnlineParity, got int"),
    "merge itself": (lambda s: s.merge(s), "got the same one"),
    "merge others": (lambda s: s.merge(parity()), "group_counts: here 2, saved None"),
}  # fmt: skip


@pytest.mark.parametrize("feedback", ["pooled", "hard"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_the_state_as_it_was(name, feedback):
    call, message = REFUSED[name]
    stream = parity(feedback=feedback, group_counts=2, unknown_group="raise")
    stream(*sample())
    before = state_of(stream)
    with pytest.raises(ProblemError, match=message):
        call(stream)
    assert same_state(before, state_of(stream))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feedback": "soft"}, "feedback: expected 'pooled', 'batch' or 'hard', got 'soft'"),
        ({"step_size": 0.0}, "step_size: expected a finite number above 0, got 0.0"),
        ({"step_size": float("inf")}, "step_size: expected a finite number above 0"),
        ({"step_size": True}, "step_size"),
        ({"warm_up": -1, "feedback": "hard"}, "warm_up: expected a whole number of at least 0"),
        ({"warm_up": 5}, "warm_up: expected 0 with feedback='pooled', got 5"),
        ({"unknown_group": "skip"}, "unknown_group: expected 'add' or 'raise'"),
        ({"bounds": (1, 0)}, "expected lower <= upper"),
        ({"bounds": (torch.zeros(3), 1)}, "expected numbers for a stream, got a tensor of shape"),
        ({"bounds": 1}, "bounds: expected \\(lower, upper\\)"),
    ],
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(ProblemError, match=message):
        parity(**options)


def test_unknown_groups_need_a_declaration_to_be_refused():
    stream = parity(unknown_group="raise")
    with pytest.raises(ProblemError, match="expected the number of groups of 'group'"):
        stream(*sample())


def test_a_ratio_needs_bounds():
    stream = OnlineParity(ImpactRatio(0.8), bounds=(None, 1))
    with pytest.raises(ProblemError, match="ImpactRatio needs a lower bound of at least 0"):
        stream(*sample())
    assert stream.report().samples == 0


def test_observe_is_for_what_was_served():
    stream = OnlineParity(EqualizedOdds(0.05), bounds=(0, 1))
    scores, groups = sample(50)
    targets = (scores > 0.5).double()
    with pytest.raises(ProblemError, match=r"got one that has served nothing"):
        stream.observe(targets, scores, groups, scores=scores)
    x = stream.run(scores, groups)
    report = stream.report()
    assert (report.samples, report.pending) == (0, 50) and report.rows == ()
    stream.observe(targets[:20], x[:20], groups[:20], scores=scores[:20])
    before = state_of(stream)
    with pytest.raises(ProblemError, match="expected at most 30 samples, as many as await targets"):
        stream.observe(targets, x, groups, scores=scores)
    with pytest.raises(ProblemError, match="needs targets that are 0 or 1, or chances"):
        stream.observe(targets[20:] + 3, x[20:], groups[20:], scores=scores[20:])
    with pytest.raises(ProblemError, match="expected groups of samples that were served"):
        stream.observe(targets[20:], x[20:], groups[20:] + 9, scores=scores[20:])
    with pytest.raises(ProblemError, match="targets: expected a tensor, got None"):
        stream.observe(None, x[20:], groups[20:], scores=scores[20:])
    assert same_state(before, state_of(stream))
    stream.observe(targets[20:], x[20:], groups[20:], scores=scores[20:])
    found = audit(x, groups, EqualizedOdds(0.05), targets)
    report = stream.report()
    assert (report.samples, report.pending) == (50, 0)
    for mine, row in zip(report.rows, found.rows, strict=True):
        assert mine.value == pytest.approx(row.value, abs=1e-13)
    assert not stream.state_dict()["pending"].any()


@pytest.mark.parametrize(
    "notion", [MeanResidual(0.05), GroupCalibration(0.05, bins=2)], ids=["residual", "bins"]
)
def test_targets_in_any_order(notion):
    stream = OnlineParity(notion, bounds=(0, 1))
    scores, groups = sample(100)
    x = stream.run(scores, groups)
    targets = scores.square()
    at = torch.from_numpy(np.random.default_rng(0).permutation(100))
    for part in at.split(7):
        stream.observe(targets[part], x[part], groups[part], scores=scores[part])
    found = audit(x, groups, notion, targets, scores=scores)
    assert [r.value for r in stream.report().rows] == pytest.approx(
        [r.value for r in found.rows], abs=1e-13
    )


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def test_a_torn_or_changed_file_is_refused(tmp_path):
    stream = parity()
    stream(*sample())
    path = tmp_path / "state"
    stream.save(path)
    whole = path.read_bytes()
    other = parity()
    other(*sample(30))
    before = state_of(other)
    rng = np.random.default_rng(0)
    for length in [0, 1, 16, 17, 40, len(whole) - 1, *rng.integers(0, len(whole), 20)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ProblemError, match=r"written by OnlineParity.save|torn or was changed"):
            other.load(path)
    for at in rng.integers(20, len(whole), 30):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ProblemError, match="torn or was changed"):
            other.load(path)
    assert same_state(before, state_of(other))
    path.write_bytes(whole)
    other.load(path)
    assert same_state(state_of(stream), state_of(other))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    stream = parity()
    stream(*sample())
    path = tmp_path / "state"
    stream.save(path)
    old = path.read_bytes()
    stream(*sample())

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        stream.save(path)
    assert path.read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: parity(feedback="hard"), "feedback: here 'hard', saved 'pooled'"),
        (lambda: parity(bounds=None), r"bounds: here \[None, None\], saved \[0.0, 1.0\]"),
        (lambda: parity(step_size=2), "step_size: here 2.0, saved 1.0"),
        (
            lambda: OnlineParity(DemographicParity(0.1), bounds=(0, 1)),
            r"constraints: here \[.DemographicParity\(tolerance=0.1,.*saved \[.Demo.*0.05, on=None",
        ),
    ],
)
def test_load_says_what_differs(other, message, tmp_path):
    stream = parity()
    stream(*sample())
    stream.save(tmp_path / "state")
    loaded = other()
    with pytest.raises(ProblemError, match=message):
        loaded.load(tmp_path / "state")
    assert loaded.report().samples == 0


def test_load_state_dict_refuses_what_is_none():
    stream, other = parity(), parity()
    stream(*sample())
    good = state_of(stream)
    for name, value in {
        "sums": good["sums"].float(),
        "counts": good["counts"][:1],
        "rows": torch.full_like(good["rows"], NAN),
        "layout": torch.tensor([1, 2, 3], dtype=torch.uint8),
    }.items():
        with pytest.raises(RuntimeError, match=r"state: (sums: |counts: )?expected"):
            other.load_state_dict({**good, name: value})
        assert other.report().samples == 0
    with pytest.raises(RuntimeError, match=r'Missing key.*"sums"'):
        other.load_state_dict({k: v for k, v in good.items() if k != "sums"})
    other.load_state_dict(good)
    assert same_state(good, state_of(other))


def test_the_report_is_a_table_and_plain_data():
    stream = parity()
    assert str(stream.report()).startswith("0 samples in 0 batches")
    assert stream.report().worst is None
    stream(*sample())
    text = str(stream.report())
    assert "200 samples in 1 batches" in text and "group: 0 vs 1" in text
    found = stream.report().to_dict()
    assert found["rows"][0]["name"] == "group: 0 vs 1" and found["batch_gap"] is None
    assert found["groups"][1]["samples"] == int((sample()[1] == 1).sum())


# ---------------------------------------------------------------------------------------------
# Files and reports
# ---------------------------------------------------------------------------------------------


def test_a_state_can_be_loaded_right_after_targets_were_observed(tmp_path):
    scores, groups = sample()
    stream, other = (OnlineParity(EqualizedOdds(0.05), bounds=(0, 1)) for _ in range(2))
    x = stream.run(scores, groups)
    stream.observe((scores > 0.5).double(), x, groups, scores=scores)
    stream.save(tmp_path / "state")
    other.load(tmp_path / "state")
    assert same_state(stream.state_dict(), other.state_dict())
    other.load_state_dict(stream.state_dict())
    assert torch.equal(other.run(scores, groups), stream.run(scores, groups))


def test_notes_are_kept_with_the_state(tmp_path):
    stream = parity()
    stream(*sample())
    notes = {"offset": 12345, "of": ["a", "ü", None]}
    stream.save(tmp_path / "state", notes=notes)
    assert parity().load(tmp_path / "state") == notes
    before = (tmp_path / "state").read_bytes()
    for bad in ({"a": {1, 2}}, {"a": NAN}):
        with pytest.raises(ProblemError, match="notes: expected what JSON can hold"):
            stream.save(tmp_path / "state", notes=bad)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert (tmp_path / "state").read_bytes() == before
    stream.save(tmp_path / "state")
    assert parity().load(tmp_path / "state") == {}


def test_a_report_names_groups_by_their_labels():
    scores, groups = sample()
    stream = OnlineParity(
        [DemographicParity(0.05, "sex"), DemographicParity(0.05, ("sex", "race"))], bounds=(0, 1)
    )
    stream.run(scores, {"sex": groups, "race": torch.where(scores > 0.5, 5, 1)})
    plain = stream.report()
    named = stream.report(labels={"sex": ["Female", "Male"], "race": ["-", "a"]})
    assert named.rows[0].name == "sex: Female vs Male"
    assert named.rows[1].name == "sex x race: (Female, a) vs (Female, 5)"
    assert [g.name for g in named.groups][:2] == ["sex: Female | race: a", "sex: Female | race: 5"]
    assert plain.rows[0].name == "sex: 0 vs 1"
    assert [r.value for r in named.rows] == [r.value for r in plain.rows]
