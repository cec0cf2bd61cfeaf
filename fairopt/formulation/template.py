"""From notions to numbered terms: the rows of a list of constraints, for given groups.

A *row plan* says what the constraints need, before any data. A *row template* holds the rows as
arrays of indices and factors, from which ``formulation.coefficients`` computes all rows together,
on every call. A *partition of the cells* says which of them each row tells apart: the layout of
``PartitionedRows``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import chain, permutations
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fairopt import kernels
from fairopt.errors import ProblemError
from fairopt.notions.catalogue import Constraint
from fairopt.notions.functionals import (
    OUTCOME,
    TARGET,
    Axis,
    Batch,
    Condition,
    Key,
    Members,
    Row,
    Scaled,
    Term,
    score_axis,
)
from fairopt.programs.rows.partitions import Partitions

MissingGroup: TypeAlias = Literal["skip", "raise"]

# Elements of what a template keeps to spare work.
MOST_KEPT = 1_000_000

# The product of all axes is used as it is up to this many cells; beyond, the occupied ones.
MOST_CELLS = 4096

# Beyond this many parts the S x S matrix of the parts is no gain over dense coefficients.
MOST_PARTS = 1024


@dataclass(frozen=True, eq=False)
class RowPlan:
    """What a list of constraints needs, whatever the data.

    Attributes:
        constraints: the constraints.
        names: of the attributes at hand that have groups, and of those that are continuous.
        attributes: those whose groups are used, in the order in which they were given.
        continuous: the continuous attributes that are used.
        scores: the axes of bins of scores.
        targeted: names of the notions that need targets.
        binary: names of those that need targets from 0 to 1.
        nonnegative: names of those that need predictions of at least 0.
        stays: whether the rows of known groups stay the same from call to call. Not so where a
            notion computes with a tensor: only the parameters themselves are read anew each time.
    """

    constraints: tuple[Constraint, ...]
    names: tuple[tuple[str, ...], tuple[str, ...]]
    attributes: tuple[str, ...]
    continuous: tuple[str, ...]
    scores: tuple[Axis, ...]
    targeted: tuple[str, ...]
    binary: tuple[str, ...]
    nonnegative: tuple[str, ...]
    stays: bool


class Plans(dict[tuple[tuple[str, ...], tuple[str, ...]], RowPlan]):
    """The plans of a list of constraints, by the names of the attributes at hand."""

    def __init__(self, constraints: tuple[Constraint, ...]) -> None:
        super().__init__()
        self.constraints = constraints

    def __missing__(self, names: tuple[tuple[str, ...], tuple[str, ...]]) -> RowPlan:
        made = self[names] = plan_rows(self.constraints, *names)
        return made


@lru_cache(maxsize=256)
def plan_rows(
    constraints: tuple[Constraint, ...], attributes: tuple[str, ...], continuous: tuple[str, ...]
) -> RowPlan:
    """The plan of constraints, given the names of the attributes at hand.

    Raises:
        ProblemError: an attribute is missing or of the other kind, or rows make no sense.
    """
    keys: dict[Key, None] = {}
    real: dict[str, None] = {}
    targeted, binary = [], []
    stays = True
    for constraint in constraints:
        owner = type(constraint).__name__
        batch = Batch(owner, attributes, continuous, None)
        rows = list(rows_of(constraint, batch))
        terms = [t for row in rows for t in (*row.value.linear, *row.value.constant)]
        for name in dict.fromkeys(t.of for t in terms if isinstance(t.of, str)):
            if name not in continuous:
                kind = "group codes" if name in attributes else "no such attribute"
                raise ProblemError(
                    f"{owner}: {name!r}: expected a continuous attribute, a floating-point tensor "
                    f"with one value for each score, in groups; got {kind}"
                )
            real[name] = None
        used = [t.tensor for t in terms] + [
            side.tensor for r in rows for side in (r.lower, r.upper)
        ]
        known = {id(tensor) for tensor in constraint.tensors}
        stays = stays and all(tensor is None or id(tensor) in known for tensor in used)
        keys |= batch.keys
        if OUTCOME.key in batch.keys:
            binary.append(owner)
        if OUTCOME.key in batch.keys or any(term.of is TARGET for term in terms):
            targeted.append(owner)
    return RowPlan(
        constraints,
        (attributes, continuous),
        tuple(name for name in attributes if ("attribute", name) in keys),
        tuple(real),
        tuple(score_axis(key[1]) for key in keys if key[0] == "score"),
        tuple(targeted),
        tuple(binary),
        tuple(type(c).__name__ for c in constraints if c.nonnegative),
        stays,
    )


def rows_of(constraint: Constraint, batch: Batch) -> Iterator[Row]:
    """The rows of a constraint, known to be rows."""
    for row in constraint.rows(batch):
        if not isinstance(row, Row):
            raise ProblemError(
                f"{type(constraint).__name__}: rows: expected Row objects, got {row!r}"
            )
        yield row


# ---------------------------------------------------------------------------------------------
# Row templates
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Terms:
    """The terms of all rows, padded with zeros to J for each: every tensor is ``(m, J)``.

    Attributes:
        inside: number of the set of samples that is summed over.
        share, per, again: numbers of the sets by whose mass it is multiplied or divided; the number
            after the last set stands for 1.
        factor: float64.
        number: which of the template's numbers multiplies it; ``None`` where none does.
        of: number of the feature; ``None`` where no term has one.
        simple: whether there is neither ``share`` nor ``again``.
    """

    inside: Tensor
    share: Tensor
    per: Tensor
    again: Tensor
    factor: Tensor
    number: Tensor | None
    of: Tensor | None
    simple: bool


@dataclass(frozen=True, eq=False)
class RowTemplate:
    """All rows of a list of constraints for given groups.

    Attributes:
        plan: the plan of the constraints that the rows come from.
        names: m readable names.
        owners: which of the constraints each row comes from.
        one_group: names of comparisons without rows, because there is one group only.
        sets: the S sets of samples that occur.
        linear, constant: the terms with predictions and, if there are any, those without.
        linear_features: from number 1, pairs of a continuous attribute and the set over whose mean
            it is centred, if it is; number 0 is 1.
        constant_features: from number 1, names of continuous attributes, or TARGET.
        needs: int64 ``(m, N)``, the sets that must not be empty for a row to mean something.
        sides: float64 ``(m, 2)``, lower and upper.
        side_numbers: which of the numbers multiply them; ``None`` where none does.
        numbers: the tensors among the parameters, from number 1; number 0 is 1.
        vanishing: whether a row may be zero though no set that it needs is empty.
        grid: float64 ``(1, S, K)``, which cells are in which set, if the cells are the product of
            the axes.
        terms_grid: float64 ``(m, J, K)``, which cells are in the sets of the linear terms, if that
            is not too large to keep.
        repeats: whether the rows are a function of the cells' masses alone.
    """

    plan: RowPlan
    names: tuple[str, ...]
    owners: tuple[int, ...]
    one_group: tuple[str, ...]
    sets: tuple[Members, ...]
    linear: Terms
    constant: Terms | None
    linear_features: tuple[tuple[str, int | None], ...]
    constant_features: tuple[object, ...]
    needs: Tensor
    sides: Tensor
    side_numbers: Tensor | None
    numbers: tuple[Tensor, ...]
    vanishing: bool
    grid: Tensor | None
    terms_grid: Tensor | None
    repeats: bool

    @property
    def uncompared(self) -> tuple[str, ...]:
        """``one_group`` with the reason, as problems and reports have it."""
        return tuple([f"{name}: only one group" for name in self.one_group])


@torch.inference_mode(False)  # what is kept serves training, too
def new_template(plan: RowPlan, axes: tuple[Axis, ...], device: torch.device) -> RowTemplate:
    """The rows of a plan over samples that are told apart by these axes."""
    by_key = {axis.key: axis for axis in axes}
    rows: list[Row] = []
    owners: list[int] = []
    one_group: list[str] = []
    for i, constraint in enumerate(plan.constraints):
        batch = Batch(type(constraint).__name__, *plan.names, by_key)
        rows += rows_of(constraint, batch)
        owners += [i] * (len(rows) - len(owners))
        one_group += batch.one_group
    for row in rows:
        check_sides(row)
    linear = [without_cancellation(row.value.linear) for row in rows]
    constant = [without_cancellation(row.value.constant) for row in rows]
    every = [(*a, *b) for a, b in zip(linear, constant, strict=True)]
    sides = [(row.lower, row.upper) for row in rows]
    scaled: list[Term | Scaled] = [*chain(*every), *chain(*sides)]
    tensors = {id(each.tensor): each.tensor for each in scaled if each.tensor is not None}
    sets = numbered(s for term in chain(*every) for s in (term.inside, *term.masses))
    # Number 0 of tensors and of features is 1; the number after the last set stands for 1.
    numbers = numbered([id(None), *tensors])
    features = numbered([(None, None), *map(feature, chain(*linear))])
    data = numbered([(None, None), *map(feature, chain(*constant))])

    def padded(lists: Sequence[Sequence[float]], fill: float, least: int = 1) -> Tensor:
        """Lists of different lengths as one tensor ``(m, J)``, J at least ``least``."""
        width = max([least, *map(len, lists)])
        kind = torch.float64 if isinstance(fill, float) else torch.int64
        whole = [[*each, *[fill] * (width - len(each))] for each in lists]
        return torch.tensor(whole, dtype=kind).reshape(len(lists), width).to(device)

    def terms(lists: list[tuple[Term, ...]], kinds: Mapping[Any, int]) -> Terms:
        def each(number: Callable[[Term], int], fill: int = 0) -> Tensor:
            return padded([[number(term) for term in row] for row in lists], fill)

        return Terms(
            each(lambda t: sets[t.inside]),
            each(lambda t: sets.get(t.share, len(sets)), len(sets)),
            each(lambda t: sets.get(t.per, len(sets)), len(sets)),
            each(lambda t: sets.get(t.again, len(sets)), len(sets)),
            padded([[t.factor for t in row] for row in lists], 0.0),
            unless_zero(each(lambda t: numbers[id(t.tensor)])),
            unless_zero(each(lambda t: kinds[feature(t)])),
            simple=not any(t.share or t.again for t in chain(*lists)),
        )

    needs = [[sets[s] for s in dict.fromkeys(s for t in each for s in t.masses)] for each in every]
    side_numbers = [[numbers[id(side.tensor)] for side in pair] for pair in sides]
    grid = None
    if math.prod(len(axis.codes) for axis in axes) <= MOST_CELLS:
        grid = product_indicators(tuple(sets), axes).to(device)
    linear_terms = terms(linear, features)
    kept = grid is not None and linear_terms.inside.numel() * grid.shape[-1] <= MOST_KEPT
    constant_features = tuple([name for name, _ in data][1:])
    return RowTemplate(
        plan,
        names=tuple([row.name for row in rows]),
        owners=tuple(owners),
        one_group=tuple(dict.fromkeys(one_group)),
        sets=tuple(sets),
        linear=linear_terms,
        constant=terms(constant, data) if any(constant) else None,
        linear_features=tuple([(name, sets.get(over)) for name, over in features][1:]),
        constant_features=constant_features,
        needs=padded(needs, len(sets)),
        sides=padded([[s.factor for s in pair] for pair in sides], 0.0, 2),
        side_numbers=unless_zero(padded(side_numbers, 0, 2)),
        numbers=tuple(tensors.values()),
        vanishing=any(
            t.of is not None or t.per != t.inside for row in rows for t in row.value.linear
        ),
        grid=grid,
        terms_grid=grid[0, linear_terms.inside] if grid is not None and kept else None,
        repeats=not tensors and not constant_features and grid is not None,
    )


# For plans whose rows stay the same from call to call.
row_template = lru_cache(maxsize=256)(new_template)


def numbered(things: Iterable[Any]) -> dict[Any, int]:
    """Distinct things, numbered in the order in which they come."""
    return {thing: i for i, thing in enumerate(dict.fromkeys(things))}


def feature(term: Term) -> tuple[Any, Members | None]:
    """What a term multiplies each sample with, and over which samples that is centred."""
    return term.of, term.inside if term.centred else None


def unless_zero(tensor: Tensor) -> Tensor | None:
    """The tensor; ``None`` if it is all zeros."""
    return tensor if bool(tensor.any()) else None


def check_sides(row: Row) -> None:
    """Raise if numbers, not tensors, leave nothing between the sides of a row."""
    lower, upper = row.lower, row.upper
    if lower.tensor is None and upper.tensor is None and not lower.factor <= upper.factor:
        raise ProblemError(
            f"row {row.name!r}: expected lower <= upper, got lower {lower.factor}, upper "
            f"{upper.factor}"
        )


def without_cancellation(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Rewrite c mean(A) - c mean(B) where A is a part of B, and R the rest of B.

    On A its coefficient is 1/mass(A) - 1/mass(B), a difference that cancels when A is nearly all of
    B. As mass(R) / (mass(A) mass(B)) it does not; on R it is -1/mass(B).
    """
    if len(terms) < 2:
        return terms
    left = list(terms)
    for a, b in permutations(terms, 2):
        if (
            a in left
            and b in left
            and a.inside == a.per
            and b.inside == b.per
            and b.inside.conditions < a.inside.conditions
            and not a.centred
            and not b.centred
            and a.of == b.of
            and a.tensor is b.tensor
            and a.factor == -b.factor
        ):
            rest = Members(b.inside.conditions, a.inside.conditions - b.inside.conditions)
            left.remove(a)
            left.remove(b)
            left += [a._replace(share=rest, again=b.inside), b._replace(inside=rest)]
    return tuple(left)


