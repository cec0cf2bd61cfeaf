"""What a call is given, read and checked: scores, groups, targets, weights and bounds.

There is one reader for each kind of tensor. All take the scores as a batch, ``flat``, ``(B, n)``,
and return tensors ``(b, n, ...)``, where b is 1 for what the problems of the batch share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt import kernels
from fairopt.errors import ProblemError, whole_number
from fairopt.notions.functionals import Axis, attribute_axis
from fairopt.programs.tensors import all_finite, compact, shape_of
from fairopt.tolerances import CHANCES

if TYPE_CHECKING:
    from fairopt.formulation.template import RowPlan

Groups: TypeAlias = Tensor | Mapping[str, Tensor]
GroupCounts: TypeAlias = Mapping[str, int] | int | None
Bound: TypeAlias = Tensor | float | None
Bounds: TypeAlias = tuple[Bound, Bound] | None

HALVES = (torch.float16, torch.bfloat16)
SCORES = (torch.float64, torch.float32, *HALVES)
INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# Codes up to this many are used as they are; larger or sparser ones are renumbered.
MOST_CODES = 64

# More attributes than this, of up to this many samples, are looked at one after the other in one
# thread: waking torch's threads for each costs as much as it saves, and far more beside other work.
FEW, MANY = 2, 1_000_000

# Up to this many samples on the CPU, inputs are looked at by the compiled code of kernels.checks.
SMALL = 50_000


def is_small(tensor: Tensor) -> bool:
    """Whether ``fairopt.kernels.checks`` takes it."""
    return tensor.is_cpu and tensor.numel() <= SMALL and tensor.is_contiguous()


# ---------------------------------------------------------------------------------------------
# Scores and what accompanies them
# ---------------------------------------------------------------------------------------------


def read_scores(scores: Tensor, classes: int | None = None, name: str = "scores") -> Tensor:
    """Scores in float32 or float64, with their history, of a shape that they may have."""
    if not isinstance(scores, Tensor):
        raise ProblemError(f"{name}: expected a tensor, got {type(scores).__name__}")
    if scores.dtype not in SCORES:
        raise ProblemError(
            f"{name}: expected a floating-point tensor, got {scores.dtype}; convert with .float()"
        )
    if classes is None and scores.dim() not in (1, 2):
        raise ProblemError(f"{name}: expected shape (n,), (n, 1) or (B, n), got {shape_of(scores)}")
    if classes is not None and (scores.dim() not in (2, 3) or scores.shape[-1] != classes):
        raise ProblemError(
            f"{name}: expected shape (n, {classes}) or (B, n, {classes}) with classes={classes}, "
            f"got {shape_of(scores)}"
        )
    if scores.numel() == 0:
        raise ProblemError(
            f"{name}: expected at least one sample, got shape {shape_of(scores)}; skip empty "
            "batches"
        )
    return scores.float() if scores.dtype in HALVES else scores


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


def check_companion(name: str, tensor: object, scores: Tensor) -> None:
    """Raise unless it is a tensor where the scores are."""
    if not isinstance(tensor, Tensor):
        raise ProblemError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.device != scores.device:
        raise ProblemError(
            f"{name}: expected device {scores.device}, where the scores are, got {tensor.device}; "
            "move it with .to(...)"
        )


def companion(name: str, tensor: Tensor, scores: Tensor, flat: Tensor) -> Tensor:
    """A companion of the scores as ``(1, n)`` or ``(B, n)``; its shape and device checked."""
    check_companion(name, tensor, scores)
    batch, n = flat.shape
    if tensor.shape == (n,):
        return tensor.unsqueeze(0)
    if tensor.shape == (batch, n):
        return tensor
    if batch == 1 and tensor.shape == (n, 1):
        return tensor.mT
    raise ProblemError(
        f"{name}: expected shape ({n},) or {shape_of(scores)}, one value for each score, got "
        f"{shape_of(tensor)}"
    )


def finite_companion(name: str, tensor: Tensor, scores: Tensor, flat: Tensor) -> Tensor:
    """A companion of real numbers in float64."""
    values = companion(name, tensor, scores, flat)
    if values.is_complex():
        raise ProblemError(f"{name}: expected real numbers, got {values.dtype}")
    values = values.double()
    if not all_finite(values):
        raise ProblemError(f"{name}: expected finite values, got NaN or infinity")
    return values


def read_weights(weights: Tensor | None, flat: Tensor) -> Tensor | None:
    """Weights in float64, checked."""
    if weights is None:
        return None
    weight = companion("weights", weights, flat, flat)
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


def read_chances(name: str, tensor: Tensor, what: str, *advice: str) -> Tensor:
    """Chances ``(n, G)`` or ``(B, n, G)`` in float64 ``(b, n, G)``, checked.

    Args:
        what: what they are chances of.
        advice: what to do where they are not from 0 to 1, and where they do not sum to 1.
    """
    chances = (tensor.unsqueeze(0) if tensor.dim() == 2 else tensor).double()
    plain = chances.detach()
    if not bool(((plain >= 0) & (plain <= 1)).all()):
        raise ProblemError(
            f"{name}: expected {what} from 0 to 1, got values from {float(plain.min())} to "
            f"{float(plain.max())}{advice[0]}"
        )
    rounding = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
    off = float((plain.sum(-1) - 1).abs().max())
    if off > max(CHANCES, 4 * rounding):
        raise ProblemError(
            f"{name}: expected {what} that sum to 1 for each sample, got a sum that is {off:.3g} "
            f"off; normalise the rows{advice[1]}"
        )
    return chances


# ---------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------


def read_groups(
    groups: Groups, scores: Tensor, flat: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The attributes: those with groups, and those that are continuous.

    Returns:
        Codes as integers ``(b, n)``, or chances in float64 ``(b, n, G)``; and real numbers in
        float64 ``(b, n)``.
    """
    bare = isinstance(groups, Tensor) or not isinstance(groups, Mapping)  # the cheap test first
    named: Any = {"group": groups} if bare else groups
    if not named:
        raise ProblemError("groups: expected at least one attribute, got an empty mapping")
    if not all(isinstance(name, str) for name in named):
        raise ProblemError(
            f"groups: expected names of attributes as keys, got {', '.join(map(repr, named))}"
        )
    found: dict[str, Tensor] = {}
    continuous: dict[str, Tensor] = {}
    for name, tensor in named.items():
        label = "groups" if bare else f"groups[{name!r}]"
        real = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if real and is_matrix(tensor, flat):
            found[name] = read_membership(label, tensor, scores, flat)
            continue
        if real and not bare:
            continuous[name] = finite_companion(label, tensor, scores, flat)
            continue
        codes = companion(label, tensor, scores, flat)
        if codes.dtype == torch.bool:
            codes = codes.view(torch.uint8)
        elif codes.dtype not in INDICES:
            refuse_real_groups(label, codes)
        found[name] = codes
    return found, continuous


