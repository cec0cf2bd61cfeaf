"""formulate(): scores, groups and constraints become a QP, in differentiable torch code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType, NoneType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.constraints import (
    OUTCOME,
    Axis,
    Comparison,
    Constraint,
    attribute_axis,
    comparison,
    plan,
)
from fairopt.errors import ProblemError
from fairopt.memory import negative
from fairopt.problem import QP, CellRows, all_finite, compact, shape_of, to_batch, trusted

__all__ = ["Bounds", "Groups", "formulate"]

Groups: TypeAlias = Tensor | Mapping[str, Tensor]
Bound: TypeAlias = Tensor | float | None
Bounds: TypeAlias = tuple[Bound, Bound] | None
MissingGroup: TypeAlias = Literal["skip", "raise"]
GroupCounts: TypeAlias = Mapping[str, int] | int | None

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
SCORES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

NUMBERS = (float, int, NoneType)

# Codes up to this many are used as they are; larger or sparser ones are renumbered.
MOST_CODES = 64

# Up to this many samples on the CPU, inputs are looked at by the compiled code of fairopt.scan.
SMALL = 50_000


def formulate(
    constraints: Constraint | Sequence[Constraint],
    scores: Tensor,
    groups: Groups,
    targets: Tensor | None = None,
    *,
    bounds: Bounds,
    weights: Tensor | None = None,
    missing_group: MissingGroup = "skip",
    group_counts: GroupCounts = None,
) -> QP:
    """Write the projection of scores onto parity constraints as a QP.

        minimise   1/2 sum_i w_i (x_i - scores_i)^2
        subject to  the rows of all constraints,   lower <= x <= upper

    so that P = diag(w), q = -w * scores, and row r weighs sample i by ``C[r, cell(i)] * w_i``.
    Gradients reach scores, tolerances, targets, bounds and weights by autograd.

    Args:
        constraints: one or several; all hold at once, each with its own tolerance.
        scores: ``(n,)``, ``(n, 1)`` or ``(B, n)``; float64, float32, bfloat16 or float16 (the last
            two are widened to float32).
        groups: group codes, integers >= 0 or bool, ``(n,)`` or ``(B, n)``; or a mapping of
            attribute name to such a tensor. A bare tensor is the attribute ``"group"``.
        targets: shape of ``scores``; 0 and 1 where a notion conditions on the outcome.
        bounds: ``(lower, upper)``, each a number, a tensor (scalar, ``(n,)`` or ``(B, n)``) or
            ``None``; ``None`` for no bounds at all. A bound that the dtype of the scores cannot
            hold is rounded inwards.
        weights: ``(n,)`` or ``(B, n)``, at least 0; they weigh the change and the means alike. A
            sample of weight 0 is only clipped to the bounds.
        missing_group: ``"skip"`` leaves out rows that compare a group of which the batch holds
            nothing (``problem.skipped`` names them); ``"raise"`` refuses the batch.
        group_counts: how many groups each attribute has, by name (or one number for all): codes run
            from 0 to one less. Without it they run to the largest code of the call, so that a batch
            lacking the LAST groups cannot be told from one in which they do not exist. Bool
            groups have two.

    Raises:
        ProblemError: an argument is outside what is said above.
    """
    problem, center = formulate_around(
        constraints, scores, groups, targets, bounds=bounds, weights=weights,
        missing_group=missing_group, group_counts=group_counts,
    )  # fmt: skip
    if center is None or not center.requires_grad:
        return problem
    return trusted(QP, **{**problem.__dict__, "q": -center.view(problem.q.shape)})


def formulate_around(
    constraints: Constraint | Sequence[Constraint],
    scores: Tensor,
    groups: Groups,
    targets: Tensor | None,
    *,
    bounds: Bounds,
    weights: Tensor | None,
    missing_group: MissingGroup,
    group_counts: GroupCounts,
) -> tuple[QP, Tensor | None]:
    """The same; without weights q = -center, where only the center has a history.

    ``solve`` then pulls gradients back to the center itself, which spares a small layer three
    steps of autograd and a large one the memory of two negations.
    """
    constraints = as_constraints(constraints)
    if missing_group not in ("skip", "raise"):
        raise ProblemError(f"missing_group: expected 'skip' or 'raise', got {missing_group!r}")
    center = wide(scores)
    flat = as_batch(center.detach())
    check_finite(scores, flat)
    batch, n = flat.shape
    attributes = group_codes(groups, scores, flat)
    recipes, used = plan(constraints, tuple(attributes))
    outcome, values = outcome_and_targets(constraints, targets, scores, flat)
    counts = counted(group_counts, groups, used)
    cells = make_cells({name: attributes[name] for name in used}, outcome, counts)
    rows = comparison(recipes, cells.axes, cells.outcome_axis, flat.device)
    if rows.alone and missing_group == "raise":
        raise ProblemError(
            f"groups: expected at least two groups to compare in {', '.join(rows.alone)}, got one; "
            'use larger or stratified batches, or missing_group="skip"'
        )
    sides = both(bounds)
    if (
        weights is None
        and len(cells.index) == 1
        and cells.size <= MOST_COUNTS
        and type(sides[0]) in NUMBERS
        and type(sides[1]) in NUMBERS
        and not rows.shifted
        and fixed(constraints)
    ):
        same = remembered(
            constraints, rows, cells.counts(), sides, missing_group, scores.dtype, flat.dtype,
            flat.device, batch, n,
        )  # fmt: skip
        template = same.rows
        assert isinstance(template, CellRows)
        fields = {
            **same.__dict__,
            "q": negative(flat),
            "rows": trusted(
                CellRows,
                coefficient=template.coefficient,
                cell=to_batch(cells.index, batch, n),
                weight=template.weight,
            ),
        }
        return trusted(QP, **fields), center

    if weights is not None:
        flat = as_batch(center)  # with its history
    weight, P, linear = objective(flat, weights)
    mass = cells.mass(weight, batch if weight is not None else len(cells.index))
    names, skipped, coefficient, l, u = write_rows(constraints, rows, mass, missing_group)
    if rows.shifted and names:
        assert values is not None
        weighted = values if weight is None else values * weight
        sums = cells.sum(weighted, batch)
        kept = [rows.names.index(name) for name in names]
        shift = (coefficient @ sums.unsqueeze(-1)).squeeze(-1)
        # Equal means of targets differ by rounding; as a side that would ask for the impossible
        # where every prediction sits at a bound.
        size = coefficient.detach().abs() @ cells.sum(weighted.detach().abs(), batch).unsqueeze(-1)
        shift = torch.where(shift.abs() <= 4e-15 * size.squeeze(-1), 0 * shift, shift)
        shift = shift * rows.residual[kept]
        l, u = l + shift, u + shift
    lower, upper = inward_bounds(sides, scores, flat)
    weight_rows = flat.new_ones(()) if weight is None else weight
    problem = put_together(
        P, linear, coefficient, cells.index, weight_rows, l, u, lower, upper, names,
        only_one(rows) + skipped,
    )  # fmt: skip
    return problem, None if weights is not None else center


def put_together(
    P: Tensor,
    q: Tensor,
    coefficient: Tensor,
    cell: Tensor,
    weight: Tensor,
    l: Tensor,
    u: Tensor,
    lower: Tensor,
    upper: Tensor,
    names: tuple[str, ...],
    skipped: tuple[str, ...],
) -> QP:
    """The QP of data that were checked: each expanded to ``q``'s batch."""
    batch, n = q.shape
    m, K = coefficient.shape[-2:]
    return trusted(
        QP,
        P=to_batch(P, batch, n),
        q=q,
        rows=trusted(
            CellRows,
            coefficient=to_batch(coefficient, batch, m, K),
            cell=to_batch(cell, batch, n),
            weight=to_batch(weight, batch, n),
        ),
        l=to_batch(l, batch, m),
        u=to_batch(u, batch, m),
        lb=to_batch(lower, batch, n),
        ub=to_batch(upper, batch, n),
        row_names=names,
        skipped=skipped,
    )


