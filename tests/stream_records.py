"""Records in both formats for the tests of ``fairopt stream``, and their expected answers."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import torch

from fairopt import OnlineParity

RULE = ["--notion", "demographic-parity", "--tolerance", "0.05", "--bounds", "0", "1"]
PARITY = [*RULE, "--groups", "sex"]
TWO = [*RULE, "--groups", "sex,race"]


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
