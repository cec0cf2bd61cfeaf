# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
"""Compiled kernels of the streaming rules: sums, coefficients, and one batch at a time.

Letters: k cells, r rows, f continuous attributes, i samples of a batch. The statistics are sums
over all samples served, per cell, each an unevaluated sum of two doubles (``high + low``), so that
a billion additions lose nothing that a double could show:

    sums[:, MASS]    sum of w             sums[:, VALUE]   sum of w x
    sums[:, SQUARE]  sum of w (x - y)^2   sums[:, TARGET]  sum of w y
    sums[:, FORECAST]  sum of w times what y was forecast to be (y itself, if it came at once)
    and for each f   sums of w v, w v x and w v^2

(y is 0 where no row needs targets.) The coefficients C of the rows are those of
``fairopt.formulation.coefficients``, computed from these masses: value of row r = sum over f, k of
C[r, f, k] * (sum of w v_f x in k) + constant, where v_0 = 1.

The rule, its letters and its proofs are in ``docs/streaming.md``. Fast-math stays off everywhere:
it would undo the compensated sums. What runs for each sample is inlined by Numba, not left to LLVM:
between functions Numba counts references to every array.
"""

from __future__ import annotations

import math

import numpy as np

from fairopt.kernels.compilation import compiled
from fairopt.tolerances import MOST

# Rows of the sums.
MASS, VALUE, SQUARE, TARGET, FORECAST, FEATURES = 0, 1, 2, 3, 4, 5
# Columns of the rows' state.
MULTIPLIER, MEMORY, SEEN, AWAY, ROW_SIZE = 0, 1, 2, 3, 4
# Columns of the terms' indices.
INSIDE, SHARE, PER, AGAIN, OF, OVER, INDICES = 0, 1, 2, 3, 4, 5, 6
# Columns of what ``evaluate`` finds for each row.
HERE, CONSTANT, LOWER, UPPER, CURVATURE, COUNT, REACH, FOUND = 0, 1, 2, 3, 4, 5, 6, 7
# What ``positions`` says.
DONE, BAD_CODE, BAD_SCORE = 0, 1, 2
# Slots of the settings of the rule.
STEP, FORGET, HASTE, MARGIN, EARLY, RANGE, LOW, HIGH = 0, 1, 2, 3, 4, 5, 6, 7

NEWTON_STEPS = 40
DESCENTS = 100
ROUNDING = 4e-16


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
def accumulate(sums, counts, count, sign, cell, chances, weight, x, y, v, first, last):
    """Add samples first <= i < last to the sums, or with sign -1 take them away.

    Args:
        counts: int64 ``(K,)``; ``count`` is what each sample adds to its cell.
        cell: ``(n,)`` cells, or of no length where ``chances`` has them.
        chances: ``(n, K)``; of no length where every sample is in one cell.
        weight: ``(n,)``, or of length 1 for all.
        y: ``(n,)``, or of no length for none.
        v: ``(n, F)`` continuous attributes.
    """
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
                add_product(sums, TARGET, k, each, target)
                add_product(sums, FORECAST, k, each, target)
            for f in range(v.shape[1]):
                base = FEATURES + 3 * f
                add_product(sums, base, k, each, v[i, f])
                add(sums, base + 1, k, each * v[i, f] * x[i])
                add(sums, base + 2, k, each * v[i, f] * v[i, f])
        if not soft:
            counts[cell[i]] += int(count)


@compiled()
def replace_forecast(sums, cell, chances, weight, y, forecast):
    """Samples that were just added with targets y had been forecast to have others."""
    for i in range(len(y)):
        w = weight[i] if len(weight) > 1 else weight[0]
        for k in range(sums.shape[2]) if len(chances) > 0 else range(cell[i], cell[i] + 1):
            each = w * chances[i, k] if len(chances) > 0 else w
            if each != 0.0:
                add_product(sums, FORECAST, k, -each, y[i])
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
            bias = (sums[0, TARGET, k] - sums[0, FORECAST, k]) / mass
            out[TARGET, k] += bias * pending[0, MASS, k]
        out[FORECAST, k] = bias


