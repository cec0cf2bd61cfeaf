"""feedback="pooled": what it shows on the Adult data, and each bound of docs/streaming.md."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import KINDS, adult_scores, order, orders_of, regression, running_gap, served_late

from fairopt import (
    QP,
    DemographicParity,
    DenseRows,
    EqualizedOdds,
    EqualOpportunity,
    MeanResidual,
    OnlineParity,
    audit,
    project,
    solve,
)
from fairopt.kernels import stream
from fairopt.kernels.stream.projection import descend
from fairopt.kernels.stream_records import Problem, Work

ORDERS = 20
BATCHES = (1, 2, 4, 8, 16, 64, 256)


def change(x, scores):
    return float((x - scores).square().mean())


@pytest.mark.parametrize("batch", BATCHES)
def test_adult_by_sex(batch):
    """One default for all batch sizes."""
    scores, groups, _ = adult_scores()
    notion = DemographicParity(0.05)
    sex = groups["sex"]
    assert audit(scores, sex, notion).worst.excess > 0.1
    optimum = change(project(scores, sex, notion, bounds=(0, 1)), scores)
    ends, runnings, changes = [], [], []
    for seed in range(ORDERS):
        at = order(seed, len(scores))
        x = OnlineParity(notion, bounds=(0, 1)).run(scores[at], sex[at], batch_size=batch)
        gap = running_gap(x, sex[at], batch)
        ends.append(gap[-1])
        runnings.append(gap[-(-2000 // batch) :].max())
        changes.append(change(x, scores[at]))
    assert sum(end <= 0.050 for end in ends) >= 19 and max(ends) <= 0.051
    assert sum(running < 0.065 for running in runnings) >= 19
    assert np.mean(changes) <= 1.2 * optimum and max(changes) <= 1.25 * optimum


@pytest.mark.parametrize(
    ("on", "most"), [(("race",), 1.55), (("sex", "race"), 1.15)], ids=["race", "both"]
)
@pytest.mark.parametrize("batch", [1, 64])
def test_adult_by_race_and_by_both(on, most, batch):
    scores, groups, _ = adult_scores()
    chosen = {name: groups[name] for name in on}
    notion = DemographicParity(0.05)
    optimum = change(project(scores, chosen, notion, bounds=(0, 1)), scores)
    ends, runnings, changes = [], [], []
    for seed in range(ORDERS):
        at = order(seed, len(scores))
        stream = OnlineParity(notion, bounds=(0, 1))
        x = stream.run(scores[at], {k: v[at] for k, v in chosen.items()}, batch_size=batch)
        ends.append(stream.report().worst.excess)
        gaps = [running_gap(x, codes[at], batch)[-(-2000 // batch) :] for codes in chosen.values()]
        runnings.append(max(gap.max() for gap in gaps))
        changes.append(change(x, scores[at]))
    assert sum(end <= 0 for end in ends) >= 19 and max(ends) <= 0.001
    assert sum(running < 0.065 for running in runnings) >= 19
    assert np.mean(changes) <= most * optimum


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("delay", [None, 0, 1000])
def test_equalized_odds_with_labels_that_come_later(delay, batch):
    scores, groups, targets = adult_scores()
    notion, ends, changes = EqualizedOdds(0.05), [], []
    sex = groups["sex"]
    optimum = change(project(scores, sex, notion, targets, bounds=(0, 1)), scores)
    for seed in range(10):
        at = order(seed, len(scores))
        stream = OnlineParity(notion, bounds=(0, 1))
        if delay is None:
            x = stream.run(scores[at], sex[at], targets[at], batch_size=batch)
        else:
            x = served_late(stream, scores[at], sex[at], targets[at], delay, batch)
        found = audit(x, groups["sex"][at], notion, targets[at])
        report = stream.report()
        assert (report.samples, report.pending) == (len(scores), 0)
        assert report.worst.value == pytest.approx(found.worst.value, abs=1e-12)
        ends.append(found.worst.excess)
        changes.append(change(x, scores[at]))
    assert audit(scores, sex, notion, targets).worst.excess > 0.04
    assert max(ends) <= 0.001 and sum(end <= 0 for end in ends) >= 9
    # Served without labels, a shift reaches the wrong outcome too: 1.12 even with hindsight.
    assert np.mean(changes) <= {None: 1.2, 0: 1.35, 1000: 1.4}[delay] * optimum


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("delay", [None, 1000])
def test_mean_residual_on_a_regression(delay, batch):
    notion, ends, changes = MeanResidual(0.5), [], []
    for seed in range(10):
        scores, groups, targets = regression(seed)
        assert audit(scores, groups, notion, targets).worst.excess > 2
        stream = OnlineParity(notion, bounds=None)
        if delay is None:
            x = stream.run(scores, groups, targets, batch_size=batch)
        else:
            x = served_late(stream, scores, groups, targets, delay, batch)
        ends.append(stream.report().worst.excess / 0.5)
        best = project(scores, groups, notion, targets, bounds=None)
        changes.append(change(x, scores) / change(best, scores))
    # Late targets too: nothing can answer to the last 1,000, and the margin counts their noise.
    assert max(ends) <= 0.02 and sum(end <= 0 for end in ends) >= 9
    # The first targets are few, and say little of the 1,000 that are awaited: no cause for haste.
    assert np.mean(changes) <= (1.1 if delay is None else 1.35)


# ---------------------------------------------------------------------------------------------
# What is guaranteed
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    batch=st.sampled_from([1, 3, 32, 500]),
    step=st.sampled_from([0.3, 1.0, 4.0]),
)
def test_identity_and_deterministic_bound(kind, seed, batch, step):
    """For two groups and one row, after every batch of ANY stream:

    the identity      excess <= |multiplier - memory| / (step sqrt(n) early)  (report().bound),
    the theorem       excess sqrt(n) early <= max_t (R / share_t + |memory_t|) / step,

    n = 1 / (1/n_a + 1/n_b), early = N / (N + 600) with N samples in all, share_t the smaller
    group's share, R the width of the bounds.
    """
    n = 600
    scores, groups = orders_of(kind, seed, n)
    notion = DemographicParity(0.05)
    stream = OnlineParity(notion, bounds=(0, 1), step_size=step)
    served, highest = [], 0.0
    for first in range(0, n, batch):
        part = slice(first, first + batch)
        before = {row.name: row.memory for row in stream.report().rows}
        served.append(stream(scores[part], groups[part]))
        rows = stream.report().rows
        if not rows:
            continue
        (row,) = rows
        x, g = torch.cat(served), groups[: part.stop]
        found = audit(x, g, notion).worst
        assert row.value == pytest.approx(found.value, abs=1e-12)
        assert found.excess <= row.bound + 1e-12
        memory = before.get(row.name, 0.0)
        assert abs(memory) <= 1.0
        counts = torch.bincount(g, minlength=2).double()
        size = float(1 / (1 / counts).sum())
        assert row.count == pytest.approx(size)
        share = float(counts.min() / counts.sum())
        highest = max(highest, (1.0 / share + abs(memory)) / step)
        early = len(x) / (len(x) + 600)
        assert found.excess * size**0.5 * early <= highest + 1e-9


@pytest.mark.parametrize("first", [20, 200])
def test_the_bound_where_others_are_counted_too(first):
    """excess sqrt(n) <= max_t (R / share_t + |memory_t|) / (step early_t): negatives are no part.

    They make it late without a chance to answer, so that early_T in front would not do.
    """
    notion, step = EqualOpportunity(0.0), 4.0
    stream = OnlineParity(notion, bounds=(0, 1), step_size=step)
    groups = torch.arange(first) % 2
    highest, memory = 0.0, 0.0
    for i in range(first):
        stream((1.0 - groups[i : i + 1]).double(), groups[i : i + 1], torch.ones(1))
        if i > 0:
            (row,) = stream.report().rows
            share = (i + 1) // 2 / (i + 1)
            highest = max(highest, (1 / share + abs(memory)) / (step * (i + 1) / (i + 601)))
            memory = row.memory
            assert row.excess * row.count**0.5 <= highest + 1e-9
    before = stream.report().rows[0]
    stream.run(
        torch.linspace(0, 1, 20_000).double(),
        torch.arange(20_000) % 2,
        torch.zeros(20_000),
        batch_size=100,
    )
    (row,) = stream.report().rows
    assert (row.value, row.count) == (before.value, before.count)
    if first == 20:
        assert row.excess * row.count**0.5 > (2 + 1) / step / (20_020 / 20_620)


@pytest.mark.parametrize("kind", ["exchangeable", "by score", "shares and scores change"])
def test_the_excess_falls_as_the_theorem_says(kind):
    """With shares that stay: by 1 / sqrt(n), and for exchangeable streams it is soon gone."""
    for seed in range(10):
        scores, groups = orders_of(kind, seed, 20_000)
        share = float(groups.double().mean())
        share = min(share, 1 - share, *((0.2,) if kind.startswith("shares") else ()))
        stream = OnlineParity(DemographicParity(0.05), bounds=(0, 1))
        stream.run(scores, groups)
        (row,) = stream.report().rows
        assert row.excess <= 2.5 / share / row.count**0.5
        if kind == "exchangeable":
            assert row.excess <= 0.001


def test_multipliers_recover_after_drift():
    """The favoured group changes half-way: no wind-up delays the turn."""
    n = 20_000
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 2, n)
    late = np.arange(n) >= n // 2
    scores = (0.3 * rng.random(n) + 0.4 * (groups ^ late)).clip(0, 1)
    scores, groups = torch.from_numpy(scores), torch.from_numpy(groups)
    stream = OnlineParity(DemographicParity(0.05), bounds=(0, 1))
    x = stream.run(scores, groups)
    gap = running_gap(x, groups, 1)
    assert gap[2000:].max() <= 0.06  # before, during and after
    stream = OnlineParity(DemographicParity(0.05), bounds=(0, 1))
    stream.run(scores[: n // 2], groups[: n // 2])
    (before,) = stream.report().rows
    stream.run(scores[n // 2 : n // 2 + 3000], groups[n // 2 : n // 2 + 3000])
    (after,) = stream.report().rows
    assert before.multiplier * after.multiplier < 0 or after.excess == 0


def test_a_stream_that_holds_by_itself_is_left_alone():
    """Nothing is moved where the pooled rows are well inside."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(5000, generator=generator, dtype=torch.float64)
    groups = torch.randint(0, 2, (5000,), generator=generator)
    stream = OnlineParity(DemographicParity(0.3), bounds=(0, 1))
    x = stream.run(scores, groups)
    assert torch.equal(x[500:], scores[500:])


