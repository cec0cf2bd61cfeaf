"""Does a change of the code leave every result as it was? Two runs, compared bit for bit.

python bench/same_results write OLD              # with the old code
python bench/same_results write NEW              # with the new code
python bench/same_results compare OLD NEW        # with either

``write`` draws 2,000 problems from a seed and keeps everything that is returned for them:
predictions, gradients of all inputs, multipliers, status, iterations, residuals, the names of
skipped rows, reports of streams and audits, and the type and message of every error. Only times are
left out. The problems cover all notions, backends and options; see ``KINDS``.

This folder uses public names only, so that it runs unchanged on both versions: name it by its path,
put the version in question on PYTHONPATH, and let both run on the same machine with the same
packages.

``compare`` counts the numbers that are equal bit for bit, and lists all others with their absolute
and relative differences. It fails if the smaller of the two is anywhere above ``--tolerance`` (0 by
default: any difference counts). Two runs of one version are equal bit for bit; but code that
only moves to another module can differ in the last bit: compilers order functions by their names.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import Draw
from kinds import KINDS
from record import Record, keep_error

import fairopt
from fairopt import FairoptError

SEED = 20_240
COUNT = 2_000


def write(path: Path, count: int, seed: int) -> None:
    """Solve all problems and keep what is returned."""
    print(f"{count} problems, seed {seed}; fairopt from {Path(fairopt.__file__).parent}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kinds, shares = list(KINDS), np.cumsum(list(KINDS.values()))
    record, solved, spent = Record(), Counter[str](), Counter[str]()
    errors: Counter[str] = Counter()
    for number in range(count):
        draw = Draw(seed, number)
        kind = kinds[int(np.searchsorted(shares, draw.rng.random() * shares[-1], "right"))]
        record.prefix = f"{number:04d} {kind.__name__}"
        began = time.perf_counter()
        try:
            kind(draw, record)
        except FairoptError as error:
            record.prefix = f"{number:04d} {kind.__name__}"
            keep_error(record, error)
            errors[type(error).__name__] += 1
        solved[kind.__name__] += 1
        spent[kind.__name__] += time.perf_counter() - began
        if number % 200 == 199:
            print(f"{number + 1} of {count}", file=sys.stderr, flush=True)
    record.save(path)
    for name, amount in solved.items():
        print(f"{name:20} {amount:5d} problems  {spent[name]:7.1f} s")
    print(f"errors: {', '.join(f'{k} {v}' for k, v in sorted(errors.items()))}")
    print(f"{len(record.index)} values written to {path}")


@dataclass
class Tally:
    """What a comparison counted."""

    numbers: int = 0
    equal: int = 0
    largest: float = 0.0
    texts: int = 0
    equal_texts: int = 0


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


def different(old: Any, new: Any, tally: Tally) -> str | None:
    """What is different, in words; counted."""
    if isinstance(old, str) or isinstance(new, str):
        tally.texts += 1
        if isinstance(old, str) and isinstance(new, str) and old == new:
            tally.equal_texts += 1
            return None
        tally.largest = math.inf
        return f"{old!r} became {new!r}"
    tally.numbers += old.size
    if old.shape != new.shape or old.dtype != new.dtype:
        tally.largest = math.inf
        return f"{old.dtype} {old.shape} became {new.dtype} {new.shape}"
    unlike = (old.reshape(-1).view(np.uint8) != new.reshape(-1).view(np.uint8)) if old.size else []
    count = int(np.any(np.reshape(unlike, (old.size, -1)), -1).sum()) if old.size else 0
    tally.equal += old.size - count
    if not count:
        return None
    absolute, relative = sizes(old, new)
    tally.largest = max(tally.largest, min(absolute, relative))
    if absolute == 0:
        return f"{count} of {old.size} differ in the sign of zero"
    return f"{count} of {old.size} differ, by {absolute:.1e} at most, relative {relative:.1e}"


def compare(old_path: Path, new_path: Path, tolerance: float) -> int:
    """List all differences; the exit code says whether any is above the tolerance."""
    old, new = Record.load(old_path), Record.load(new_path)
    tally = Tally()
    by_field: Counter[str] = Counter()
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in old or name not in new:
            tally.largest = math.inf
            print(f"{name}: only in the {'old' if name in old else 'new'} results")
            by_field[field_of(name)] += 1
            continue
        words = different(old[name], new[name], tally)
        if words is not None:
            by_field[field_of(name)] += 1
            print(f"{name}: {words}")
    for field, count in by_field.most_common():
        print(f"  {count:6d} differences in {field}")
    print(
        f"{tally.numbers} numbers compared, {tally.equal} equal bit for bit, "
        f"{tally.numbers - tally.equal} not; {tally.texts} texts compared, "
        f"{tally.texts - tally.equal_texts} not equal; largest difference "
        f"{tally.largest:.1e}"
    )
    return int(tally.largest > tolerance or (tolerance == 0 and bool(by_field)))


def field_of(name: str) -> str:
    """The kind of problem and the value, without the problem's number."""
    problem, _, value = name.partition("/")
    return f"{problem[5:]}: {value}"


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
        write(arguments.file, arguments.count, arguments.seed)
        return 0
    return compare(arguments.old, arguments.new, arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
