"""Large memory is kept for the next call, and never while anything still uses it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fairopt import DemographicParity, FairnessLayer
from fairopt.kernels import memory


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "LARGE", 100)
    monkeypatch.setattr(memory, "spare", [])
    yield
    gc.collect()


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_what_is_given_back_comes_again() -> None:
    first = memory.empty((1, 200), torch.float64)[0]
    there = address(first)
    del first
    assert [block.nbytes for block in memory.spare] == [1600]
    again = memory.empty((2, 200), torch.float32)[0]  # as many bytes
    assert address(again) == there
    assert again.shape == (2, 200)
    assert not memory.spare


def test_another_size_is_new() -> None:
    first = memory.empty((1, 200), torch.float64)[0]
    there = address(first)
    del first
    other = memory.empty((1, 201), torch.float64)[0]
    assert address(other) != there
    assert len(memory.spare) == 1


@pytest.mark.parametrize("number", range(4), ids=["slice", "numpy", "detached", "storage"])
def test_nothing_in_use_is_given_away(number: int) -> None:
    tensor = memory.empty((1, 200), torch.float64)[0].fill_(7)
    views = [tensor[0, 3:9], tensor.numpy(), tensor.detach(), tensor.untyped_storage()]
    held = views[number]
    del tensor, views
    gc.collect()
    assert not memory.spare
    memory.empty((1, 200), torch.float64)[0].fill_(0)
    if not isinstance(held, torch.UntypedStorage):
        assert (np.asarray(held) == 7).all()
    del held
    gc.collect()
    assert len(memory.spare) == 2


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_SPARE", 5000)
    held = [memory.empty((1, 200), torch.float64) for _ in range(9)]
    held.clear()
    assert len(memory.spare) == 3  # of 1,600 bytes each


def test_predictions_of_earlier_calls_stay_as_they_were() -> None:
    layer = FairnessLayer(DemographicParity(tolerance=0.02), bounds=(0, 1), backend="numba")
    groups = torch.arange(500) % 2
    batches = [torch.rand(500) for _ in range(5)]
    found = [layer(scores, groups) for scores in batches]
    copies = [fair.clone() for fair in found]
    for scores in batches:
        leaf = scores.clone().requires_grad_()
        layer(leaf, groups).sum().backward()
    assert all(map(torch.equal, found, copies))


def test_several_threads_share_it() -> None:
    layer = FairnessLayer(DemographicParity(tolerance=0.02), bounds=(0, 1), backend="numba")
    groups = torch.arange(500) % 2
    batches = [torch.rand(500) for _ in range(60)]
    alone = [layer(scores, groups) for scores in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda scores: layer(scores, groups), batches))
    assert all(map(torch.equal, alone, together))