@compiled(inline="always")
def evaluate(
    now, sets, index, factor, const_index, const_factor, needs, sides, mean_weight, mass, C, found
):
    """Coefficients, constants, sides and scales of all rows, from the masses.

    Args:
        now: ``(Q, K)`` sums as doubles.
        sets: ``(S, K)``, 1 where a cell belongs to a set.
        index, factor: ``(m, J, INDICES)`` and ``(m, J)``, the linear terms.
        const_index, const_factor: the constant terms; their OF is a row of ``now``, to be summed.
        needs: ``(m, N)`` sets that must not be empty; S for none.
        sides: ``(m, 2)``.
        mean_weight: mass per sample.
        mass: ``(S + 1,)``, overwritten.
        C: ``(m, 1 + F, K)``, written.
        found: ``(m, FOUND)``, written.
    """
    S, K = sets.shape
    m = len(sides)
    mass[S] = 1.0
    for j in range(S):
        total = 0.0
        for k in range(K):
            total += sets[j, k] * now[MASS, k]
        mass[j] = total
    for r in range(m):
        here = True
        for j in range(needs.shape[1]):
            here = here and (needs[r, j] == S or mass[needs[r, j]] > 0.0)
        for f in range(C.shape[1]):
            for k in range(K):
                C[r, f, k] = 0.0
        found[r, HERE] = 1.0 if here else 0.0
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
                    center += sets[over, k] * now[FEATURES + 3 * (f - 1), k]
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
        # The sum of w a^2 over all samples served, a their coefficients in the row; and as how
        # many samples they count, (sum of w |a|)^2 / (4 sum of w a^2): for a difference of means
        # of two groups 1 / (1 / n_a + 1 / n_b).
        curvature = 0.0
        size = 0.0
        for k in range(K):
            a = C[r, 0, k]
            curvature += a * a * now[MASS, k]
            size += abs(a) * now[MASS, k]
            for f in range(1, C.shape[1]):
                c = C[r, f, k]
                base = FEATURES + 3 * (f - 1)
                curvature += c * c * now[base + 2, k] + 2.0 * a * c * now[base, k]
        found[r, CONSTANT] = constant
        found[r, LOWER] = sides[r, 0]
        found[r, UPPER] = sides[r, 1]
        found[r, CURVATURE] = max(curvature, 0.0)
        # Half the sum of w |a|: by how much the value moves where each prediction that raises it
        # goes up by one, and each of as many others down. For attributes an upper bound.
        mass_count = 0.0
        found[r, REACH] = 0.5 * size
        if features:
            mass_count = smallest / 4.0
            everything = 0.0
            for k in range(K):
                everything += now[MASS, k]
            found[r, REACH] = 0.5 * math.sqrt(max(curvature, 0.0) * everything)
        elif curvature > 0.0:
            mass_count = size * size / (4.0 * curvature)
        found[r, COUNT] = mass_count / mean_weight
        # A row in which nothing has weight yet asks nothing.
        if not curvature > 0.0 or not mass_count > 0.0:
            found[r, HERE] = 0.0


@compiled(inline="always")
def variances(sums, others, mean_weight, variance):
    """Variance of predictions (residuals, where there are targets) within each cell.

    A cell of few samples says little of its own: each counts two more, of the mean variance.
    """
    total = 0.0
    mass = 0.0
    for k in range(sums.shape[2]):
        w = sums[0, MASS, k]
        d = sums[0, VALUE, k] - sums[0, TARGET, k]
        square = sums[0, SQUARE, k]
        if others is not None:
            Q = sums.shape[1]
            w = max(0.0, w - others[Q + MASS, k])
            d -= others[Q + VALUE, k] - others[Q + TARGET, k]
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
            w = max(0.0, w - others[sums.shape[1] + MASS, k])
        variance[k] = (variance[k] + few * mean) / (w + few)


