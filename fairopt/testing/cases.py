"""The cases of the contract: the problems that a backend is asked, by what it declares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fairopt.backends import Capabilities
from fairopt.programs.problem import Problem
from fairopt.testing.failing import Failing, failing
from fairopt.testing.known import Recipe, draw, recipes

FORMS = {
    "quadratic": {"diagonal", "dense", "sparse"},
    "rows": {"blocks", "cells", "dense", "sparse"},
}
EVERYTHING = Capabilities(
    quadratic=frozenset(FORMS["quadratic"]), linear=True, rows=frozenset(FORMS["rows"])
)


def present(can: Capabilities) -> Iterator[str]:
    for device in sorted(can.devices):
        if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
            yield device


def known_recipes(can: Capabilities) -> Iterator[Recipe]:
    """Every problem with a known solution, on every declared device that is here."""
    for device in present(can):
        yield from recipes(can, device)


def general_recipes(can: Capabilities) -> Iterator[Recipe]:
    """One of each combination of forms."""
    return (r for r in known_recipes(can) if r.name == "general" and r.dtype == torch.float64)


def undeclared_recipes(can: Capabilities) -> Iterator[Recipe]:
    for recipe in recipes(EVERYTHING):
        takes = can.linear if recipe.quadratic is None else recipe.quadratic in can.quadratic
        if recipe.name == "general" and not (takes and recipe.rows in can.rows):
            yield recipe


def failures(can: Capabilities) -> Iterator[Failing]:
    for device in present(can):
        yield from failing(can, device)


def labelled(choose: Callable[[Capabilities], Iterator[Any]]) -> Callable[[Capabilities], Any]:
    """The cases as pytest takes them; a device that is declared and not here is a skip by name."""

    def cases(can: Capabilities) -> Iterator[Any]:
        for case in choose(can):
            yield pytest.param(case, id=case.label)
        for device in sorted(can.devices - set(present(can))):
            mark = pytest.mark.skip(reason=f"no {device} device here")
            yield pytest.param(None, id=device, marks=mark)

    return cases


CASES: dict[str, Callable[[Capabilities], Any]] = {
    "known": labelled(known_recipes),
    "smooth": labelled(lambda can: (r for r in known_recipes(can) if r.quadratic is not None)),
    "form": labelled(general_recipes),
    "failure": labelled(failures),
    "undeclared": labelled(undeclared_recipes),
}


def everything(can: Capabilities) -> Iterator[Problem]:
    """Problems of every kind, with and without a solution."""
    for recipe in general_recipes(can):
        yield draw(recipe).problem
    for failure in failures(can):
        yield failure.problem
