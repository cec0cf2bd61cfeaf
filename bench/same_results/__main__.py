"""Does a change of the code leave every result as it was? Two runs, compared bit for bit.

python bench/same_results write OLD              # with the old code
python bench/same_results write NEW              # with the new code
python bench/same_results compare OLD NEW        # with either

``write`` draws 2,000 problems from a seed and keeps everything that is returned for them:
predictions, gradients of all inputs, multipliers, status, iterations, residuals, the names of
skipped rows, reports of streams and audits, and the type and message of every error. Only times are
left out. It prints how often each notion, backend and option was drawn, and what never was.

This folder uses public names only, so that it runs unchanged on both versions: name it by its path,
put the version in question on PYTHONPATH, and let both run on the same machine with the same
packages.

``compare`` lists all values that are not equal bit for bit with their absolute and relative
differences, and counts them for each group of values. It fails if the smaller of the two is
anywhere above ``--tolerance`` (0 by default: any difference counts). Two runs of one version are
equal bit for bit; but code that only moves to another module can differ in the last bit: compilers
order functions by their names.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counted import SEEN, table
from drawing import Draw
from kinds import KINDS
from record import Record, keep_error

import fairopt
from fairopt import FairoptError

SEED = 20_240
COUNT = 2_000
WARM_UP = 150  # problems that load most kernels
# Sums of MKL depend on where their arrays lie in memory, if it is not told that they must not.
ENVIRONMENT = {"MKL_CBWR": "AVX2,STRICT", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def write(path: Path, count: int, seed: int) -> None:
    """Solve all problems and keep what is returned.

    Backends keep solvers, templates and memory from one call to the next. Each problem is therefore
    solved in a fork of one process that has solved a fixed list of others before, so that its
    answer does not depend on which problems came before it.
    """
    print(f"{count} problems, seed {seed}; fairopt from {Path(fairopt.__file__).parent}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for number in range(WARM_UP):
        solved(seed + 1, number)
    SEEN.clear()
    record, kinds, spent = Record(), Counter[str](), Counter[str]()
    for number in range(count):
        began = time.perf_counter()
        kind, index, data, seen = forked(lambda number=number: solved(seed, number))
        record.join(index, data)
        SEEN.update(seen)
        kinds[kind] += 1
        spent[kind] += time.perf_counter() - began
        if number % 200 == 199:
            print(f"{number + 1} of {count}", file=sys.stderr, flush=True)
    record.save(path)
    for name, amount in kinds.items():
        print(f"{name:20} {amount:5d} problems  {spent[name]:7.1f} s")
    print("\n".join(table(SEEN)))
    print(f"{len(record.index)} values written to {path}")


def solved(seed: int, number: int) -> tuple[str, Any, bytes, Counter[tuple[str, str, str]]]:
    """Draw one problem and solve it: its kind, the values returned, and the arguments counted."""
    SEEN.clear()
    draw, record = Draw(seed, number), Record()
    shares = np.cumsum(list(KINDS.values()))
    kind = list(KINDS)[int(np.searchsorted(shares, draw.rng.random() * shares[-1], "right"))]
    name = record.prefix = f"{number:04d} {kind.__name__}"
    try:
        kind(draw, record)
    except FairoptError as error:
        record.prefix = name
        keep_error(record, error)
    return kind.__name__, record.index, bytes(record.data), SEEN


def forked(work: Callable[[], Any]) -> Any:
    """What ``work`` returns when a copy of this process does it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(work()))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(found)


