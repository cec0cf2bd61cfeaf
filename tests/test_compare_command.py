"""``fairopt compare``: the table, the verdict, files, plots and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from comparing import Twin, WrongX, parity

from fairopt import ProblemError, backends, save_problem
from fairopt.cli import main
from fairopt.cli.drawing import Drawn, draw
from fairopt.notions.names import COMPARING

PNG = b"\x89PNG\r\n\x1a\n"


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def with_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy backends with names, until the end of the test."""
    monkeypatch.setattr(backends, "registry", dict(backends.registry))
    monkeypatch.setattr(backends, "loaded", dict(backends.loaded))
    for kind in (Twin, WrongX):
        backends.register(kind.name, lambda kind=kind: kind)


COMPARE = ["compare", "--samples", "30", "--batch", "4", "--repeats", "1"]


def test_compare_prints_the_table_and_the_verdict(
    with_toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs it")
    files = {name: tmp_path / "new" / f"it.{name}" for name in ("json", "png", "npz")}
    status = main(
        [
            *COMPARE,
            "--backends",
            "numba,twin",
            "--finite-differences",
            "--json",
            str(files["json"]),
            "--plot",
            str(files["png"]),
            "--save",
            str(files["npz"]),
        ]
    )
    text = capsys.readouterr().out
    assert status == 0, text
    assert "AGREE: 2 answers" in text
    assert text.startswith("4 quadratic programs, 30 variables, 3 rows, float64 on cpu\n")
    assert files["png"].read_bytes().startswith(PNG)
    figures = json.loads(files["json"].read_text("utf-8"))
    assert figures["problem"] == {
        "drawn": {
            "samples": 30, "groups": 3, "notion": "demographic-parity", "comparison": "pairwise",
            "tolerance": 0.05, "batch": 4, "bounds": [0.0, 1.0], "dtype": "float64", "seed": 0,
        }
    }  # fmt: skip
    assert figures["agree"] is True
    assert {row["backend"] for row in figures["table"]} == {"numba", "twin"}
    for row in figures["table"]:
        assert row["status"] == "solved"
        assert row["forward_seconds"] > 0
        assert {"x", "gradient of q", "gradient of tolerance", "slope along u"} <= set(row)

    # The saved problem is the same one.
    assert main(["compare", str(files["npz"]), "--backends", "numba,twin", "--repeats", "0"]) == 0
    assert "4 quadratic programs, 30 variables" in capsys.readouterr().out


def test_compare_exits_with_1_where_backends_disagree(
    with_toys: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "problem.npz"
    save_problem(parity(), file)
    status = main(
        [
            "compare",
            str(file),
            "--backends",
            "numba,twin,wrong-x",
            "--reference",
            "twin",
            "--json",
            str(tmp_path / "it.json"),
        ]
    )
    assert status == 1
    text = capsys.readouterr().out
    assert "wrong-x: the odd one out of 3" in text
    assert "problem 2, x[3]" in text
    figures = json.loads((tmp_path / "it.json").read_text("utf-8"))
    assert figures["problem"] == {"file": str(file)}
    assert figures["reference"] == "twin"
    assert figures["agree"] is False
    assert {d["backend"] for d in figures["differences"]} == {"wrong-x"}
    assert main([*COMPARE, "--backends", "numba"]) == 1
    assert "NOTHING TO COMPARE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backends", "abacus"], "'abacus'"),
        (["--backends", ","], "at least one"),
        (["--tolerance", "-1"], "tolerance"),
        (["--allow", "2"], "tolerance"),
        (["missing.npz"], "cannot open missing.npz"),
        (["missing.npz", "--groups", "3", "--dtype", "float32"], "--groups, --dtype"),
        (["--smoothing", "0.1"], "smoothing"),
    ],
)
def test_compare_errors_are_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fairopt: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert not captured.out


def test_compare_refuses_a_file_that_is_no_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "it.npz"
    file.write_text("no problem", "utf-8")
    assert main(["compare", str(file)]) == 2
    assert "it.npz" in capsys.readouterr().err


def test_compare_says_at_once_that_a_plot_is_not_possible(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*COMPARE, "--plot", str(tmp_path / "it.png")]) == 2
    assert "pip install 'fairopt[demo]'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.undo()
    assert main([*COMPARE, "--json", str(tmp_path / "file" / "it.json")]) == 2
    assert "cannot open" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--samples", "0"], ["--notion", "luck"], ["--bounds", "0"], ["--bounds", "a", "b"],
     ["--dtype", "float16"], ["--repeats", "-1"]],
)  # fmt: skip
def test_compare_unusable_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *arguments])
    assert stopped.value.code == 2


@pytest.mark.parametrize("notion", COMPARING)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_compare_draws_every_notion(
    notion: str, dtype: str, with_toys: None, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        [
            *COMPARE,
            "--notion",
            notion,
            "--comparison",
            "overall",
            "--tolerance",
            "0.01",
            "--bounds",
            "none",
            "0.9",
            "--dtype",
            dtype,
            "--backends",
            "numba,twin",
        ]
    )
    assert status == 0, capsys.readouterr().out


def test_drawn_problems_follow_the_seed() -> None:
    first, again, other = (draw(Drawn(seed=seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first.q, again.q)
    assert not torch.equal(first.q, other.q)
    with pytest.raises(ProblemError, match="notion"):
        draw(Drawn(notion="luck"))