def refuse_real_groups(label: str, codes: Tensor) -> None:
    raise ProblemError(
        f"{label}: expected integer or bool codes, got {codes.dtype}; convert categories "
        "with .long(), or pass chances of membership as a matrix (n, G)"
    )


def is_matrix(tensor: Tensor, flat: Tensor) -> bool:
    """Whether real numbers are chances ``(n, G)`` or ``(B, n, G)``, not one for each sample."""
    batch, n = flat.shape
    if tensor.dim() == 3:
        return True
    return tensor.dim() == 2 and len(tensor) == n and tensor.shape not in ((batch, n), (n, 1))


def read_membership(name: str, tensor: Tensor, scores: Tensor, flat: Tensor) -> Tensor:
    """Chances of membership in the groups of an attribute."""
    check_companion(name, tensor, scores)
    batch, n = flat.shape
    if tensor.shape[:-1] not in ((n,), (1, n), (batch, n)) or tensor.shape[-1] == 0:
        raise ProblemError(
            f"{name}: expected chances of membership of shape ({n}, G)"
            + (f" or ({batch}, {n}, G)" if batch > 1 else "")
            + f", got {shape_of(tensor)}"
        )
    advice = "", ", and give unknown membership a column"
    return read_chances(name, tensor, "chances of membership", *advice)


def check_group_counts(group_counts: GroupCounts) -> None:
    """Raise unless they are ``None``, a number of groups, or such numbers by name."""
    if isinstance(group_counts, Mapping):
        for name, count in group_counts.items():
            expected = f"a whole number of at least 1 for {name!r}"
            whole_number("group_counts", count, 1, expected)
    elif group_counts is not None:
        expected = "a whole number of at least 1, or a mapping of attribute name to such"
        whole_number("group_counts", group_counts, 1, expected)


