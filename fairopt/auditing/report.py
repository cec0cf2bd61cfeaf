"""audit(): which rows hold for given predictions, recomputed in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fairopt.errors import FairoptError, ProblemError
from fairopt.formulation.inputs import (
    GroupCounts,
    Groups,
    as_batch,
    check_finite,
    companion,
    read_class_targets,
    read_scores,
    read_weights,
)
from fairopt.formulation.samples import Data, gather
from fairopt.formulation.specification import as_constraints, check_classes
from fairopt.formulation.template import Plans
from fairopt.notions.catalogue import Constraint
from fairopt.programs.solution import RowValues
from fairopt.programs.tensors import compact
from fairopt.tolerances import ROW_PRECISION

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class AuditedRow:
    """One row, recomputed.

    Attributes:
        name: as in errors and in ``layer.last.problem.row_names``.
        notion: the class of the constraint.
        value: what the row bounds, such as a difference of means.
        lower, upper: its sides; infinite for none.
        excess: by how much the value is outside; 0 where it is not.
        samples: how many there are in the smallest set that the row sums over; a chance of
            belonging counts as that part of a sample.
        holds: whether it is inside, to the precision that fairopt guarantees for the dtype of the
            predictions: 1e-12 of the row's size for float64, 1e-6 for others.
    """

    name: str
    notion: str
    value: float
    lower: float
    upper: float
    excess: float
    samples: float
    holds: bool


@dataclass(frozen=True)
class Audit:
    """What ``audit`` found. ``str(audit)`` is a table.

    Attributes:
        rows: every row, in the order of the constraints.
        groups: for each attribute in use the number of samples of each group.
        skipped: names of rows that compare nothing, with the reason.
        n: the number of samples.
    """

    rows: tuple[AuditedRow, ...]
    groups: Mapping[str, Mapping[str, float]]
    skipped: tuple[str, ...]
    n: int

    @property
    def holds(self) -> bool:
        """Whether every row does."""
        return all(row.holds for row in self.rows)

    @property
    def worst(self) -> AuditedRow | None:
        """The row with the largest excess; among rows that hold, the one nearest to a side."""
        return max(self.rows, key=lambda r: (r.excess, -slack(r)), default=None)

    def __str__(self) -> str:
        broken = sum(not row.holds for row in self.rows)
        verdict = (
            f"all {len(self.rows)} rows hold"
            if not broken
            else f"{broken} of {len(self.rows)} rows {'does' if broken == 1 else 'do'} not hold"
        )
        width = max([len("row"), *(len(row.name) for row in self.rows)])
        lines = [
            f"{self.n} samples: {verdict}",
            f"{'row':{width}}  {'value':>10}  {'lower':>10}  {'upper':>10}  {'excess':>9}  "
            f"{'samples':>9}  holds",
        ]
        lines += [
            f"{r.name:{width}}  {r.value:10.6f}  {r.lower:10.6f}  {r.upper:10.6f}  {r.excess:9.2e}"
            f"  {r.samples:9.6g}  {'yes' if r.holds else 'NO'}"
            for r in self.rows
        ]
        lines += [
            f"{name}: {', '.join(f'{count:.6g} in {label}' for label, count in counts.items())}"
            for name, counts in self.groups.items()
        ]
        lines += [f"skipped: {name}" for name in self.skipped]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: what is infinite is None."""
        rows = [
            {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in asdict(r).items()}
            for r in self.rows
        ]
        return {
            "holds": self.holds,
            "n": self.n,
            "rows": rows,
            "groups": {name: dict(counts) for name, counts in self.groups.items()},
            "skipped": list(self.skipped),
        }

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a table, indexed by name.

        Raises:
            FairoptError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise FairoptError(
                "to_pandas: expected pandas to be installed; run: pip install pandas, or use "
                "to_dict()"
            ) from error
        columns = list(AuditedRow.__dataclass_fields__)
        return pd.DataFrame([asdict(row) for row in self.rows], columns=columns).set_index("name")


def slack(row: AuditedRow) -> float:
    return min(row.value - row.lower, row.upper - row.value)


def audit(
    predictions: Tensor,
    groups: Groups,
    constraints: Constraint | Sequence[Constraint],
    targets: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    scores: Tensor | None = None,
    group_counts: GroupCounts = None,
    classes: int | None = None,
) -> Audit:
    """Recompute every row of the constraints for any predictions, fair or not.

    Args:
        predictions: ``(n,)`` or ``(n, 1)``; one problem, not a batch.
        groups, constraints, targets, weights, group_counts: as for ``formulate``.
        scores: what the predictions were made from, for notions that bin scores
            (``GroupCalibration``); by default the predictions themselves.
        classes: the number C of classes: predictions and scores are then ``(n, C)``, targets as
            for ``formulate``, and every row is recomputed for each class.

    Raises:
        ProblemError: an argument is outside what is said above; ``ImpactRatio`` met negative
            predictions.
    """
    if classes is not None:
        return audit_classes(
            predictions, groups, constraints, targets, weights, scores, group_counts, classes
        )
    return audited(predictions, groups, constraints, targets, weights, scores, group_counts)


