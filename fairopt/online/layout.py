"""What the numbers of the state stand for: attributes, groups, cells and rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairopt.errors import ProblemError, UnsupportedProblemError
from fairopt.formulation.template import (
    MOST_CELLS,
    RowPlan,
    RowTemplate,
    Terms,
    new_template,
    plan_rows,
    row_template,
)
from fairopt.kernels.stream_records import (
    EACH_V,
    FEATURES,
    MASS,
    OVER,
    TARGETS,
    Arrays,
    Floats,
    Integers,
)
from fairopt.notions.catalogue import Constraint
from fairopt.notions.functionals import OUTCOME, TARGET, Axis, attribute_axis

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Layout:
    """The attributes that a stream came with, and the groups seen so far.

    Attributes:
        names: all attributes with groups, in the order of the first call.
        codes: for each of them that the constraints use, its increasing codes.
        soft: those that come as chances; their codes are 0, 1, ...
        continuous: the continuous attributes.
    """

    names: tuple[str, ...]
    codes: tuple[tuple[str, tuple[int, ...]], ...]
    soft: frozenset[str]
    continuous: tuple[str, ...]

    def to_json(self) -> str:
        """As text."""
        return json.dumps(
            {
                "names": self.names,
                "codes": self.codes,
                "soft": sorted(self.soft),
                "continuous": self.continuous,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """From ``to_json``.

        Raises:
            ProblemError: the text is no layout.
        """
        try:
            read: dict[str, Any] = json.loads(text)
            return cls(
                tuple(map(str, read["names"])),
                tuple((str(name), tuple(map(int, codes))) for name, codes in read["codes"]),
                frozenset(map(str, read["soft"])),
                tuple(map(str, read["continuous"])),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ProblemError(
                "state: expected the layout of a stream, as state_dict() of an OnlineParity has "
                f"it, got {text[:80]!r}"
            ) from error

    def with_codes(self, new: dict[str, tuple[int, ...]]) -> Layout:
        """With more codes of some attributes."""
        codes = tuple((name, tuple(sorted({*old, *new.get(name, ())}))) for name, old in self.codes)
        return Layout(self.names, codes, self.soft, self.continuous)


@dataclass(frozen=True, eq=False)
class Programme:
    """The rows of the constraints over the cells of a layout.

    Attributes:
        layout: what it is for.
        plan, rows: as fairopt.formulation.template makes them.
        axes: of the cells, in row-major order.
        features: the continuous attributes in use.
        labels: for each cell, what its samples have in common.
        keys: what each row is recognised by when the groups become more.
    """

    layout: Layout
    plan: RowPlan
    rows: RowTemplate
    axes: tuple[Axis, ...]
    features: tuple[str, ...]

    @property
    def cells(self) -> int:
        """K, how many there are."""
        return math.prod(len(axis.codes) for axis in self.axes)

    @property
    def needs_targets(self) -> bool:
        return bool(self.plan.targeted)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        found = [""]
        for axis in self.axes:
            name = axis.key[1] if axis.key[0] == "attribute" else ""
            words = [f"{name}: {label}" if name else label for label in axis.labels]
            found = [" | ".join(filter(None, (a, b))) for a in found for b in words]
        return tuple(found)

    @cached_property
    def keys(self) -> tuple[tuple[int, str, int], ...]:
        seen: dict[tuple[int, str], int] = {}
        found = []
        for owner, name in zip(self.rows.owners, self.rows.names, strict=True):
            number = seen.get((owner, name), 0)
            seen[owner, name] = number + 1
            found.append((owner, name, number))
        return tuple(found)

    @cached_property
    def fixed(self) -> Arrays:
        """The arrays, tensors among the parameters taken as 1."""
        rows, names = self.rows, self.features
        assert rows.grid is not None
        linear = [(0, -1)] + [
            (1 + names.index(name), -1 if over is None else over)
            for name, over in rows.linear_features
        ]
        constant = [MASS] + [
            TARGETS if kind is TARGET else FEATURES + EACH_V * names.index(str(kind))
            for kind in rows.constant_features
        ]
        none = np.zeros((len(rows.names), 0))
        return Arrays(
            rows.grid[0].numpy(),
            indices(rows.linear, linear),
            rows.linear.factor.numpy(),
            none[..., None].astype(np.int64).repeat(1 + OVER, -1)
            if rows.constant is None
            else indices(rows.constant, [(row, -1) for row in constant]),
            none if rows.constant is None else rows.constant.factor.numpy(),
            rows.needs.numpy(),
            rows.sides.numpy(),
        )

    def arrays(self) -> Arrays:
        """The arrays, with the present values of tensors among the parameters.

        Raises:
            ProblemError: a parameter is out of range.
        """
        fixed, rows = self.fixed, self.rows
        if not rows.numbers:
            return fixed
        for constraint in rows.plan.constraints:
            constraint.check()
        numbers = np.array([1.0, *(float(t.detach()) for t in rows.numbers)])

        def times(array: Floats, number: Tensor | None) -> Floats:
            return array if number is None else array * numbers[number.numpy()]

        return fixed._replace(
            factor=times(fixed.factor, rows.linear.number),
            const_factor=fixed.const_factor
            if rows.constant is None
            else times(fixed.const_factor, rows.constant.number),
            sides=times(fixed.sides, rows.side_numbers),
        )


def indices(terms: Terms, kinds: Sequence[tuple[int, int]]) -> Integers:
    """Inside, share, per, again, and what ``of`` stands for: ``(m, J, 6)``."""
    of = torch.zeros_like(terms.inside) if terms.of is None else terms.of
    kind = torch.tensor(kinds)[of]
    parts = (terms.inside, terms.share, terms.per, terms.again)
    return torch.cat([torch.stack(parts, -1), kind], -1).contiguous().numpy()


def programme(constraints: tuple[Constraint, ...], layout: Layout) -> Programme:
    """The rows of constraints for a layout.

    Raises:
        ProblemError: an attribute is missing, or a row bounds a total, which grows with the stream.
        UnsupportedProblemError: more cells than a state should hold.
    """
    made = plan_rows(constraints, layout.names, layout.continuous)
    axes = [attribute_axis(name, codes) for name, codes in layout.codes]
    axes += made.scores
    if made.binary:
        axes.append(OUTCOME)
    cells = math.prod(len(axis.codes) for axis in axes)
    if cells > MOST_CELLS:
        raise UnsupportedProblemError(
            f"groups: expected at most {MOST_CELLS} combinations of groups, outcomes and bins, got "
            f"{cells}; stream fewer attributes or coarser groups"
        )
    rows = (row_template if made.stays else new_template)(made, tuple(axes), CPU)
    per_nobody = len(rows.sets)
    for terms in filter(None, (rows.linear, rows.constant)):
        total = ((terms.per == per_nobody) & (terms.factor != 0)).any(-1)
        if bool(total.any()):
            name = rows.names[int(total.nonzero()[0])]
            raise ProblemError(
                f"row {name!r}: expected means, got a total, which grows with the stream for ever; "
                "bound the mean, as in Budget(mean=...)"
            )
    return Programme(layout, made, rows, tuple(axes), made.continuous)


def labelled(made: Programme, labels: Mapping[str, Sequence[str]]) -> Programme:
    """The same with names for groups, by attribute and code, in the names of cells and rows."""

    def named(axis: Axis) -> Axis:
        words = labels.get(str(axis.key[1]), ()) if axis.key[0] == "attribute" else ()
        shown = zip(axis.codes, axis.labels, strict=True)
        return axis._replace(labels=tuple(words[c] if c < len(words) else old for c, old in shown))

    axes = tuple(named(axis) for axis in made.axes)
    template = row_template if made.plan.stays else new_template
    return replace(made, axes=axes, rows=template(made.plan, axes, CPU))
