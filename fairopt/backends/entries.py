"""Where backends come from: what the registry knows of one, and those of other distributions.

Another distribution offers a backend in its metadata:

    [project.entry-points."fairopt.backends"]
    mine = "my_package.my_module:MySolver"

Nothing of it is imported before the backend is asked for.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fairopt.backends.contract import Backend

GROUP = "fairopt.backends"


@dataclass(frozen=True)
class Entry:
    """Where a backend lives and what it needs.

    Attributes:
        load: returns the class; it may import the solver.
        package: the import name of the solver's package; ``None`` if it needs none.
        install: how to get it.
        kind: name of the class, where ``fairopt.backends`` offers it under that name.
        distribution: who offers it in its metadata; ``None`` for ours and for registered ones.
        fault: why it cannot be used, as far as that is known without loading it.
    """

    load: Callable[[], type[Backend]]
    package: str | None = None
    install: str = ""
    kind: str | None = None
    distribution: str | None = None
    fault: str | None = None

    @property
    def installed(self) -> bool:
        """Whether the package that it needs is there; nothing is imported."""
        if self.fault is not None:
            return False
        try:
            return self.package is None or find_spec(self.package) is not None
        except ModuleNotFoundError:  # of a.b, where a is missing
            return False

    @property
    def remedy(self) -> str:
        """What to do where it is missing or does not load."""
        if self.install:
            return f"get it with: {self.install}"
        if self.distribution is not None:
            return f"update or uninstall the distribution {self.distribution!r}, which offers it"
        return "the code that registered it is at fault"


def built_in(module: str, kind: str, package: str, install: str) -> Entry:
    """One of ours: class ``kind`` of ``fairopt/backends/<module>.py``."""

    def load() -> type[Backend]:
        found: type[Backend] = getattr(import_module(f"fairopt.backends.{module}"), kind)
        return found

    return Entry(load, package, install, kind)


@dataclass(frozen=True)
class Found:
    """What other distributions offer, by name, and what is wrong with the rest, in words."""

    entries: dict[str, Entry]
    faults: tuple[str, ...]


@cache
def entry_points() -> Found:
    """Read the metadata of the installed distributions, once per process; imports nothing.

    Only files that mention our group are parsed: a malformed one elsewhere does no harm.
    """
    entries: dict[str, Entry] = {}
    faults: list[str] = []
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        owner = "unknown"
        try:
            if GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue
            owner = str(distribution.metadata["Name"])
            points = [p for p in distribution.entry_points if p.group == GROUP]
        except (TypeError, ValueError, OSError) as error:
            faults.append(
                f"entry points of the distribution {owner!r} cannot be read: {error}; reinstall it"
            )
            continue
        if owner in seen:  # an older copy, later on the path
            continue
        seen.add(owner)
        for point in points:
            entries[point.name] = combined(entries.get(point.name), offered(point, owner))
    return Found(entries, tuple(faults))


def offered(point: importlib.metadata.EntryPoint, owner: str) -> Entry:
    """The entry of one entry point; the extras that it names are what to install."""
    extras = re.search(r"\[(.+)\]", point.value)
    install = f"pip install '{owner}[{extras[1]}]'" if extras else ""
    return Entry(point.load, install=install, distribution=owner)


def combined(first: Entry | None, second: Entry) -> Entry:
    """One entry for a name: where two distributions offer it, neither is taken."""
    if first is None:
        return second
    owners = f"{first.distribution}, {second.distribution}"
    fault = f"several distributions offer it ({owners}); uninstall all but one"
    return Entry(second.load, distribution=owners, fault=fault)
