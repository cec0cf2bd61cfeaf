"""The command line: the demo end to end on few rows, the doctor, and errors in one line."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fairopt
from fairopt import backends
from fairopt.cli import demo as demo_command
from fairopt.cli import main
from fairopt.datasets import Split
from fairopt.demo import Settings
from fairopt.demo.notions import SHOWN, gaps_of
from fairopt.demo.streaming import BATCHES, serve_all
from fairopt.demo.training import area_under_curve
from fairopt.notions.names import NOTIONS

QUICK = ["demo", "--epochs", "4", "--limit", "4000", "--batch-size", "250", "--repeats", "1"]
PNG = b"\x89PNG\r\n\x1a\n"


# ---------------------------------------------------------------- demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One quick run of the demo: its folder, with what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    printed, progress = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        patch.setattr(sys, "stderr", progress)
        status = main([*QUICK, "--output", str(folder), "--json", str(folder / "x" / "demo.json")])
    (folder / "stdout.txt").write_text(printed.getvalue())
    (folder / "stderr.txt").write_text(progress.getvalue())
    assert status == 0
    return folder


def test_demo_prints_a_table_and_says_where_the_plots_are(demo: Path) -> None:
    text = (demo / "stdout.txt").read_text()
    for expected in ("unconstrained", "post-hoc projection", "fairness layer", "accuracy", "AUC"):
        assert expected in text
    assert "within its tolerance of 0.05 on every one of its 11 constraints" in text
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 120
    for name in ("training.png", "tolerance.png"):
        assert str(demo / name) in text
        assert (demo / name).read_bytes().startswith(PNG)


def test_demo_reports_progress_on_stderr(demo: Path) -> None:
    text = (demo / "stderr.txt").read_text()
    assert "[1/7] unconstrained   epoch 4/4" in text
    assert "\r" not in text, "no terminal, so plain lines"


def test_demo_writes_its_figures(demo: Path) -> None:
    figures = json.loads((demo / "x" / "demo.json").read_text())
    assert figures["settings"]["tolerance"] == 0.05
    assert figures["rows"] == {"train": 4000, "test": 4000}
    assert len(figures["constraints"]) == 11  # 1 pair of sexes and 10 of races
    assert len(figures["plots"]) == 2
    plain, post_hoc, layer = figures["models"]
    assert plain["worst_excess"] > 0.01, "nothing to mend: the demo would show nothing"
    assert post_hoc["worst_excess"] <= 1e-6
    assert layer["worst_excess"] <= 1e-6
    assert layer["batches_checked"] == 64
    assert 0.0 < layer["layer_share"] < 1.0
    assert [entry["epoch"] for entry in layer["history"]] == [1, 2, 3, 4]
    tolerances = [point["tolerance"] for point in figures["sweep"]]
    assert tolerances == sorted(tolerances)
    assert 0.05 in tolerances
    for point in figures["sweep"]:
        for way in ("post_hoc", "layer"):
            (quality,) = point[way]
            assert max(quality["gap"].values()) <= point["tolerance"] + 1e-6
            assert 0.5 < quality["accuracy"] < 1.0


def test_demo_goes_on_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("fairopt.demo.run.SWEEP", ())
    assert main([*QUICK, "--tolerance", "0.1", "--streaming", "--output", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "The test rows as a stream" in text
    assert "pip install 'fairopt[demo]'" in text
    assert "tolerance of 0.1" in text
    assert not list(tmp_path.glob("*.png"))


def test_demo_streams_only_where_it_is_asked_to(demo: Path) -> None:
    assert "stream" not in (demo / "stdout.txt").read_text()
    assert json.loads((demo / "x" / "demo.json").read_text())["streaming"] is None
    assert not (demo / "streaming.png").exists()


def test_demo_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fairopt.demo.run.SWEEP", ())
    file, plot = tmp_path / "demo.json", tmp_path / "streaming.png"
    chosen = ["--streaming", "--attributes", "sex", "--json", str(file), "--output", str(tmp_path)]
    assert main([*QUICK, *chosen]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 120
    assert str(plot) in text and plot.read_bytes().startswith(PNG)
    figures = json.loads(file.read_text())
    assert figures["plots"][2] == str(plot)
    streaming = figures["streaming"]
    runs = {(run["rule"], run["batch_size"]): run for run in streaming["runs"]}
    for (rule, size), run in runs.items():
        shown = f"{run['end']:7.4f} {run['largest']:7.4f} {run['change']:6.2f}"
        (line,) = [line for line in text.splitlines() if line.startswith(rule)]
        assert shown in line
        assert run["samples"] == sorted(set(run["samples"])) and run["samples"][-1] == 4000
        assert all(n % size == 0 or n == 4000 for n in run["samples"])
        assert run["end"] == run["gap"][-1]
        if rule == "raw scores":  # nothing is moved; the gap at the end is that of the table
            assert run["change"] == 0.0
            assert run["end"] == pytest.approx(
                figures["models"][0]["history"][-1]["raw"]["gap"]["sex"], abs=1e-9
            )
        if rule == "the pooled rule":
            assert run["end"] <= run["largest"] <= 0.055
            assert 0.9 < run["change"] < 2.0
    assert {size for _, size in runs} == set(BATCHES) and len(runs) == 3 * len(BATCHES)
    # A single prediction has no gap in its batch: it is clipped and nothing else.
    assert runs["the paper's rule", 1]["end"] > runs["raw scores", 1]["end"] - 0.001
    assert runs["the paper's rule", 64]["end"] < 0.5 * runs["raw scores", 64]["end"]


def stream_of(notion: str, tolerance: float = 0.05) -> Any:
    generator = torch.Generator().manual_seed(0)
    sex = (torch.rand(3000, generator=generator) < 0.4).long()
    scores = (torch.rand(3000, generator=generator) + 0.4 * sex) / 1.4
    targets = (torch.rand(3000, generator=generator) < scores).float()
    data = Split(torch.zeros(3000, 0), targets, {"sex": sex})
    return serve_all(scores, data, Settings(tolerance, [notion], ["sex"]), (0.0, 1.0))


@pytest.mark.parametrize("notion", NOTIONS)
def test_any_notion_of_the_demo_is_streamed(notion: str) -> None:
    streaming = stream_of(notion)
    for run in streaming.runs:
        if run.rule == "the pooled rule":
            assert run.end <= 0.05
        if run.rule == "raw scores" and notion not in ("error-parity", "mean-residual"):
            assert run.end > 0.2  # these two hold by themselves
    assert ("label" in str(streaming)) == NOTIONS[notion].needs_targets
    papers = [run for run in streaming.runs if run.rule == "the paper's rule"]
    if notion == "impact-ratio":
        assert not papers
        assert "The paper's rule is left out. constraints: feedback='batch'" in str(streaming)
    else:
        assert len(papers) == len(BATCHES) and streaming.left_out is None


def test_a_stream_that_needs_no_change_says_so() -> None:
    streaming = stream_of("demographic-parity", tolerance=1.0)
    assert streaming.optimum == 0.0
    assert all(run.change is None for run in streaming.runs)
    assert "which changes nothing" in " ".join(str(streaming).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tolerance", "-0.1"], "tolerance"),
        (["--backend", "abacus"], "'abacus'"),
        (["--notions", "parity"], "notions: expected one or more of demographic-parity"),
        (["--notions", "impact-ratio,impact-ratio"], "each once, got impact-ratio, impact-ratio"),
        (["--notions", "impact-ratio", "--tolerance", "2"], "threshold"),
        (["--attributes", "age"], "attributes: expected one or more of sex, race"),
        (["--attributes", ","], "got none"),
    ],
)
def test_demo_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, *arguments, "--output", str(tmp_path)]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("fairopt: error:")]
    assert message in line


def test_demo_says_at_once_that_a_folder_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    assert main([*QUICK, "--output", str(blocked / "folder")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "cannot write to" in error
    assert "--output" in error


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["demo", "--epochs", "0"],
        ["demo", "--epochs", "many"],
        ["demo", "--limit", "3"],
        ["demo", "--tolerance", "nan"],
        ["demo", "--tolerance", "wide"],
    ],
)
def test_unusable_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: fairopt" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fairopt {fairopt.__version__}\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_rewrites_one_line_on_a_terminal() -> None:
    stream = _Terminal()
    progress = demo_command.Progress(stream)
    progress("one", False)
    progress("two", True)
    assert stream.getvalue() == "\r\x1b[Kone\r\x1b[Ktwo\n"


# ---------------------------------------------------------------- what the demo measures


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_area_under_curve_counts_pairs(samples: list[tuple[int, bool]]) -> None:
    positive = [score for score, target in samples if target]
    negative = [score for score, target in samples if not target]
    if not positive or not negative:
        return
    wins = sum((p > q) + 0.5 * (p == q) for p, q in itertools.product(positive, negative))
    scores = torch.tensor([score / 4 for score, _ in samples])
    targets = torch.tensor([float(target) for _, target in samples])
    expected = wins / (len(positive) * len(negative))
    assert area_under_curve(scores, targets) == pytest.approx(expected, abs=1e-12)


def test_gaps_are_those_of_the_groups_present() -> None:
    predictions, targets = torch.tensor([0.1, 0.3, 0.9, 0.5]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    groups = {"two": torch.tensor([0, 0, 3, 3]), "one": torch.tensor([2, 2, 2, 2])}
    expected = {  # of group 0 and of group 3
        "demographic-parity": 0.7 - 0.2,
        "equal-opportunity": 0.5 - 0.3,
        "predictive-equality": 0.9 - 0.1,
        "equalized-odds": 0.9 - 0.1,
        "error-parity": (0.9 + 0.5) / 2 - (0.1 + 0.7) / 2,
        "mean-residual": (-0.1 + 0.7) / 2 - (-0.9 + 0.5) / 2,
        "impact-ratio": 1 - 0.2 / 0.7,
    }
    for notion in NOTIONS:
        gaps = gaps_of(predictions, targets, groups, [notion])
        assert gaps == {"two": pytest.approx(expected[notion], abs=1e-7), "one": 0.0}, notion
    assert tuple(NOTIONS) == tuple(SHOWN)
    both = gaps_of(predictions, targets, groups, ["equal-opportunity", "error-parity"])
    assert both["two"] == pytest.approx(0.3, abs=1e-7)


@pytest.mark.parametrize("notion", NOTIONS)
def test_demo_holds_any_notion(
    notion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fairopt.demo.run.SWEEP", ())
    chosen = ["--notions", notion, "--attributes", "sex", "--tolerance", "0.02", "--epochs", "2"]
    file = tmp_path / "demo.json"
    assert main([*QUICK, *chosen, "--output", str(tmp_path), "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert notion.replace("-", " ").capitalize() + " on sex" in text
    assert "gap: race" not in text
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 120
    plain, post_hoc, layer = json.loads(file.read_text())["models"]
    assert post_hoc["worst_excess"] <= 1e-6
    assert layer["worst_excess"] <= 1e-6
    if notion not in ("error-parity", "mean-residual"):  # these the network may hold by itself
        assert plain["worst_excess"] > 0.0


# ---------------------------------------------------------------- doctor


def test_doctor_prints_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in backends.names():
        assert f"backend {name!r}" in text
    for word in ("python", "torch", "numpy", "numba", "threads", "CUDA", "kernel cache"):
        assert word in text


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is True
    assert torch.__version__.startswith(found["versions"]["torch"])  # metadata may lack "+cu126"
    reports = {report["name"]: report for report in found["backends"]}
    assert tuple(reports) == backends.names()
    for name, report in reports.items():
        assert report["installed"] == (name in backends.available())
        assert report["passed"] is (True if report["installed"] else None)
    assert "diagonal" in reports["numba"]["capabilities"]["quadratic"]
    assert "solved a quadratic program" in reports["numba"]["message"]


def test_doctor_says_how_to_install_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = backends.Entry(  # type: ignore[attr-defined]
        load=lambda: pytest.fail("must not be loaded"),
        package="no_such_solver",
        install="pip install 'fairopt[nosuch]'",
    )
    monkeypatch.setitem(backends.registry, "nosuch", absent)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "backend 'nosuch': not installed" in text
    assert "pip install 'fairopt[nosuch]'" in text


def test_doctor_finds_a_wrong_solver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fairopt.programs.solution import Solution

    right = backends.get("numba")

    class Liar(type(right)):  # type: ignore[misc]
        name = "liar"

        def solve(self, problem: object) -> Solution:
            from dataclasses import replace

            solution = super().solve(problem)
            return replace(solution, x=solution.x + 1e-3)

    monkeypatch.setattr(backends, "registry", dict(backends.registry))
    backends.register("liar", lambda: Liar)
    try:
        assert main(["doctor"]) == 1
    finally:
        backends.loaded.pop("liar", None)
    assert "backend 'liar': FAILED" in capsys.readouterr().out


def test_doctor_finds_the_kernel_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import numba

    from fairopt import kernels

    monkeypatch.setattr(numba.config, "CACHE_DIR", "")  # whatever the environment says
    folder = Path(kernels.__file__).parent / "__pycache__"
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["kernel_cache"]
    assert Path(found) == folder or not os.access(folder, os.W_OK)

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernel_cache"].startswith(str(tmp_path))


def test_doctor_says_what_to_do_without_a_kernel_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> object:
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr("numba.njit", refuse)
    assert main(["doctor"]) == 0
    assert "set NUMBA_CACHE_DIR" in capsys.readouterr().out