def only_one(rows: Comparison) -> tuple[str, ...]:
    """What is not compared because there is one group only, as problems report it."""
    return tuple([f"{name}: only one group" for name in rows.alone])


@lru_cache(maxsize=512)
@torch.inference_mode(False)  # what is kept serves training, too
def remembered(
    constraints: tuple[Constraint, ...],
    rows: Comparison,
    counts: tuple[int, ...],
    bounds: tuple[float | None, float | None],
    missing_group: MissingGroup,
    dtype: torch.dtype,
    kept: torch.dtype,
    device: torch.device,
    batch: int,
    n: int,
) -> QP:
    """Everything of a problem but q and the cells, where it is a function of cell counts.

    That is so without weights; stratified batches repeat their counts. Its q and cells are
    placeholders.

    Args:
        dtype, kept: dtypes of the scores and of the solution.
    """
    mass = torch.tensor([counts], dtype=torch.float64, device=device)
    names, skipped, coefficient, l, u = write_rows(constraints, rows, mass, missing_group)
    like = torch.zeros((), dtype=dtype, device=device)
    lower, upper = inward_bounds(bounds, like, like.to(kept))
    one = torch.ones((), dtype=kept, device=device)
    problem = put_together(
        one, one.expand(batch, n), coefficient, torch.zeros(1, n, dtype=torch.uint8, device=device),
        one, l, u, lower, upper, names, only_one(rows) + skipped,
    )  # fmt: skip
    return trusted(QP, **{**problem.__dict__, "memo": {}})


