"""A problem as the kernels of the closed-form projection take it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairopt.errors import UnsupportedProblemError
from fairopt.kernels import passes
from fairopt.kernels.adjoint import adjoint_sums, adjoint_write
from fairopt.kernels.memory import NUMPY, empty
from fairopt.kernels.oracle import solve_by_oracle
from fairopt.kernels.projection import PASSES, STATUS
from fairopt.kernels.state import CELL_MASS, CONVERGED, INFEASIBLE, MAGNITUDE, SUM
from fairopt.kernels.threads import each
from fairopt.optimality.minimum_norm import support
from fairopt.programs.problem import QP
from fairopt.programs.rows.cells import CellRows
from fairopt.programs.solution import Solution, Status
from fairopt.programs.tensors import is_uniform, unchecked
from fairopt.tolerances import ROW_PRECISION

Array = NDArray[Any]

OUTCOMES = {CONVERGED: Status.SOLVED, INFEASIBLE: Status.INFEASIBLE}


class Constants:
    """What the kernels take beside q and the cells: arrays, and numbers where one serves all.

    Attributes:
        C: the coefficients; of rows over partitions their table.
        grouped: whether each sample is a cell of its own (dense rows).
        single: whether the solution is rounded to float32.
        dtype: of q and x in the kernels.
        metric: 1/P, weight, lb and ub.
        options: of ``fairopt.kernels.projection.solve``.
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
            self.metric: tuple[Any, ...] = (1 / quadratic if positive else 0.0, w, lower, upper)
        else:
            quadratic_, w_, lower_, upper_ = (as_numpy(t, np.float64) for t in tensors)
            positive = bool((quadratic_ > 0).all())
            self.metric = (1 / quadratic_ if positive else quadratic_, w_, lower_, upper_)
        self.rows = self.C, self.l, self.u
        self.options = self.grouped, self.single, ROW_PRECISION[problem.q.dtype]
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

    def samples(self, b: int) -> tuple[Any, ...]:
        """q, 1/P, weight, bounds and cells of one problem, as the passes take them."""
        return (self.q[b], *(passes.at(a, b) for a in self.constants.metric), self.cell[b])


class Answer:
    """What ``fairopt.kernels.projection.solve`` writes, and what the backward needs of it.

    Attributes:
        tensor: x as a tensor.
        arrays: all that is written.
    """

    def __init__(self, data: Data, K: int) -> None:
        self.data = data
        batch, m = data.constants.l.shape
        self.tensor, x = empty(data.q.shape, data.constants.dtype)
        self.y, self.T = np.empty((batch, m)), np.empty((batch, 2, K))
        self.tight, self.outcome = np.empty((batch, m), np.uint8), np.empty((batch, 2), np.int64)
        self.arrays = x, self.y, self.T, self.tight, self.outcome

    def solution(self, problem: QP, context: Any, begun: float, failures: int = 1) -> Solution:
        dtype = problem.q.dtype
        return unchecked(
            Solution,
            problem=problem,
            x=self.tensor if self.tensor.dtype == dtype else self.tensor.to(dtype),
            row_dual=torch.from_numpy(self.y),
            status=outcomes(self.outcome, failures),
            backend="numba",
            iterations=tuple(self.outcome[:, PASSES].tolist()),
            seconds=time.perf_counter() - begun,
            context=context,
        )


def as_numpy(tensor: Tensor, dtype: Any) -> Array:
    """Contiguous NumPy array, in place where the tensor already is one of that dtype."""
    array: Array = tensor.numpy()
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    return np.ascontiguousarray(array, dtype)


def active_rows(N: Tensor, y: Array, equality: Array, tight: Array) -> Tensor:
    """The rows that count in the derivative, given their normals: ``(B, m)``, bool."""
    upper, lower = (tight & 1 != 0) | (y > 0), (tight & 2 != 0) | (y < 0)
    sides = (torch.from_numpy(each) for each in ((y != 0) | equality, upper, lower))
    return support(N, torch.from_numpy(y), *sides)


def outcomes(outcome: Array, failures: int) -> tuple[Status, ...]:
    """The status of each problem of a batch in which so many failed."""
    if not failures:
        return (Status.SOLVED,) * len(outcome)
    return tuple(OUTCOMES.get(each, Status.STALLED) for each in outcome[:, STATUS].tolist())


def solve_large(rows: Any, data: Data, b: int, workers: int, answer: Answer) -> None:
    """Solve one problem with every pass split over threads, and the small algebra in one.

    Args:
        rows: its coefficients, as ``solve_by_oracle`` takes them.
    """
    fixed = data.constants
    _, single, precision = fixed.options
    oracle = ThreadedSums(data, b, workers, answer.T.shape[-1])
    solve = solve_by_oracle(rows, fixed.l[b], fixed.u[b], oracle, data.q.shape[1])
    sums = oracle.write(solve.shifts, single, answer.arrays[0][b])
    solve.conclude(sums, precision, answer.tight[b])
    answer.y[b], answer.T[b] = solve.multipliers, solve.shifts
    answer.outcome[b] = solve.status, solve.passes


