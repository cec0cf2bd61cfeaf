"""Several workers share one stream through torch.distributed: four processes, gloo."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from streams import adult_scores, order
from torch import distributed

from fairopt import DemographicParity, EqualizedOdds, OnlineParity, ProblemError, audit, project

HERE = Path(__file__).resolve().parent
WORKERS = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of four workers saw, scenario by scenario; see tests/sharing_worker.py."""
    folder = tmp_path_factory.mktemp("workers")
    scores, groups, _ = adult_scores()
    at = order(0, len(scores))
    torch.save((scores[at], groups["sex"][at]), folder / "adult")
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    workers = [
        subprocess.Popen(
            [sys.executable, str(HERE / "sharing_worker.py"), str(rank), str(folder)],
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORKERS)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=240)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    return [pickle.loads((folder / f"found-{rank}").read_bytes()) for rank in range(WORKERS)]


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def all_same(states):
    return all(same_state(states[0], other) for other in states[1:])


def everything(parts):
    return [torch.cat([part[i] for part in parts]) for i in range(len(parts[0]))]


def test_all_have_the_same_state_and_it_is_what_an_audit_finds(found):
    each = [worker["odds"] for worker in found]
    for turn in range(3):
        assert all_same([worker["rounds"][turn] for worker in each])
    x, codes, targets, weights = everything([part for worker in each for part in worker["served"]])
    audited = audit(x, codes, EqualizedOdds(0.03), targets, weights=weights)
    report = each[0]["report"]
    assert report.samples == len(x)
    rows = {row.name: row.value for row in report.rows}
    assert len(rows) == 6  # three groups, of which rank 2 alone has seen one
    assert rows == pytest.approx({row.name: row.value for row in audited.rows}, abs=1e-14)
    state = each[3]["rounds"][-1]
    assert sorted(state["counts"].tolist()) == sorted(
        int(((codes == g) & (targets == y)).sum()) for g in (0, 1, 9) for y in (0, 1)
    )
    for g, y in [(0, 0), (1, 1), (9, 1)]:
        cell = 2 * [0, 1, 9].index(g) + y
        here = (codes == g) & (targets == y)
        exact = sum(
            (Fraction(a) * Fraction(b) for a, b in zip(x[here].tolist(), weights[here].tolist(),
                                                       strict=True)), Fraction(0),
        )  # fmt: skip
        high, low = state["sums"][:, 1, cell].tolist()
        assert abs(Fraction(high) + Fraction(low) - exact) <= exact / 2**98


def test_meeting_again_changes_nothing(found):
    for worker in found:
        rounds = worker["odds"]
        assert all(same_state(rounds["rounds"][-1], each) for each in rounds["again"])


@pytest.mark.parametrize("feedback", ["pooled", "hard", "batch"])
def test_every_rule_and_dtype(found, feedback):
    each = [worker["rules"][feedback] for worker in found]
    assert all_same([worker["state"] for worker in each])
    served = [(x.double(), codes) for worker in each for x, codes in worker["served"]]
    x, codes = everything(served)
    audited = audit(x, codes, DemographicParity(0.05)).worst
    report = each[0]["report"]
    assert report.samples == len(x) and report.batches == WORKERS * 3 * 50
    assert report.worst.value == pytest.approx(audited.value, abs=1e-14)
    # No bound is claimed where the identity is of a share.
    for worker in each:
        for one in (worker["between"], worker["report"]):
            assert not one.worst.bound < float("inf")
            assert not one.batch_bound < float("inf")
    if feedback == "hard":
        # Each keeps its share within the sides, and the groups are distributed alike but for
        # chance: what is left is that chance.
        assert audited.excess < 0.002


def test_targets_may_come_to_another_worker(found):
    each = [worker["late_targets"] for worker in found]
    assert all_same([worker["state"] for worker in each])
    assert [worker["first"] for worker in each] == [400] * WORKERS
    assert (each[3]["second"].samples, each[3]["second"].pending) == (300, 500)
    for worker in each:
        assert "synchronize: expected the targets of each sample once, got 400" in worker["twice"]
        assert same_state(worker["before"], worker["after"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("configuration", 'expected workers of the same configuration, got constraints: ["Demo'),
        ("attributes", "expected streams with the same attributes, got group and sex"),
        ("one saved state", "rank 1 and rank 2 that were both loaded from one state"),
        ("different meetings", "got rank 0, which knew of 3200 samples then, and rank 3, which"),
    ],
)
def test_all_refuse_alike(found, name, message):
    texts = [worker["refusals"][name][0] for worker in found]
    assert texts[0].startswith("synchronize: expected") and message in texts[0]
    assert texts == [texts[0]] * WORKERS
    for worker in found:
        _, before, after = worker["refusals"][name]
        assert same_state(before, after)


