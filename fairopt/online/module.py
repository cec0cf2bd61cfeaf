"""OnlineParity: predictions that arrive one or a few at a time, fair in aggregate."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fairopt.constraints import Constraint
from fairopt.errors import ProblemError
from fairopt.inputs import as_constraints, both, check_bounds, rounded_inwards
from fairopt.online.hard import hard_batch
from fairopt.online.layout import Arrays, Floats, Layout, programme
from fairopt.online.paper import paper_batch, theorem
from fairopt.online.persistence import differences, read_state, write_state
from fairopt.online.reading import NO_CHANCES, NOTHING, ONE, Samples, UnknownGroup, read
from fairopt.online.report import OnlineReport, report_of
from fairopt.online.state import ARRAYS, State, joined, kernels
from fairopt.samples import GroupCounts, Groups

__all__ = ["Feedback", "OnlineParity"]

Feedback = Literal["pooled", "batch", "hard"]

# The pooled rule's constants; docs/streaming.md says where each comes from. All are pure numbers.
DEFAULT_STEP = {"pooled": 1.0, "batch": 0.01, "hard": 1.0}
GENTLE = 0.5
FORGET = 0.05
MARGIN = 2.5

FAST = (torch.float32, torch.float64)
CODES = (torch.int64, torch.int32, torch.uint8, torch.bool)
TABLE = 64
NO_FEATURES = np.zeros((1, 0))


class OnlineParity(torch.nn.Module):
    """Rows of all constraints on the POOLED statistic: all predictions ever served.

    For predictions that arrive in batches of any size from 1, with any group missing from any of
    them. What is bounded is what ``audit`` of everything served recomputes.

    Args:
        constraints: one or several parity notions, each with its own tolerance.
        bounds: ``(lower, upper)``, numbers or ``None``; ``None`` for no bounds at all.
        feedback: ``"pooled"`` steers with one signed multiplier per row, and comes to hold as the
            stream goes on, at nearly the least change; ``"hard"`` keeps the rows from every batch
            on that follows ``warm_up`` samples, wherever the bounds allow it, at a higher change;
            ``"batch"`` is the rule of the paper, which bounds gaps within batches.
        step_size: a pure number. For ``"pooled"``, how strongly a row that counts n samples pulls:
            a violation is cut by 1 + step_size * sqrt(n); for ``"batch"``, the paper's eta_0. The
            default is 1.0 for ``"pooled"`` and 0.01 for ``"batch"``.
        warm_up: for ``"hard"``, how many samples are served by ``"pooled"`` first.
        group_counts: as for ``formulate``; groups beyond them are added when they come.
        unknown_group: ``"add"``, or ``"raise"`` to refuse groups beyond those declared.

    The state is a few numbers per cell (group, outcome, bin) and per row, in float64 whatever the
    module is converted to, and on the CPU. ``state_dict`` has it, and changes its sizes when groups
    are first seen.

    Safe to call from several threads: calls take turns. Outputs carry no gradient.

    Raises:
        ProblemError: an argument is outside what is said above.
    """

    _state: State
    _ready: Any
    _compiled: Any

    def __init__(
        self,
        constraints: Constraint | Sequence[Constraint],
        *,
        bounds: tuple[float | None, float | None] | None,
        feedback: Feedback = "pooled",
        step_size: float | None = None,
        warm_up: int = 0,
        group_counts: GroupCounts = None,
        unknown_group: UnknownGroup = "add",
    ) -> None:
        super().__init__()
        if feedback not in DEFAULT_STEP:
            raise ProblemError(f"feedback: expected 'pooled', 'batch' or 'hard', got {feedback!r}")
        if unknown_group not in ("add", "raise"):
            raise ProblemError(f"unknown_group: expected 'add' or 'raise', got {unknown_group!r}")
        step = DEFAULT_STEP[feedback] if step_size is None else step_size
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 < step < math.inf:
            raise ProblemError(f"step_size: expected a finite number above 0, got {step_size!r}")
        if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 0:
            raise ProblemError(f"warm_up: expected a whole number of at least 0, got {warm_up!r}")
        if warm_up and feedback != "hard":
            raise ProblemError(
                f"warm_up: expected 0 with feedback={feedback!r}, got {warm_up}; it is for 'hard'"
            )
        self.constraints = as_constraints(constraints)
        self.bounds = numbers(bounds)
        self.feedback = feedback
        self.step_size = float(step)
        self.warm_up = warm_up
        self.group_counts = group_counts
        self.unknown_group = unknown_group
        self._settings: dict[torch.dtype, Floats] = {}
        self._lock = threading.RLock()
        self._commit(State())

    # -----------------------------------------------------------------------------------------
    # Serving
    # -----------------------------------------------------------------------------------------

    def forward(
        self,
        scores: Tensor,
        groups: Groups,
        targets: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:
        """Adjusted scores of one batch, ``(n,)`` or ``(n, 1)``; the state counts them.

        Args:
            targets: for notions that need them: 0 and 1, chances, or real numbers. Where they are
                ``None`` the scores are taken for forecasts of them, and ``observe`` must follow
                when the targets are known.
            weights: ``(n,)``, at least 0.
            update: ``False`` predicts and leaves the state as it is.

        Raises:
            ProblemError: the input is refused; the state is as before.
        """
        return self._serve(scores, groups, targets, weights, None, update)

    def run(
        self,
        scores: Tensor,
        groups: Groups,
        targets: Tensor | None = None,
        *,
        batch_size: int = 1,
        weights: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:
        """A whole array in order, ``batch_size`` samples at a time: what as many calls return.

        If something is refused, it is refused before anything is served.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ProblemError(
                f"batch_size: expected a whole number of at least 1, got {batch_size!r}"
            )
        return self._serve(scores, groups, targets, weights, batch_size, update)

    def observe(
        self,
        targets: Tensor,
        predictions: Tensor,
        groups: Groups,
        *,
        scores: Tensor,
        weights: Tensor | None = None,
    ) -> None:
        """Targets of samples served before, in any order and number.

        They replace the forecasts by which those samples counted. The stream keeps no samples, so
        it is told them again.

        Args:
            predictions: what was served.
            groups, scores, weights: what they were served for.

        Raises:
            ProblemError: the input is refused, no notion needs targets, or more come than are
                awaited; the state is as before.
        """
        with self._lock:
            arguments = (self.group_counts, self.unknown_group)
            known = self._state.programme
            if known is None or not known.needs_targets:
                raise ProblemError(
                    "observe: expected a stream that awaits targets, got one that "
                    + ("has served nothing" if known is None else "needs none")
                )
            if targets is None:
                raise ProblemError("targets: expected a tensor, got None")
            forecast = read(self.constraints, known, scores, groups, None, weights, *arguments)
            actual = read(self.constraints, known, scores, groups, targets, weights, *arguments)
            served = read(
                self.constraints, known, predictions, groups, targets, weights, *arguments
            ).scores
            n, awaited = len(served), int(self._state.totals[2])
            if n > awaited or len(actual.scores) != n:
                raise ProblemError(
                    f"observe: expected at most {awaited} samples, as many as await targets, got "
                    f"{n}; each sample is observed once, and only if it was served without targets"
                )
            if forecast.programme.layout != known.layout:
                raise ProblemError(
                    "observe: expected groups of samples that were served, got new ones"
                )
            state = self._state.copy()
            compiled = kernels()
            compiled.accumulate(
                state.pending, state.counts, 0.0, -1.0, forecast.cell, forecast.chances,
                forecast.weight, served, forecast.y, forecast.v, 0, n,
            )  # fmt: skip
            compiled.accumulate(
                state.sums, state.counts, 1.0, 1.0, actual.cell, actual.chances, actual.weight,
                served, actual.y, actual.v, 0, n,
            )  # fmt: skip
            compiled.replace_forecast(
                state.sums, actual.cell, actual.chances, actual.weight, actual.y, forecast.y
            )
            state.totals[0] += n
            state.totals[2] -= n
            if state.totals[2] == 0:
                state.pending[...] = 0.0
            state.rows[:, 3] = math.inf
            self._commit(state)

    def _serve(
        self,
        scores: Tensor,
        groups: Groups,
        targets: Tensor | None,
        weights: Tensor | None,
        batch_size: int | None,
        update: bool,
    ) -> Tensor:
        with self._lock:
            if targets is None and weights is None and update and self.feedback == "pooled":
                fast = self._fast(scores, groups, batch_size)
                if fast is not None:
                    return fast
            samples = read(
                self.constraints, self._state.programme, scores, groups, targets, weights,
                self.group_counts, self.unknown_group,
            )  # fmt: skip
            self._check(samples)
            state = self._state
            grown = samples.programme is not state.programme
            working = state.moved(samples.programme) if grown else state.copy()
            size = len(samples.scores) if batch_size is None else batch_size
            x = self._through(working, samples, size, scores.dtype)
            if update:
                self._commit(working) if grown else self._overwrite(working)
        return torch.from_numpy(x).to(scores.device, scores.dtype).reshape(scores.shape)

    def _fast(self, scores: Tensor, groups: Groups, batch_size: int | None) -> Tensor | None:
        """The same where there is little to read: one attribute, on the CPU; or ``None``."""
        ready = self._ready
        if (
            ready is None
            or type(groups) is not Tensor
            or not isinstance(scores, Tensor)
            or scores.dtype not in FAST
            or scores.dim() != 1
            or groups.shape != scores.shape
            or groups.dtype not in CODES
            or not scores.is_cpu
            or not groups.is_cpu
            or scores.shape[0] == 0
        ):
            return None
        programme_arrays, table, codes, settings = ready
        state = self._state
        single = scores.dtype == torch.float32
        # Contiguous: for other layouts Numba would compile everything once more.
        values = np.ascontiguousarray(scores.detach().numpy(), np.float64)
        cell = np.empty(len(values), np.int64)
        places = np.ascontiguousarray(groups.numpy())
        compiled = self._compiled
        status, _ = compiled.positions(values, places, table, codes, cell)
        if status:  # a new group, or something to refuse: the long way says which
            return None
        out = np.empty(len(values))
        compiled.stream(
            values, cell, NO_CHANCES, ONE, NOTHING, NO_FEATURES, batch_size or len(values), single,
            False, state.sums, state.pending, state.counts, state.totals, state.extent, state.rows,
            settings[single], programme_arrays, out,
        )  # fmt: skip
        return torch.from_numpy(out.astype(np.float32) if single else out)

    def _through(self, state: State, samples: Samples, size: int, dtype: torch.dtype) -> Floats:
        """All samples, ``size`` at a time; ``state`` is updated."""
        arrays, settings = samples.programme.arrays(), self._settings_for(dtype)
        compiled = kernels()
        single, half = dtype == torch.float32, dtype not in FAST
        out = np.empty(len(samples.scores))
        if self.feedback == "pooled" and not half:
            compiled.stream(
                samples.scores, samples.cell, samples.chances, samples.weight, samples.y, samples.v,
                size, single, samples.expected, state.sums, state.pending, state.counts,
                state.totals, state.extent, state.rows, settings, tuple(arrays), out,
            )  # fmt: skip
            return out
        for first in range(0, len(out), size):
            part = samples.part(first, first + size)
            x = self._one(state, part, arrays, settings)
            x = torch.from_numpy(x).to(dtype).double().numpy()
            compiled.close_batch(
                part.cell, part.chances, part.weight, part.y, part.v, 0, len(x), False, x,
                state.pending if part.expected else state.sums, state.counts, state.totals,
                part.expected,
            )  # fmt: skip
            out[first : first + size] = x
        return out

    def _one(self, state: State, part: Samples, arrays: Arrays, settings: Floats) -> Floats:
        """The predictions of one batch, not yet counted."""
        bounds = float(settings[5]), float(settings[6])
        if self.feedback == "batch":
            return paper_batch(state, part, arrays, bounds, self.step_size)
        served = int(state.totals[0] + state.totals[2])
        if self.feedback == "hard" and served + len(part.scores) > self.warm_up:
            x, dual, left = hard_batch(state, part, arrays, bounds)
            state.rows[:, 0], state.rows[:, 1], state.rows[:, 3] = dual, 0.0, left
            state.extent[0] = min(state.extent[0], part.scores.min())
            state.extent[1] = max(state.extent[1], part.scores.max())
            return x
        x = np.empty(len(part.scores))
        trial = state.copy()  # its sums are counted later, in the dtype that is returned
        kernels().stream(
            part.scores, part.cell, part.chances, part.weight, part.y, part.v, len(x), False,
            part.expected, trial.sums, trial.pending, trial.counts, trial.totals, trial.extent,
            trial.rows, settings, tuple(arrays), x,
        )  # fmt: skip
        state.rows[...], state.extent[...] = trial.rows, trial.extent
        return x

    def _check(self, samples: Samples) -> None:
        """Raise where the notions do not fit to bounds or feedback."""
        made, lower = samples.programme, self.bounds[0]
        if made.plan.nonnegative and not lower >= 0:
            raise ProblemError(
                f"bounds: {', '.join(made.plan.nonnegative)} needs a lower bound of at least 0, "
                f"got {lower}; a ratio of means says nothing where they can be negative"
            )
        if self.feedback != "batch":
            return
        if samples.expected:
            raise ProblemError(
                f"targets: feedback='batch' with {', '.join(made.plan.targeted)} needs them with "
                "the scores, got none; pass them, or take feedback='pooled'"
            )
        sides = made.arrays().sides
        if not bool(np.isfinite(sides).all()):
            raise ProblemError(
                "constraints: feedback='batch' bounds a gap, and needs rows with two finite sides "
                "as parity notions have; take feedback='pooled' for others"
            )

    # -----------------------------------------------------------------------------------------
    # The state
    # -----------------------------------------------------------------------------------------

    def report(self) -> OnlineReport:
        """Samples, groups, pooled rows, multipliers and bounds, from the sums."""
        with self._lock:
            made = self._state.programme
            arrays = made.arrays() if made is not None else None
            paper = (math.nan, math.nan)
            if self.feedback == "batch":
                paper = theorem(self._state, self.step_size, arrays)
            return report_of(self._state, self.feedback, paper)

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self._commit(State())

    def merge(self, other: OnlineParity) -> None:
        """Add what a replica served; exact in counts and sums. ``other`` stays as it is.

        Multipliers have no exact sum: memories become means, weighted by the samples of each.

        Raises:
            ProblemError: the configurations or the attributes differ.
        """
        if not isinstance(other, OnlineParity):
            raise ProblemError(f"merge: expected an OnlineParity, got {type(other).__name__}")
        if other is self:
            raise ProblemError("merge: expected another OnlineParity, got the same one")
        different = differences(self.configuration(), other.configuration())
        if different:
            raise ProblemError(
                "merge: expected streams of the same configuration, got " + "; ".join(different)
            )
        with other._lock:
            theirs = other._state.copy()
        with self._lock:
            mine = self._state
            if theirs.programme is None:
                return
            if mine.programme is None:
                self._commit(theirs)
                return
            layout = joined(mine.programme.layout, theirs.programme.layout)
            merged = mine.moved(programme(self.constraints, layout))
            merged.absorb(theirs)
            self._commit(merged)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write state and configuration to a file, which appears whole or not at all.

        Raises:
            OSError: it cannot be written; what was there before is still there.
        """
        with self._lock:
            state = self._state.copy()
        write_state(path, state, self.configuration())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file that ``save`` wrote; the state is replaced.

        Raises:
            ProblemError: the file is torn or none of ours, or was saved under another
                configuration; the message says what differs, and the state is as before.
            OSError: it cannot be read.
        """
        configuration, layout, arrays = read_state(path)
        different = differences(self.configuration(), configuration)
        if different:
            raise ProblemError(
                f"{path}: expected a stream of this configuration, got another: "
                + "; ".join(different)
                + "; make an OnlineParity like the one that was saved"
            )
        made = programme(self.constraints, Layout.from_json(layout)) if layout else None
        with self._lock:
            self._commit(State.restored(made, arrays))

    def configuration(self) -> dict[str, Any]:
        """What must be the same for two states to mean the same; ready for JSON."""
        ends = [None if math.isinf(end) else end for end in self.bounds]
        counts = self.group_counts
        return {
            "constraints": [described(each) for each in self.constraints],
            "bounds": ends,
            "feedback": self.feedback,
            "step_size": self.step_size,
            "warm_up": self.warm_up,
            "group_counts": counts if counts is None or isinstance(counts, int) else dict(counts),
            "unknown_group": self.unknown_group,
        }

    def _settings_for(self, dtype: torch.dtype) -> Floats:
        """The settings of the kernels, with bounds that the dtype can hold."""
        found = self._settings.get(dtype)
        if found is None:
            low, high = (
                float(rounded_inwards(torch.tensor(end, dtype=torch.float64), dtype, side))
                for end, side in zip(self.bounds, (-math.inf, math.inf), strict=True)
            )
            check_bounds(
                torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64),
                dtype,
            )  # fmt: skip
            found = np.array(
                [self.step_size, GENTLE, FORGET, MARGIN, high - low, low, high], np.float64
            )
            self._settings[dtype] = found
        return found

    def _overwrite(self, working: State) -> None:
        """Take over the numbers of a state of the same programme, in place."""
        for name in ARRAYS:
            getattr(self._state, name)[...] = getattr(working, name)

    def _commit(self, state: State) -> None:
        """Make this the state; buffers share its memory."""
        self.__dict__["_state"] = state
        self.__dict__["_compiled"] = None
        self.__dict__["_ready"] = None
        for name, tensor in state.tensors().items():
            self._buffers[name] = tensor
        made = state.programme
        if (
            made is not None
            and len(made.axes) == 1
            and made.layout.names == (made.axes[0].key[1],)
            and made.layout.names == ("group",)
            and not made.layout.soft
            and not made.layout.continuous
            and not made.rows.numbers
            and made.plan.stays
            and not made.needs_targets
            and not (made.plan.nonnegative and not self.bounds[0] >= 0)
        ):
            codes = np.array(made.axes[0].codes, np.int64)
            table = np.full(TABLE, -1, np.int64)
            small = codes[codes < TABLE]
            table[small] = np.arange(len(small))
            settings = [self._settings_for(torch.float64), self._settings_for(torch.float32)]
            self.__dict__["_ready"] = (tuple(made.arrays()), table, codes, settings)
            self.__dict__["_compiled"] = kernels()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OnlineParity:
        """The state stays in float64 on the CPU, whatever the module is converted or moved to."""
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take over a state of whatever sizes."""
        names = (*ARRAYS, "layout")
        missing = [prefix + name for name in names if prefix + name not in state_dict]
        missing_keys.extend(missing)
        if strict:
            known = {prefix + name for name in names}
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k not in known)
        if missing:
            return
        try:
            text = bytes(state_dict[prefix + "layout"].cpu().to(torch.uint8).tolist()).decode()
            made = programme(self.constraints, Layout.from_json(text)) if text else None
            values = {name: state_dict[prefix + name] for name in ARRAYS}
            state = State.restored(made, values)
        except (ProblemError, UnicodeDecodeError) as error:
            error_msgs.append(str(error))
            return
        with self._lock:
            self._commit(state)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            left_out = ("_lock", "_ready", "_compiled", "_state", "_buffers")
            kept = {name: value for name, value in self.__dict__.items() if name not in left_out}
            arrays = {name: array.copy() for name, array in self._state.arrays().items()}
            made = self._state.programme
            return kept | {
                "_saved": (None if made is None else made.layout.to_json(), arrays),
                "_buffers": {},
            }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        layout, arrays = saved.pop("_saved")
        self.__dict__.update(saved)
        self._lock = threading.RLock()
        made = None if layout is None else programme(self.constraints, Layout.from_json(layout))
        self._commit(State.restored(made, arrays))

    def extra_repr(self) -> str:
        notions = ", ".join(map(repr, self.constraints))
        return f"{notions}, bounds={self.bounds}, feedback={self.feedback!r}"


def numbers(bounds: tuple[float | None, float | None] | None) -> tuple[float, float]:
    """Both bounds as numbers, infinite for none."""
    ends = []
    for value, none in zip(both(bounds), (-math.inf, math.inf), strict=True):
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ProblemError(
                    "bounds: expected numbers for a stream, got a tensor of shape "
                    f"{tuple(value.shape)}; bounds that differ between samples are not supported"
                )
            value = float(value.detach())
        ends.append(none if value is None else float(value))
    check_bounds(
        torch.tensor(ends[0], dtype=torch.float64), torch.tensor(ends[1], dtype=torch.float64),
        torch.float64,
    )  # fmt: skip
    return ends[0], ends[1]


def described(notion: Constraint) -> str:
    """A notion with the present values of its parameters."""

    def plain(value: object) -> object:
        if isinstance(value, (tuple, list)):
            return tuple(plain(part) for part in value)
        return float(value.detach()) if isinstance(value, Tensor) and value.numel() == 1 else value

    values = [f"{each.name}={plain(getattr(notion, each.name))!r}" for each in fields(notion)]
    return f"{type(notion).__name__}({', '.join(values)})"
