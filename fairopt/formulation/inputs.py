"""What formulate() and its companions are given, read and checked: scores, weights, bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import TypeAlias

import torch
from torch import Tensor

from fairopt import kernels
from fairopt.errors import ProblemError
from fairopt.formulation.samples import fit, is_small
from fairopt.kernels.memory import negative
from fairopt.notions.catalogue import Constraint
from fairopt.programs.tensors import all_finite, compact, shape_of

Bound: TypeAlias = Tensor | float | None
Bounds: TypeAlias = tuple[Bound, Bound] | None

SCORES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

NUMBERS = (float, int, NoneType)


def as_constraints(constraints: Constraint | Sequence[Constraint]) -> tuple[Constraint, ...]:
    """One or several constraints as a tuple."""
    if isinstance(constraints, Constraint):
        return (constraints,)
    listed = tuple(constraints) if isinstance(constraints, Iterable) else (constraints,)
    for constraint in listed:
        if not isinstance(constraint, Constraint):
            raise ProblemError(
                "constraints: expected parity notions such as DemographicParity(tolerance=0.05), "
                f"got {constraint!r}"
            )
    if not listed:
        raise ProblemError("constraints: expected at least one, got none")
    return listed


def wide(scores: Tensor) -> Tensor:
    """Scores in float32 or float64, of a shape that they may have."""
    if not isinstance(scores, Tensor):
        raise ProblemError(f"scores: expected a tensor, got {type(scores).__name__}")
    if scores.dtype not in SCORES:
        raise ProblemError(
            f"scores: expected a floating-point tensor, got {scores.dtype}; convert with .float()"
        )
    if scores.dim() not in (1, 2):
        raise ProblemError(f"scores: expected shape (n,), (n, 1) or (B, n), got {shape_of(scores)}")
    if scores.numel() == 0:
        raise ProblemError(
            f"scores: expected at least one sample, got shape {shape_of(scores)}; skip "
            "empty batches"
        )
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def as_batch(scores: Tensor) -> Tensor:
    """``(n,)`` and ``(n, 1)`` as ``(1, n)``; ``(B, n)`` as it is."""
    if scores.dim() == 1:
        return scores.unsqueeze(0)
    return scores.mT if scores.shape[1] == 1 else scores


def check_finite(scores: Tensor, flat: Tensor) -> None:
    """Raise unless all are finite; ``flat`` are the scores as a batch."""
    if not (kernels.checks.finite(flat.numpy()) if is_small(flat) else all_finite(flat)):
        bad = (~torch.isfinite(scores.detach())).nonzero()
        raise ProblemError(
            f"scores: expected finite values, got {len(bad)} NaN or infinite ones, first at index "
            f"{tuple(bad[0].tolist())}; look for a diverged model or a log of zero"
        )


def distance(flat: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The diagonal P and q of the weighted distance to the scores."""
    if weight is None:
        return flat.new_ones(()), negative(flat)
    # Weight 0: the sample counts for nothing, and is moved to nothing but the bounds.
    P = torch.where(weight.detach() > 0, weight, 1.0)
    return P, -(P * flat.double()).expand(len(flat), -1)


def read_weights(weights: Tensor | None, flat: Tensor) -> Tensor | None:
    """Weights in float64, checked."""
    if weights is None:
        return None
    weight = fit("weights", weights, flat, flat)
    if not weight.is_floating_point():
        raise ProblemError(f"weights: expected floating-point numbers, got {weight.dtype}")
    weight = weight.double()
    plain = weight.detach()
    if not all_finite(plain) or bool((plain < 0).any()):
        raise ProblemError(
            "weights: expected finite numbers of at least 0; drop or correct the samples that have "
            "others"
        )
    return weight


def both(bounds: Bounds) -> tuple[Bound, Bound]:
    """The two bounds, each of a type that a bound may have."""
    if bounds is None:
        return None, None
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ProblemError(f"bounds: expected (lower, upper), or None for none, got {bounds!r}")
    for name, value in zip(("lower bound", "upper bound"), bounds, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor, NoneType)):
            raise ProblemError(
                f"{name}: expected a number, a floating-point tensor or None, got {value!r}"
            )
    return bounds[0], bounds[1]


def inward_bounds(
    bounds: tuple[Bound, Bound], scores: Tensor, flat: Tensor
) -> tuple[Tensor, Tensor]:
    """Both bounds in a dtype of the solution, each at values that the scores' dtype can hold."""
    lower = one_bound("lower bound", bounds[0], -math.inf, scores, flat)
    upper = one_bound("upper bound", bounds[1], math.inf, scores, flat)
    check_bounds(lower, upper, scores.dtype)
    return lower, upper


def check_bounds(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> None:
    """Raise unless lower <= upper everywhere, each finite or infinite on its own end."""
    low, high = compact(lower.detach()), compact(upper.detach())
    if not bool(((low <= high) & (low < math.inf) & (high > -math.inf)).all()):
        raise ProblemError(
            "bounds: expected lower <= upper without NaN for every sample (after rounding to what "
            f"{dtype} can hold), got lower {describe(low)}, upper {describe(high)}"
        )


def describe(tensor: Tensor) -> str:
    """The value of all, or their range, for messages."""
    low, high = float(tensor.min()), float(tensor.max())
    return f"{low}" if low == high else f"from {low} to {high}"


def one_bound(name: str, value: Bound, default: float, scores: Tensor, flat: Tensor) -> Tensor:
    """One bound; ``default`` tells its side. Rounded inwards to the dtype of the scores."""
    if value is None:
        return flat.new_full((), default)
    if not isinstance(value, Tensor):
        exact = torch.tensor(float(value), dtype=torch.float64)
        return rounded_inwards(exact, scores.dtype, default).to(flat.device, flat.dtype)
    if not value.is_floating_point():
        raise ProblemError(
            f"{name}: expected a number, a floating-point tensor or None, got {value.dtype}"
        )
    bound = value if value.dim() == 0 else fit(name, value, scores, flat)
    if bound.device != flat.device:
        bound = bound.to(flat.device) if bound.dim() == 0 else bound
    inside = rounded_inwards(bound.detach().double(), scores.dtype, default)
    moved = inside - bound.detach().double()
    wide = bound.double() + torch.where(torch.isfinite(moved), moved, 0.0)
    return wide.to(flat.dtype)


def rounded_inwards(exact: Tensor, dtype: torch.dtype, side: float) -> Tensor:
    """float64 values moved to the nearest ones that ``dtype`` holds, not outwards."""
    near = exact.to(dtype)
    wide = near.double()
    outside = wide > exact if side > 0 else wide < exact
    if not bool(outside.any()):
        return wide
    step = torch.nextafter(near, torch.tensor(-side, dtype=dtype, device=near.device)).double()
    return torch.where(outside, step, wide)