def counted(
    group_counts: GroupCounts, groups: Groups, used: tuple[str, ...]
) -> dict[str, int] | None:
    """The declared number of groups of each attribute in use; ``None`` if none is declared."""
    if isinstance(groups, Tensor):
        boolean = {"group": 2} if groups.dtype == torch.bool and used else {}
    else:
        boolean = {name: 2 for name in used if groups[name].dtype == torch.bool}
    if group_counts is None:
        return boolean or None
    check_group_counts(group_counts)  # again: a mapping may have changed
    if not isinstance(group_counts, Mapping):
        return boolean | dict.fromkeys(used, group_counts)
    known = ("group",) if isinstance(groups, Tensor) else tuple(groups)
    unknown = [name for name in group_counts if name not in known]
    if unknown:
        raise ProblemError(
            f"group_counts: expected names among {', '.join(map(repr, known))}, got "
            f"{', '.join(map(repr, unknown))}"
        )
    return boolean | {name: group_counts[name] for name in used if name in group_counts}


def encode(
    attributes: Mapping[str, Tensor], plan: RowPlan, flat: Tensor, counts: Mapping[str, int] | None
) -> tuple[list[Axis], list[Tensor], NDArray[np.int64] | None]:
    """The axes of all attributes and bins in use, and the place of each sample on them.

    Returns:
        The axes; codes ``(b, n)`` or chances ``(b, n, G)`` for each; and the number of samples of
        each code, if there is one axis only and its codes were counted on the way.
    """
    axes: list[Axis] = []
    parts: list[Tensor] = []
    found = None  # counts, as long as all parts are small
    for name in plan.attributes:
        codes = attributes[name]
        declared = counts.get(name) if counts else None
        if codes.is_floating_point():
            if declared not in (None, codes.shape[-1]):
                raise ProblemError(
                    f"groups[{name!r}]: expected chances of {declared} groups, the number "
                    f"declared, got {codes.shape[-1]} columns; correct the matrix, or group_counts"
                )
            axes.append(attribute_axis(name, codes_below(codes.shape[-1])))
            parts.append(codes)
            continue
        if is_small(codes) and len(codes) == 1:
            array, found = np.empty(codes.shape, np.uint8), np.zeros(MOST_CODES, np.int64)
            low, high = kernels.checks.encode(codes.numpy(), array, found)
            part = torch.from_numpy(array)
        else:
            part, found = codes, None
            if len(plan.attributes) > FEW and codes.is_cpu and codes.numel() <= MANY:
                low, high = kernels.combinations.ends(codes.reshape(-1).numpy())
            else:
                low, high = (int(end) for end in torch.aminmax(codes))
        if low < 0:
            raise ProblemError(
                f"groups[{name!r}]: expected codes of at least 0, got {low}; give unknown members "
                "a code of their own, or leave them out"
            )
        if declared is not None:
            if high >= declared:
                raise ProblemError(
                    f"groups[{name!r}]: expected codes below {declared}, the number of groups "
                    f"declared, got {high}; correct the code, or group_counts"
                )
            values = codes_below(declared)
        elif high < MOST_CODES:
            values = codes_below(high + 1)
        else:
            distinct, codes = torch.unique(codes, return_inverse=True)
            values = tuple(distinct.tolist())
        if high >= MOST_CODES:
            part, found = codes, None
        axes.append(attribute_axis(name, values))
        parts.append(part)
    for axis in plan.scores:
        edges = torch.tensor(axis.key[1], dtype=torch.float64, device=flat.device)
        axes.append(axis)
        parts.append(torch.bucketize(flat.detach().double().contiguous(), edges, right=True))
    return axes, parts, found if len(axes) == 1 else None


@lru_cache(maxsize=256)
def codes_below(count: int) -> tuple[int, ...]:
    """0, 1, ..., count - 1."""
    return tuple(range(count))


# ---------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------


