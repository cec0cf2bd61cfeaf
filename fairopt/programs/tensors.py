"""Checks of tensors, what they share by being expanded, and frozen records made without checks."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from fairopt.errors import ProblemError

Kind = TypeVar("Kind")

FLOATS = (torch.float32, torch.float64)


def unchecked(kind: type[Kind], **fields: object) -> Kind:
    """A frozen instance from fields already in canonical form: for internal conversions only."""
    instance = object.__new__(kind)
    instance.__dict__.update(fields)
    return instance


def is_uniform(tensor: Tensor) -> bool:
    """Whether all elements are one expanded value, by construction (strides), not by looking."""
    if not any(tensor.stride()):
        return tensor.numel() > 0
    return tensor.numel() == 1


def compact(tensor: Tensor) -> Tensor:
    """The same values with every expanded dimension cut to size 1; for checks and copies."""
    for dim, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def without_history(tensor: Tensor) -> Tensor:
    """The tensor, detached if it has a history."""
    return tensor.detach() if tensor.requires_grad else tensor


def to_batch(tensor: Tensor, *shape: int) -> Tensor:
    """``tensor.expand(shape)``, at no cost where it has that shape."""
    return tensor if tensor.shape == shape else tensor.expand(shape)


def chosen(tensor: Tensor, index: Tensor) -> Tensor:
    """Some problems' part of a tensor, with its history; what they share stays shared."""
    if tensor.stride(0) == 0:
        return tensor[:1].expand(len(index), *tensor.shape[1:])
    return tensor[index.to(tensor.device)]


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite: one reduction in the usual case, two passes otherwise."""
    tensor = tensor.detach()
    if math.isfinite(tensor.sum().item()):
        return True  # a NaN or an infinity anywhere would have made the sum one
    return bool(torch.isfinite(tensor).all())


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ProblemError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def check_float(name: str, tensor: object) -> None:
    check_tensor(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.dtype not in FLOATS:
        raise ProblemError(
            f"{name}: expected float32 or float64, got {tensor.dtype}; convert with .float() or "
            ".double()"
        )
