"""The bounds that `bench limits` computes, against closed forms, differences and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import nnls
from scipy.special import log_ndtr, ndtri

from bench import causal_rows
from bench.causal import Group, Limit, least_change_causal, least_change_known, value
from bench.causal_rows import Plane, Rows, chance_below


def normal(mean, deviation, count=200):
    steps = ndtri((np.arange(count) + 0.5) / count)
    return mean + deviation * steps / steps.std()


@pytest.mark.parametrize("width", [math.inf, 0.1])
@pytest.mark.parametrize("price", [0.01, 0.05, 10.0])
def test_one_sample(price, width):
    """It is moved into the window if that costs less than staying outside."""
    steps = normal(-0.02, 0.2)
    prices, slack = np.array([[0.0, price]]), np.array([0.0])
    cost, outside = value(Group(steps, 1, width), prices, slack, 0.001)
    away = np.maximum(np.maximum(-steps, steps - width), 0.0)
    assert cost == pytest.approx(np.minimum(away**2, price).mean(), rel=5e-3)
    assert outside[0, 1] == pytest.approx((away**2 > price).mean(), abs=0.02)


def test_an_end_that_must_be_reached():
    """-2 sigma^2 ln Phi(mean sqrt(N) / sigma), Hopf and Cole's, for small steps."""
    prices = np.zeros((1, 401))
    prices[0, -1] = 1e4
    cost, outside = value(Group(normal(-0.01, 0.05), 400), prices, np.zeros(1), 0.005)
    exact = -2 * 0.05**2 * log_ndtr(-0.01 * 20 / 0.05)
    # A rule that sees a sample before it moves it saves its noise in the last steps.
    assert 0.97 * exact < cost < exact
    assert outside[0, -1] < 1e-3


@pytest.mark.parametrize("width", [math.inf, 0.02])
def test_the_chances_are_the_slope_of_the_bound(width):
    """V_0 = cost of the policy + sum of price * chance, which no other policy has less."""
    rng = np.random.default_rng(0)
    group = Group(np.append(rng.normal(-0.02, 0.1, 30), rng.normal(0.01, 0.05, 20)), 40, width)
    prices = np.tile(np.where(np.arange(41) >= 10, 0.01, 0.0), (2, 1))
    slack = np.array([0.0, 0.002])
    outside = value(group, prices, slack, 0.0025)[1]
    for place in [(0, 10), (0, 25), (1, 25), (1, 40)]:
        change = np.zeros_like(prices)
        change[place] = 1e-4
        up, down = (value(group, prices + x, slack, 0.0025)[0] for x in (change, -change))
        assert (up - down) / 2e-4 == pytest.approx(outside[place], rel=0.03, abs=2e-4)
        assert 1e-4 < outside[place] < 1


def test_between_hindsight_and_certainty():
    """More than one who knows all (and may fail), less than one who must not fail at all."""
    group = Group(normal(-0.04, 0.2), 160)
    known = least_change_known(group)
    bounds = [
        least_change_causal([group], 160, 20, [Limit(alpha)]) for alpha in (0.05, 0.0125, 1e-4)
    ]
    assert known < bounds[0] < bounds[1] < bounds[2]
    # A second limit that asks for less than the first changes nothing, one that asks for more does.
    for alpha, slack, least in ((0.05, 0.01, bounds[0]), (1e-4, 0.0, bounds[2])):
        two = least_change_causal([group], 160, 20, [Limit(0.05), Limit(alpha, (slack,))])
        assert two == pytest.approx(least, rel=3e-3)
    # The search has converged: more of it changes the bound by a thousandth.
    more = least_change_causal([group], 160, 20, [Limit(0.05)], iterations=80)
    assert more == pytest.approx(bounds[0], rel=1e-3)


def test_groups_that_fail_independently():
    """Two alike may each fail with the chance 1 - sqrt(1 - alpha)."""
    group = Group(normal(-0.04, 0.2), 160, 0.2)
    both = least_change_causal([group, group], 320, 40, [Limit(0.05)])
    one = least_change_causal([group], 160, 20, [Limit(-math.expm1(0.5 * math.log1p(-0.05)))])
    assert both == pytest.approx(2 * one, rel=3e-3)


def test_what_all_samples_known_costs():
    steps = normal(-0.02, 0.2)
    rng = np.random.default_rng(1)
    ends = rng.choice(steps, (20_000, 50)).sum(1)
    played = np.maximum(-ends, 0.0) ** 2 / 50
    assert least_change_known(Group(steps, 50)) == pytest.approx(played.mean(), rel=0.03)


def two_rows(delay=0, count=4000):
    rng = np.random.default_rng(2)
    effects = rng.uniform(0.1, 1.0, (2, count))
    steps = rng.multivariate_normal([-0.02, -0.01], [[0.04, 0.01], [0.01, 0.03]], count).T
    late = np.zeros((2, count))
    if delay:
        late = rng.multivariate_normal([0.0, 0.0], [[0.01, -0.006], [-0.006, 0.007]], count).T
    return Rows(steps, effects, late - late.mean(1, keepdims=True), delay)


