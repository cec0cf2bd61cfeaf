"""``fairopt stream``: the same as ``OnlineParity`` from a file, whatever happens to the process."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import torch
from stream_records import (
    FORMATS,
    PARITY,
    RULE,
    TWO,
    adjusted,
    as_csv,
    as_json,
    codes,
    column,
    expected,
    parsed,
    people,
    same,
    saved,
    tensors,
)

from fairopt import (
    DemographicParity,
    EqualizedOdds,
    EqualOpportunity,
    ImpactRatio,
    OnlineParity,
    audit,
)
from fairopt.cli import main
from fairopt.cli.records import Columns, PipeOutput, Session, Source

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