def test_after_a_refusal_they_can_meet(found):
    assert all_same([worker["refusals"]["state"] for worker in found])
    # 3,200 were common, three have served 400 more each; the fourth was reset.
    assert found[0]["refusals"]["samples"] == 3200 + 3 * 400


def test_nothing_counts_twice_after_a_restart(found):
    each = [worker["restart"] for worker in found]
    # Two rounds of all; then three that were saved, and a last one of all.
    assert [worker["count"] for worker in each] == [400 * (8 + 3 + 4)] * WORKERS
    assert [worker["again"] for worker in each] == [400 * (8 + 3 + 4 + 4)] * WORKERS
    assert all_same([worker["state"] for worker in each])


def test_what_was_served_elsewhere_is_made_up_for_by_all(found):
    each = [worker["counting"] for worker in found]
    assert all_same([worker["state"] for worker in each])
    x, codes = everything([part for worker in each for part in worker["served"]])
    audited = audit(x, codes, DemographicParity(0.05)).worst
    assert each[0]["report"].worst.value == pytest.approx(audited.value, abs=1e-13)
    assert audited.excess < 0.002


def test_merging_what_has_met_counts_the_common_part_once(found):
    each = [worker["merging"] for worker in found]
    assert [worker["merged"] for worker in each] == [400 * (4 + 2)] * WORKERS
    assert [worker["all"] for worker in each] == [400 * (4 + 8)] * WORKERS
    assert all_same([worker["state"] for worker in each])


def test_serving_goes_on_meanwhile_and_nothing_is_lost(found):
    each = [worker["serving_meanwhile"] for worker in found]
    assert all_same([worker["state"] for worker in each])
    x, codes = everything([worker["served"] for worker in each])
    report = each[2]["report"]
    assert (report.samples, report.batches) == (WORKERS * 5000, WORKERS * 1000)
    assert {row.name: row.value for row in report.rows} == pytest.approx(
        {row.name: row.value for row in audit(x, codes, DemographicParity(0.05)).rows}, abs=1e-13
    )


def test_a_group_of_some_workers(found):
    each = [worker["a_part_of_the_workers"] for worker in found]
    assert [worker["samples"] for worker in each] == [800, 400, 800, 400]
    assert each[0]["message"] is None
    assert "expected a process group that this process is in" in each[1]["message"]


def test_adult_by_sex(found):
    """Between meetings each knows a quarter of what comes, and yet: the gap holds, and is cheap."""
    each = [worker["adult"] for worker in found]
    x, scores, sex = (
        torch.cat([worker[k] for worker in each]) for k in ("served", "scores", "sex")
    )
    notion = DemographicParity(0.05)
    worst = audit(x, sex, notion).worst
    optimum = float((project(scores, sex, notion, bounds=(0, 1)) - scores).square().mean())
    assert worst.excess == 0.0 and audit(scores, sex, notion).worst.excess > 0.1
    assert float((x - scores).square().mean()) <= 1.25 * optimum
    assert each[1]["report"].worst.value == pytest.approx(worst.value, abs=1e-13)


def test_without_a_process_group():
    with pytest.raises(ProblemError, match="expected an initialised process group, got none; call"):
        OnlineParity(DemographicParity(0.05), bounds=(0, 1)).synchronize()


@pytest.mark.skipif(
    not (torch.cuda.is_available() and distributed.is_nccl_available()),
    reason="nccl needs a CUDA device",
)
def test_on_nccl(tmp_path):
    stream = OnlineParity(DemographicParity(0.05), bounds=(0, 1))
    stream(torch.rand(10, dtype=torch.float64), torch.arange(10) % 2)
    store = (tmp_path / "store").as_uri()
    distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    try:
        before = stream.state_dict()["sums"].clone()
        stream.synchronize()
        assert torch.equal(stream.state_dict()["sums"], before) and before.is_cpu
    finally:
        distributed.destroy_process_group()