def audit_classes(
    predictions: Tensor,
    groups: Groups,
    constraints: Constraint | Sequence[Constraint],
    targets: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    group_counts: GroupCounts,
    classes: int,
) -> Audit:
    """The audits of all classes, as one."""
    check_classes(classes)
    x = read_scores(predictions, classes, "predictions").detach().contiguous()
    if x.dim() != 2:
        raise ProblemError(
            f"predictions: expected shape (n, {classes}), got {tuple(x.shape)}; audit the problems "
            "of a batch one by one"
        )
    binned = x if scores is None else read_scores(scores, classes).detach().contiguous()
    outcomes = read_class_targets(targets, x, x.unsqueeze(0))
    found = [
        audited(
            x[:, c].to(predictions.dtype), groups, constraints,
            None if outcomes is None else outcomes.of(c)[0], weights, binned[:, c], group_counts,
            largest=float(x.abs().max()),
        )
        for c in range(classes)
    ]  # fmt: skip
    return Audit(
        tuple(
            replace(r, name=f"class {c} | {r.name}")
            for c, one in enumerate(found)
            for r in one.rows
        ),
        found[0].groups,
        tuple(f"class {c} | {name}" for c, one in enumerate(found) for name in one.skipped),
        len(x),
    )


def audited(
    predictions: Tensor,
    groups: Groups,
    constraints: Constraint | Sequence[Constraint],
    targets: Tensor | None,
    weights: Tensor | None,
    scores: Tensor | None,
    group_counts: GroupCounts,
    largest: float | None = None,
) -> Audit:
    """The audit of one prediction per sample.

    Args:
        largest: the magnitude that a row's size is measured by, instead of the largest of these
            predictions.
    """
    chosen = as_constraints(constraints)
    x = as_batch(read_scores(predictions).detach())
    check_finite(predictions, x)
    if len(x) != 1:
        raise ProblemError(
            f"predictions: expected shape (n,) or (n, 1), got {tuple(predictions.shape)}; audit "
            "the problems of a batch one by one"
        )
    binned = (
        x if scores is None else read_scores(companion("scores", scores, predictions, x)).detach()
    )
    check_finite(binned, binned)
    data = gather(Plans(chosen), predictions, binned, groups, targets, group_counts)
    nonnegative = data.rows.plan.nonnegative
    if nonnegative and bool((x < 0).any()):
        raise ProblemError(
            f"predictions: {', '.join(nonnegative)} needs predictions of at least 0, got "
            f"{float(x.min())}"
        )
    weight = read_weights(weights, x)
    weight = None if weight is None else weight.detach()
    with torch.no_grad():
        assembled = data.assemble(weight, 1, "skip")
        rows = data.in_form(assembled, weight, x)
        l, u = (side.expand(1, len(assembled.names)) for side in assembled.sides)
        size = None if largest is None else torch.full_like(x.double(), largest)
        found_values = RowValues(rows, l, u, x, size)
        value, beyond = found_values.value, found_values.relative[0]
        if assembled.constant is not None:
            value = value + assembled.constant
        sizes = smallest(data)
    owners = [type(chosen[i]).__name__ for i in data.rows.owners]
    if assembled.kept is not None:
        owners = [owners[i] for i in assembled.kept.tolist()]
        sizes = sizes[assembled.kept]
    allowed = ROW_PRECISION.get(predictions.dtype, ROW_PRECISION[torch.float32])
    m = len(assembled.names)
    found = zip(
        assembled.names, owners, value[0].tolist(), assembled.lower.expand(1, m)[0].tolist(),
        assembled.upper.expand(1, m)[0].tolist(), sizes.tolist(), (beyond <= allowed).tolist(),
        strict=True,
    )  # fmt: skip
    return Audit(
        tuple(
            AuditedRow(name, owner, v, low, up, max(0.0, low - v, v - up), size, holds)
            for name, owner, v, low, up, size, holds in found
        ),
        group_sizes(data),
        data.rows.uncompared + assembled.skipped,
        x.shape[1],
    )


def smallest(data: Data) -> Tensor:
    """The number of samples in the smallest set that each row sums over: ``(m,)``."""
    terms = data.rows.linear
    if not data.rows.names:
        return terms.factor.new_zeros(0)
    sizes = data.sizes()[0][terms.inside]
    return torch.where(terms.factor != 0, sizes, math.inf).amin(-1)


def group_sizes(data: Data) -> dict[str, dict[str, float]]:
    """For each attribute in use the number of samples of each group."""
    found: dict[str, dict[str, float]] = {}
    for axis, part in zip(data.axes, data.parts, strict=True):
        if axis.key[0] != "attribute":
            continue
        if part.is_floating_point():
            sizes = part[0].detach().sum(0)
        else:
            sizes = torch.bincount(compact(part)[0].long(), minlength=len(axis.codes)).double()
        found[axis.key[1]] = dict(zip(axis.labels, sizes.tolist(), strict=True))
    return found