@compiled(inline="always")
def primal(s, weight, column, first, last, A, columns, y, lo, hi, x, total, free):
    """x = clip(s - A^T y), and per column the sum of w x and the mass of the unclipped."""
    m = len(A)
    for k in range(columns):
        total[k] = 0.0
        free[k] = 0.0
    for i in range(first, last):
        k = column[i] if len(column) > 0 else i - first
        t = 0.0
        for r in range(m):
            t += A[r, k] * y[r]
        w = weight[i] if len(weight) > 1 else weight[0]
        value = s[i] - t if w > 0.0 else s[i]  # what counts for nothing is only clipped
        if value < lo:
            value = lo
        elif value > hi:
            value = hi
        else:
            free[k] += w
        x[i] = value
        total[k] += w * value


@compiled(inline="always")
def row_residual(A, columns, r, total, base, y, kappa, offset, l, u):
    """v_r - y_r / kappa_r - clip(v_r, l_r, u_r), v = value + offset: zero at the solution.

    Returns also v and its size, to which rounding is relative.
    """
    v = base[r] + offset[r]
    size = abs(base[r]) + abs(offset[r])
    for k in range(columns):
        v += A[r, k] * total[k]
        size += abs(A[r, k] * total[k])
    return v - y[r] / kappa[r] - min(max(v, l[r]), u[r]), v, size


@compiled()
def workspace(m, columns):
    """What ``project`` computes in, so that a stream of single samples allocates once."""
    return (
        np.empty(columns), np.empty(columns), np.empty(m), np.empty((m, m)), np.empty(m),
        np.empty(m, np.int64),
    )  # fmt: skip


@compiled(inline="always")
def newton(
    s, weight, column, first, last, A, columns, base, l, u, kappa, offset, lo, hi, x, y, total,
    free, v, H, d, active
):  # fmt: skip
    """``project``, by semismooth Newton on y_r = kappa_r (v_r - clip(v_r)), x = clip(s - A^T y).

    Its matrix, A D A^T + 1 / kappa on the active rows, D the unclipped, is positive definite.
    """
    m = len(A)
    for r in range(m):
        if kappa[r] == 0.0:
            y[r] = 0.0
    worst = 0.0
    before = math.inf
    for _ in range(NEWTON_STEPS):
        primal(s, weight, column, first, last, A, columns, y, lo, hi, x, total, free)
        worst = 0.0
        count = 0
        for r in range(m):
            if kappa[r] == 0.0:
                continue
            residual, v[r], size = row_residual(A, columns, r, total, base, y, kappa, offset, l, u)
            worst = max(worst, abs(residual) / max(size, 1e-300))
            if v[r] < l[r] or v[r] > u[r]:
                active[count] = r
                count += 1
        if worst <= ROUNDING or (worst <= 1e-13 and worst >= before):
            return worst
        before = worst
        # v(y') = v(y) - H (y' - y); wanted: y'_r / kappa_r = v_r(y') - side_r.
        for a in range(count):
            r = active[a]
            side = l[r] if v[r] < l[r] else u[r]
            right = v[r] - side
            for q in range(m):
                if y[q] != 0.0:
                    h = 0.0
                    for k in range(columns):
                        if free[k] > 0.0:
                            h += A[r, k] * free[k] * A[q, k]
                    right += h * y[q]
            d[a] = right
            for c in range(a + 1):
                h = 0.0
                for k in range(columns):
                    if free[k] > 0.0:
                        h += A[r, k] * free[k] * A[active[c], k]
                H[a, c] = h
            H[a, a] += 1.0 / kappa[r]
        solve_positive(H, d, count)
        for r in range(m):
            y[r] = 0.0
        for a in range(count):
            y[active[a]] = d[a]
    return worst