# ---------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------


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
    if not (scan().finite(flat.numpy()) if is_small(flat) else all_finite(flat)):
        bad = (~torch.isfinite(scores.detach())).nonzero()
        raise ProblemError(
            f"scores: expected finite values, got {len(bad)} NaN or infinite ones, first at index "
            f"{tuple(bad[0].tolist())}; look for a diverged model or a log of zero"
        )


def is_small(tensor: Tensor) -> bool:
    """Whether ``fairopt.scan`` takes it."""
    return tensor.is_cpu and tensor.numel() <= SMALL and tensor.is_contiguous()


@lru_cache(maxsize=1)
def scan() -> ModuleType:
    """The compiled functions, loaded when first needed."""
    return import_module("fairopt.scan")


def fit(name: str, tensor: object, scores: Tensor, flat: Tensor) -> Tensor:
    """A companion of the scores as ``(1, n)`` or ``(B, n)``; its shape and device checked."""
    if not isinstance(tensor, Tensor):
        raise ProblemError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.device != scores.device:
        raise ProblemError(
            f"{name}: expected device {scores.device}, where the scores are, got {tensor.device}; "
            "move it with .to(...)"
        )
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


def group_codes(groups: Groups, scores: Tensor, flat: Tensor) -> dict[str, Tensor]:
    """Each attribute's codes as integers ``(1, n)`` or ``(B, n)``."""
    bare = isinstance(groups, Tensor) or not isinstance(groups, Mapping)  # the cheap test first
    named: Any = {"group": groups} if bare else groups
    if not named:
        raise ProblemError("groups: expected at least one attribute, got an empty mapping")
    if not all(isinstance(name, str) for name in named):
        raise ProblemError(
            f"groups: expected names of attributes as keys, got {', '.join(map(repr, named))}"
        )
    found = {}
    for name, tensor in named.items():
        label = "groups" if bare else f"groups[{name!r}]"
        codes = fit(label, tensor, scores, flat)
        if codes.dtype not in INTEGERS:
            raise ProblemError(
                f"{label}: expected integer or bool codes, got {codes.dtype}; convert categories "
                "with .long()"
            )
        found[name] = codes.view(torch.uint8) if codes.dtype == torch.bool else codes
    return found


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
    named = group_counts if isinstance(group_counts, Mapping) else dict.fromkeys(used, group_counts)
    known = ("group",) if isinstance(groups, Tensor) else tuple(groups)
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ProblemError(
            f"group_counts: expected names among {', '.join(map(repr, known))}, got "
            f"{', '.join(map(repr, unknown))}"
        )
    for name, count in named.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ProblemError(
                f"group_counts: expected a whole number of at least 1 for {name!r}, got {count!r}"
            )
    return boolean | {name: named[name] for name in used if name in named}


