"""The state of a stream: counts, sums and multipliers, a few numbers per cell and row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fairopt import kernels
from fairopt.errors import ProblemError
from fairopt.kernels.stream_records import (
    AWAY,
    EACH_V,
    FEATURES,
    GAPS,
    GREATEST,
    LEAST,
    MASS,
    PENDING,
    SAMPLES,
    Floats,
    Integers,
    Rows,
    Statistics,
)
from fairopt.online.layout import Programme

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Names, dtypes and shapes of the arrays: K cells, m rows, Q sums.
ARRAYS = {
    "sums": (np.float64, ("two", "Q", "K")),
    "pending": (np.float64, ("two", "Q", "K")),
    "counts": (np.int64, ("K",)),
    "totals": (np.int64, ("three",)),
    "extent": (np.float64, ("two",)),
    "rows": (np.float64, ("m", "four")),
    "paper": (np.float64, ("four",)),
}
EXTRAS = ("common", "history")  # bytes that are saved where there is something to save


class State:
    """The numbers, and the programme that says what they stand for.

    Attributes:
        programme: ``None`` before the first sample; then every array has no element.
        sums, pending: float64 ``(2, Q, K)``, high and low parts of the sums per cell, as
            ``fairopt.kernels.stream`` lists them: of samples whose targets are known (or that need
            none), and of those whose targets are expected.
        counts: int64 ``(K,)``, samples per cell, where groups and outcomes are certain.
        totals: int64, [samples, batches, samples whose targets are expected].
        extent: [least, greatest] score.
        rows: float64 ``(m, 4)``: multiplier, memory, the root of the count at the last update, and
            how far outside its sides the value can have been then.
        paper: float64, the state of feedback="batch": [multiplier, its largest value, sum over
            batches of size times gap, in two parts].
        others: float64 ``(2 Q + 1, K)``, what of the sums other workers steer by, as
            ``Statistics`` has it; ``None`` where the stream is not shared.
    """

    __slots__ = (*ARRAYS, "others", "programme")

    programme: Programme | None
    sums: Floats
    pending: Floats
    counts: Integers
    totals: Integers
    extent: Floats
    rows: Floats
    paper: Floats
    others: Floats | None

    def __init__(self, programme: Programme | None = None) -> None:
        self.programme = programme
        sizes = self.sizes()
        for name, (kind, shape) in ARRAYS.items():
            setattr(self, name, np.zeros([sizes[s] for s in shape], kind))
        self.extent[:] = math.inf, -math.inf
        self.others = None

    def sizes(self) -> dict[str, int]:
        made = self.programme
        known = {"two": 2, "three": 3, "four": 4, "Q": FEATURES, "K": 0, "m": 0}
        if made is None:
            return known
        Q = FEATURES + EACH_V * len(made.features)
        return known | {"Q": Q, "K": made.cells, "m": len(made.rows.names)}

    def copy(self) -> State:
        """Apart from the original."""
        new = State.__new__(State)
        new.programme = self.programme
        new.others = None if self.others is None else self.others.copy()
        for name in ARRAYS:
            setattr(new, name, getattr(self, name).copy())
        return new

    def moved(self, programme: Programme) -> State:
        """A copy for a programme with more groups: what was, is in its new place."""
        new = State(programme)
        old = self.programme
        new.totals[:], new.extent[:], new.paper[:] = self.totals, self.extent, self.paper
        if old is not None:
            place = places(old, programme)
            for name in ("sums", "pending"):
                kernels.stream.merge_sums(getattr(new, name), getattr(self, name), place)
            new.counts[place] = self.counts
            if self.others is not None:
                new.others = np.zeros((len(self.others), new.sums.shape[2]))
                new.others[:-1, place] = self.others[:-1]
                new.others[-1, 0] = self.others[-1, 0]
            row = {key: i for i, key in enumerate(programme.keys)}
            for i, key in enumerate(old.keys):
                if key in row:
                    new.rows[row[key]] = self.rows[i]
        return new

    def since(self, earlier: State) -> State:
        """A copy whose counts and sums are of what came after an earlier state of the stream."""
        new = self.copy()
        if self.programme is not None and earlier.programme is not None:
            new.count(earlier.moved(self.programme), -1)
        return new

    def count(self, other: State, sign: int = 1) -> None:
        """Add the counts and sums of a state of the same cells, or with sign -1 take them away."""
        place = np.arange(len(self.counts))
        for name in ("sums", "pending"):
            kernels.stream.merge_sums(getattr(self, name), sign * getattr(other, name), place)
        self.counts += sign * other.counts
        self.totals += sign * other.totals
        for part in other.paper[GAPS:]:
            self.paper[GAPS:] = kernels.stream.two_sum(*self.paper[GAPS:], sign * part)
        if sign > 0:
            self.extent[LEAST] = min(self.extent[LEAST], other.extent[LEAST])
            self.extent[GREATEST] = max(self.extent[GREATEST], other.extent[GREATEST])

    @property
    def served(self) -> int:
        """How many samples, with those whose targets are expected."""
        return int(self.totals[SAMPLES] + self.totals[PENDING])

    @property
    def shared(self) -> bool:
        """Whether other workers steer by a part of the sums."""
        return self.others is not None

    def statistics(self) -> Statistics:
        """The numbers as kernels take them, in the same memory."""
        return Statistics(
            self.sums, self.pending, self.counts, self.totals, self.extent, self.rows, self.others
        )

    # -----------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
        """All numbers, by name; the layout as UTF-8 text in bytes."""
        return {name: getattr(self, name) for name in ARRAYS}

    def layout_bytes(self) -> NDArray[np.uint8]:
        text = "" if self.programme is None else self.programme.layout.to_json()
        return np.frombuffer(text.encode(), np.uint8).copy()

    def tensors(self) -> dict[str, Tensor]:
        """The arrays as tensors that share their memory."""
        found = {name: torch.from_numpy(array) for name, array in self.arrays().items()}
        return found | {"layout": torch.from_numpy(self.layout_bytes())}

    @classmethod
    def restored(cls, programme: Programme | None, values: Mapping[str, object]) -> State:
        """From arrays or tensors of the right shapes.

        Raises:
            ProblemError: a shape, a dtype or a number is not one that a stream can have.
        """
        new = cls(programme)
        for name, (kind, _) in ARRAYS.items():
            value = values[name]
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            mine = getattr(new, name)
            if not isinstance(array, np.ndarray) or (array.shape, array.dtype) != (
                mine.shape,
                np.dtype(kind),
            ):
                got = (
                    f"{array.dtype} of shape {array.shape}"
                    if isinstance(array, np.ndarray)
                    else type(array).__name__
                )
                raise ProblemError(
                    f"state: {name}: expected {np.dtype(kind)} of shape {mine.shape}, got {got}; "
                    "load what state_dict() or save() of an OnlineParity gave"
                )
            mine[...] = array
        good = bool((new.counts >= 0).all() and (new.totals >= 0).all())
        # How far a row was from its aim is infinite where that is not known, as after ``observe``.
        finite = (new.sums, new.pending, new.rows[:, :AWAY])
        good = good and all(bool(np.isfinite(array).all()) for array in finite)
        good = good and not bool(np.isnan(new.rows).any())
        if not good:
            raise ProblemError(
                "state: expected counts of at least 0 and finite sums, got others; the state was "
                "damaged: restore an older one"
            )
        return new


def places(old: Programme, new: Programme) -> Integers:
    """For each cell of one programme its number among those of another with more groups."""
    positions = []
    for before, after in zip(old.axes, new.axes, strict=True):
        positions.append([after.codes.index(code) for code in before.codes])
    sizes = [len(axis.codes) for axis in new.axes]
    found = []
    for combination in itertools.product(*positions):
        number = 0
        for size, position in zip(sizes, combination, strict=True):
            number = number * size + position
        found.append(number)
    return np.array(found, np.int64)


def pooled(state: State, made: Programme) -> tuple[Floats, Rows]:
    """Sums as doubles, and the rows at them."""
    compiled = kernels.stream
    now = np.empty(state.sums.shape[1:])
    compiled.combined(state.sums, np.zeros_like(state.sums), now)
    found: Rows = compiled.empty_rows(len(made.rows.names), len(made.features), made.cells)
    mass = np.empty(len(made.rows.sets) + 1)
    samples = int(state.totals[SAMPLES])
    weight = float(now[MASS].sum()) / samples if samples else 1.0
    compiled.evaluate(now, made.arrays(), weight if weight > 0.0 else 1.0, mass, found)
    compiled.values(now, found)
    return now, found