@compiled(_nrt=True)
def patient(
    s, weight, column, first, last, A, columns, base, l, u, kappa, offset, lo, hi, x, y, total,
    free, v, H, d, active
):  # fmt: skip
    """``project``, with prices that rise tenfold from low ones, at which Newton does not cycle.

    Where rows contradict each other, multipliers grow with the price: the next start is ten times
    the last answer. What Newton does not solve then is left to ``descend``, which always gains.
    """
    worst = 0.0
    part = kappa * 1e-7
    start = np.zeros(len(y))
    for stage in range(8):
        for r in range(len(y)):
            part[r] = kappa[r] * 10.0 ** (stage - 7)
            start[r] = 10.0 * y[r] if stage > 0 else 0.0
            y[r] = start[r]
        worst = newton(
            s, weight, column, first, last, A, columns, base, l, u, part, offset, lo, hi, x, y,
            total, free, v, H, d, active
        )  # fmt: skip
        if worst > 1e-12:
            y[:] = start
            worst = descend(
                s, weight, column, first, last, A, columns, base, l, u, part, offset, lo, hi, x, y,
                total, free, v, H, d, active,
            )  # fmt: skip
    return worst


@compiled(inline="always")
def project(
    s, weight, column, first, last, A, columns, base, l, u, kappa, offset, lo, hi, x, y, total,
    free, v, H, d, active
):  # fmt: skip
    """The prediction of one batch, of least change with rows at a price.

        minimise  1/2 sum_i w_i (x_i - s_i)^2 + 1/2 sum_r kappa_r dist(v_r, [l_r, u_r])^2
        where     v = base + A (sums of w x per column) + offset,   lo <= x <= hi

    Semismooth Newton, ``newton``; where it cycles, ``patient``.

    Args:
        first, last: which of the samples are the batch.
        column: ``(n,)``, the column of A of each sample; of no length where the samples of the
            batch have each its own.
        A: ``(m, >= columns)``.
        kappa: ``(m,)``; 0 for rows without effect.
        x: ``(n,)``, written.
        y: ``(m,)``, the multipliers to start from, overwritten.
        total, ..., active: from ``workspace``, for at least as many columns.

    Returns:
        The largest residual, relative to the size of what it is the difference of.
    """
    worst = newton(
        s, weight, column, first, last, A, columns, base, l, u, kappa, offset, lo, hi, x, y,
        total, free, v, H, d, active
    )  # fmt: skip
    if worst > 1e-11:
        worst = patient(
            s, weight, column, first, last, A, columns, base, l, u, kappa, offset, lo, hi, x, y,
            total, free, v, H, d, active,
        )  # fmt: skip
    return worst


@compiled()
def solve_positive(H, d, n):
    """d <- H^-1 d by Cholesky, H given by its lower triangle and overwritten."""
    for a in range(n):
        for c in range(a + 1):
            h = H[a, c]
            for j in range(c):
                h -= H[a, j] * H[c, j]
            if a == c:
                H[a, a] = math.sqrt(max(h, 1e-300))
            else:
                H[a, c] = h / H[c, c]
    for a in range(n):
        for j in range(a):
            d[a] -= H[a, j] * d[j]
        d[a] /= H[a, a]
    for a in range(n - 1, -1, -1):
        for j in range(a + 1, n):
            d[a] -= H[j, a] * d[j]
        d[a] /= H[a, a]


@compiled(_nrt=True)
def settle(H, y, z, v, kappa, l, u):
    """Solve the model exactly, given the signs that coordinate steps found; if they stay so."""
    m = len(y)
    rows = np.empty(m, np.int64)
    count = 0
    for r in range(m):
        if z[r] != 0.0:
            rows[count] = r
            count += 1
    part, d = np.empty((count, count)), np.empty(count)
    for a in range(count):
        r = rows[a]
        d[a] = v[r] - y[r] / kappa[r] - (u[r] if z[r] > 0.0 else l[r])
        for q in range(m):
            d[a] += H[r, q] * y[q]
        for c in range(count):
            part[a, c] = H[r, rows[c]]
    solve_positive(part, d, count)
    for a in range(count):
        if not d[a] * z[rows[a]] > 0.0:
            return
    for a in range(count):
        z[rows[a]] = d[a]