def outcome_and_targets(
    constraints: tuple[Constraint, ...], targets: Tensor | None, scores: Tensor, flat: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Binary targets as codes and real targets in float64, each where a constraint needs it."""
    needing = [type(c).__name__ for c in constraints if c.needs_targets]
    if not needing:
        return None, None
    if targets is None:
        raise ProblemError(
            f"targets: {', '.join(needing)} needs them, got none; pass targets with the shape of "
            "the scores"
        )
    fitted = fit("targets", targets, scores, flat)
    if fitted.is_complex():
        raise ProblemError(f"targets: expected real numbers, got {fitted.dtype}")
    values = fitted.double()
    if not all_finite(values):
        raise ProblemError("targets: expected finite values, got NaN or infinity")
    outcome = None
    binary = [type(c).__name__ for c in constraints if c.needs_outcome]
    if binary:
        plain = values.detach()
        outcome = plain.to(torch.uint8)
        wrong = plain != outcome
        if bool((wrong | (outcome > 1)).any()):
            worst = plain[wrong | (outcome > 1)][0].item()
            raise ProblemError(
                f"targets: {', '.join(binary)} needs targets that are 0 or 1, got {worst}; "
                "threshold them, or use MeanResidual for real targets"
            )
    return outcome, values


def objective(flat: Tensor, weights: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """Weights (float64, or ``None``), the diagonal P and q."""
    if weights is None:
        return None, flat.new_ones(()), negative(flat)
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
    # Weight 0: the sample counts for nothing, and is moved to nothing but the bounds.
    P = torch.where(plain > 0, weight, 1.0)
    return weight, P, -(P * flat.double()).expand(len(flat), -1)


def fixed(constraints: tuple[Constraint, ...]) -> bool:
    """Whether all tolerances are numbers."""
    return not any([isinstance(c.tolerance, Tensor) for c in constraints])  # noqa: C419


def tolerances(constraints: tuple[Constraint, ...], device: torch.device) -> Tensor:
    """The tolerances as one float64 tensor, with their history."""
    if fixed(constraints):
        return torch.tensor([c.tolerance for c in constraints], dtype=torch.float64).to(device)
    for constraint in constraints:
        constraint.check_tolerance()  # again: the optimizer may have moved it
    return torch.stack(
        [
            torch.as_tensor(c.tolerance, dtype=torch.float64).reshape(()).to(device)
            for c in constraints
        ]
    )


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


# ---------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Cells:
    """The combinations of attributes (and outcome) as one integer per sample.

    Attributes:
        index: ``(1, n)`` or ``(B, n)``.
        axes: what the cells are the product of, the outcome last.
        outcome_axis: its place among the axes, or ``None``.
        size: how many there are, K.
        found: number of samples in each cell (and zeros behind), if already counted.
    """

    index: Tensor
    axes: tuple[Axis, ...]
    outcome_axis: int | None
    size: int
    found: NDArray[np.int64] | None = None

    def sum(self, values: Tensor, batch: int) -> Tensor:
        """Sum of values ``(1, n)`` or ``(B, n)`` over each cell: ``(batch, K)``, float64."""
        index = self.index.long().expand(batch, -1)
        out = values.new_zeros(batch, self.size, dtype=torch.float64)
        return out.scatter_add(1, index, values.double().expand(batch, -1))

    def counts(self) -> tuple[int, ...]:
        """Number of samples in each cell, of groups that the whole batch shares."""
        if self.found is not None:
            return tuple(self.found[: self.size].tolist())
        n = self.index.shape[1]
        if self.size == 2 and n > 1_000:
            second = int(torch.count_nonzero(self.index))  # ten times faster than a count
            return n - second, second
        return tuple(torch.bincount(self.index[0], minlength=self.size).tolist())

    def mass(self, weight: Tensor | None, batch: int) -> Tensor:
        """Total weight, or number, of the samples in each cell: ``(batch, K)``, float64."""
        if weight is not None:
            return self.sum(weight, batch)
        if len(self.index) == 1:
            return torch.tensor([self.counts()], dtype=torch.float64).to(self.index.device)
        ones = torch.ones((), dtype=torch.float64, device=self.index.device)
        return self.sum(ones.expand(self.index.shape), batch)


def make_cells(
    attributes: Mapping[str, Tensor], outcome: Tensor | None, counts: Mapping[str, int] | None
) -> Cells:
    """Number the combinations of all attributes in use, in row-major order."""
    axes, parts = [], []
    found = None  # counts, as long as all parts are small
    for name, codes in attributes.items():
        if is_small(codes) and len(codes) == 1:
            array, found = np.empty(codes.shape, np.uint8), np.zeros(MOST_CODES, np.int64)
            low, high = scan().encode(codes.numpy(), array, found)
            part = torch.from_numpy(array)
        else:
            part, found = codes, None
            low, high = (int(end) for end in torch.aminmax(codes))
        if low < 0:
            raise ProblemError(
                f"groups[{name!r}]: expected codes of at least 0, got {low}; give unknown members "
                "a code of their own, or leave them out"
            )
        declared = counts.get(name) if counts else None
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
    outcome_axis = None
    if outcome is not None:
        outcome_axis = len(axes)
        axes.append(OUTCOME)
        parts.append(outcome)
    size = math.prod([len(axis.codes) for axis in axes])
    if size > 256:
        parts = [codes.long() for codes in parts]
        found = None
    else:  # a byte per sample: every pass of every solver reads the cells
        parts = [c if c.dtype == torch.uint8 else c.to(torch.uint8) for c in parts]
        if size > MOST_CODES or len(parts) > 1:
            found = None
    index = parts[0]
    if len(parts) > 1:
        for axis, codes in zip(axes[1:], parts[1:], strict=True):
            index = index * len(axis.codes) + codes
    return Cells(index, tuple(axes), outcome_axis, size, found)


@lru_cache(maxsize=256)
def codes_below(count: int) -> tuple[int, ...]:
    """0, 1, ..., count - 1."""
    return tuple(range(count))


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


Written: TypeAlias = tuple[tuple[str, ...], tuple[str, ...], Tensor, Tensor, Tensor]

# Rows of up to this many cells are remembered by the cells' counts.
MOST_COUNTS = 256


def write_rows(
    constraints: tuple[Constraint, ...],
    rows: Comparison,
    mass: Tensor,
    missing_group: MissingGroup,
) -> Written:
    """Names, skipped names, coefficients ``(B, m, K)`` and sides ``(B, m)`` before any shift.

    Args:
        mass: total weight of each cell, ``(B, K)``.
    """
    totals = (mass @ rows.sets.mT).view(len(mass), 3, -1)  # weights of left, right, right only
    tolerance = tolerances(constraints, mass.device)[rows.owner].unsqueeze(0)
    if not rows.names or totals.min().item() > 0:
        return rows.names, (), contrasts(rows, totals), -tolerance, tolerance
    return leave_out(rows, totals, -tolerance, tolerance, missing_group)


def contrasts(rows: Comparison, totals: Tensor) -> Tensor:
    """Coefficients of mean over left minus mean over right: ``(B, 3, m)`` to ``(B, m, K)``.

    On cells of both ("overall") the coefficient is 1/left - 1/right, a difference that cancels when
    one group is nearly everyone; written as (right only) / (left right) it does not.
    """
    coefficient = (rows.signed / totals[:, :2].unsqueeze(-1)).sum(1)
    if rows.nested:
        left, right, rest = totals.unsqueeze(-1).unbind(1)
        coefficient = coefficient + rows.both * (rest / (left * right))
    return coefficient


def leave_out(
    rows: Comparison,
    totals: Tensor,
    l: Tensor,
    u: Tensor,
    missing_group: MissingGroup,
) -> Written:
    """Drop rows of which no problem has both sides; make them void in problems that lack one."""
    here = (totals > 0).all(1)  # (B, m)
    batch = len(here)
    absent = []
    for name, some in zip(rows.names, here.sum(0).tolist(), strict=True):
        if some < batch:
            where = "" if some == 0 else f" (in {batch - some} of {batch} problems)"
            absent.append(f"{name}{where}")
    if missing_group == "raise":
        raise ProblemError(
            "groups: the batch lacks a group, so that these rows compare nothing: "
            f'{", ".join(absent)}; use larger or stratified batches, or missing_group="skip"'
        )
    coefficient = contrasts(rows, torch.where(here.unsqueeze(1), totals, 1.0)) * here.unsqueeze(-1)
    keep = here.any(0).nonzero().squeeze(1)
    names = tuple(rows.names[i] for i in keep.tolist())
    l = torch.where(here, l, -math.inf)[:, keep]
    u = torch.where(here, u, math.inf)[:, keep]
    skipped = tuple(f"{name}: a group has no samples" for name in absent)
    return names, skipped, coefficient[:, keep], l, u
