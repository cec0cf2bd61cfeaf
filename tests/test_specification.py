"""Options of a layer: what no call could take is refused where the layer is written."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from refusals import GROUPS, PARITY, SCORES

from fairopt import EqualOpportunity, FairnessLayer, ImpactRatio, ProblemError
from fairopt.backends import Numba
from fairopt.formulation.specification import Specification

NAN, INF = math.nan, math.inf
SMOOTHING = ["1", True, NAN, -1.0, INF, 10**400, (1,), torch.tensor(1.0), np.float32(1), None]

REFUSED: dict[str, list[Any]] = {
    "constraints": [None, 7, "parity", [], [PARITY, 0.1], torch.tensor(0.1), np.array(1), {}],
    "bounds": [
        (1, 0), (NAN, 1), (0, NAN), (INF, None), (None, -INF), (0,), (0, 1, 2), 1, "01", (True, 1),
        (0, "1"), (0, 10**400), (0, np.float32(1)), (0, torch.tensor(1)), (0, torch.ones(1, 1, 1)),
        (0, torch.ones(0)), torch.tensor([0.0, 1.0]), np.array([0, 1]),
    ],
    "objective": ["l3", None, 2, ["l2"], torch.tensor(2)],
    "missing_group": ["foo", None, True, ["skip"], torch.tensor(0)],
    "group_counts": [0, -1, 2.0, True, "2", NAN, [2], torch.tensor(2), np.int64(2), {"group": 0}],
    "smoothing": SMOOTHING,
    "classes": [-3, 0, 1, 2.0, "3", True, NAN, (3,), torch.tensor(3), np.int64(3)],
    "elastic": [1, 0, None, "yes", np.True_, torch.tensor(True)],
    "backend": [7, None, True, ["numba"], Numba, torch.tensor(1)],
    "minimum_batch": [8, "8", 0],
    "online": [7, "pooled", FairnessLayer],
}  # fmt: skip
CASES = [(name, value) for name, values in REFUSED.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda v: repr(v)[:20])
def test_an_option_that_no_call_could_take_is_refused_at_once(name: str, value: Any) -> None:
    with pytest.raises(ProblemError, match=r"expected .*got|needs"):
        FairnessLayer(**{"constraints": PARITY, "bounds": (0, 1), name: value})


@pytest.mark.parametrize("lower", [None, -1, -1e-6, -INF])
def test_a_ratio_without_a_lower_bound_is_refused_at_once(lower: float | None) -> None:
    with pytest.raises(ProblemError, match="ImpactRatio needs a lower bound of at least 0"):
        FairnessLayer(ImpactRatio(0.8), bounds=(lower, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"classes": 3, "bounds": (0, 2)},
        {"classes": 3, "objective": "l1"},
        {"classes": 3, "elastic": True},
        {"objective": "l1", "elastic": True},
        {"smoothing": 0.1},
    ],
    ids=repr,
)
def test_options_that_contradict_each_other_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ProblemError, match="expected"):
        FairnessLayer(**{"constraints": PARITY, "bounds": (0, 1)} | options)


@pytest.mark.parametrize(
    "options",
    [
        {"bounds": None}, {"bounds": [0, 1]}, {"bounds": (np.float64(0), 1)}, {"bounds": (-INF, 1)},
        {"bounds": (torch.zeros(4, requires_grad=True), torch.tensor(1.0))},
        {"constraints": iter([PARITY])}, {"constraints": {PARITY}}, {"group_counts": {"group": 2}},
        {"objective": "l1", "smoothing": np.float64(0.1)}, {"backend": Numba()},
    ],
    ids=lambda v: repr(v)[:40],
)  # fmt: skip
def test_an_option_that_a_call_can_take_is_taken(options: dict[str, Any]) -> None:
    layer = FairnessLayer(**{"constraints": PARITY, "bounds": (0, 1)} | options)
    assert layer(SCORES, GROUPS).shape == SCORES.shape


def test_half_precision_rounds_a_tiny_lower_bound_to_zero() -> None:
    layer = FairnessLayer(ImpactRatio(0.8), bounds=(-1e-9, 1))
    assert layer(SCORES.half(), GROUPS).min() >= 0
    with pytest.raises(ProblemError, match="ImpactRatio needs a lower bound of at least 0"):
        layer(SCORES.double(), GROUPS)


def test_a_specification_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Specification(PARITY, (0, 1)).elastic = True  # type: ignore[misc]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_attributes_are_read_set_and_copied(copied: Any) -> None:
    layer = FairnessLayer(PARITY, bounds=(0, 1), backend="numba")
    before = layer(SCORES, GROUPS)
    assert layer.constraints == (PARITY,) and layer.bounds == (0, 1) and layer.backend == "numba"
    assert "bounds=(0, 1)" in repr(layer) and layer.state_dict() == {}
    other = copied(layer)
    assert other(SCORES, GROUPS).tolist() == before.tolist()
    other.bounds = (0.4, 0.6)
    assert other(SCORES, GROUPS).min() >= 0.4
    assert layer(SCORES, GROUPS).tolist() == before.tolist()
    other.bounds, other.smoothing, other.objective = (0, 1), 0.1, "l1"  # valid together only
    assert other(SCORES, GROUPS).shape == SCORES.shape
    other.constraints = EqualOpportunity(0.1)
    assert other(SCORES, GROUPS, GROUPS).shape == SCORES.shape
    other.missing_group = "foo"
    with pytest.raises(ProblemError, match="missing_group: expected"):
        other(SCORES, GROUPS, GROUPS)