# ---------------------------------------------------------------------------------------------
# The projection of one batch
# ---------------------------------------------------------------------------------------------


class kernels:
    """The kernels, called with arrays one by one."""

    workspace = staticmethod(stream.workspace)

    @staticmethod
    def project(s, w, cell, first, last, A, K, base, l, u, kappa, offset, lo, hi, x, y, *work):
        problem = Problem(s, w, cell, A, base, l, u, kappa, offset, lo, hi)
        return stream.project(problem, first, last, K, x, y, Work(*work))


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 7),
    K=st.integers(1, 5),
    n=st.integers(1, 40),
    scale=st.sampled_from([1e-3, 1.0, 1e2, 1e5]),
    dependent=st.booleans(),
)
def test_the_projection_of_a_batch_is_optimal(seed, m, K, n, scale, dependent):
    """Against the same problem as a QP, each row with a slack that costs kappa / 2 its square."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((m, K))
    if dependent and m > 1:
        A[-1] = A[0] - A[m // 2]
    s, w, cell = rng.random(n), rng.choice([1.0, 0.3, 2.5], n), rng.integers(0, K, n)
    base, middle = rng.standard_normal(m), rng.standard_normal(m)
    l, u = middle - rng.choice([0.0, 0.5], m), middle + rng.choice([0.0, 0.5], m)
    kappa = scale * rng.uniform(0.5, 2.0, m)
    offset = rng.standard_normal(m)
    x, y = np.empty(n), np.zeros(m)
    kernels.project(
        s, w, cell, 0, n, A, K, base, l, u, kappa, offset, 0.0, 1.0, x, y, *kernels.workspace(m, K)
    )
    assert x.min() >= 0 and x.max() <= 1
    # y is the derivative of the price at x, and x minimises the Lagrangian: optimality, exactly.
    v = base + offset + (A[:, cell] * w) @ x
    size = np.abs(base) + np.abs(offset) + (np.abs(A[:, cell]) * w) @ np.abs(x)
    # y_r / kappa_r is how far v_r is outside, up to rounding in v_r and, through x, in y.
    size = size.max() + 1e-3 * np.abs(y).max() * (A[:, cell] ** 2 * w).sum()
    assert np.abs(y / kappa - (v - v.clip(l, u))).max() <= 1e-12 * size
    assert np.abs(x - (s - A[:, cell].T @ y).clip(0, 1)).max() <= 1e-12 * (1 + np.abs(y).max())
    if scale > 1e2:
        return
    slack = -np.eye(m)
    solution = solve(
        QP(
            P=torch.from_numpy(np.concatenate([w, kappa])),
            q=torch.from_numpy(np.concatenate([-w * s, np.zeros(m)])),
            rows=DenseRows(torch.from_numpy(np.concatenate([A[:, cell] * w, slack], 1))),
            l=torch.from_numpy(l - base - offset),
            u=torch.from_numpy(u - base - offset),
            lb=torch.from_numpy(np.concatenate([np.zeros(n), np.full(m, -np.inf)])),
            ub=torch.from_numpy(np.concatenate([np.ones(n), np.full(m, np.inf)])),
        ),
        backend="numba",
    )
    assert np.abs(solution.x[0, :n].numpy() - x).max() <= 1e-8


@pytest.mark.xfail(strict=True, reason="what Newton cycles on, coordinate steps do not finish")
def test_rows_that_contradict_each_other_at_high_prices_are_solved():
    """As many dependent rows as cells: one of some 3,000 problems of the test above."""
    test_the_projection_of_a_batch_is_optimal.hypothesis.inner_test(
        seed=976327908, m=4, K=4, n=23, scale=1e5, dependent=True
    )


def test_the_slow_way_finds_the_same():
    """What runs where Newton cycles, on problems that both can solve."""
    for seed, m in itertools.product(range(20), (1, 3)):
        rng = np.random.default_rng(seed)
        n, K = 12, 3
        A, s, cell = rng.standard_normal((m, K)), rng.random(n), rng.integers(0, K, n)
        base, kappa = rng.standard_normal(m), rng.uniform(0.5, 5.0, m)
        l, u = np.full(m, -0.1), np.full(m, 0.1)
        found = []
        problem = Problem(s, np.ones(1), cell, A, base, l, u, kappa, np.zeros(m), 0.0, 1.0)
        for solver in (stream.project, descend):
            x, y = np.empty(n), np.zeros(m)
            solver(problem, 0, n, K, x, y, stream.workspace(m, K))
            found.append(x)
        assert np.abs(found[0] - found[1]).max() < 1e-9
