"""The bound that `bench limits` computes, against closed forms, differences and a simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_ndtr, ndtri

from bench.causal import Walk, least_change_causal, least_change_known, value


def normal(mean, deviation, count=200):
    steps = ndtri((np.arange(count) + 0.5) / count)
    return mean + deviation * steps / steps.std(), np.full(count, 1.0 / count)


@pytest.mark.parametrize("effect", [1.0, 0.4])
@pytest.mark.parametrize("price", [0.01, 0.05, 10.0])
def test_one_sample(price, effect):
    """It is moved up to the level if that costs less than staying below."""
    steps, chances = normal(-0.02, 0.2)
    walk = Walk([effect], [steps], [chances])
    cost, below = value(walk, np.array([0.0, price]), 0.001)
    short = np.maximum(-steps, 0.0) / effect
    assert cost == pytest.approx(np.minimum(short**2, price) @ chances, rel=5e-3)
    assert below[1] == pytest.approx((short**2 > price) @ chances, abs=0.02)


def test_an_end_that_must_be_reached():
    """-2 sigma^2 ln Phi(mean sqrt(N) / sigma), Hopf and Cole's, for small steps."""
    steps, chances = normal(-0.01, 0.05)
    prices = np.zeros(401)
    prices[-1] = 1e4
    cost, below = value(Walk([1.0], [steps], [chances]), prices, 0.005)
    exact = -2 * 0.05**2 * log_ndtr(-0.01 * 20 / 0.05)
    # A rule that sees a sample before it moves it saves its noise in the last steps.
    assert 0.97 * exact < cost < exact
    assert below[-1] < 1e-3


@pytest.mark.parametrize("delay", [0, 7])
def test_the_chances_are_the_slope_of_the_bound(delay):
    """V_0 = cost of the policy + sum of price * chance, which no other policy has less."""
    rng = np.random.default_rng(0)
    steps = [rng.normal(-0.02, 0.1, 30), rng.normal(0.01, 0.05, 20)]
    chances = [np.full(30, 0.02), np.full(20, 0.02)]
    late = np.array([-0.1, 0.1]) if delay else None
    walk = Walk([1.0, 0.5], steps, chances, late, delay)
    prices = np.where(np.arange(41) >= 10, 0.01, 0.0)
    below = value(walk, prices, 0.01)[1]
    for n in (10, 25, 40):
        change = np.where(np.arange(41) == n, 1e-4, 0.0)
        up, down = value(walk, prices + change, 0.01)[0], value(walk, prices - change, 0.01)[0]
        assert (up - down) / 2e-4 == pytest.approx(below[n], abs=2e-3)
        assert 1e-3 < below[n] < 1


def test_between_hindsight_and_certainty():
    """More than one who knows all (and may fail), less than one who must not fail at all."""
    steps, chances = normal(-0.04, 0.2)
    walk = Walk([1.0], [steps], [chances])
    known = least_change_known(walk, 160)
    bounds = [
        least_change_causal(walk, 160, 20, alpha, grid=0.02) for alpha in (0.05, 0.0125, 1e-4)
    ]
    assert known < bounds[0] < bounds[1] < bounds[2]
    # The search has converged, and the grid is fine: more of both changes it by a thousandth.
    more = least_change_causal(walk, 160, 20, 0.05, grid=0.005, iterations=80)
    assert more == pytest.approx(bounds[0], rel=1e-3)


def test_what_all_samples_known_costs():
    steps, chances = normal(-0.02, 0.2)
    walk = Walk([0.5], [steps], [chances])
    rng = np.random.default_rng(1)
    ends = rng.choice(steps, (20_000, 50)).sum(1)
    played = np.maximum(-ends, 0.0) ** 2 / (50 * 0.25)
    assert least_change_known(walk, 50) == pytest.approx(played.mean(), rel=0.03)
