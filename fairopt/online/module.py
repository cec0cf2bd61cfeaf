"""OnlineParity: predictions that arrive one or a few at a time, fair in aggregate."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fairopt import kernels
from fairopt.errors import ProblemError, whole_number
from fairopt.formulation.inputs import GroupCounts, Groups, both, check_bounds, rounded_inwards
from fairopt.formulation.specification import as_constraints
from fairopt.kernels.stream_records import AWAY, PENDING, SAMPLES, Settings
from fairopt.notions.catalogue import Constraint
from fairopt.online.counting import count_batch
from fairopt.online.feedback import MODULES, method_of
from fairopt.online.history import History, Records, check_history, stretches
from fairopt.online.layout import Layout, Programme, labelled, programme
from fairopt.online.persistence import differences, read_state, write_state
from fairopt.online.reading import Declared, UnknownGroup, read, read_predictions
from fairopt.online.report import OnlineReport, report_of
from fairopt.online.sharing import Common, Part, meeting, origin_of, parts_from, pooled, resumed
from fairopt.online.state import ARRAYS, EXTRAS, State
from fairopt.online.workers import gather
from fairopt.tolerances import MOST

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Feedback = Literal["pooled", "batch", "hard"]

FAST = (torch.float32, torch.float64)
CODES = (torch.int64, torch.int32, torch.uint8, torch.bool)
TABLE = 64


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
            ``"batch"`` is that of the paper, which bounds gaps within batches.
        step_size: a pure number. For ``"pooled"``, how strongly a row that counts n samples pulls:
            once thousands have been served and the stream has settled, a violation is cut by more
            than 1 + step_size * sqrt(n); for ``"batch"``, the paper's eta_0. The default is 1.0 for
            ``"pooled"`` and 0.01 for ``"batch"``.
        warm_up: for ``"hard"``, how many samples are served by ``"pooled"`` first.
        group_counts: as for ``formulate``; groups beyond them are added when they come.
        unknown_group: ``"add"``, or ``"raise"`` to refuse groups beyond those declared.
        history: how many moments of the stream to keep at most, for ``history``; ``None`` for none.

    The state is a few numbers per cell (group, outcome, bin) and per row, in float64 whatever the
    module is converted to, and on the CPU. ``state_dict`` has it, and changes its sizes when groups
    are first seen.

    Safe to call from several threads: calls take turns. Outputs carry no gradient.

    Raises:
        ProblemError: an argument is outside what is said above.
    """

    _state: State
    _common: Common
    _origin: str
    _records: Records | None
    _ready: Any

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
        history: int | None = None,
    ) -> None:
        super().__init__()
        if feedback not in MODULES:
            raise ProblemError(f"feedback: expected 'pooled', 'batch' or 'hard', got {feedback!r}")
        if unknown_group not in ("add", "raise"):
            raise ProblemError(f"unknown_group: expected 'add' or 'raise', got {unknown_group!r}")
        method = method_of(feedback)
        step = method.default_step if step_size is None else step_size
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 < step < math.inf:
            raise ProblemError(f"step_size: expected a finite number above 0, got {step_size!r}")
        whole_number("warm_up", warm_up, 0)
        if warm_up and not method.warms_up:
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
        self._moments = check_history(history)
        self._method = method(self.step_size, warm_up)
        self._settings: dict[torch.dtype, Settings] = {}
        self._lock = threading.RLock()
        self._meeting = threading.Lock()
        self._begin(State(), Common(), records=b"")

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
        whole_number("batch_size", batch_size, 1)
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
            known = self._state.programme
            if known is None or not known.needs_targets:
                raise ProblemError(
                    "observe: expected a stream that awaits targets, got one that "
                    + ("has served nothing" if known is None else "needs none")
                )
            if targets is None:
                raise ProblemError("targets: expected a tensor, got None")
            how = self._declared()
            made, forecast = read(how, known, scores, groups, None, weights)
            _, actual = read(how, known, scores, groups, targets, weights)
            served = read(how, known, predictions, groups, targets, weights)[1].scores
            n, awaited = len(served), int(self._state.totals[PENDING])
            if n > awaited or len(actual.scores) != n:
                raise ProblemError(
                    f"observe: expected at most {awaited} samples, as many as await targets, got "
                    f"{n}; each sample is observed once, and only if it was served without targets"
                )
            if made.layout != known.layout:
                raise ProblemError(
                    "observe: expected groups of samples that were served, got new ones"
                )
            state = self._state.copy()
            compiled = kernels.stream
            compiled.accumulate(state.pending, state.counts, 0.0, -1.0, forecast, served, 0, n)
            compiled.accumulate(state.sums, state.counts, 1.0, 1.0, actual, served, 0, n)
            compiled.replace_forecast(state.sums, actual, forecast.y)
            state.totals[SAMPLES] += n
            state.totals[PENDING] -= n
            if state.totals[PENDING] == 0:
                state.pending[...] = 0.0
            state.rows[:, AWAY] = math.inf
            self._commit(state)

    def count(
        self,
        predictions: Tensor,
        groups: Groups,
        targets: Tensor | None = None,
        *,
        scores: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Predictions that were served elsewhere: from now on they are pooled with all others.

        They count as they are; ``report()`` has them, and the feedback makes up for their excess.
        The pooled memory does not learn from them, the multiplier of ``"batch"`` does, and what
        ``report()`` says in ``bound`` is infinite until the next batch that the stream serves.

        Args:
            predictions: ``(n,)`` or ``(n, 1)``, or ``(B, n)`` for B batches of n, as served; they
                need not be within the bounds.
            targets: as for a call; where they are ``None``, forecasts stand for them.
            scores: what the predictions were served for, in the same shape. Needed where notions
                have bins of scores, and where forecasts stand for targets.

        Raises:
            ProblemError: the input is refused; the state is as before.
        """
        with self._lock:
            given = predictions if scores is None else scores
            if scores is None:
                read_predictions(predictions, predictions)  # its errors name the right argument
            made, samples = read(
                self._declared(), self._state.programme, given, groups, targets, weights,
                several=True,
            )  # fmt: skip
            x = read_predictions(predictions, given)
            if scores is None and (samples.expected or made.plan.scores):
                raise ProblemError(
                    "scores: expected those that the predictions were served for, got none; "
                    + ("forecasts stand for targets, " if samples.expected else "bins of scores, ")
                    + "and they are read from the scores"
                )
            self._check(made, samples.expected)
            working, arrays = self._working(made), made.arrays()
            size = len(x) if given.dim() == 1 or given.shape[1] == 1 else given.shape[1]
            records = None if self._records is None else self._records.copy()
            for first in range(0, len(x), size):
                part = samples.part(first, first + size)
                count_batch(working, part, x[first : first + size], arrays, self._method)
                if records is not None:
                    records.take(working)
            self._keep(working, records)

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
            if targets is None and weights is None and update:
                fast = self._fast(scores, groups, batch_size)
                if fast is not None:
                    return fast
            made, samples = read(
                self._declared(), self._state.programme, scores, groups, targets, weights
            )
            self._check(made, samples.expected)
            working = self._working(made)
            size = len(samples.scores) if batch_size is None else batch_size
            kept = self._records if update else None
            records = None if kept is None else kept.copy()
            x = self._method.serve(
                working, samples, made.arrays(), self._settings_for(scores.dtype), size,
                scores.dtype, records,
            )  # fmt: skip
            if update:
                self._keep(working, records)
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
        known, statistics, arrays, settings = ready
        single = scores.dtype == torch.float32
        # Contiguous: for other layouts Numba would compile everything once more.
        values = np.ascontiguousarray(scores.detach().numpy(), np.float64)
        codes = np.ascontiguousarray(groups.numpy())
        serve, out = kernels.stream.stream_codes, np.empty(len(values))
        records, size = self._records, batch_size or len(values)
        fixed = (known, statistics, arrays, settings[single], size, single)
        if records is None:
            if not serve(values, codes, *fixed, out):
                return None  # a new group, or something to refuse: the long way says which
        elif not kernels.stream.positions(values, codes, *known, np.empty(len(out), np.int64)):
            return None
        else:
            for at in stretches(records, self._state, len(values), size):
                serve(values[at], codes[at], *fixed, out[at])
        return torch.from_numpy(out.astype(np.float32) if single else out)

    def _check(self, made: Programme, expected: bool) -> None:
        """Raise where the notions do not fit to bounds or feedback."""
        lower = self.bounds[0]
        if made.plan.nonnegative and not lower >= 0:
            raise ProblemError(
                f"bounds: {', '.join(made.plan.nonnegative)} needs a lower bound of at least 0, "
                f"got {lower}; a ratio of means says nothing where they can be negative"
            )
        self._method.check(made, expected)

    # -----------------------------------------------------------------------------------------
    # The state
    # -----------------------------------------------------------------------------------------

    def report(self, labels: Mapping[str, Sequence[str]] | None = None) -> OnlineReport:
        """Samples, groups, pooled rows, multipliers and bounds, from the sums.

        Args:
            labels: what to call the groups: for an attribute the labels of codes 0, 1, ...; codes
                beyond them, and attributes left out, keep their numbers.
        """
        with self._lock:
            made = self._state.programme
            state = self._state
            if labels and made is not None:
                state = state.copy()
                state.programme = labelled(made, labels)
            return report_of(state, self.feedback, self._method)

    @property
    def history(self) -> History | None:
        """How the stream went, the present last; ``None`` unless it was made with ``history``.

        What this stream itself recorded: ``merge`` and ``synchronize`` bring no history of others,
        and after them the samples rise by what the others served.
        """
        with self._lock:
            return None if self._records is None else self._records.history(self._state)

    def reset(self) -> None:
        """Forget everything; also what other workers know, until the next ``synchronize``."""
        with self._meeting:
            self._begin(State(), Common(), records=b"")

    def merge(self, other: OnlineParity) -> None:
        """Add what a replica served; exact in counts and sums. ``other`` stays as it is.

        What both know from a ``synchronize`` counts once. Multipliers have no exact sum: they
        become means, weighted by the samples of each.

        Raises:
            ProblemError: the configurations or the attributes differ, or something would count
                twice: both were loaded from one state, or synchronised at different times.
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
        theirs = other._part("the other")
        with self._meeting, self._lock:
            mine = self._part("this stream")
            state, common = pooled("merge", self.constraints, (mine, theirs))
            self._begin(state, common, mine.origin or theirs.origin)

    def synchronize(self, process_group: ProcessGroup | None = None) -> None:
        """Share one state with all workers of a ``torch.distributed`` process group. Collective.

        Every worker of the group must call it, and the same number of times. What each has served
        since the last time is added up: afterwards all have the same state, bit for bit, exact in
        counts and sums, with the groups that any of them has seen and the multipliers as means,
        weighted by the samples of each. A worker that begins empty joins in. Meanwhile other
        threads may go on serving; what they serve counts the next time.

        Between two calls a worker steers by its share: an equal part of what all knew, and what
        it serves itself. docs/streaming.md says what that guarantees.

        Args:
            process_group: its workers; ``None`` for all. The same one each time.

        Raises:
            ProblemError: on every worker alike, and all states are as before: configurations or
                attributes differ, or something would count twice. On this one alone: there is no
                process group.
            RuntimeError: from torch, where a worker is gone; the state is as before.
        """
        with self._meeting:
            mine = self._part("")
            found = gather(mine.to_bytes(self.configuration()), process_group)
            common = meeting(self.constraints, parts_from(self.constraints, found))
            with self._lock:
                state = resumed(self.constraints, common.state, mine.state, self._state)
                self._begin(state, common)

    def save(self, path: str | os.PathLike[str], *, notes: Mapping[str, Any] | None = None) -> None:
        """Write state and configuration to a file, which appears whole or not at all.

        Args:
            notes: anything that JSON can hold, kept with the state: how far an input was read, say,
                so that both are of one moment. ``load`` returns it.

        Raises:
            ProblemError: JSON cannot hold the notes.
            OSError: it cannot be written; what was there before is still there.
        """
        with self._lock:
            state, extras = self._state.copy(), self._extras()
        write_state(path, state, self.configuration(), extras, notes)

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Go on from a file that ``save`` wrote; the state is replaced.

        Returns:
            The notes that were saved with it.

        Raises:
            ProblemError: the file is torn or none of ours, or was saved under another
                configuration; the message says what differs, and the state is as before.
            OSError: it cannot be read.
        """
        configuration, layout, arrays, notes = read_state(path)
        different = differences(self.configuration(), configuration)
        if different:
            raise ProblemError(
                f"{path}: expected a stream of this configuration, got another: "
                + "; ".join(different)
                + "; make an OnlineParity like the one that was saved"
            )
        self._resume(layout, arrays)
        return notes

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

    def _settings_for(self, dtype: torch.dtype) -> Settings:
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
            found = self._method.settings(low, high)
            self._settings[dtype] = found
        return found

    def _part(self, name: str) -> Part:
        """What this stream brings to a meeting."""
        with self._lock:
            return Part(name, self._state.copy(), self._common, self._origin)

    def _extras(self) -> dict[str, np.ndarray]:
        """What is saved beside the state, as bytes."""
        history = b"" if self._records is None else self._records.to_bytes()
        found = {"common": self._common.to_bytes(), "history": history}
        return {name: np.frombuffer(each, np.uint8) for name, each in found.items() if each}

    def _resume(self, layout: str, arrays: Mapping[str, Any], origin: str = "") -> None:
        """Go on from what was saved.

        Raises:
            ProblemError: it is none of a stream with these constraints.
        """
        made = programme(self.constraints, Layout.from_json(layout)) if layout else None
        state = State.restored(made, arrays)
        extras = {name: bytes_of(arrays[name]) if name in arrays else b"" for name in EXTRAS}
        common = Common.from_bytes(self.constraints, extras["common"])
        origin = origin or origin_of(state, common)
        with self._meeting:
            self._begin(state, common, origin, records=extras["history"])

    def _begin(
        self, state: State, common: Common, origin: str = "", records: bytes | None = None
    ) -> None:
        """Make this the state, of which other workers know what is common.

        Args:
            records: the history from here on, as bytes; ``None`` for what there is.

        Raises:
            ProblemError: the bytes are no history.
        """
        new = None
        if self._moments is not None and records is not None:
            new = Records.from_bytes(self._moments, records)
        common.divide(state)
        with self._lock:
            self._common, self._origin = common, origin
            if records is not None:
                self._records = new
            self._commit(state)

    def _declared(self) -> Declared:
        return Declared(self.constraints, self.group_counts, self.unknown_group)

    def _working(self, made: Programme) -> State:
        """A copy of the state, with room for the groups of a programme."""
        state = self._state
        return state.copy() if made is state.programme else state.moved(made)

    def _keep(self, working: State, records: Records | None) -> None:
        """Make this the state, in place where the programme is the same, and these the records."""
        if working.programme is self._state.programme:
            for name in ARRAYS:
                getattr(self._state, name)[...] = getattr(working, name)
        else:
            self._commit(working)
        self._records = records

    def _commit(self, state: State) -> None:
        """Make this the state; buffers share its memory."""
        self.__dict__["_state"] = state
        self.__dict__["_ready"] = None
        for name, tensor in state.tensors().items():
            self._buffers[name] = tensor
        made = state.programme
        if (
            made is not None
            and self._method.fast
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
            settings = [tuple(self._settings_for(d)) for d in (torch.float64, torch.float32)]
            self.__dict__["_ready"] = (
                (table, codes), tuple(state.statistics()), tuple(made.arrays()), settings,
            )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OnlineParity:
        """The state stays in float64 on the CPU, whatever the module is converted or moved to."""
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """The buffers, and what is saved beside them."""
        with self._lock:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            for name, each in self._extras().items():
                destination[prefix + name] = torch.from_numpy(each.copy())

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
            known = {prefix + name for name in (*names, *EXTRAS)}
            unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k not in known)
        if missing:
            return
        try:
            found = (*ARRAYS, *(name for name in EXTRAS if prefix + name in state_dict))
            layout = bytes_of(state_dict[prefix + "layout"]).decode()
            self._resume(layout, {name: state_dict[prefix + name] for name in found})
        except (ProblemError, UnicodeDecodeError) as error:
            error_msgs.append(str(error))

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            left_out = (
                "_lock", "_meeting", "_ready", "_state", "_common", "_records",
                "_buffers", "_method", "_settings",
            )  # fmt: skip
            kept = {name: value for name, value in self.__dict__.items() if name not in left_out}
            arrays = {name: array.copy() for name, array in self._state.arrays().items()}
            layout = bytes(self._state.layout_bytes()).decode()
            return kept | {"_saved": (layout, arrays | self._extras()), "_buffers": {}}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        layout, arrays = saved.pop("_saved")
        self.__dict__.update(saved)
        self._method = method_of(self.feedback)(self.step_size, self.warm_up)
        self._settings = {}
        self._lock, self._meeting = threading.RLock(), threading.Lock()
        self._resume(layout, arrays, self._origin)

    def extra_repr(self) -> str:
        notions = ", ".join(map(repr, self.constraints))
        return f"{notions}, bounds={self.bounds}, feedback={self.feedback!r}"


def bytes_of(array: Any) -> bytes:
    """The bytes of a tensor or an array of them."""
    plain = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    return plain.astype(np.uint8).tobytes()


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
    for end in ends:
        if MOST < abs(end) < math.inf:
            raise ProblemError(
                f"bounds: expected magnitudes of at most {MOST:g}, or None for none, got {end:g}"
            )
    return ends[0], ends[1]


def described(notion: Constraint) -> str:
    """A notion with the present values of its parameters."""

    def plain(value: object) -> object:
        if isinstance(value, (tuple, list)):
            return tuple(plain(part) for part in value)
        return float(value.detach()) if isinstance(value, Tensor) and value.numel() == 1 else value

    values = [f"{each.name}={plain(getattr(notion, each.name))!r}" for each in fields(notion)]
    return f"{type(notion).__name__}({', '.join(values)})"
