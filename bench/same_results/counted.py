"""The public callables, each of which notes with which arguments it was called.

The kinds of problems call these in place of fairopt's own, so that the table of coverage is a count
of what was done, not a claim.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

import fairopt
from fairopt import Constraint
from fairopt.backends import Backend, get

SEEN: Counter[tuple[str, str, str]] = Counter()  # callable, argument, kind of value
TOLERANCES = ("tolerance", "ratio", "rate", "threshold")
F = TypeVar("F", bound=Callable[..., object])


def described(value: object) -> str:
    """The kind of a value, for the table: options as they are, data by type and shape."""
    if isinstance(value, (str, bool, type(None), torch.dtype)):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]} of {value.dim()} dimensions"
    if isinstance(value, Constraint):
        return " ".join([type(value).__name__, *(
            f"{name}={described(part)}" for name, part in vars(value).items()
            if name not in TOLERANCES and not name.startswith("_") and part is not None
        )])  # fmt: skip
    if isinstance(value, (int, float)):
        return "0" if value == 0 else "a number" if math.isfinite(value) else "infinite"
    if isinstance(value, Backend):
        return repr(value)
    if isinstance(value, Mapping):
        soft = any(isinstance(part, Tensor) and part.is_floating_point() for part in value.values())
        return f"mapping of {len(value)}" + (", some floating-point" if soft else "")
    if isinstance(value, (tuple, list)):
        if value and all(isinstance(part, Constraint) for part in value):
            return f"list of {len(value)}"
        return f"({', '.join(map(described, value))})"
    return type(value).__name__


def counted(function: F) -> F:
    """The same callable; arguments that are left out count by their defaults."""
    signature, name = inspect.signature(function), getattr(function, "__name__", "")

    @wraps(function, updated=())
    def call(*arguments: object, **options: object) -> object:
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        for argument, value in bound.arguments.items():
            if argument != "self":
                count(name, argument, value)
        return function(*arguments, **options)

    return call  # type: ignore[return-value]


def count(name: str, argument: str, value: object) -> None:
    """Note one value; of a list of notions each one, too."""
    SEEN[name, argument, described(value)] += 1
    if argument == "constraints":
        for each in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(each, Constraint):
                SEEN["notions", type(each).__name__, described(each)] += 1
                for number in (getattr(each, key, None) for key in TOLERANCES):
                    if number is not None:
                        SEEN["notions", "tolerances", described(number)] += 1


FairnessLayer = counted(fairopt.FairnessLayer)
OnlineParity = counted(fairopt.OnlineParity)
StratifiedBatchSampler = counted(fairopt.StratifiedBatchSampler)
audit = counted(fairopt.audit)
cross_validate = counted(fairopt.cross_validate)
formulate = counted(fairopt.formulate)
project = counted(fairopt.project)
solve = counted(fairopt.solve)
backend_of = counted(get)


def table(seen: Mapping[tuple[str, str, str], int], most: int = 12) -> Iterable[str]:
    """The lines of the table, and at the end what no problem has drawn."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for (name, argument, value), number in seen.items():
        groups.setdefault((name, argument), []).append((number, value))
    last = ""
    for (name, argument), found in sorted(groups.items()):
        if name != last:
            yield f"{name}:"
            last = name
        found.sort(key=lambda each: (-each[0], each[1]))
        rest = f"; {len(found) - most} others" if len(found) > most else ""
        shown = "; ".join(f"{value} {number}" for number, value in found[:most])
        yield f"    {argument}: {shown}{rest}"
    every = {name: getattr(fairopt, name) for name in fairopt.__all__}
    notions = {
        name
        for name, kind in every.items()
        if isinstance(kind, type) and issubclass(kind, Constraint)
    } - {"Constraint", "Parity"}
    missing = sorted(notions - {argument for name, argument, _ in seen if name == "notions"})
    missing += [f"{name}({argument}=...)" for (name, argument), found in sorted(groups.items())
                if len(found) == 1 and name not in ("notions", "solutions", "rows")]  # fmt: skip
    yield f"never drawn, or with one kind of value only: {', '.join(missing) or 'nothing'}"
