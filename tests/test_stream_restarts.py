"""``fairopt stream`` in several runs: states, files that grow, signals and kills."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stream_records import (
    FORMATS,
    PARITY,
    TWO,
    adjusted,
    as_csv,
    as_json,
    expected,
    parsed,
    people,
    same,
    saved,
    tensors,
)
from stream_victims import nursery

from fairopt import DemographicParity, EqualizedOdds, OnlineParity
from fairopt.cli.records import FileOutput

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