@compiled(_nrt=True)
def descend(
    s, weight, column, first, last, A, columns, base, l, u, kappa, offset, lo, hi, x, y, total,
    free, v, H, d, active
):  # fmt: skip
    """The same for any problem, by proximal Newton steps on the dual, with a line search.

    The dual, to be minimised, is smooth(y) + sum_r (u_r y_r if y_r > 0, l_r y_r if y_r < 0), where
    smooth has the gradient y / kappa - v and, in turn, the Hessian of the unclipped samples and
    that of all samples, of which it is never more. Each step minimises this model, kinks included,
    and so descends; the slope along it, not the value, says how far.
    """
    m = len(A)
    mass = np.zeros(columns)
    for i in range(first, last):
        k = column[i] if len(column) > 0 else i - first
        mass[k] += weight[i] if len(weight) > 1 else weight[0]
    z = np.empty(m)
    trial = np.empty(m)
    best = math.inf
    since = 0
    worst = 0.0
    for step in range(DESCENTS):
        primal(s, weight, column, first, last, A, columns, y, lo, hi, x, total, free)
        worst = 0.0
        for r in range(m):
            z[r] = y[r]
            if kappa[r] > 0.0:
                residual, v[r], size = row_residual(
                    A, columns, r, total, base, y, kappa, offset, l, u
                )
                worst = max(worst, abs(residual) / max(size, 1e-300))
        since = 0 if worst < 0.5 * best else since + 1
        best = min(best, worst)
        if worst <= 1e-15 or (worst <= 1e-9 and since > 6):
            break
        D = free if step % 2 == 0 else mass
        for r in range(m):
            for q in range(m):
                h = 0.0
                for k in range(columns):
                    if D[k] > 0.0:
                        h += A[r, k] * D[k] * A[q, k]
                H[r, q] = h
            if kappa[r] > 0.0:
                H[r, r] += 1.0 / kappa[r]
        for _sweep in range(100):
            moved = 0.0
            for r in range(m):
                if kappa[r] == 0.0:
                    continue
                gradient = y[r] / kappa[r] - v[r]
                for q in range(m):
                    gradient += H[r, q] * (z[q] - y[q])
                free_r = H[r, r] * z[r] - gradient
                new = 0.0
                if free_r > u[r]:
                    new = (free_r - u[r]) / H[r, r]
                elif free_r < l[r]:
                    new = (free_r - l[r]) / H[r, r]
                moved = max(moved, abs(new - z[r]))
                z[r] = new
            if moved <= 1e-15:
                break
        settle(H, y, z, v, kappa, l, u)
        near, far = 0.0, 1.0
        for halving in range(60):
            share = 1.0 if halving == 0 else 0.5 * (near + far)
            for r in range(m):
                d[r] = z[r] - y[r]
                trial[r] = z[r] if share == 1.0 else y[r] + share * d[r]
            primal(s, weight, column, first, last, A, columns, trial, lo, hi, x, total, free)
            slope = 0.0
            for r in range(m):
                if kappa[r] > 0.0 and d[r] != 0.0:
                    _, value, _ = row_residual(
                        A, columns, r, total, base, trial, kappa, offset, l, u
                    )
                    up = trial[r] > 0.0 or (trial[r] == 0.0 and d[r] > 0.0)
                    slope += d[r] * (trial[r] / kappa[r] - value + (u[r] if up else l[r]))
            if slope <= 0.0:
                near = share
            else:
                far = share
            if near == 1.0:
                break
        share = near if near > 0.0 else far
        for r in range(m):
            y[r] = z[r] if share == 1.0 else y[r] + share * (z[r] - y[r])
    primal(s, weight, column, first, last, A, columns, y, lo, hi, x, total, free)
    return worst


