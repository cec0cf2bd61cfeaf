"""Large tensors on the CPU.

Memory of more than some 32 MB comes new from the system each time, and its first touch can cost
more than the computation (on virtual machines above all, where the host takes part in it). NumPy
asks for huge pages there, torch does not; and what a call is done with is kept for the next one.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGE = 4_000_000  # elements
MOST_SPARE = 2**28  # bytes

NUMPY = {torch.float32: np.float32, torch.float64: np.float64}

spare: list[NDArray[np.uint8]] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, NDArray[Any]]:
    """An uninitialised float32 or float64 tensor on the CPU, and its memory as an array."""
    kind = NUMPY[dtype]
    if math.prod(shape) <= LARGE:
        array: NDArray[Any] = np.empty(shape, kind)
        return torch.from_numpy(array), array
    size = math.prod(shape) * np.dtype(kind).itemsize
    block = recycled(size)
    array = block.view(kind).reshape(shape)
    # Called when the last tensor on this memory is gone: each holds the array, as its base.
    weakref.finalize(array, keep, block).atexit = False
    return torch.from_numpy(array), array


def recycled(size: int) -> NDArray[np.uint8]:
    """A block of this many bytes, one that was given back if there is one.

    Without a lock, which ``keep`` could meet again in the same thread: it runs whenever memory is
    freed. Each single step on the list is atomic.
    """
    for _ in range(len(spare)):
        try:
            block = spare.pop()
        except IndexError:  # another thread was faster
            break
        if block.nbytes == size:
            return block
        spare.insert(0, block)
    return np.empty(size, np.uint8)


def keep(block: NDArray[np.uint8]) -> None:
    """Keep a block that nothing uses any more; the oldest go when there are too many."""
    spare.append(block)
    while sum(kept.nbytes for kept in tuple(spare)) > MOST_SPARE:
        del spare[:1]


def negative(tensor: Tensor) -> Tensor:
    """-tensor, without history, for a float32 or float64 tensor on any device."""
    if tensor.numel() > LARGE and tensor.is_cpu:
        return torch.neg(tensor, out=empty(tensor.shape, tensor.dtype)[0])
    return -tensor