def indicators(sets: Sequence[Members], parts: Mapping[Key, Tensor], like: Tensor) -> Tensor:
    """Whether, or with which chance, each column is in each set: float64 ``(b, S, C)``.

    Args:
        parts: for each axis positions, integers ``(b, C)``, or chances, float64 ``(b, C, G)``; b is
            1 or the batch.
        like: ``(b, C)``, of the shape and device of the columns where a set has no condition.
    """
    everyone = torch.ones_like(like, dtype=torch.float64)

    @cache
    def holds(condition: Condition) -> Tensor:
        part = parts[condition.axis]
        if part.is_floating_point():
            return part[..., condition.position]
        if condition.position < 0:
            return everyone * 0.0
        return (part == condition.position).double()

    @cache
    def all_hold(conditions: frozenset[Condition]) -> Tensor:
        if len({condition.axis for condition in conditions}) < len(conditions):
            return everyone * 0.0  # two values of one attribute: nobody has both
        product = everyone
        for condition in sorted(conditions, key=repr):
            product = product * holds(condition)
        return product

    found = [
        all_hold(s.conditions) * (1.0 - all_hold(s.less)) if s.less else all_hold(s.conditions)
        for s in sets
    ]
    if not found:
        return everyone.unsqueeze(1)[:, :0]
    return torch.stack(torch.broadcast_tensors(*found), 1)