@compiled(inline="always")
def prices(
    now, pending, others, C, found, rows, settings, width, count, mean_weight, variance, awaits,
    base, l, u, kappa, offset, y
):  # fmt: skip
    """Sides with their margins, prices, and what the memory moves: the pooled rule's numbers.

    Each row has two prices: number r is that beyond its aim, number m + r that beyond its sides.

    Args:
        count: samples, also those of other workers, the batch included.
        variance: as ``variances`` has them.
        awaits: the share of the pending samples' variance that their forecasts leave.
        base, ..., y: ``(2 m,)``; the first half of ``base`` is copied, all else written.
    """
    m = len(found)
    step = settings[STEP] * count / (count + settings[EARLY])
    for r in range(m):
        base[m + r] = base[r]
        y[r], y[m + r] = 0.0, 0.0
        offset[r], offset[m + r] = 0.0, 0.0
        l[r], u[r] = found[r, LOWER], found[r, UPPER]
        l[m + r], u[m + r] = l[r], u[r]
        kappa[r], kappa[m + r] = 0.0, 0.0
        if found[r, HERE] == 0.0:
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
                base_f = FEATURES + 3 * (f - 1)
                each += c * c * now[base_f + 2, k] + 2.0 * a * c * now[base_f, k]
            if each > 0.0:
                awaited = pending[0, MASS, k]
                if others is not None:
                    awaited -= others[MASS, k] - others[now.shape[0] + MASS, k]
                share = awaits * min(max(awaited, 0.0) / now[MASS, k], 1.0)
                noise += each * variance[k]
                late += share * each * variance[k]
                unknown += share * each
        # What is not known yet counts for nothing in how firmly the value is held.
        known = max(0.0, 1.0 - unknown / found[r, CURVATURE])
        if known == 0.0:
            continue
        gentle = step * (known * found[r, COUNT]) ** (1.0 / 3.0)
        full = step * math.sqrt(known * found[r, COUNT])
        noise = mean_weight * (noise / (1.0 + 2.0 * gentle) + late)
        most = 0.5 * (u[r] - l[r])
        if math.isinf(most):
            most = 0.1 * width * found[r, REACH]
        margin = min(settings[MARGIN] * math.sqrt(noise), most)
        l[r] += margin
        u[r] = max(u[r] - margin, l[r])
        kappa[r] = gentle / found[r, CURVATURE]
        kappa[m + r] = full / found[r, CURVATURE]
        offset[r] = rows[r, MEMORY] / gentle
        y[r] = rows[r, MULTIPLIER] / found[r, CURVATURE]


@compiled(inline="always")
def remember(found, rows, settings, width, kappa, y):
    """Multipliers after a batch, and the memory, which follows them."""
    m = len(found)
    for r in range(m):
        if found[r, HERE] == 0.0:
            continue
        rows[r, MULTIPLIER] = (y[r] + y[m + r]) * found[r, CURVATURE]
        root = math.sqrt(found[r, COUNT])
        time = settings[FORGET] * settings[STEP] * max(0.0, root - rows[r, SEEN])
        if y[m + r] != 0.0:
            time *= settings[HASTE]
        memory = rows[r, MEMORY]
        # The identity: by how much the value can be beyond its sides.
        both = (kappa[r] + kappa[m + r]) * found[r, CURVATURE]
        rows[r, AWAY] = (rows[r, MULTIPLIER] - memory) / both if both > 0.0 else math.inf
        memory += (1.0 - math.exp(-time)) * (rows[r, MULTIPLIER] - memory)
        most = width * found[r, REACH]
        rows[r, MEMORY] = min(max(memory, -most), most)
        rows[r, SEEN] = max(rows[r, SEEN], root)


@compiled()
def positions(scores, codes, table, sorted_codes, cell):
    """The place of each code among the known ones, and whether all scores can be summed.

    Args:
        table: int64, the place of each code below its length, -1 for unknown ones.
        sorted_codes: the known codes, increasing, for those beyond.
        cell: int64 ``(n,)``, written.

    Returns:
        DONE, BAD_SCORE or BAD_CODE, and the first sample that is bad.
    """
    for i in range(len(scores)):
        if not abs(scores[i]) <= MOST:
            return BAD_SCORE, i
        code = np.int64(codes[i])
        if 0 <= code < len(table):
            cell[i] = table[code]
        else:
            place = np.searchsorted(sorted_codes, code)
            known = place < len(sorted_codes) and sorted_codes[place] == code
            cell[i] = place if known else -1
        if cell[i] < 0:
            return BAD_CODE, i
    return DONE, 0


