"""How a stream went: its pooled rows at some of its sample counts, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from fairopt.errors import ProblemError, whole_number
from fairopt.kernels.stream_records import MULTIPLIER, Floats, Integers
from fairopt.online.layout import Programme
from fairopt.online.packing import packed, unpacked
from fairopt.online.state import State, pooled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("value", "lower", "upper", "excess", "multiplier")
# From the palette of Okabe and Ito; dashes go on where the colours end.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
DASHES = ("-", "--", "-.", ":")
MOST_NAMES = 12  # in a legend


@dataclass(frozen=True, eq=False)
class History:
    """How a stream went: T moments, m rows.

    Attributes:
        samples: int64 ``(T,)``, how many had been served, rising; the last is the present.
        names, notions: of the m rows, as ``report()`` has them.
        value, lower, upper, excess, multiplier: float64 ``(T, m)``, as ``report()`` has them at
            those moments; NaN where a row compared nothing yet.
    """

    samples: Integers
    names: tuple[str, ...]
    notions: tuple[str, ...]
    value: Floats
    lower: Floats
    upper: Floats
    excess: Floats
    multiplier: Floats

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: what is infinite or not a number is None."""
        found: dict[str, Any] = {
            "samples": self.samples.tolist(),
            "names": list(self.names),
            "notions": list(self.notions),
        }
        for name in COLUMNS:
            table = getattr(self, name).tolist()
            found[name] = [[x if math.isfinite(x) else None for x in row] for row in table]
        return found

    def plot(self, target: str | PathLike[str] | Axes) -> None:
        """Draw the pooled values and their sides, into a file or on axes of matplotlib.

        A file has a second panel with the multipliers.

        Raises:
            ImportError: matplotlib is not installed; ``pip install 'fairopt[demo]'`` brings it.
            ValueError: matplotlib knows no format of that suffix.
        """
        if not isinstance(target, (str, PathLike)):
            self._draw(target, "value")
            return
        try:
            # Figure, not pyplot: no window, no global state, and any thread may draw.
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "plot: matplotlib is not installed; get it with: pip install 'fairopt[demo]'"
            ) from error
        figure = Figure(figsize=(8.0, 6.0), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        self._draw(top, "value")
        self._draw(bottom, "multiplier")
        top.set_title("pooled value (dotted: its sides)", loc="left", fontsize=11)
        bottom.set_title("multiplier, in units of a prediction", loc="left", fontsize=11)
        top.set_xlabel("")
        if 0 < len(self.names) <= MOST_NAMES:
            figure.legend(
                *top.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False,
                fontsize=9,
            )  # fmt: skip
        figure.savefig(target, dpi=150)

    def _draw(self, ax: Axes, what: str) -> None:
        table, sides = getattr(self, what), set()
        for r, name in enumerate(self.names):
            color, dash = COLORS[r % len(COLORS)], DASHES[r // len(COLORS) % len(DASHES)]
            ax.plot(self.samples, table[:, r], color=color, linestyle=dash, linewidth=1.4,
                    label=name)  # fmt: skip
            for side in (self.lower[:, r], self.upper[:, r]) if what == "value" else ():
                if side.tobytes() not in sides and np.isfinite(side).any():
                    sides.add(side.tobytes())
                    ax.plot(self.samples, side, color="#AA0000", linestyle=":", linewidth=1.2)
        ax.set_xlabel("samples served")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        ax.set_axisbelow(True)


class Records:
    """The moments that are kept, fewer than ``most``, spread over the whole stream.

    One is taken at the end of the first batch at which ``due`` samples have been served, the next
    multiple of ``stride``. When there are as many as may be, every second one is dropped, and the
    stride becomes what is left between two. So it makes no difference how calls cut the batches.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.stride = 1
        self.keys: tuple[tuple[int, str, int], ...] = ()
        self.notions: tuple[str, ...] = ()
        self.samples: list[int] = []
        self.rows: list[Floats] = []  # (5, m) each, as COLUMNS has them

    @property
    def due(self) -> int:
        last = self.samples[-1] if self.samples else 0
        return (last // self.stride + 1) * self.stride

    def copy(self) -> Records:
        """Apart from the original; arrays are never written again."""
        new = Records(self.most)
        new.stride, new.keys, new.notions = self.stride, self.keys, self.notions
        new.samples, new.rows = list(self.samples), list(self.rows)
        return new

    def take(self, state: State) -> None:
        """Record a state, if one is due."""
        if state.programme is None or state.served < self.due:
            return
        self.follow(state.programme)
        self.samples.append(state.served)
        self.rows.append(table(state, state.programme))
        self.shrink()

    def shrink(self) -> None:
        """Drop every second one while there are too many; the last stays."""
        while len(self.samples) >= self.most:
            first = (len(self.samples) + 1) % 2
            self.samples, self.rows = self.samples[first::2], self.rows[first::2]
            between = (self.samples[-1] - self.samples[0]) / max(1, len(self.samples) - 1)
            self.stride = 2 * max(1, self.stride)
            while self.stride < between:
                self.stride *= 2

    def follow(self, made: Programme) -> None:
        """Make room for rows of groups that were seen since; they are NaN before."""
        if self.keys == made.keys:
            return
        place = {key: r for r, key in enumerate(self.keys)}
        old = [place.get(key, -1) for key in made.keys]  # -1: the column of NaN behind them
        nothing = np.full((len(COLUMNS), 1), np.nan)
        self.rows = [np.concatenate([row, nothing], 1)[:, old] for row in self.rows]
        self.keys = made.keys
        self.notions = tuple(type(made.rows.plan.constraints[o]).__name__ for o in made.rows.owners)

    def history(self, state: State) -> History:
        """What was recorded, and the present state as the last."""
        new = self.copy()
        if state.programme is not None:
            new.follow(state.programme)
            before = sum(samples < state.served for samples in new.samples)
            new.samples = new.samples[:before] + [state.served]
            new.rows = new.rows[:before] + [table(state, state.programme)]
        shape = (len(new.rows), len(COLUMNS), len(new.keys))
        rows = np.stack(new.rows) if new.rows else np.empty(shape)
        parts = (np.ascontiguousarray(rows[:, c]) for c in range(len(COLUMNS)))
        names = tuple(name for _, name, _ in new.keys)
        return History(np.array(new.samples, np.int64), names, new.notions, *parts)

    def to_bytes(self) -> bytes:
        """None where nothing was recorded."""
        if not self.samples:
            return b""
        header = {"stride": self.stride, "keys": self.keys, "notions": self.notions}
        samples = np.array(self.samples, np.int64)
        return packed(header, {"samples": samples, "rows": np.stack(self.rows)})

    @classmethod
    def from_bytes(cls, most: int, data: bytes) -> Records:
        """From ``to_bytes``; thinned out where fewer may be kept here.

        Raises:
            ProblemError: the bytes are no history.
        """
        new = cls(most)
        if not data:
            return new
        header, arrays = unpacked(data)
        try:
            new.stride, new.notions = int(header["stride"]), tuple(map(str, header["notions"]))
            new.keys = tuple((int(o), str(name), int(k)) for o, name, k in header["keys"])
            samples, rows = arrays["samples"], arrays["rows"]
        except (KeyError, TypeError, ValueError) as error:
            raise ProblemError(f"history: expected that of a stream, got {error}") from error
        shape = (len(samples), len(COLUMNS), len(new.keys))
        if rows.shape != shape or new.stride < 1 or len(new.notions) != len(new.keys):
            raise ProblemError(f"history: expected rows of shape {shape}, got {rows.shape}")
        new.samples, new.rows = [int(count) for count in samples], list(rows)
        new.shrink()
        return new


def stretches(records: Records | None, state: State, n: int, batch: int) -> Iterator[slice]:
    """The next n samples in parts, none of which goes beyond a moment to be recorded.

    Each part is to be served into ``state`` before the next is asked for.
    """
    if records is None:
        yield slice(0, n)
        return
    first = 0
    while first < n:
        batches = max(1, -(-(records.due - state.served) // batch))
        last = min(n, first + batches * batch)
        yield slice(first, last)
        records.take(state)
        first = last


def table(state: State, made: Programme) -> Floats:
    """The columns of the rows of a state, ``(5, m)``."""
    _, found = pooled(state, made)
    value, low, high = found.value, found.lower, found.upper
    excess = np.maximum(0.0, np.maximum(low - value, value - high))
    columns = np.stack([value, low, high, excess, state.rows[:, MULTIPLIER]])
    return np.where(found.here > 0.0, columns, np.nan)


def check_history(most: object) -> int | None:
    """The number of moments that may be kept, or ``None`` for no history.

    Raises:
        ProblemError: it is no whole number of at least 2.
    """
    if most is None:
        return None
    return whole_number("history", most, 2, "how many moments to keep, at least 2, or None")
