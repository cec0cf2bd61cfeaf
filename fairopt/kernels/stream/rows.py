# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The rows of a stream at given sums: coefficients, sides and values, before and after a batch."""

from __future__ import annotations

import math

import numpy as np

from fairopt.kernels.compilation import compiled
from fairopt.kernels.stream.sums import accumulate, combined
from fairopt.kernels.stream_records import (
    AGAIN,
    BATCHES,
    EACH_V,
    FEATURES,
    FORECAST,
    GREATEST,
    INSIDE,
    LEAST,
    MASS,
    OF,
    OF_V,
    OF_V_V,
    OF_V_X,
    OVER,
    PENDING,
    PER,
    SAMPLES,
    SHARE,
    SQUARE,
    TARGETS,
    VALUE,
    Rows,
)


@compiled(_nrt=True)
def empty_rows(m, features, cells):
    """Room for ``evaluate`` and ``values``, each array of its own."""
    found = np.empty((8, m))
    return Rows(
        np.empty((m, 1 + features, cells)), found[0], found[1], found[2], found[3], found[4],
        found[5], found[6], found[7],
    )  # fmt: skip


@compiled(inline="always")
def evaluate(now, arrays, mean_weight, mass, found):
    """All of ``Rows`` but the values, from the masses.

    Args:
        now: ``(Q, K)`` sums as doubles.
        arrays: ``Arrays``.
        mean_weight: mass per sample.
        mass: ``(S + 1,)``, overwritten.
        found: ``Rows``, written.
    """
    sets, index, factor = arrays.sets, arrays.linear_index, arrays.factor
    const_index, const_factor = arrays.const_index, arrays.const_factor
    C = found.C
    S, K = sets.shape
    mass[S] = 1.0
    for j in range(S):
        total = 0.0
        for k in range(K):
            total += sets[j, k] * now[MASS, k]
        mass[j] = total
    for r in range(len(C)):
        here = True
        for j in range(arrays.needs.shape[1]):
            here = here and (arrays.needs[r, j] == S or mass[arrays.needs[r, j]] > 0.0)
        for f in range(C.shape[1]):
            for k in range(K):
                C[r, f, k] = 0.0
        found.here[r] = 1.0 if here else 0.0
        if not here:
            continue
        smallest = math.inf
        features = False
        for j in range(factor.shape[1]):
            if factor[r, j] == 0.0:
                continue
            inside = index[r, j, INSIDE]
            scale = factor[r, j] / mass[index[r, j, PER]]
            scale *= mass[index[r, j, SHARE]] / mass[index[r, j, AGAIN]]
            f = index[r, j, OF]
            center = 0.0
            if index[r, j, OVER] >= 0:
                over = index[r, j, OVER]
                for k in range(K):
                    center += sets[over, k] * now[FEATURES + EACH_V * (f - 1) + OF_V, k]
                center /= mass[over]
            for k in range(K):
                C[r, f, k] += scale * sets[inside, k]
                if center != 0.0:
                    C[r, 0, k] -= center * scale * sets[inside, k]
            if f > 0:
                features = True
                smallest = min(smallest, mass[inside])
        constant = 0.0
        for j in range(const_factor.shape[1]):
            if const_factor[r, j] == 0.0:
                continue
            total = 0.0
            for k in range(K):
                total += sets[const_index[r, j, INSIDE], k] * now[const_index[r, j, OF], k]
            scale = const_factor[r, j] / mass[const_index[r, j, PER]]
            scale *= mass[const_index[r, j, SHARE]] / mass[const_index[r, j, AGAIN]]
            constant += scale * total
        curvature = 0.0
        size = 0.0
        for k in range(K):
            a = C[r, 0, k]
            curvature += a * a * now[MASS, k]
            size += abs(a) * now[MASS, k]
            for f in range(1, C.shape[1]):
                c = C[r, f, k]
                base = FEATURES + EACH_V * (f - 1)
                curvature += c * c * now[base + OF_V_V, k] + 2.0 * a * c * now[base + OF_V, k]
        found.constant[r] = constant
        found.lower[r] = arrays.sides[r, 0]
        found.upper[r] = arrays.sides[r, 1]
        found.curvature[r] = max(curvature, 0.0)
        mass_count = 0.0
        found.reach[r] = 0.5 * size
        if features:
            mass_count = smallest / 4.0
            everything = 0.0
            for k in range(K):
                everything += now[MASS, k]
            found.reach[r] = 0.5 * math.sqrt(max(curvature, 0.0) * everything)
        elif curvature > 0.0:
            mass_count = size * size / (4.0 * curvature)
        found.counted[r] = mass_count / mean_weight
        # A row in which nothing has weight yet asks nothing.
        if not curvature > 0.0 or not mass_count > 0.0:
            found.here[r] = 0.0