def product_indicators(sets: Sequence[Members], axes: Sequence[Axis]) -> Tensor:
    """The indicators of all cells of the product of the axes: ``(1, S, K)``."""
    sizes = [len(axis.codes) for axis in axes]
    places = torch.meshgrid(*map(torch.arange, sizes), indexing="ij") if sizes else ()
    parts = {axis.key: place.reshape(1, -1) for axis, place in zip(axes, places, strict=True)}
    return indicators(sets, parts, torch.ones(1, math.prod(sizes)))


# ---------------------------------------------------------------------------------------------
# Partitions of the cells
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of the cells that the rows of a template look at.

    A row looks at the axes that the sets of its terms have conditions on; the products of these
    axes are the parts of one partition. ``formulation.coefficients`` then takes parts for columns.
    Of the partitions of which a set is a union of parts one, its *home*, gives the set's mass.

    Attributes:
        axes: of each of the F partitions, the axes whose products are its parts.
        sizes: how many parts each has.
        of_row: int64 ``(m,)``, the partition that each row looks at.
        home: float64 ``(1, sets, S)``, which parts are in which set, in one of the partitions of
            which the set is a union of parts: masses are counted once.
        columns: int64 ``(m, G)``, the parts of each row's partition; its first behind the last.
        terms_grid: float64 ``(m, J, G)``, which of these are in the sets of the row's linear terms;
            zero behind the last.
    """

    axes: tuple[tuple[Axis, ...], ...]
    sizes: tuple[int, ...]
    of_row: Tensor
    home: Tensor
    columns: Tensor
    terms_grid: Tensor

    def partitions(self, axes: tuple[Axis, ...], combinations: Tensor) -> Partitions:
        """The parts of given cells.

        Args:
            axes: what the cells are told apart by.
            combinations: int32 ``(K, len(axes))``, the position of each cell on each axis.
        """
        end = np.cumsum([0, *map(len, self.axes)])
        column = np.array([axes.index(axis) for each in self.axes for axis in each], np.int64)
        size = np.array([len(axis.codes) for axis in axes], np.int64)
        start = np.cumsum([0, *self.sizes])
        member = np.empty((len(combinations), len(self.sizes)), np.int32)
        kernels.combinations.members(combinations.numpy(), end, column, size, start, member)
        return Partitions(self.sizes, torch.from_numpy(member), self.of_row)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept serves training, too
def partition(template: RowTemplate, axes: tuple[Axis, ...]) -> Parts | None:
    """The parts that rows over these axes look at; ``None`` if they are too many."""
    if not template.names:
        return None
    sets = template.sets
    looks = [frozenset(c.axis for c in (*s.conditions, *s.less)) for s in sets]
    terms = template.linear
    of_term = torch.where(terms.factor != 0, terms.inside, -1).tolist()
    of_rows = [frozenset().union(*(looks[s] for s in each if s >= 0)) for each in of_term]
    families = list(dict.fromkeys(of_rows))
    families += [each for each in dict.fromkeys(looks) if not any(each <= f for f in families)]
    made = tuple([tuple([axis for axis in axes if axis.key in each]) for each in families])
    sizes = tuple([math.prod(len(axis.codes) for axis in each) for each in made])
    if sum(sizes) > MOST_PARTS:
        return None
    device = terms.factor.device
    grid = torch.zeros(len(sets), sum(sizes), dtype=torch.float64)
    home = torch.zeros_like(grid)
    homeless = set(range(len(sets)))
    start = 0
    for family, each, size in zip(families, made, sizes, strict=True):
        inside = [s for s, look in enumerate(looks) if look <= family]
        block = slice(start, start + size)
        found = product_indicators([sets[s] for s in inside], each)[0]
        grid[inside, block] = found
        first = [i for i, s in enumerate(inside) if s in homeless]
        here = [inside[i] for i in first]
        home[here, block] = found[first]
        homeless -= set(here)
        start += size
    of_row = torch.tensor([families.index(each) for each in of_rows], dtype=torch.int64)
    starts = torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)[:-1]
    column = torch.arange(max(sizes[f] for f in of_row.tolist()))
    there = column < torch.tensor(sizes)[of_row].unsqueeze(-1)
    columns = starts[of_row].unsqueeze(-1) + torch.where(there, column, 0)
    at = columns.unsqueeze(1).expand(-1, terms.inside.shape[1], -1)
    terms_grid = grid[terms.inside.cpu()].gather(2, at) * there.unsqueeze(1)
    return Parts(
        made, sizes, of_row.to(device), home.unsqueeze(0).to(device), columns.to(device),
        terms_grid.to(device),
    )  # fmt: skip
