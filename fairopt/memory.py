"""Large tensors on the CPU.

Memory of more than some 32 MB comes new from the system each time. NumPy asks for huge pages there
and torch does not: the first touch of 40 MB takes 3 ms instead of 10. Small tensors come faster
from torch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["empty", "negative"]

LARGE = 4_000_000  # elements

NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised float32 or float64 tensor on the CPU."""
    if math.prod(shape) > LARGE:
        return torch.from_numpy(np.empty(shape, NUMPY[dtype]))
    return torch.empty(shape, dtype=dtype)


def negative(tensor: Tensor) -> Tensor:
    """-tensor, with its history, for float32 or float64 tensors on any device."""
    if tensor.numel() > LARGE and tensor.device.type == "cpu":
        # In place on zeros, which the system gives away untouched: torch records that, too.
        return torch.from_numpy(np.zeros(tensor.shape, NUMPY[tensor.dtype])).sub_(tensor)
    return -tensor