@compiled(inline="always")
def open_batch(
    cell, chances, weight, y, v, first, last, expected, sums, pending, others, totals,
    sets, index, factor, const_index, const_factor, needs, sides, now, mass, C, found, base,
):  # fmt: skip
    """What is known of the pooled rows before a batch has its predictions.

    Its masses, targets and attributes count already, its predictions do not: the value of row r
    will be base[r] + sum over the batch of w_i a_ri x_i.

    Args:
        cell, chances, weight, y, v: as for ``accumulate``.
        expected: whether y are forecasts.
        others: ``(2 Q + 1, K)``, what of the sums other workers steer by, first as ``combined`` has
            them, then only those of known targets; below them, in the first column, its samples;
            ``None`` where the stream is not shared.
        sets, ..., sides: the arrays of ``fairopt.online.layout.Programme``, as for ``evaluate``.
        now, mass, C, found, base: written.

    Returns:
        The mean weight of a sample.
    """
    K, F = now.shape[1], v.shape[1]
    combined(sums, pending, now)
    elsewhere = 0.0
    if others is not None:  # decided when it is compiled: without others it costs nothing
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
                now[TARGET, k] += each * (y[i] + now[FORECAST, k] if expected else y[i])
            for f in range(F):
                now[FEATURES + 3 * f, k] += each * v[i, f]
                now[FEATURES + 3 * f + 2, k] += each * v[i, f] * v[i, f]
    everything = 0.0
    for k in range(K):
        everything += now[MASS, k]
    mean_weight = everything / (totals[0] + totals[2] - elsewhere + last - first)
    if not mean_weight > 0.0:
        mean_weight = 1.0
    evaluate(
        now, sets, index, factor, const_index, const_factor, needs, sides, mean_weight, mass, C,
        found,
    )  # fmt: skip
    values(now, C, found, base)
    return mean_weight


@compiled(inline="always")
def values(now, C, found, value):
    """The value of each row, from the sums of the predictions."""
    for r in range(len(found)):
        total = 0.0
        if found[r, HERE] > 0.0:
            total = found[r, CONSTANT]
            for k in range(C.shape[2]):
                total += C[r, 0, k] * now[VALUE, k]
                for f in range(1, C.shape[1]):
                    total += C[r, f, k] * now[FEATURES + 3 * (f - 1) + 1, k]
        value[r] = total


@compiled()
def loadings(C, cell, chances, v, first, last, A):
    """The coefficient of each sample in each row, without its weight: A ``(m, size)``."""
    K = C.shape[2]
    for i in range(first, last):
        for r in range(len(C)):
            a = 0.0
            for k in range(K) if len(chances) > 0 else range(cell[i], cell[i] + 1):
                c = C[r, 0, k]
                for f in range(1, C.shape[1]):
                    c += C[r, f, k] * v[i, f - 1]
                a += c * (chances[i, k] if len(chances) > 0 else 1.0)
            A[r, i - first] = a


@compiled(inline="always")
def close_batch(
    cell, chances, weight, y, v, first, last, single, x, target, counts, totals, expected
):  # fmt: skip
    """Round the predictions as they will be returned, and count them.

    Args:
        target: the sums, or, for forecasts (``expected``), the pending ones.
    """
    if single:
        for i in range(first, last):
            x[i] = np.float64(np.float32(x[i]))
    each, place = (0.0, 2) if expected else (1.0, 0)
    accumulate(target, counts, each, 1.0, cell, chances, weight, x, y, v, first, last)
    totals[place] += last - first
    totals[1] += 1


