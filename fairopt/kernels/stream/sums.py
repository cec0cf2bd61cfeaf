# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""The sums of a stream per cell, in pairs of doubles, as ``stream_records`` lists them.

Fast-math stays off everywhere: it would undo the compensated sums.
"""

from __future__ import annotations

from fairopt.kernels.compilation import compiled
from fairopt.kernels.stream_records import (
    EACH_V,
    FEATURES,
    FORECAST,
    MASS,
    OF_V,
    OF_V_V,
    OF_V_X,
    SQUARE,
    TARGETS,
    VALUE,
)


@compiled()
def two_sum(high, low, value):
    """(high + low) + value as two doubles; Knuth's exact addition, renormalised."""
    total = high + value
    part = total - high
    error = (high - (total - part)) + (value - part)
    low = low + error
    result = total + low
    return result, low - (result - total)


@compiled()
def two_product(a, b):
    """a * b as two doubles, exact barring overflow: Dekker's product with Veltkamp's splitting."""
    p = a * b
    c = 134217729.0 * a
    ah = c - (c - a)
    al = a - ah
    d = 134217729.0 * b
    bh = d - (d - b)
    bl = b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


@compiled()
def add(sums, q, k, value):
    high, low = two_sum(sums[0, q, k], sums[1, q, k], value)
    sums[0, q, k] = high
    sums[1, q, k] = low


@compiled()
def add_product(sums, q, k, a, b):
    """Add a * b without rounding it first."""
    if a == 1.0:
        add(sums, q, k, b)
        return
    p, e = two_product(a, b)
    add(sums, q, k, p)
    if e != 0.0:
        add(sums, q, k, e)


@compiled(inline="always")
def accumulate(sums, counts, count, sign, samples, x, first, last):
    """Add samples first <= i < last, served x, to the sums, or with sign -1 take them away.

    Args:
        counts: int64 ``(K,)``; ``count`` is what each sample adds to its cell.
    """
    cell, chances, weight, y, v = (
        samples.cell, samples.chances, samples.weight, samples.y, samples.v,
    )  # fmt: skip
    soft = len(chances) > 0
    for i in range(first, last):
        w = sign * (weight[i] if len(weight) > 1 else weight[0])
        target = y[i] if len(y) > 0 else 0.0
        residual = x[i] - target
        for k in range(sums.shape[2]) if soft else range(cell[i], cell[i] + 1):
            each = w * chances[i, k] if soft else w
            if each == 0.0:
                continue
            add(sums, MASS, k, each)
            add_product(sums, VALUE, k, each, x[i])
            add(sums, SQUARE, k, each * residual * residual)
            if len(y) > 0:
                add_product(sums, TARGETS, k, each, target)
                add_product(sums, FORECAST, k, each, target)
            for f in range(v.shape[1]):
                base = FEATURES + EACH_V * f
                add_product(sums, base + OF_V, k, each, v[i, f])
                add(sums, base + OF_V_X, k, each * v[i, f] * x[i])
                add(sums, base + OF_V_V, k, each * v[i, f] * v[i, f])
        if not soft:
            counts[cell[i]] += int(count)


@compiled()
def replace_forecast(sums, samples, forecast):
    """Samples that were just added with their targets had been forecast to have others."""
    for i in range(len(samples.y)):
        w = samples.weight[i] if len(samples.weight) > 1 else samples.weight[0]
        soft, cell = len(samples.chances) > 0, samples.cell[i]
        for k in range(sums.shape[2]) if soft else range(cell, cell + 1):
            each = w * samples.chances[i, k] if soft else w
            if each != 0.0:
                add_product(sums, FORECAST, k, -each, samples.y[i])
                add_product(sums, FORECAST, k, each, forecast[i])


@compiled()
def merge_sums(into, other, where):
    """Add other's sums to ``into``, cell k to cell where[k]."""
    for q in range(other.shape[1]):
        for k in range(other.shape[2]):
            add(into, q, where[k], other[0, q, k])
            add(into, q, where[k], other[1, q, k])


@compiled(inline="always")
def combined(sums, pending, out):
    """The sums as doubles, with what is expected of samples whose targets have not come.

    Forecasts have been wrong on average by what out[FORECAST] says, per unit of mass, and are
    expected to be wrong by as much again.
    """
    for q in range(sums.shape[1]):
        for k in range(sums.shape[2]):
            out[q, k] = (sums[0, q, k] + pending[0, q, k]) + (sums[1, q, k] + pending[1, q, k])
    for k in range(sums.shape[2]):
        bias = 0.0
        mass = sums[0, MASS, k]
        if mass > 0.0:
            bias = (sums[0, TARGETS, k] - sums[0, FORECAST, k]) / mass
            out[TARGETS, k] += bias * pending[0, MASS, k]
        out[FORECAST, k] = bias