class Shares:
    """The samples of one problem, a share for each thread.

    Attributes:
        shares: for each thread q, 1/P, weight, bounds and cells of its samples.
    """

    def __init__(self, data: Data, b: int, workers: int, K: int) -> None:
        self.workers, self.K = workers, K
        n = data.q.shape[1]
        self.cut = [n * c // workers for c in range(workers + 1)]
        self.shares = self.cut_up(data.samples(b))

    def cut_up(self, arrays: Sequence[Any]) -> list[tuple[Any, ...]]:
        if self.workers == 1:
            return [tuple(arrays)]
        ends = [(self.cut[c], self.cut[c + 1]) for c in range(self.workers)]
        return [tuple(passes.part(a, *each) for a in arrays) for each in ends]

    def adjoint_sums(self, shifts: Array, reach: float, g: Array) -> Array:
        """The sums of ``fairopt.kernels.adjoint.adjoint_sums``, ``(2, K)``."""
        out = np.empty((self.workers, 2, self.K))
        gradients = self.cut_up((g,))
        each(
            self.workers,
            lambda c: adjoint_sums(*self.shares[c], *shifts, reach, *gradients[c], out[c]),
        )
        return out.sum(0)  # type: ignore[no-any-return]

    def adjoint_write(self, shifts: Array, reach: float, g: Array, change: Array, v: Array) -> None:
        """v of the adjoint, where nu changes the dual shifts by ``change``."""
        parts = self.cut_up((g, v))

        def write(c: int) -> None:
            mine, out = parts[c]
            adjoint_write(*self.shares[c], *shifts, reach, mine, change, out)

        each(self.workers, write)


class ThreadedSums(Shares):
    """The cell-sum oracle of one large problem: every pass is split over threads."""

    def __init__(self, data: Data, b: int, workers: int, K: int) -> None:
        super().__init__(data, b, workers, K)
        self.pair = self.K <= 2
        self.out = np.empty((workers, MAGNITUDE + 1, self.K))
        self.sorted = self.shares if self.pair else self.by_cells(data.samples(b)[:-1])

    def by_cells(self, arrays: Sequence[Any]) -> list[tuple[Any, ...]]:
        """The shares with the samples of each cell side by side, and where each cell starts."""
        tables = np.empty((self.workers, self.K), np.int64)
        cells = [share[-1] for share in self.shares]
        each(self.workers, lambda c: passes.count(cells[c], tables[c]))
        start = np.zeros(self.K + 1, np.int64)
        np.cumsum(tables.sum(0), out=start[1:])
        position = start[:-1] + np.cumsum(tables, 0) - tables

        def in_order(k: int) -> Any:
            if not isinstance(arrays[k], np.ndarray):
                return arrays[k]
            out = np.empty_like(arrays[k])
            each(
                self.workers,
                lambda c: passes.scatter(self.shares[c][k], cells[c], position[c].copy(), out),
            )
            return out

        ordered = self.cut_up([in_order(k) for k in range(len(arrays))])
        first, last = np.array(self.cut[:-1])[:, None], np.array(self.cut[1:])[:, None]
        starts = start.clip(first, last) - first
        return [(*mine, place) for mine, place in zip(ordered, starts, strict=True)]

    def limits(self) -> Array:
        find = passes.pair_limits if self.pair else passes.cell_limits
        each(self.workers, lambda c: find(*self.sorted[c][1:], self.out[c]))
        return self.out[:, : CELL_MASS + 1].sum(0)  # type: ignore[no-any-return]

    def sums(self, shift_hi: Array, shift_lo: Array, *, single: bool = False) -> Array:
        """With ``single`` of values rounded to float32, and without the curvature."""

        def one(c: int) -> None:
            if self.pair:
                passes.pair_evaluate(*self.sorted[c], shift_hi, shift_lo, self.out[c])
            else:
                passes.evaluate(*self.sorted[c], shift_hi, shift_lo, single, self.out[c])

        each(self.workers, one)
        return self.found()

    def found(self) -> Array:
        return self.out[:, SUM : MAGNITUDE + 1].sum(0)  # type: ignore[no-any-return]

    def write(self, shifts: Array, single: bool, x: Array) -> Array:
        """The solution; and the sums of what was written."""
        parts = self.cut_up((x,))

        def write(c: int) -> None:
            if self.pair and single:
                passes.pair_write(*self.shares[c], *shifts, *parts[c], self.out[c])
            else:
                passes.write(*self.shares[c], *shifts, *parts[c])

        each(self.workers, write)
        return self.sums(*shifts, single=True) if single and not self.pair else self.found()