def test_two_rows_known():
    """Against the dual of the least distance problem, a least-squares problem in y >= 0."""
    rows = two_rows()
    rng = np.random.default_rng(3)
    ends = rng.multivariate_normal(800 * rows.drift, 800 * np.cov(rows.steps), 4000)
    L = rows.axes
    squares = []
    for end in ends:
        y, _ = nnls(np.vstack([L.T, -end]), np.array([0.0, 0.0, 1.0]))
        gap = 1.0 + end @ y
        squares.append(float(np.square(L.T @ y / gap).sum()))
    exact = np.mean(squares) / 800
    assert causal_rows.least_change_known(rows, 800) == pytest.approx(exact, rel=0.03)


def test_chance_below():
    rng = np.random.default_rng(4)
    D = rng.normal(0.0, 1.0, (2, 5, 3))
    variance = np.array([[1.0, -0.6], [-0.6, 0.8]])
    noise = rng.multivariate_normal([0.0, 0.0], variance, 200_000)
    played = (D[..., None] + noise.T[:, None, None, :] < 0.0).any(0).mean(-1)
    assert np.abs(chance_below(D, variance) - played).max() < 0.005
    assert (chance_below(D, 0.0 * variance) == (D < 0.0).any(0)).all()


def test_what_a_block_adds():
    """The mean and the covariance of a step, from E of z and of z z'."""
    rows = two_rows()
    plane = Plane(rows, 2000, 50, 0.5)
    inverse = np.linalg.inv(rows.axes)
    mean, variance = 50 * inverse @ rows.drift, 50 * inverse @ np.cov(rows.steps) @ inverse.T
    z = np.indices(plane.outside[0].shape) - np.array(plane.outside[0].shape)[:, None, None] // 2
    z = z * plane.step
    middle = tuple(k // 2 for k in plane.outside[0].shape)
    found = np.array([plane.expected(x, plane.known)[middle] for x in z])
    assert found == pytest.approx(mean, abs=1e-6)
    second = [[plane.expected(a * b, plane.known)[middle] for a in z] for b in z]
    assert np.array(second) - np.outer(mean, mean) == pytest.approx(variance, rel=1e-3)


def test_slack():
    """After block n a row may be so far below 0."""
    rows = two_rows(200)
    plane = Plane(rows, 2000, 50, 0.1)
    z = np.indices(plane.outside[0].shape) - np.array(plane.outside[0].shape)[:, None, None] // 2
    D = np.einsum("rk,kij->rij", rows.axes, z * plane.step)
    slack = np.array([0.002, 0.004])
    exact = chance_below(D + (30 * 50 * slack)[:, None, None], 200 * np.cov(rows.late))
    inner = tuple(slice(k // 4, -k // 4) for k in exact.shape)
    assert np.abs(plane.below(30, slack) - exact)[inner].max() < 0.01
    assert np.abs(plane.below(30, 0.0 * slack) - exact)[inner].max() > 0.1


def test_two_rows_of_which_one_always_holds():
    """Are one row, as a group."""
    steps = normal(-0.04, 0.2, 2000)
    always = 1.0 + np.random.default_rng(6).normal(0.0, 0.2, 2000)
    effects = np.stack([np.ones(2000), np.tile([1.0, -1.0], 1000)])
    rows = Rows(np.stack([steps, always]), effects, np.zeros((2, 2000)))
    limits = [Limit(0.05, (0.0, 0.0))]
    found = causal_rows.least_change_causal(rows, 60, 6, limits, grid=0.4, block=1)
    exact = least_change_causal([Group(steps, 60)], 60, 6, [Limit(0.05)])
    assert found == pytest.approx(exact, rel=0.01)
    # Whole blocks at a time it sees ahead, and needs less.
    ahead = causal_rows.least_change_causal(rows, 60, 6, limits, grid=0.4, block=2)
    assert 0.8 * exact < ahead < exact


@pytest.mark.parametrize("delay", [0, 200])
def test_no_policy_has_less(delay):
    """One that keeps both rows clear of what is not known yet, played."""
    rows, within = two_rows(delay), Limit(0.1, (0.0, 0.0))
    samples, first, block, alpha = 2000, 400, 50, within.alpha
    bounds = [
        causal_rows.least_change_causal(rows, samples, first, limits, grid=0.6, block=block)
        for limits in ([within], [within, Limit(alpha / 10, (0.003, 0.003))])
    ]
    rng = np.random.default_rng(5)
    L, streams, waits = rows.axes, 400, delay // block
    clear = 2.2 * np.sqrt(delay * rows.late.var(1))
    D, cost = np.zeros((streams, 2)), np.zeros(streams)
    outstanding = np.zeros((streams, 2))
    queue: list[np.ndarray] = []
    for n in range(1, samples // block + 1):
        drawn = rng.integers(rows.steps.shape[1], size=(streams, block))
        D += rows.steps[:, drawn].sum(-1).T
        if delay:
            queue.append(rows.late[:, drawn].sum(-1).T)
            outstanding += queue[-1]
            if len(queue) > waits:
                D += queue[0]
                outstanding -= queue.pop(0)
        goal = clear * min(1.0, n * block / first)
        # A move that lifts both rows to their goals, if they are below.
        short = np.maximum(goal - D, 0.0)
        move = short @ np.linalg.inv(L).T
        cost += np.square(move).sum(1) / block
        D += short
        assert n * block < first or (D + outstanding < -1e-9).any(1).mean() < alpha
    assert causal_rows.least_change_known(rows, samples) < bounds[0] < bounds[1]
    assert bounds[0] < cost.mean()
