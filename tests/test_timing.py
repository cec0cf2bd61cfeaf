"""What `fairopt bench` measures and says; the figures themselves are no test's business."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fairopt import BackendNotFoundError, ProblemError
from fairopt.cli import main
from fairopt.cli.drawing import Drawn
from fairopt.cli.timing import Timing, Timings, time_backends


def test_every_backend_is_timed_or_says_why_not() -> None:
    pytest.importorskip("osqp", reason="the table needs a second backend")
    found = time_backends(Drawn(groups=2), [40, 20], ["numba", "osqp", "highs"], seconds=0.02)
    assert [(t.samples, t.backend) for t in found.timings] == [
        (n, name) for n in (40, 20) for name in ("numba", "osqp", "highs")
    ]
    for each in found.timings:
        if each.backend == "highs":
            assert "does not solve a diagonal P" in each.refusal
            assert math.isnan(each.median)
            assert each.rounds == 0
        else:
            assert 0 < each.lower <= each.median <= each.upper
            assert each.rounds >= 3
            assert not each.refusal
    lines = str(found).splitlines()
    assert lines[1].split() == ["samples", "numba", "osqp", "highs"]
    assert [line.split()[0] for line in lines[2:4]] == ["40", "20"]
    assert all(line.count("*") == 1 and line.endswith(" -") for line in lines[2:4])
    assert lines[-1].startswith("highs: ")
    assert len(lines) == 6  # the refusal once
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_what_is_slow_has_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"numba": 0, "osqp": 0}
    now = 0.0

    def clocked(once: object) -> float:
        nonlocal now
        took = once()  # type: ignore[operator]
        now += took
        return float(took)

    def step(drawn: Drawn, backend: str, device: torch.device) -> object:
        def once() -> float:
            calls[backend] += 1
            return {"numba": 0.25, "osqp": 5.0}[backend]

        return once

    monkeypatch.setattr("fairopt.cli.timing.clocked", clocked)
    monkeypatch.setattr("fairopt.cli.timing.step", step)
    monkeypatch.setattr("fairopt.cli.timing.time.perf_counter", lambda: now)
    found = time_backends(Drawn(), [10], ["numba", "osqp"], seconds=1.0)
    assert calls == {"numba": 2 + 4, "osqp": 2}
    assert [(t.median, t.rounds) for t in found.timings] == [(0.25, 4), (5.0, 1)]

    calls.update(numba=0, osqp=0)
    found = time_backends(Drawn(), [10, 30, 5], ["numba", "osqp"], seconds=1.0)
    assert calls == {"numba": 3 * 6, "osqp": 2 + 2}  # left out of the larger problem only
    assert [t.rounds for t in found.timings if t.backend == "osqp"] == [1, 0, 1]
    assert "osqp: left out of more than 10 samples, where a call took 5 s" in str(found)


def test_the_table_of_one_size() -> None:
    timings = (
        Timing(1000, "numba", 0.00012, 0.0001, 0.0002, 1.0, 9),
        Timing(1000, "qpth", 2.5, 2.5, 2.5, 2.5, 1),
    )
    text = str(Timings(Drawn(), "cpu", 2, timings))
    assert text.splitlines()[2].split() == ["1,000", "0.12*", "2500"]
    assert "not timed" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": []}, "samples: expected numbers of at least 1, got \\[\\]"),
        ({"samples": [0]}, "samples: expected numbers of at least 1"),
        ({"seconds": 0.0}, "seconds: expected a number above 0, got 0.0"),
        ({"names": ["highs"]}, "expected one that takes the problem; .*highs"),
        ({"problem": Drawn(notion="luck")}, "notion: expected one of .*got 'luck'"),
        ({"problem": Drawn(tolerance=-1.0)}, "tolerance"),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"problem": Drawn(), "samples": [10], "names": ["numba"]}
    with pytest.raises(ProblemError, match=message):
        time_backends(**given | arguments)  # type: ignore[arg-type]


def test_an_unknown_backend() -> None:
    with pytest.raises(BackendNotFoundError, match="nonesuch"):
        time_backends(Drawn(), [10], ["nonesuch"])


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta?"])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(ProblemError, match="device: expected one that is here, such as cpu, got"):
        time_backends(Drawn(), [10], ["numba"], device=name)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    words = "bench --samples 20,30 --groups 3 --backends numba --seconds 0.01 --notion"
    assert main([*words.split(), "equalized-odds", "--json", str(path)]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()[2:4]] == ["20", "30"]
    assert "30 samples" in shown.err
    written = json.loads(path.read_text())
    assert [each["samples"] for each in written["timings"]] == [20, 30]
    assert written["problem"]["notion"] == "equalized-odds"
    assert main(["bench", "--backends", "nonesuch"]) == 2
    assert "nonesuch" in capsys.readouterr().err
    assert main(["bench", "--json", str(tmp_path / "nowhere" / "times.json")]) == 2
    assert "cannot open" in capsys.readouterr().err