@dataclass
class Tally:
    """What a comparison counted for one group of values."""

    numbers: int = 0
    unequal: int = 0
    absolute: float = 0.0
    relative: float = 0.0
    texts: int = 0
    unequal_texts: int = 0

    def add(self, old: Any, new: Any) -> str | None:
        """Count two values; what is different, in words."""
        if isinstance(old, str) or isinstance(new, str) or old is None or new is None:
            self.texts += 1
            if isinstance(old, str) and isinstance(new, str) and old == new:
                return None
            self.unequal_texts += 1
            return f"{old!r} became {new!r}"
        self.numbers += old.size
        if old.shape != new.shape or old.dtype != new.dtype:
            self.unequal += old.size
            self.absolute = self.relative = math.inf
            return f"{old.dtype} {old.shape} became {new.dtype} {new.shape}"
        if old.tobytes() == new.tobytes():
            return None
        unlike = old.reshape(-1).view(np.uint8) != new.reshape(-1).view(np.uint8)
        count = int(unlike.reshape(old.size, -1).any(-1).sum())
        absolute, relative = sizes(old, new)
        self.unequal += count
        self.absolute = max(self.absolute, absolute)
        self.relative = max(self.relative, relative)
        if absolute == 0:
            return f"{count} of {old.size} differ in the sign of zero"
        return f"{count} of {old.size} differ, by {absolute:.1e} at most, relative {relative:.1e}"


def sizes(old: Any, new: Any) -> tuple[float, float]:
    """The largest difference, and that over the largest magnitude; infinite for NaN against 1."""
    a, b = np.asarray(old, np.float64), np.asarray(new, np.float64)
    unlike = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    if not unlike.any():
        return 0.0, 0.0
    if not np.isfinite(a[unlike]).all() or not np.isfinite(b[unlike]).all():
        return math.inf, math.inf
    finite = np.isfinite(a) & np.isfinite(b)
    largest = float(np.abs(a - b)[unlike].max())
    return largest, largest / max(np.abs(a[finite]).max(), np.abs(b[finite]).max())


def compare(old_path: Path, new_path: Path, tolerance: float) -> int:
    """List all differences; the exit code says whether any is above the tolerance."""
    old, new = Record.load(old_path), Record.load(new_path)
    tallies: dict[str, Tally] = {}
    allowed = True
    for name in dict.fromkeys([*old, *new]):
        tally = tallies.setdefault(field_of(name), Tally())
        one = Tally()
        for each in (tally, one):
            words = each.add(old.get(name), new.get(name))
        if words is not None:
            print(f"{name}: {words}")
            small = min(one.absolute, one.relative) <= tolerance and not one.unequal_texts
            allowed &= small and tolerance > 0
    print(
        "values                numbers  unequal  largest difference  of the scale   texts  unequal"
    )
    tallies["all"] = Tally(*(
        combine(getattr(each, field.name) for each in tallies.values())
        for field, combine in zip(fields(Tally), (sum, sum, max, max, sum, sum), strict=True)
    ))  # fmt: skip
    for name, t in tallies.items():
        print(
            f"{name:20} {t.numbers:8d} {t.unequal:8d} {t.absolute:19.1e} {t.relative:13.1e} "
            f"{t.texts:7d} {t.unequal_texts:8d}"
        )
    return int(not allowed)


GROUPS = (
    ("error", "errors"), ("gradient", "gradients"), ("problem", "data of problems"),
    ("stored", "data of problems"), ("solution.residuals", "residuals"), ("judged", "residuals"),
    ("solution.row_dual", "multipliers"), ("solution.bound_dual", "multipliers"),
    ("solution.x", "predictions"), ("solution", "status and the like"), ("audit", "audits"),
    ("text", "audits"),
)  # fmt: skip


def field_of(name: str) -> str:
    """The group of values that a value belongs to."""
    problem, _, value = name.partition("/")
    kind, value = problem[5:], value.removeprefix("0/").removeprefix("1/")
    if kind in ("streams", "agreements", "samplers"):
        return kind
    return next((group for start, group in GROUPS if value.startswith(start)), "predictions")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="solve the problems and keep what is returned")
    writing.add_argument("file", type=Path)
    writing.add_argument("--count", type=int, default=COUNT)
    writing.add_argument("--seed", type=int, default=SEED)
    comparing = commands.add_parser("compare", help="compare two such files")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--tolerance", type=float, default=0.0)
    arguments = parser.parse_args()
    if arguments.command == "write":
        if not ENVIRONMENT.items() <= os.environ.items():  # they count from the start on
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)
        write(arguments.file, arguments.count, arguments.seed)
        return 0
    return compare(arguments.old, arguments.new, arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
