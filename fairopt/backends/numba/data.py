"""A problem as the kernels of the closed-form projection take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.errors import UnsupportedProblemError
from fairopt.kernels import projection as kernels
from fairopt.kernels.memory import NUMPY
from fairopt.kernels.threads import each
from fairopt.programs.problem import QP
from fairopt.programs.rows.cells import CellRows
from fairopt.programs.solution import Status
from fairopt.programs.tensors import is_uniform

Array = NDArray[Any]


class Constants:
    """What the kernels take beside q and the cells: arrays, and numbers where one serves all.

    Attributes:
        C: the coefficients; of rows over partitions their table.
        grouped: whether each sample is a cell of its own (dense rows).
        single: whether the solution is rounded to float32.
        dtype: of q and x in the kernels.
    """

    def __init__(self, problem: QP) -> None:
        P, lb, ub, rows = problem.P, problem.lb, problem.ub, problem.rows
        assert isinstance(P, Tensor)
        self.l, self.u = as_numpy(problem.l, np.float64), as_numpy(problem.u, np.float64)
        self.grouped = not isinstance(rows, CellRows)
        if self.grouped:
            C, weight = rows.to_tensor(), P.new_ones(()).expand_as(P)
        else:
            C, weight = rows.tensors
        self.C = as_numpy(C, np.float64)
        self.single = problem.q.dtype == torch.float32
        self.dtype = torch.float64
        tensors = (P, weight, lb, ub)
        if all(map(is_uniform, tensors)):
            quadratic, w, lower, upper = [t.numpy().item(0) for t in tensors]
            positive = quadratic > 0
            # 1/P must not round in float32 sums; a float32 q is widened unless P is one.
            if quadratic == 1 and self.single:
                self.dtype = torch.float32
            self.scalars_or_arrays: tuple[Any, ...] = (
                1 / quadratic if positive else 0.0, w, lower, upper,
            )  # fmt: skip
        else:
            quadratic_, w_, lower_, upper_ = (as_numpy(t, np.float64) for t in tensors)
            positive = bool((quadratic_ > 0).all())
            self.scalars_or_arrays = (
                1 / quadratic_ if positive else quadratic_,
                w_,
                lower_,
                upper_,
            )
        if not positive:
            raise UnsupportedProblemError(
                "backend 'numba' needs a positive diagonal P: where it is zero the projection is "
                "not unique; add a small positive weight there"
            )


class Data:
    """A problem as the kernels take it."""

    def __init__(self, problem: QP) -> None:
        self.constants = problem.remembered(Constants)
        self.q = as_numpy(problem.q, NUMPY[self.constants.dtype])
        if isinstance(problem.rows, CellRows):
            cell: Array = problem.rows.cell.numpy()
            self.cell = cell if cell.flags.c_contiguous else np.ascontiguousarray(cell)
        else:
            batch, _, n = problem.shape
            self.cell = np.broadcast_to(np.arange(n), (batch, n)).copy()

    def of(self, b: int) -> tuple[Any, ...]:
        """1/P, weight and bounds of one problem."""
        pick = kernels.at
        return tuple(pick(a, b) for a in self.constants.scalars_or_arrays)  # type: ignore[no-untyped-call]


def as_numpy(tensor: Tensor, dtype: Any) -> Array:
    """Contiguous NumPy array, in place where the tensor already is one of that dtype."""
    array: Array = tensor.numpy()
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    return np.ascontiguousarray(array, dtype)


def outcomes(status: Array, worst: Array, precision: float) -> tuple[Status, ...]:
    """The status of each problem of a batch in which some failed."""
    solved = (status == kernels.CONVERGED) & (worst <= precision)
    infeasible = status == kernels.INFEASIBLE
    return tuple(
        Status.SOLVED if good else Status.INFEASIBLE if proven else Status.STALLED
        for good, proven in zip(solved.tolist(), infeasible.tolist(), strict=True)
    )


def by_cells(
    cell: Array, K: int, cut: Sequence[int], arrays: Sequence[Any]
) -> tuple[list[Any], Array]:
    """Arrays with the samples of each cell side by side, and where each cell starts: ``(K + 1,)``.

    Args:
        cut: where the share of each thread starts; one more than there are threads.
        arrays: ``(n,)`` each; numbers, which are the same for all samples, stay as they are.
    """
    workers = len(cut) - 1
    tables = np.empty((workers, K), np.int64)
    each(workers, lambda c: kernels.count(cell, cut[c], cut[c + 1], tables[c]))
    start = np.zeros(K + 1, np.int64)
    np.cumsum(tables.sum(0), out=start[1:])
    position = start[:-1] + np.cumsum(tables, 0) - tables

    def in_order(a: Any) -> Any:
        if not isinstance(a, np.ndarray):
            return a
        out = np.empty_like(a)
        each(
            workers, lambda c: kernels.scatter(a, cell, cut[c], cut[c + 1], position[c].copy(), out)
        )
        return out

    return [in_order(a) for a in arrays], start