@compiled()
def stream(
    scores, cell, chances, weight, y, v, batch, single, expected,
    sums, pending, others, counts, totals, extent, rows, settings, programme, out,
):  # fmt: skip
    """The pooled rule over all samples in turn, ``batch`` at a time; the state is updated.

    Args:
        scores: float64 ``(n,)``, finite.
        cell, chances, weight, y, v: as for ``accumulate``.
        single: whether predictions are rounded to float32.
        expected: whether the targets are forecasts.
        others: as for ``open_batch``.
        totals: int64, [samples, batches, pending].
        extent: [least, greatest] score seen.
        out: float64 ``(n,)``, written.

    Returns:
        The largest relative residual of any batch.
    """
    m, K, n = len(rows), sums.shape[2], len(scores)
    soft = len(chances) > 0 or v.shape[1] > 0
    longest = min(batch, n)
    now = np.empty((sums.shape[1], K))
    C = np.empty((m, 1 + v.shape[1], K))
    found = np.empty((m, FOUND))
    base, l, u = np.empty(2 * m), np.empty(2 * m), np.empty(2 * m)
    kappa, offset, dual = np.empty(2 * m), np.empty(2 * m), np.empty(2 * m)
    A = np.empty((2 * m, longest if soft else K))
    column = cell[:0] if soft else cell
    target = pending if expected else sums
    total, free, v_rows, H, d, active = workspace(2 * m, A.shape[1])
    sets, index, factor, const_index, const_factor, needs, sides = programme
    mass, variance = np.empty(len(programme[0]) + 1), np.empty(K)
    # How much of the variance of what is awaited nobody knows: all, where targets are in a row's
    # value, as in a mean residual; at most a quarter, a chance's q (1 - q), where they only divide
    # samples into cells.
    awaits = 0.25
    for r in range(m):
        for j in range(const_factor.shape[1]):
            if const_factor[r, j] != 0.0 and const_index[r, j, OF] == TARGET:
                awaits = 1.0
    return steps(
        scores, cell, column, chances, weight, y, v, batch, single, expected, soft, sums, pending,
        others, target, counts, totals, extent, rows, settings, sets, index, factor, const_index,
        const_factor, needs, sides, now, mass, C, found, base, l, u, kappa, offset, dual, A, total,
        free, v_rows, H, d, active, variance, awaits, out,
    )  # fmt: skip


@compiled(_nrt=False)
def steps(
    scores, cell, column, chances, weight, y, v, batch, single, expected, soft, sums, pending,
    others, target, counts, totals, extent, rows, settings, sets, index, factor, const_index,
    const_factor, needs, sides, now, mass, C, found, base, l, u, kappa, offset, dual, A, total,
    free, v_rows, H, d, active, variance, awaits, out,
):  # fmt: skip
    """The batches of ``stream``, in arrays that it has made.

    Without Numba's reference counts, which took as long as the rule itself. Hence nothing that is
    inlined here may make an array, not by a slice either; and what is called from here and does
    make some says so, or it would inherit this.
    """
    m, K, n = len(rows), sums.shape[2], len(scores)
    lo, hi = settings[LOW], settings[HIGH]
    worst = 0.0
    for first in range(0, n, batch):
        last = min(first + batch, n)
        mean_weight = open_batch(
            cell, chances, weight, y, v, first, last, expected, sums, pending, others, totals,
            sets, index, factor, const_index, const_factor, needs, sides, now, mass, C, found, base,
        )  # fmt: skip
        for i in range(first, last):
            extent[0] = min(extent[0], scores[i])
            extent[1] = max(extent[1], scores[i])
        width = settings[RANGE] if settings[RANGE] < math.inf else extent[1] - extent[0]
        variances(sums, others, mean_weight, variance)
        count = totals[0] + totals[2] + last - first
        prices(
            now, pending, others, C, found, rows, settings, width, count, mean_weight, variance,
            awaits, base, l, u, kappa, offset, dual,
        )  # fmt: skip
        if soft:
            loadings(C, cell, chances, v, first, last, A)
            columns = last - first
        else:
            columns = K
            for r in range(m):
                for k in range(K):
                    A[r, k] = C[r, 0, k]
        for r in range(m):
            for k in range(columns):
                A[m + r, k] = A[r, k]
        error = project(
            scores, weight, column, first, last, A, columns, base, l, u, kappa, offset, lo, hi, out,
            dual, total, free, v_rows, H, d, active,
        )  # fmt: skip
        worst = max(worst, error)
        remember(found, rows, settings, width, kappa, dual)
        close_batch(
            cell, chances, weight, y, v, first, last, single, out, target, counts, totals, expected
        )  # fmt: skip
    return worst
