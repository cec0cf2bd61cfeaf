"""The measurements themselves: turns are taken, ratios are paired, verdicts are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.harness import Report, Row, Spread, interleaved, ratio


def test_functions_take_turns() -> None:
    order: list[str] = []
    times = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        seconds=0,
        warmup=1,
        fewest_rounds=3,
        calls={"b": 2},
    )
    assert "".join(order) == "ab" + "abb" * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_within_a_round() -> None:
    # The machine slowed down threefold in the second round, and fourfold in the third.
    spread = ratio({"a": [2.0, 6.0, 8.0], "b": [1.0, 3.0, 4.0]}, "a", "b")
    assert spread == Spread(2.0, 2.0, 2.0, 3)


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        ({}, ""),
        ({"at_most": 0.5}, "met"),
        ({"at_most": 0.49}, "NOT MET"),
        ({"at_least": 0.5}, "met"),
        ({"at_least": 0.51}, "NOT MET"),
    ],
)
def test_verdicts(target: dict[str, float], verdict: str) -> None:
    assert Row("figure", 0.5, "s", **target).verdict == verdict
    assert Row("figure", float("nan"), "s", **target).verdict in ("", "NOT MET")


def test_a_report_says_where_it_was_measured(tmp_path: Path) -> None:
    report = Report("example", "How long?")
    report.add("a figure", Spread(2.0, 1.5, 2.5, 9), "ms", at_most=3)
    report.save(tmp_path)
    record = json.loads((tmp_path / "example.json").read_text("utf-8"))
    assert record["figures"][0]["verdict"] == "met"
    assert {"date", "cpu", "cores", "torch threads", "versions"} <= set(record["machine"])
    table = (tmp_path / "example.md").read_text("utf-8")
    assert "| a figure | 2.00 ms | 1.50 to 2.50 | ≤ 3.00 | met |" in table
