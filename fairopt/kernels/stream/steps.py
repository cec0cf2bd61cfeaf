# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The pooled feedback, batch after batch; its letters and its proofs are in ``docs/streaming.md``.

Records travel between compiled functions at no cost. From Python they come as plain tuples, because
Numba takes 2 us to read a named one.
"""

from __future__ import annotations

import math

import numpy as np

from fairopt.kernels.compilation import compiled
from fairopt.kernels.stream.projection import project, workspace
from fairopt.kernels.stream.rows import (
    close_batch,
    empty_rows,
    loadings,
    open_batch,
    variances,
    widen,
)
from fairopt.kernels.stream_records import (
    AWAY,
    EACH_V,
    FEATURES,
    GREATEST,
    LEAST,
    MASS,
    MEMORY,
    MULTIPLIER,
    OF,
    OF_V,
    OF_V_V,
    PENDING,
    SAMPLES,
    SEEN,
    TARGETS,
    Arrays,
    Problem,
    Room,
    Samples,
    Settings,
    Statistics,
)
from fairopt.tolerances import MOST


@compiled(inline="always")
def prices(state, others, settings, room, count, width, mean_weight):
    """Sides with their margins, prices, and what the memory moves: the pooled feedback's numbers.

    Each row has two prices: number r is that beyond its aim, number m + r that beyond its sides.

    Args:
        room: its problem and dual are written.
        count: samples, also those of other workers, the batch included.
    """
    now, found, variance, y = room.now, room.rows, room.variance, room.dual
    C = found.C
    base, l, u = room.problem.base, room.problem.l, room.problem.u
    kappa, offset = room.problem.kappa, room.problem.offset
    m = len(C)
    step = settings.step * count / (count + settings.early)
    for r in range(m):
        base[r] = found.value[r]
        base[m + r] = base[r]
        y[r], y[m + r] = 0.0, 0.0
        offset[r], offset[m + r] = 0.0, 0.0
        l[r], u[r] = found.lower[r], found.upper[r]
        l[m + r], u[m + r] = l[r], u[r]
        kappa[r], kappa[m + r] = 0.0, 0.0
        if found.here[r] == 0.0:
            continue
        # The variance of the value that chance leaves: of all samples, were none moved, over what
        # the multiplier takes away; and of those whose targets nobody can have answered to.
        noise = 0.0
        late = 0.0
        unknown = 0.0
        for k in range(C.shape[2]):
            a = C[r, 0, k]
            each = a * a * now[MASS, k]
            for f in range(1, C.shape[1]):
                c = C[r, f, k]
                base_f = FEATURES + EACH_V * (f - 1)
                each += c * c * now[base_f + OF_V_V, k] + 2.0 * a * c * now[base_f + OF_V, k]
            if each > 0.0:
                awaited = state.pending[0, MASS, k]
                if others is not None:
                    awaited -= others[MASS, k] - others[now.shape[0] + MASS, k]
                share = room.awaits * min(max(awaited, 0.0) / now[MASS, k], 1.0)
                noise += each * variance[k]
                late += share * each * variance[k]
                unknown += share * each
        # What is not known yet counts for nothing in how firmly the value is held.
        known = max(0.0, 1.0 - unknown / found.curvature[r])
        if known == 0.0:
            continue
        gentle = step * (known * found.counted[r]) ** (1.0 / 3.0)
        full = step * math.sqrt(known * found.counted[r])
        noise = mean_weight * (noise / (1.0 + 2.0 * gentle) + late)
        most = 0.5 * (u[r] - l[r])
        if math.isinf(most):
            most = 0.1 * width * found.reach[r]
        margin = min(settings.margin * math.sqrt(noise), most)
        l[r] += margin
        u[r] = max(u[r] - margin, l[r])
        kappa[r] = gentle / found.curvature[r]
        kappa[m + r] = full / found.curvature[r]
        offset[r] = state.rows[r, MEMORY] / gentle
        y[r] = state.rows[r, MULTIPLIER] / found.curvature[r]


@compiled(inline="always")
def remember(rows, settings, room, width):
    """Multipliers after a batch, and the memory, which follows them."""
    found, kappa, y = room.rows, room.problem.kappa, room.dual
    m = len(rows)
    for r in range(m):
        if found.here[r] == 0.0:
            continue
        rows[r, MULTIPLIER] = (y[r] + y[m + r]) * found.curvature[r]
        root = math.sqrt(found.counted[r])
        time = settings.forget * settings.step * max(0.0, root - rows[r, SEEN])
        if y[m + r] != 0.0:
            time *= settings.haste
        memory = rows[r, MEMORY]
        # The identity: by how much the value can be beyond its sides.
        both = (kappa[r] + kappa[m + r]) * found.curvature[r]
        rows[r, AWAY] = (rows[r, MULTIPLIER] - memory) / both if both > 0.0 else math.inf
        memory += (1.0 - math.exp(-time)) * (rows[r, MULTIPLIER] - memory)
        most = width * found.reach[r]
        rows[r, MEMORY] = min(max(memory, -most), most)
        rows[r, SEEN] = max(rows[r, SEEN], root)


@compiled()
def positions(scores, codes, table, sorted_codes, cell):
    """Write the place of each code among the known ones; whether all can be served.

    Args:
        table: int64, the place of each code below its length, -1 for unknown ones.
        sorted_codes: the known codes, increasing, for those beyond.
        cell: int64 ``(n,)``, written.
    """
    for i in range(len(scores)):
        if not abs(scores[i]) <= MOST:
            return False
        code = np.int64(codes[i])
        if 0 <= code < len(table):
            cell[i] = table[code]
        else:
            place = np.searchsorted(sorted_codes, code)
            known = place < len(sorted_codes) and sorted_codes[place] == code
            cell[i] = place if known else -1
        if cell[i] < 0:
            return False
    return True


@compiled()
def stream(samples, state, arrays, settings, size, single, out):
    """The pooled feedback over all samples in turn, ``size`` at a time; the state is updated.

    Args:
        samples, state, arrays, settings: ``Samples``, ``Statistics``, ``Arrays`` and ``Settings``,
            or tuples of the same.
        single: whether predictions are rounded to float32.
        out: float64 ``(n,)``, written.
    """
    samples, state, arrays = Samples(*samples), Statistics(*state), Arrays(*arrays)
    serve(samples, state, arrays, Settings(*settings), size, single, out)


@compiled()
def stream_codes(scores, codes, known, state, arrays, settings, size, single, out):
    """``stream`` for samples of one attribute without targets; False, and nothing, if refused.

    Args:
        codes: integers ``(n,)``.
        known: ``table`` and ``sorted_codes`` of ``positions``.
    """
    cell = np.empty(len(scores), np.int64)
    if not positions(scores, codes, known[0], known[1], cell):
        return False
    none = np.empty(0)
    samples = Samples(
        scores, cell, np.empty((0, 0)), np.ones(1), none, np.empty((len(scores), 0)), False
    )  # fmt: skip
    serve(
        samples, Statistics(*state), Arrays(*arrays), Settings(*settings), size, single, out
    )  # fmt: skip
    return True


@compiled()
def serve(samples, state, arrays, settings, size, single, out):
    """``stream``, given records."""
    m, K = len(state.rows), state.sums.shape[2]
    F = samples.v.shape[1]
    soft = len(samples.chances) > 0 or F > 0
    columns = min(size, len(samples.scores)) if soft else K
    # How much of the variance of what is awaited nobody knows: all, where targets are in a row's
    # value, as in a mean residual; at most a quarter, a chance's q (1 - q), where they only divide
    # samples into cells.
    awaits = 0.25
    for r in range(m):
        for j in range(arrays.const_factor.shape[1]):
            if arrays.const_factor[r, j] != 0.0 and arrays.const_index[r, j, OF] == TARGETS:
                awaits = 1.0
    both = np.empty((6, 2 * m))
    problem = Problem(
        samples.scores, samples.weight, samples.cell[:0] if soft else samples.cell,
        np.empty((2 * m, columns)), both[0], both[1], both[2], both[3], both[4], settings.low,
        settings.high,
    )  # fmt: skip
    room = Room(
        np.empty((state.sums.shape[1], K)), np.empty(len(arrays.sets) + 1), np.empty(K),
        empty_rows(m, F, K), problem, both[5], workspace(2 * m, columns), awaits,
    )  # fmt: skip
    steps(samples, state, state.others, arrays, settings, size, single, room, out)


@compiled(_nrt=False)
def steps(samples, state, others, arrays, settings, size, single, room, out):
    """The batches of ``stream``, in arrays that it has made.

    Without Numba's reference counts, which took as long as the feedback itself. Hence nothing that
    is inlined here may make an array, not by a slice either; and what is called from here and does
    make some says so, or it would inherit this.
    """
    n, K, C, A = len(samples.scores), state.sums.shape[2], room.rows.C, room.problem.A
    soft = len(samples.chances) > 0 or samples.v.shape[1] > 0
    m = len(C)
    for first in range(0, n, size):
        last = min(first + size, n)
        mean_weight = open_batch(
            samples, first, last, state, others, arrays, room.now, room.mass, room.rows
        )  # fmt: skip
        widen(state.extent, samples.scores, first, last)
        width = settings.range
        if not width < math.inf:
            width = state.extent[GREATEST] - state.extent[LEAST]
        variances(state.sums, others, mean_weight, room.variance)
        count = state.totals[SAMPLES] + state.totals[PENDING] + last - first
        prices(state, others, settings, room, count, width, mean_weight)
        columns = K
        if soft:
            loadings(C, samples, first, last, A)
            columns = last - first
        else:
            for r in range(m):
                for k in range(K):
                    A[r, k] = C[r, 0, k]
        for r in range(m):
            for k in range(columns):
                A[m + r, k] = A[r, k]
        project(room.problem, first, last, columns, out, room.dual, room.work)
        remember(state.rows, settings, room, width)
        close_batch(samples, first, last, state, out, single)
