"""``fairopt stream``: the same as ``OnlineParity`` from a file, whatever happens to the process."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stream_victims import nursery

from fairopt import (
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    ImpactRatio,
    OnlineParity,
    audit,
)
from fairopt.cli import main
from fairopt.cli.records import Columns, FileOutput, PipeOutput, Session, Source

RULE = ["--notion", "demographic-parity", "--tolerance", "0.05", "--bounds", "0", "1"]
PARITY = [*RULE, "--groups", "sex"]
TWO = [*RULE, "--groups", "sex,race"]


# ---------------------------------------------------------------------------------------------
# Records, written in both formats, and what OnlineParity makes of them
# ---------------------------------------------------------------------------------------------


def people(n, seed=0):
    """Records whose groups differ, some of which come late."""
    draw = random.Random(seed)
    found = []
    for i in range(n):
        sex = draw.choice(["Female", "Male"])
        race = draw.choice(["a", "b, or so", "ç"] if i > n // 2 else ["a"])
        score = draw.random() * (0.7 if sex == "Female" else 1.0)
        found.append(
            {
                "id": i,
                "score": score,
                "sex": sex,
                "race": race,
                "y": int(draw.random() < score),
                "w": draw.choice([0.5, 1.0, 2.0]),
            }
        )
    return found


def as_csv(records, header=True):
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0], lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(records)  # numbers by their repr
    return text.getvalue().encode()


def as_json(records, header=True):
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records).encode()


FORMATS = {"csv": as_csv, "jsonl": as_json}


def parsed(data):
    """What was written, as records."""
    text = data.decode()
    if text.startswith("{"):
        return [json.loads(line) for line in text.splitlines()]
    return list(csv.DictReader(io.StringIO(text)))


def adjusted(data):
    """The adjusted scores in what was written, as text."""
    found = [each["adjusted"] for each in parsed(data)]
    return [each if isinstance(each, str) else repr(each) for each in found]


def codes(records, name):
    known = {}
    return torch.tensor([known.setdefault(each[name], len(known)) for each in records])


def column(records, name):
    return torch.tensor([float(each[name]) for each in records], dtype=torch.float64)


def expected(records, constraints, groups, *, target=None, weight=None, batch_size=1, **options):
    """Adjusted scores as text, and the stream that gave them."""
    stream = OnlineParity(constraints, **{"bounds": (0, 1), **options})
    x = stream.run(
        column(records, "score"),
        {name: codes(records, name) for name in groups},
        None if target is None else column(records, target),
        weights=None if weight is None else column(records, weight),
        batch_size=batch_size,
    )
    return list(map(repr, x.tolist())), stream


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder, and ``run``, which gives status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    made = SimpleNamespace(folder=tmp_path)

    def run(*arguments, stdin=b"", state="S"):
        printed, said = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            patch.setattr(sys, "stdout", printed)
            patch.setattr(sys, "stderr", said)
            status = main(["stream", "--state", state, *arguments])
        printed.flush()
        return status, printed.buffer.getvalue(), said.getvalue()

    made.run = run
    return made


def saved(path="S"):
    """The state in a file, as numbers, with what else the file says."""
    raw = Path(path).read_bytes()
    header = json.loads(raw.split(b"\n")[1])
    return header["notes"]["stream"], raw


def tensors(path, like):
    """The state in a file, as Python loads it."""
    stream = OnlineParity(
        like.constraints,
        bounds=like.bounds,
        feedback=like.feedback,
        step_size=like.step_size,
        warm_up=like.warm_up,
        group_counts=like.group_counts,
        unknown_group=like.unknown_group,
    )
    stream.load(path)
    return stream.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------
# The same as OnlineParity
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["file", "stdin"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_what_online_parity_returns(name, source, place):
    records = people(600)
    data = FORMATS[name](records)
    Path("in").write_bytes(data)
    status, out, said = place.run(
        *([] if source == "stdin" else ["in"]), *TWO, "--chunk-size", "37",
        stdin=data if source == "stdin" else b"",
    )  # fmt: skip
    right, stream = expected(
        records, [DemographicParity(0.05, "sex"), DemographicParity(0.05, "race")], ("sex", "race")
    )
    assert status == 0
    assert adjusted(out) == right
    assert sum(a != repr(each["score"]) for a, each in zip(right, records, strict=True)) > 100
    rest = [{k: v for k, v in each.items() if k != "adjusted"} for each in parsed(out)]
    assert rest == parsed(data), "the records themselves come back as they were"
    assert same(tensors("S", stream), stream.state_dict())
    assert said.startswith("600 records\n600 samples in 600 batches\n")
    assert "sex: Female vs Male" in said or "sex: Male vs Female" in said
    assert "race: a vs b, or so" in said and " | race: ç: " in said


OPTIONS = {
    "targets and weights": (
        ["--notion", "equalized-odds", "--target", "y", "--weight", "w"],
        lambda: EqualizedOdds(0.05, "sex"),
        {"target": "y", "weight": "w"},
    ),
    "no targets": (["--notion", "equal-opportunity"], lambda: EqualOpportunity(0.05, "sex"), {}),
    "two notions": (
        ["--notion", "impact-ratio=0.1,equalized-odds", "--target", "y"],
        lambda: [ImpactRatio(0.9, "sex"), EqualizedOdds(0.05, "sex")],
        {"target": "y"},
    ),
    "batches": (
        ["--notion", "demographic-parity", "--batch-size", "8"],
        lambda: DemographicParity(0.05, "sex"),
        {"batch_size": 8},
    ),
    "the hard rule": (
        ["--notion", "demographic-parity", "--feedback", "hard", "--warm-up", "50",
         "--batch-size", "16"],
        lambda: DemographicParity(0.05, "sex"),
        {"batch_size": 16, "feedback": "hard", "warm_up": 50},
    ),
    "the paper's rule": (
        ["--notion", "demographic-parity", "--feedback", "batch", "--batch-size", "20",
         "--step-size", "0.1"],
        lambda: DemographicParity(0.05, "sex"),
        {"batch_size": 20, "feedback": "batch", "step_size": 0.1},
    ),
    "no bounds": (
        ["--notion", "demographic-parity", "--bounds", "none", "none"],
        lambda: DemographicParity(0.05, "sex"),
        {"bounds": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_reaches_the_rule_and_chunks_change_nothing(name, place):
    arguments, constraints, options = OPTIONS[name]
    records = people(210, seed=1)
    Path("in.csv").write_bytes(as_csv(records))
    right, stream = expected(records, constraints(), ("sex",), **options)
    for size in ("9", "1000"):
        status, out, _ = place.run(
            "in.csv", "--groups", "sex", "--bounds", "0", "1", "--tolerance", "0.05", *arguments,
            "--chunk-size", size, state=f"S{size}",
        )  # fmt: skip
        assert status == 0
        assert adjusted(out) == right
        assert same(tensors(f"S{size}", stream), stream.state_dict())


class Pieces:
    """A pipe whose writer is in no hurry: random pieces of some bytes."""

    def __init__(self, data, draw):
        self.data, self.draw = data, draw

    def read1(self, size):
        length = self.draw.choice([1, 7, 50, 400, 5000])
        piece, self.data = self.data[:length], self.data[length:]
        return piece

    def seek(self, offset):
        raise AssertionError("a pipe cannot be rewound")


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_how_lines_arrive_changes_no_answer(batch_size, place):
    records = people(97, seed=9)
    text = as_csv(records).replace(b"\n", b"\n\n", 20)[:-1]  # blank lines, and no end at the end
    right, stream = expected(
        records, DemographicParity(0.05, "sex"), ("sex",), batch_size=batch_size
    )
    for seed in range(5):
        draw = random.Random(seed)
        written = io.BytesIO()
        with Session(
            OnlineParity(DemographicParity(0.05, "sex"), bounds=(0, 1)),
            Columns("score", ("sex",)),
            state=Path(f"S{seed}"),
            output=PipeOutput(written),
            batch_size=batch_size,
            chunk=draw.choice([1, 2, 10, 1000]),
        ) as session:
            session.run(Source(Pieces(text, draw)))
        assert adjusted(written.getvalue()) == right
        assert same(tensors(f"S{seed}", stream), stream.state_dict())


class Sparing:
    """Takes at most seven bytes at a time, as a file without a buffer may."""

    def __init__(self):
        self.taken = b""

    def write(self, data):
        self.taken += bytes(data[:7])
        return min(7, len(data))


def test_answers_are_written_whole_whatever_is_taken_at_a_time(place):
    records = people(20)
    file = Sparing()
    with Session(
        OnlineParity(DemographicParity(0.05, "sex"), bounds=(0, 1)),
        Columns("score", ("sex",)),
        state=Path("S"),
        output=PipeOutput(file),
    ) as session:
        session.run(Source(io.BufferedReader(io.BytesIO(as_csv(records)))))
    assert adjusted(file.taken) == expected(records, DemographicParity(0.05, "sex"), ("sex",))[0]


def test_intersections_and_the_choice_of_attributes(place):
    records = people(300)
    Path("in").write_bytes(as_json(records))
    status, out, said = place.run("in", *TWO, "--on", "sex+race")
    right, _ = expected(records, DemographicParity(0.05, ("sex", "race")), ("sex", "race"))
    assert status == 0
    assert adjusted(out) == right
    assert "sex x race: (" in said
    status, out, said = place.run("in", *TWO, "--on", "sex", state="T")
    assert adjusted(out) == expected(records, DemographicParity(0.05, "sex"), ("sex", "race"))[0]
    assert "race" not in said


def test_the_report_is_what_an_audit_finds(place):
    records = people(400)
    Path("in").write_bytes(as_csv(records))
    status, out, _ = place.run("in", *PARITY, "--json", "report.json")
    report = json.loads(Path("report.json").read_text())
    x = torch.tensor([float(a) for a in adjusted(out)], dtype=torch.float64)
    found = audit(x, {"sex": codes(records, "sex")}, DemographicParity(0.05))
    assert status == 0
    assert (report["records"], report["samples"], report["pending"]) == (400, 400, 0)
    (row,) = report["rows"]
    assert row["value"] == pytest.approx(found.worst.value, abs=1e-13)
    names = list(dict.fromkeys(each["sex"] for each in records))
    assert row["name"] == f"sex: {names[0]} vs {names[1]}"
    for group, name in zip(report["groups"], names, strict=True):
        assert group["name"] == f"sex: {name}"
        assert group["samples"] == sum(each["sex"] == name for each in records)


def test_labels_are_text_numbers_and_truth_values(place):
    lines = [
        '{"score": 0.5, "sex": "F"}',
        '{"score": 0.9, "sex": 7}',
        '{"score": 0.2, "sex": true}',
        '{"score": 0.4, "sex": " F "}',
        "",
        '{"score": 1, "sex": false, "more": [1, {"a": "b}"}], "large": 12345678901234567890.10} ',
        '  {"score":0.25,"sex":"7"}\r',
    ]
    status, out, _ = place.run(*PARITY, stdin="\n".join(lines).encode())
    assert status == 0
    assert saved()[0]["codes"] == {"sex": ["F", "7", "true", "false"]}
    written = out.decode().splitlines()
    assert len(written) == 6
    assert written[4].startswith(
        '{"score": 1, "sex": false, "more": [1, {"a": "b}"}], "large": 12345678901234567890.10, "ad'
    )
    assert all(0 <= each["adjusted"] <= 1 for each in parsed(out))


def test_other_names_quotes_marks_and_line_ends(place):
    text = '\ufeff"the score",G,"note, free"\r\n0.25,x,"says ""no"", or so"\r\n+25e-2, y ,\r\n'
    arguments = [*RULE, "--score", "the score", "--groups", "G", "--adjusted", "fair, now"]
    status, out, _ = place.run(*arguments, stdin=text.encode())
    assert status == 0
    assert out.decode() == (
        '\ufeff"the score",G,"note, free","fair, now"\n0.25,x,"says ""no"", or so",0.25\n'
        "+25e-2, y ,,0.25\n"
    )
    assert saved()[0]["codes"] == {"G": ["x", "y"]}


# ---------------------------------------------------------------------------------------------
# Between runs
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_a_growing_file_is_counted_once_and_its_output_appended(name, batch_size, place):
    records = people(240)
    write = FORMATS[name]
    right, stream = expected(
        records, DemographicParity(0.05, "sex"), ("sex",), batch_size=batch_size
    )
    arguments = ["in", *PARITY, "--output", "out", "--batch-size", str(batch_size)]
    for last in (0, 80, 80, 160, 240):
        Path("in").write_bytes(write(records[:last]) if last else write(records[:1])[:0])
        status, out, said = place.run(*arguments)
        assert (status, out) == (0, b"")
        assert f"{last} records" in said
    assert adjusted(Path("out").read_bytes()) == right
    assert same(tensors("S", stream), stream.state_dict())
    assert Path("out").read_bytes().count(b'"adjusted"' if name == "jsonl" else b"adjusted") == (
        240 if name == "jsonl" else 1
    )


def test_one_file_after_the_other_and_standard_input_between_them(place):
    records = people(300)
    Path("monday.csv").write_bytes(as_csv(records[:100]))
    Path("tuesday.csv").write_bytes(as_csv(records[200:]))
    right, stream = expected(records, DemographicParity(0.05, "sex"), ("sex",))
    found = []
    for source, stdin in (("monday.csv", b""), ("-", as_json(records[100:200])),
                          ("tuesday.csv", b""), ("tuesday.csv", b"")):  # fmt: skip
        status, out, said = place.run(source, *PARITY, stdin=stdin)
        assert status == 0
        found += adjusted(out)
    assert found == right
    assert same(tensors("S", stream), stream.state_dict())
    assert "going on after record 300" in said


def test_standard_input_from_its_start_again(place):
    records = people(90)
    data = as_csv(records)
    place.run(*PARITY, "--from-start", "--output", "out", stdin=as_csv(records[:40]))
    status, _, _ = place.run(*PARITY, "--from-start", "--output", "out", stdin=data)
    assert status == 0
    assert (
        adjusted(Path("out").read_bytes())
        == expected(records, DemographicParity(0.05, "sex"), ("sex",))[0]
    )
    before = Path("S").read_bytes()
    status, _, said = place.run(*PARITY, "--from-start", stdin=as_csv(people(90, seed=5)))
    assert status == 2
    assert f"the input: expected the {len(data)} bytes that were counted before" in said
    assert Path("S").read_bytes() == before


def test_files_that_changed_are_refused_and_those_left_unfinished_go_on_later(place):
    records = people(60)
    good = as_csv(records[:50])
    Path("in").write_bytes(good + b"0,zero,Male,a,0,1\n")
    assert place.run("in", *PARITY)[0] == 2
    Path("other").write_bytes(as_csv(people(9, seed=3)))
    status, out, said = place.run("other", *PARITY)
    assert (status, len(adjusted(out))) == (0, 9)
    assert "59 records" in said
    before = Path("S").read_bytes()
    Path("in").write_bytes(good.replace(b"Female", b"female"))
    status, _, said = place.run("in", *PARITY)
    assert status == 2
    assert f"in: expected the {len(good)} bytes that were counted before, got others" in said
    assert Path("S").read_bytes() == before
    Path("in").write_bytes(as_csv(records))
    for count, options in ((10, []), (0, []), (0, ["--new-input"])):
        status, out, _ = place.run("in", *PARITY, *options)
        assert (status, out.count(b"\n")) == (0, count + (count > 0))
    Path("in").rename("moved")
    assert place.run("moved", *PARITY)[1] == b""
    Path("in").write_bytes(good.replace(b"Female", b"female"))
    status, out, said = place.run("in", *PARITY, "--new-input")
    assert (status, len(adjusted(out))) == (0, 50)
    assert "119 records" in said


def test_a_last_line_without_an_end_that_goes_on_is_refused(place):
    records = people(20)
    data = as_csv(records)
    half = data[:-3]
    Path("in").write_bytes(data[:-1])
    assert place.run("in", *PARITY)[0] == 0
    Path("in").write_bytes(data + b"1,0.5,Male,a,1,1\n")
    status, out, _ = place.run("in", *PARITY)
    assert (status, len(adjusted(out))) == (0, 1)
    Path("in").write_bytes(half)
    assert place.run("in", *PARITY, state="T")[0] == 0
    Path("in").write_bytes(data)
    status, _, said = place.run("in", *PARITY, state="T")
    assert status == 2
    assert "line 21: expected its end" in said


def test_outputs_that_are_not_ours_are_left_alone(place):
    Path("in").write_bytes(as_csv(people(20)))
    Path("out").write_bytes(b"precious\n")
    status, _, said = place.run("in", *PARITY, "--output", "out")
    assert status == 2
    assert "expected an empty file, or the answers that were written before" in said
    assert Path("out").read_bytes() == b"precious\n"
    assert not Path("S").exists()
    assert place.run("in", *PARITY, "--output", "mine")[0] == 0
    Path("more").write_bytes(as_json(people(20)))
    status, _, said = place.run("more", *PARITY, "--output", "mine")
    assert status == 2
    assert "mine: expected answers like those before, id,score,sex,race,y,w,adjusted, got JSON" in (
        said
    )
    with Path("mine").open("ab") as file:
        file.write(b"1\n")
    assert place.run("in", *PARITY, "--output", "mine")[0] == 2
    assert place.run("more", *PARITY, "--output", "new")[0] == 0
    assert len(parsed(Path("new").read_bytes())) == 20


def test_answers_that_could_not_be_written_come_with_the_next_run(place, monkeypatch):
    def full(self, data):
        os.write(self._file.fileno(), data[:700])
        raise OSError(errno.ENOSPC, "No space left on device")

    records = people(40)
    Path("in").write_bytes(as_csv(records))
    arguments = ["in", *PARITY, "--output", "out", "--chunk-size", "15"]
    with monkeypatch.context() as patch:
        patch.setattr(FileOutput, "_append", full)
        status, _, said = place.run(*arguments)
    assert status == 2
    assert said.startswith("fairopt: error: cannot read or write: No space left on device")
    assert len(Path("out").read_bytes()) == 700
    status, _, said = place.run(*arguments)
    assert status == 0
    assert "going on after record 15" in said and "once more" not in said
    assert (
        adjusted(Path("out").read_bytes())
        == expected(records, DemographicParity(0.05, "sex"), ("sex",))[0]
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--tolerance", "0.06"], "constraints: here"),
        (["--bounds", "0", "2"], "bounds: here [0.0, 2.0], saved [0.0, 1.0]"),
        (["--feedback", "hard"], "feedback: here 'hard', saved 'pooled'"),
        (["--step-size", "2"], "step_size: here 2.0, saved 1.0"),
        (["--batch-size", "2"], "batch_size: here 2, saved 1"),
        (["--weight", "w"], "weight: here 'w', saved None"),
        (["--score", "w"], "score: here 'w', saved 'score'"),
        (["--groups", "race"], "constraints: here"),
        (["--groups", "sex,race", "--on", "sex"], "expected the attributes sex, in this order"),
        (["--group-labels", "sex=Male,Female"], "group_counts: here {'sex': 2}, saved None"),
    ],
)
def test_another_configuration_is_refused(changed, message, place):
    Path("in").write_bytes(as_csv(people(20)))
    place.run("in", *PARITY)
    before = Path("S").read_bytes()
    status, out, said = place.run("in", *PARITY, *changed)
    assert (status, out) == (2, b"")
    assert message in said
    assert said.count("\n") <= 2
    assert Path("S").read_bytes() == before


def test_states_that_are_torn_or_of_something_else_are_refused(place):
    Path("in").write_bytes(as_csv(people(20)))
    for notes in (None, {"stream": [1]}, {"stream": {"codes": {"sex": ["F"]}, "progress": {}}}):
        OnlineParity(DemographicParity(0.05, "sex"), bounds=(0, 1)).save("S", notes=notes)
        status, _, said = place.run("in", *PARITY)
        assert status == 2
        assert "one that does not say what its groups are called" in said
    Path("S").write_bytes(b"hello")
    assert place.run("in", *PARITY)[0] == 2
    place.run("in", *PARITY, state="T")
    Path("T").write_bytes(Path("T").read_bytes()[:-9])
    status, _, said = place.run("in", *PARITY, state="T")
    assert status == 2
    assert "the file is torn" in said


# ---------------------------------------------------------------------------------------------
# Targets that come later
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_targets_that_come_later_are_observed(name, place):
    records = people(120)
    write = FORMATS[name]
    bare = [{k: v for k, v in each.items() if k != "y"} for each in records]
    Path("in").write_bytes(write(bare))
    arguments = ["--groups", "sex", "--notion", "equalized-odds=0.05", "--bounds", "0", "1",
                 "--weight", "w"]  # fmt: skip
    assert place.run("in", *arguments, "--output", "out")[0] == 0
    served = parsed(Path("out").read_bytes())
    late = [a | {"y": b["y"]} for a, b in zip(served, records, strict=True)]
    random.Random(4).shuffle(late)
    for first in range(0, 120, 40):
        Path("late").write_bytes(write(late[: first + 40]))
        status, out, said = place.run(
            "late", *arguments, "--observe", "--target", "y", "--chunk-size", "7"
        )
        assert (status, out) == (0, b"")
        assert f"{first + 40} samples in 120 batches" in said
    right, stream = expected(records, EqualizedOdds(0.05, "sex"), ("sex",), weight="w")
    assert adjusted(Path("out").read_bytes()) == right
    sexes = codes(records, "sex")
    x = torch.tensor([float(a) for a in right], dtype=torch.float64)
    for each in [int(each["id"]) for each in late]:
        one = slice(each, each + 1)
        stream.observe(
            column(records, "y")[one], x[one], {"sex": sexes[one]},
            scores=column(records, "score")[one], weights=column(records, "w")[one],
        )  # fmt: skip
    assert same(tensors("S", stream), stream.state_dict())
    # Serving goes on where it was.
    Path("in").write_bytes(write(bare + bare[:5]))
    status, _, said = place.run("in", *arguments, "--output", "out")
    assert status == 0
    assert len(parsed(Path("out").read_bytes())) == 125
    # More than are awaited.
    Path("late").write_bytes(write(late + late[:9]))
    status, _, said = place.run("late", *arguments, "--observe", "--target", "y")
    assert status == 2
    assert f"line {127 if name == 'csv' else 126}: observe: expected at most 0 samples" in said


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------

GOOD = [f"{0.1 * i!r},{'FM'[i % 2]},{i % 3 // 2},1" for i in range(6)]
JSON_GOOD = [
    json.dumps({"score": 0.1 * i, "sex": "FM"[i % 2], "y": i % 3 // 2, "w": 1}) for i in range(6)
]
BAD = {
    "no number": ("abc,F,1,1", "score: expected a finite number, got 'abc'"),
    "NaN": ("nan,F,1,1", "score: expected a finite number, got 'nan'"),
    "infinite": ("1e999,F,1,1", "score: expected a finite number, got '1e999'"),
    "underscores": ("1_0,F,1,1", "score: expected a finite number"),
    "no score": (",F,1,1", "score: expected a value, got none"),
    "no group": ("0.5, ,1,1", "sex: expected a value, got none"),
    "no target": ("0.5,F,,1", "y: expected a value, got none"),
    "a target of 2": ("0.5,F,2,1", "needs targets that are 0 or 1"),
    "a negative weight": ("0.5,F,1,-1", "w: expected a weight of at least 0, got -1.0"),
    "an unknown group": ("0.5,X,1,1", "sex: expected one of the labels declared, F, M, got 'X'"),
    "a field too few": ("0.5,F,1", "expected 4 fields, as in the header, got 3"),
    "a field too many": ("0.5,F,1,1,1", "expected 4 fields, as in the header, got 5"),
    "two lines": ('0.5,"F', "expected a record of CSV on one line"),
    "too large": ("1e300,F,1,1", "scores: expected magnitudes of at most 1e+100"),
    "no text": (b"0.5,\xff,1,1", "expected UTF-8"),
}
JSON_BAD = {
    "no JSON": ("{]", "expected a JSON object, got '{]'"),
    "no object": ("[1]", "expected a JSON object, got '[1]'"),
    "NaN": ('{"score": NaN, "sex": "F", "y": 1, "w": 1}', "score: expected a finite number"),
    "text": ('{"score": "0.5", "sex": "F", "y": 1, "w": 1}', "score: expected a finite number"),
    "truth": ('{"score": true, "sex": "F", "y": 1, "w": 1}', "score: expected a finite number"),
    "digits": (f'{{"score": 1{"0" * 400}, "sex": "F", "y": 1, "w": 1}}', "score: expected a fin"),
    "no score": ('{"sex": "F", "y": 1, "w": 1}', "score: expected a value, got none"),
    "null": ('{"score": 0.5, "sex": null, "y": 1, "w": 1}', "sex: expected a value, got none"),
    "a list": ('{"score": 0.5, "sex": [], "y": 1, "w": 1}', "sex: expected the label of a group"),
    "a real label": ('{"score": 0.5, "sex": 1.5, "y": 1, "w": 1}', "sex: expected the label of"),
    "taken": ('{"score": 1, "sex": "F", "y": 1, "w": 1, "adjusted": 3}', "expected no column 'adj"),
    "deep": ("[" * 200_000, "expected a JSON object"),
}  # fmt: skip
KNOWN = ["--groups", "sex", "--notion", "equalized-odds=0.05", "--bounds", "none", "none",
         "--target", "y", "--weight", "w", "--group-labels", "sex=F,M",
         "--unknown-group", "raise"]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "message", "good", "header"),
    [
        *[pytest.param(*BAD[n], GOOD, "score,sex,y,w", id=f"csv-{n}") for n in BAD],
        *[pytest.param(*JSON_BAD[n], JSON_GOOD, None, id=f"json-{n}") for n in JSON_BAD],
    ],
)
@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_a_line_that_is_refused_is_named_and_all_before_it_are_counted(
    bad, message, good, header, batch_size, place
):
    head = [] if header is None else [header]
    bad = bad if isinstance(bad, bytes) else bad.encode()

    def text(*lines):
        return b"\n".join(x if isinstance(x, bytes) else x.encode() for x in (*head, *lines))

    arguments = ["in", *KNOWN, "--output", "out", "--batch-size", batch_size]
    Path("in").write_bytes(text(*good[:4], bad, *good[4:]) + b"\n")
    status, out, said = place.run(*arguments)
    assert (status, out) == (2, b"")
    (line,) = said.splitlines()
    assert line.startswith("fairopt: error: line")
    number = 5 + len(head)
    assert f"line {number}: " in line or f"lines {number} to {number + 1}: " in line
    assert message in line
    # As if the file had ended before it ...
    Path("before").write_bytes(text(*good[:4]) + b"\n")
    assert place.run("before", *KNOWN, "--batch-size", batch_size, state="T")[0] == 0
    reference = OnlineParity(
        EqualizedOdds(0.05, "sex"), bounds=None, group_counts={"sex": 2}, unknown_group="raise"
    )
    assert same(tensors("S", reference), tensors("T", reference))
    assert len(parsed(Path("out").read_bytes())) == 4
    assert saved()[0]["codes"] == {"sex": ["F", "M"]}
    # ... and with the line mended it goes on as if nothing had been.
    Path("in").write_bytes(text(*good[:4], *good[4:]) + b"\n")
    assert place.run(*arguments)[0] == 0
    assert place.run("in", *KNOWN, "--batch-size", batch_size, "--output", "U.out", state="U")[
        0
    ] == 0  # fmt: skip
    assert Path("out").read_bytes() == Path("U.out").read_bytes()
    assert same(tensors("S", reference), tensors("U", reference))


def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(place, monkeypatch):
    monkeypatch.setattr("fairopt.cli.records.files.LONGEST_LINE", 1000)
    records = people(3)
    status, out, said = place.run(*PARITY, stdin=as_json(records) + b"x" * 2000)
    assert (status, out) == (2, b"")
    assert "line 4: expected at most 1000 bytes on a line" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,sex\n1,F\n", "line 1: the header: expected one column 'score', got id, sex"),
        ("score,sex,sex\n1,F,F\n", "line 1: the header: expected one column 'sex'"),
        ("score,sex,adjusted\n1,F,1\n", "expected no column 'adjusted', which is to be added"),
        ("0.5,F\n", "line 1: the header: expected one column"),
    ],
)
def test_headers_that_are_refused_leave_nothing_behind(text, message, place):
    status, out, said = place.run(*PARITY, stdin=text.encode())
    assert (status, out) == (2, b"")
    assert message in said
    assert not Path("S").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RULE, "--groups", "sex,sex"], "--groups: expected different names"),
        ([*RULE, "--groups", "score"], "columns: expected different names"),
        ([*PARITY, "--on", "race"], "--on: expected some of sex, got 'race'"),
        ([*PARITY, "--group-labels", "race=a"], "--group-labels: expected some of sex"),
        ([*PARITY, "--unknown-group", "raise"], "expected --group-labels for sex, got none"),
        ([*PARITY, "--output", "S"], "files: expected different ones"),
        (["o", *PARITY, "--output", "o"], "files: expected different ones"),
        ([*PARITY, "--observe"], "--observe: expected --target"),
        ([*PARITY, "--observe", "--target", "y", "--output", "o"], "expected no --output"),
        ([*PARITY, "--warm-up", "3"], "warm_up: expected 0 with feedback='pooled', got 3"),
        ([*PARITY, "--step-size", "-1"], "step_size: expected a finite number above 0"),
        (["--notion", "equalized-odds", "--groups", "a", "--bounds", "0", "1"], "--tolerance: exp"),
        ([*PARITY, "--state", "."], "--state: expected a file, got the folder ."),
        (["missing.csv", *PARITY], "cannot read or write missing.csv: No such file"),
        ([*PARITY, "--output", "no/folder"], "cannot read or write no/folder"),
        ([*PARITY, "--json", "no/folder"], "cannot read or write no/folder"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message, place):
    status, out, said = place.run(*arguments, stdin=b"score,sex\n0.5,F\n")
    assert (status, out) == (2, b"")
    assert message in said
    assert said.count("\n") == 1
    assert not Path("S").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--notion", "fairness"],
        ["--notion", "impact-ratio,impact-ratio"],
        ["--notion", "impact-ratio=much"],
        ["--group-labels", "sex"],
        ["--group-labels", "sex=F,F"],
        ["--bounds", "0"],
        ["--batch-size", "0"],
        ["--chunk-size", "0"],
    ],
)
def test_unusable_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["stream", *PARITY, "--state", "S", *arguments])
    assert stopped.value.code == 2
    assert "usage: fairopt stream" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def command():
    """Starts processes of the real command, which in any case end after a while."""
    started = []

    def start(*arguments, **options):
        process = subprocess.Popen(
            [sys.executable, "-m", "fairopt", "stream", *arguments],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
               "bufsize": 0, **options},
        )  # fmt: skip
        limit = threading.Timer(90, process.kill)  # so that a lost answer is a failure, no wait
        limit.start()
        started.append((process, limit))
        return process

    yield start
    for process, limit in started:
        limit.cancel()
        process.kill()
        with process:
            pass


def test_a_slow_producer_is_answered_line_by_line_and_ends_are_clean(place, command):
    records = people(12)
    lines = as_csv(records).splitlines(keepends=True)
    right, stream = expected(records, DemographicParity(0.05, "sex"), ("sex",))
    first = command(*PARITY, "--state", "S", "--chunk-size", "2")
    first.stdin.write(lines[0])
    # Whole lines are answered at once, be it one or more than a chunk.
    for start, end in ((0, 1), (1, 2), (2, 7)):
        first.stdin.write(lines[1 + start][:5])
        first.stdin.write(lines[1 + start][5:] + b"".join(lines[2 + start : 1 + end]))
        if start == 0:
            assert first.stdout.readline().endswith(b",adjusted\n")
        for line, answer in zip(lines[1 + start : 1 + end], right[start:end], strict=True):
            assert first.stdout.readline() == line[:-1] + f",{answer}\n".encode()
    # One process at a time.
    second = command(*PARITY, "--state", "S")
    _, said = second.communicate(b"", timeout=60)
    assert second.returncode == 2
    assert f"that process {first.pid} holds".encode() in said
    # Asked to end while it waits, it ends; the state is of all that was answered.
    first.stdin.write(lines[8][:-3])
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    said = first.stderr.read().decode()
    assert "ended by SIGTERM; the state is saved" in said
    assert "7 samples in 7 batches" in said
    # The next run goes on; the reader leaves before the answers come.
    third = command(*PARITY, "--state", "S")
    third.stdout.close()
    third.stdin.write(b"".join((lines[0], *lines[8:10])))
    third.stdin.close()
    assert third.wait(60) == 128 + 13
    said = third.stderr.read().decode()
    assert "going on after record 7" in said
    assert "nobody reads what is written any more" in said
    assert "Traceback" not in said and "Exception ignored" not in said
    # What was counted and could not be written comes first.
    fourth = command(*PARITY, "--state", "S")
    out, said = fourth.communicate(b"".join((lines[0], *lines[10:])), timeout=60)
    assert fourth.returncode == 0
    assert b"going on after record 9" in said and b"come once more" in said
    assert adjusted(out) == right[7:]
    assert same(tensors("S", stream), stream.state_dict())


def test_interrupts_end_in_order_with_a_report(place, command):
    process = command(*PARITY, "--state", "S")
    process.stdin.write(b'{"score": 0.5, "sex": "F"}\n')
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert b"1 samples in 1 batches" in process.stderr.read()
    assert saved()[0]["output"]["pending"] == ""


def test_who_waits_for_a_reader_that_does_not_read_ends_at_the_second_signal(place, command):
    records = people(4000)
    Path("in").write_bytes(as_csv(records))
    process = command("in", *PARITY, "--state", "S")
    while not Path("S").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)  # the pipe is full: what was counted waits for its reader
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    process.stdout.close()
    status, out, said = place.run("in", *PARITY)
    assert status == 0
    assert "going on after record 4000" in said and "come once more" in said
    assert adjusted(out) == expected(records, DemographicParity(0.05, "sex"), ("sex",))[0]


# ---------------------------------------------------------------------------------------------
# kill -9
# ---------------------------------------------------------------------------------------------

CHUNK = 20


class Undisturbed:
    """A run that nobody kills: what it writes, and every state that it passes through."""

    def __init__(self, place, arguments):
        self.states = {}

        def save(parity, path, **options):
            original(parity, path, **options)
            raw = Path(path).read_bytes()
            self.states[hashlib.sha256(raw).hexdigest()] = len(self.states)

        original = OnlineParity.save
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OnlineParity, "save", save)
            status, _, _ = place.run(*arguments)
        assert status == 0
        self.output = Path("out").read_bytes()
        self.final = Path("S").read_bytes()
        clear("in")

    def look(self):
        """After a kill: the number of the state, how many lines it counts, how many were written.

        Fails where the state is none that the run passed through, or lacks an acknowledged line.
        """
        output = Path("out").read_bytes() if Path("out").exists() else b""
        assert self.output.startswith(output)
        written = max(0, output.count(b"\n") - 1)
        if not Path("S").exists():
            assert written == 0
            return -1, 0, output
        notes, raw = saved()
        number = self.states[hashlib.sha256(raw).hexdigest()]
        counted = notes["progress"]["served"]["records"]
        assert written <= counted <= written + CHUNK
        return number, counted, output


def stamp():
    """Changes with the state file."""
    return Path("S").stat().st_mtime_ns if Path("S").exists() else None


def level(undisturbed, counted, output):
    """Whether everything that was counted was written."""
    return output == undisturbed.output[: len(output)] and output.count(b"\n") == counted + 1


def clear(*kept):
    for path in Path().iterdir():
        if path.name not in kept:
            path.unlink()


def test_killed_before_each_operation_nothing_is_lost_or_counted_twice(place):
    records = people(3 * CHUNK + 7)
    Path("in").write_bytes(as_csv(records))
    arguments = ["in", *TWO, "--output", "out", "--chunk-size", str(CHUNK)]
    undisturbed = Undisturbed(place, arguments)
    arguments += ["--state", "S"]
    ways, number = set(), 0
    with nursery() as victims:
        while True:
            clear("in")
            victims.start(arguments, bomb=number)
            if victims.end() == 0:
                break
            _, counted, output = undisturbed.look()
            ways.add((level(undisturbed, counted, output), output.endswith(b"\n")))
            # The next one is killed too, early; the one after that ends what they began.
            victims.start(arguments, bomb=number % 7)
            victims.end()
            undisturbed.look()
            victims.start(arguments)
            assert victims.end() == 0
            assert Path("out").read_bytes() == undisturbed.output
            assert Path("S").read_bytes() == undisturbed.final
            assert sorted(p.name for p in place.folder.iterdir()) == ["S", "S.lock", "in", "out"]
            number += 1
        assert number >= 4 * 5
        assert {(True, True), (False, True), (False, False)} <= ways

        # The output is lost after a kill: what may be missing comes in the next one, once.
        lines = undisturbed.output.splitlines(keepends=True)
        for bomb in range(9):
            clear("in")
            victims.start(arguments, bomb=9)  # the second chunk is saved
            assert victims.end() == -signal.SIGKILL
            Path("out").rename("old")
            victims.start(arguments, bomb=bomb)
            assert victims.end() == -signal.SIGKILL
            victims.start(arguments)
            assert victims.end() == 0
            old, new = (
                Path(name).read_bytes().splitlines(keepends=True) for name in ("old", "out")
            )
            assert old == lines[: len(old)]
            assert new == lines[:1] + lines[1 + CHUNK :]


def test_killed_before_each_operation_no_target_is_observed_twice(place):
    records = people(3 * CHUNK)
    Path("in").write_bytes(as_json([{k: v for k, v in r.items() if k != "y"} for r in records]))
    arguments = ["--groups", "sex", "--notion", "equalized-odds=0.05", "--bounds", "0", "1"]
    _, out, _ = place.run("in", *arguments)
    late = [a | {"y": b["y"]} for a, b in zip(parsed(out), records, strict=True)]
    Path("late").write_bytes(as_json(late))
    served = Path("S").read_bytes()
    arguments += ["late", "--observe", "--target", "y", "--chunk-size", str(CHUNK), "--state", "S"]
    states, final, number = set(), None, 0
    with nursery() as victims:
        while True:
            clear("late")
            Path("S").write_bytes(served)
            victims.start(arguments, bomb=number)
            ended = victims.end()
            states.add(Path("S").read_bytes())
            if ended == 0:
                break
            victims.start(arguments)
            assert victims.end() == 0
            assert final in (None, Path("S").read_bytes())
            final = Path("S").read_bytes()
            number += 1
    assert final in states
    assert len(states) == 1 + 3
    stream = OnlineParity(EqualizedOdds(0.05, "sex"), bounds=(0, 1))
    stream.load("S")
    assert (stream.report().samples, stream.report().pending) == (len(records), 0)


@pytest.mark.slow
def test_fifty_kills_at_random_moments(place, command):
    draw = random.Random(11)
    records = people(8_000, seed=2)
    Path("in").write_bytes(as_csv(records))
    arguments = ["in", *PARITY, "--output", "out", "--chunk-size", str(CHUNK)]
    began = time.monotonic()
    undisturbed = Undisturbed(place, arguments)
    each = (time.monotonic() - began) / len(undisturbed.states)
    right, _ = expected(records, DemographicParity(0.05, "sex"), ("sex",))
    assert adjusted(undisturbed.output) == right
    arguments += ["--state", "S"]
    seen, levels, last = [], [], 0

    def look():
        nonlocal last
        number, counted, output = undisturbed.look()
        assert counted >= last, "what was counted before is counted still"
        last = counted
        seen.append(number)
        levels.append(level(undisturbed, counted, output))

    def changed():
        """Wait until the victim is at work: the state is another one than before."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            now = stamp()
            if now not in (before, None):
                return
            time.sleep(each / 10)
        raise AssertionError("the victim does nothing")

    with nursery() as victims:
        for kill in range(40):
            before = stamp()
            if kill % 4 == 0:  # at a random operation
                victims.start(arguments, bomb=draw.randrange(60))
            else:
                child = victims.start(arguments)
                if kill % 4 == 1:  # while it begins
                    time.sleep(draw.uniform(0.0, 0.01 + 4 * each))
                else:  # while it is at work
                    changed()
                    time.sleep(draw.uniform(0.0, 4 * each))
                os.kill(child, signal.SIGKILL)
            assert victims.end() == -signal.SIGKILL, "it came to its end before it was killed"
            look()
    for kill in range(10):  # and ten starts of the command itself
        before = stamp()
        process = command(*arguments, stderr=subprocess.DEVNULL)
        if kill % 5:
            changed()
        time.sleep(draw.uniform(0.0, 4 * each))
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        process.stdin.close()
        process.stdout.close()
        look()
    assert len(seen) == 50
    assert len(set(seen)) >= 20
    assert set(levels) == {True, False}
    assert place.run(*arguments[:-2])[0] == 0
    assert Path("out").read_bytes() == undisturbed.output
    assert Path("S").read_bytes() == undisturbed.final
    assert sorted(p.name for p in place.folder.iterdir()) == ["S", "S.lock", "in", "out"]


@pytest.mark.slow
def test_a_sender_that_sends_again_what_was_not_counted_loses_and_doubles_nothing(place, command):
    draw = random.Random(8)
    records = people(400, seed=6)
    lines = as_json(records).splitlines(keepends=True)
    right, stream = expected(records, DemographicParity(0.05, "sex"), ("sex",))
    answers, counted = {}, 0
    for run in range(4):
        process = command(*PARITY, "--state", "S", "--chunk-size", "5")
        process.stdin.write(b"".join(lines[counted:]))
        process.stdin.close()
        if run < 3:
            data = b""
            for _ in range(draw.randrange(3, 60)):
                data += process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            data += process.stdout.read()
        else:
            data = process.stdout.read()
        assert process.wait(60) == (-signal.SIGKILL if run < 3 else 0)
        process.stderr.close()
        for each in parsed(data[: data.rfind(b"\n") + 1]):
            assert answers.setdefault(each["id"], each["adjusted"]) == each["adjusted"]
        counted = saved()[0]["progress"]["served"]["records"]
        assert len(answers) <= counted
    assert [repr(answers[i]) for i in range(400)] == right
    assert same(tensors("S", stream), stream.state_dict())