@compiled(inline="always")
def values(now, found):
    """The value of each row, from the sums of the predictions."""
    C = found.C
    for r in range(len(C)):
        total = 0.0
        if found.here[r] > 0.0:
            total = found.constant[r]
            for k in range(C.shape[2]):
                total += C[r, 0, k] * now[VALUE, k]
                for f in range(1, C.shape[1]):
                    total += C[r, f, k] * now[FEATURES + EACH_V * (f - 1) + OF_V_X, k]
        found.value[r] = total


@compiled(inline="always")
def variances(sums, others, mean_weight, variance):
    """Variance of predictions (residuals, where there are targets) within each cell.

    A cell of few samples says little of its own: each counts two more, of the mean variance.
    """
    Q = sums.shape[1]
    total = 0.0
    mass = 0.0
    for k in range(sums.shape[2]):
        w = sums[0, MASS, k]
        d = sums[0, VALUE, k] - sums[0, TARGETS, k]
        square = sums[0, SQUARE, k]
        if others is not None:
            w = max(0.0, w - others[Q + MASS, k])
            d -= others[Q + VALUE, k] - others[Q + TARGETS, k]
            square -= others[Q + SQUARE, k]
        variance[k] = 0.0
        if w > 0.0:
            variance[k] = max(0.0, square - d * d / w)
            total += variance[k]
            mass += w
    few = 2.0 * mean_weight
    mean = total / mass if mass > 0.0 else 0.0
    for k in range(sums.shape[2]):
        w = sums[0, MASS, k]
        if others is not None:
            w = max(0.0, w - others[Q + MASS, k])
        variance[k] = (variance[k] + few * mean) / (w + few)


@compiled(inline="always")
def open_batch(samples, first, last, state, others, arrays, now, mass, found):
    """What is known of the pooled rows before samples first <= i < last have their predictions.

    Their masses, targets and attributes count already, their predictions do not: the value of row
    r will be found.value[r] + sum over the batch of w_i a_ri x_i.

    Args:
        others: those of ``state``, apart, so that without any nothing is compiled for them.
        now, mass, found: as for ``evaluate``, written.

    Returns:
        The mean weight of a sample.
    """
    cell, chances, weight, y, v = (
        samples.cell, samples.chances, samples.weight, samples.y, samples.v,
    )  # fmt: skip
    K, F = now.shape[1], v.shape[1]
    combined(state.sums, state.pending, now)
    elsewhere = 0.0
    if others is not None:
        elsewhere = others[len(others) - 1, 0]
        for q in range(len(now)):
            for k in range(K):
                now[q, k] -= others[q, k]
    for i in range(first, last):
        w = weight[i] if len(weight) > 1 else weight[0]
        for k in range(K) if len(chances) > 0 else range(cell[i], cell[i] + 1):
            each = w * chances[i, k] if len(chances) > 0 else w
            now[MASS, k] += each
            if len(y) > 0:
                # now[FORECAST] is the mean error of forecasts so far; see combined.
                now[TARGETS, k] += each * (y[i] + now[FORECAST, k] if samples.expected else y[i])
            for f in range(F):
                base = FEATURES + EACH_V * f
                now[base + OF_V, k] += each * v[i, f]
                now[base + OF_V_V, k] += each * v[i, f] * v[i, f]
    everything = 0.0
    for k in range(K):
        everything += now[MASS, k]
    served = state.totals[SAMPLES] + state.totals[PENDING]
    mean_weight = everything / (served - elsewhere + last - first)
    if not mean_weight > 0.0:
        mean_weight = 1.0
    evaluate(now, arrays, mean_weight, mass, found)
    values(now, found)
    return mean_weight


@compiled()
def loadings(C, samples, first, last, A):
    """The coefficient of each sample in each row, without its weight: A ``(m, size)``."""
    K, chances = C.shape[2], samples.chances
    for i in range(first, last):
        cell = samples.cell[i]
        for r in range(len(C)):
            a = 0.0
            for k in range(K) if len(chances) > 0 else range(cell, cell + 1):
                c = C[r, 0, k]
                for f in range(1, C.shape[1]):
                    c += C[r, f, k] * samples.v[i, f - 1]
                a += c * (chances[i, k] if len(chances) > 0 else 1.0)
            A[r, i - first] = a


@compiled(inline="always")
def close_batch(samples, first, last, state, x, single):
    """Count samples first <= i < last with their predictions, rounded to float32 if ``single``."""
    if single:
        for i in range(first, last):
            x[i] = np.float64(np.float32(x[i]))
    expected = samples.expected
    target = state.pending if expected else state.sums
    accumulate(target, state.counts, 0.0 if expected else 1.0, 1.0, samples, x, first, last)
    state.totals[PENDING if expected else SAMPLES] += last - first
    state.totals[BATCHES] += 1


@compiled(inline="always")
def widen(extent, scores, first, last):
    """Let the extent reach as far as some scores."""
    for i in range(first, last):
        extent[LEAST] = min(extent[LEAST], scores[i])
        extent[GREATEST] = max(extent[GREATEST], scores[i])