def outcome_and_targets(
    plan: RowPlan, targets: Tensor | None, scores: Tensor, flat: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What notions need of the targets.

    Returns:
        Binary targets: codes, uint8 ``(b, n)``; or, where they are no numbers but chances, or have
        a history, chances of 0 and of 1, float64 ``(b, n, 2)``. And targets as they are, float64.
    """
    if not plan.targeted:
        return None, None
    if targets is None:
        raise ProblemError(
            f"targets: {', '.join(plan.targeted)} needs them, got none; pass targets with the "
            "shape of the scores"
        )
    values = finite_companion("targets", targets, scores, flat)
    if not plan.binary:
        return None, values
    plain = values.detach()
    outcome = plain.to(torch.uint8)
    if not bool((plain != outcome).any() | (outcome > 1).any()) and not values.requires_grad:
        return outcome, values
    wrong = ~((plain >= 0) & (plain <= 1))
    if bool(wrong.any()):
        raise ProblemError(
            f"targets: {', '.join(plan.binary)} needs targets that are 0 or 1, or chances from 0 "
            f"to 1, got {plain[wrong][0].item()}; threshold them, or use MeanResidual for real "
            "targets"
        )
    return torch.stack([1.0 - values, values], -1), values


class Outcomes(NamedTuple):
    """Targets of several classes.

    Attributes:
        codes: the class of each sample, int64 ``(b, n)``; ``None`` where they are chances.
        chances: float64 ``(b, n, C)``; ``None`` where they are classes.
    """

    codes: Tensor | None
    chances: Tensor | None

    def of(self, c: int) -> Tensor:
        """1 where the target is class c, else 0; or the chance that it is: ``(b, n)``."""
        if self.chances is not None:
            return self.chances[..., c]
        assert self.codes is not None
        return (self.codes == c).double()


def read_class_targets(targets: Tensor | None, scores: Tensor, flat: Tensor) -> Outcomes | None:
    """Targets of several classes, checked; ``None`` if there are none.

    Args:
        flat: the scores, ``(B, n, C)``.
    """
    if targets is None:
        return None
    batch, n, classes = flat.shape
    check_companion("targets", targets, scores)
    if targets.shape in (scores.shape, flat.shape[1:]):
        advice = f"; pass classes as integers ({n},)", ""
        chances = read_chances("targets", targets, "chances of the classes", *advice)
        plain = chances.detach()
        if not chances.requires_grad and bool((plain.amax(-1) == 1).all()):
            return Outcomes(plain.argmax(-1), None)  # one-hot: classes
        return Outcomes(None, chances)
    if targets.dtype not in INDICES:
        raise ProblemError(
            f"targets: expected classes, integers of shape ({n},)"
            + (f" or ({batch}, {n})" if batch > 1 else "")
            + f", or the chance of each, of shape {shape_of(scores)}; got {targets.dtype} of "
            f"shape {shape_of(targets)}"
        )
    index = companion("targets", targets, scores[..., 0], flat[..., 0]).long()
    low, high = (int(end) for end in torch.aminmax(index))
    if low < 0 or high >= classes:
        raise ProblemError(
            f"targets: expected classes from 0 to {classes - 1}, got {low if low < 0 else high}; "
            "leave out samples without a class"
        )
    return Outcomes(index, None)


# ---------------------------------------------------------------------------------------------
# Bounds
# ---------------------------------------------------------------------------------------------


def both(bounds: Bounds) -> tuple[Bound, Bound]:
    """The two bounds, each of a type that a bound may have."""
    if bounds is None:
        return None, None
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ProblemError(f"bounds: expected (lower, upper), or None for none, got {bounds!r}")
    for name, value in zip(("lower bound", "upper bound"), bounds, strict=True):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number and not isinstance(value, (Tensor, NoneType)):
            raise ProblemError(
                f"{name}: expected a number, a floating-point tensor or None, got {value!r}"
            )
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise ProblemError(
                f"{name}: expected a number, a floating-point tensor or None, got {value.dtype}"
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


def check_nonnegative(names: tuple[str, ...], lower: Tensor) -> None:
    """Raise unless predictions cannot be negative, where a notion needs that."""
    if names and not bool((compact(lower.detach()) >= 0).all()):
        refuse_negative(names, describe(compact(lower.detach())))


def refuse_negative(names: tuple[str, ...], lower: object) -> None:
    raise ProblemError(
        f"bounds: {', '.join(names)} needs a lower bound of at least 0, got {lower}; a ratio of "
        "means says nothing where they can be negative"
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
    bound = value if value.dim() == 0 else companion(name, value, scores, flat)
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
