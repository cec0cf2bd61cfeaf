"""Which classes the rows of a trace look at: the layout of ``PartitionedRows``.

A row looks at the axes that its terms' sets have conditions on, and the classes are the products of
these axes. Everything that ``formulation.coefficients`` computes for cells it then computes for
classes; of the partitions of which a set is a union of classes, one, its *home*, gives the set's
mass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fairopt import kernels
from fairopt.formulation.template import Trace, indicators
from fairopt.notions.functionals import Axis, Members
from fairopt.programs.rows.partitions import Partitions

# Beyond this many classes the S x S matrix of the classes is no gain over dense coefficients.
MOST_CLASSES = 1024


@dataclass(frozen=True, eq=False)
class Classes:
    """The classes of a trace.

    Attributes:
        axes: of each of the F partitions, the axes whose products are its classes.
        sizes: how many classes each has.
        of_row: int64 ``(m,)``, the partition that each row looks at.
        home: float64 ``(1, sets, S)``, which classes are in which set, in one of the partitions of
            which the set is a union of classes: masses are counted once.
        columns: int64 ``(m, G)``, the classes of each row's partition; its first behind the last.
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
        """The classes of given cells.

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
def classes(trace: Trace, axes: tuple[Axis, ...]) -> Classes | None:
    """The classes of the rows of a trace over these axes; ``None`` if they are too many."""
    if not trace.names:
        return None
    sets = trace.sets
    looks = [frozenset(c.axis for c in (*s.conditions, *s.less)) for s in sets]
    terms = trace.linear
    of_term = torch.where(terms.factor != 0, terms.inside, -1).tolist()
    of_rows = [frozenset().union(*(looks[s] for s in each if s >= 0)) for each in of_term]
    families = list(dict.fromkeys(of_rows))
    families += [each for each in dict.fromkeys(looks) if not any(each <= f for f in families)]
    made = tuple([tuple([axis for axis in axes if axis.key in each]) for each in families])
    sizes = tuple([math.prod(len(axis.codes) for axis in each) for each in made])
    if sum(sizes) > MOST_CLASSES:
        return None
    device = terms.factor.device
    grid = torch.zeros(len(sets), sum(sizes), dtype=torch.float64)
    home = torch.zeros_like(grid)
    homeless = set(range(len(sets)))
    start = 0
    for family, each, size in zip(families, made, sizes, strict=True):
        inside = [s for s, look in enumerate(looks) if look <= family]
        block = slice(start, start + size)
        found = held([sets[s] for s in inside], each, size)
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
    return Classes(
        made, sizes, of_row.to(device), home.unsqueeze(0).to(device), columns.to(device),
        terms_grid.to(device),
    )  # fmt: skip


def held(sets: Sequence[Members], axes: Sequence[Axis], size: int) -> Tensor:
    """Which sets hold which classes of the product of some axes: float64 ``(sets, size)``."""
    lengths = [len(axis.codes) for axis in axes]
    places = torch.meshgrid(*map(torch.arange, lengths), indexing="ij") if lengths else ()
    parts = {axis.key: place.reshape(1, -1) for axis, place in zip(axes, places, strict=True)}
    return indicators(sets, parts, torch.ones(1, size))[0]
