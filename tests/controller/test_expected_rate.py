"""What arrives soon: a burst's begin is told from chance."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.controller.test_recorded import sequence
from vllm_flying.controller.observation import RateTracker, Totals
from vllm_flying.controller.policies import load

LOOK_S = 0.25


def looks(rates: list[tuple[float, float]], seed: int) -> list[tuple[float, float, float]]:
    """Time, rate and expected rate at every look; arrivals by chance at rates of (seconds, requests per second)."""
    source, tracker, (blank, *_) = random.Random(seed), RateTracker(), sequence("load")
    seen, time, added = [], 0.0, 0
    for seconds, rate in rates:
        for _ in range(int(seconds / LOOK_S)):
            time += LOOK_S
            gap = source.expovariate(rate)
            while gap < LOOK_S:
                added += 1
                gap += source.expovariate(rate)
            tracker.update(time, replace(Totals(), requests_added=added))
            now = replace(blank, arrival_rate=tracker.arrival_rate, arrival_trend=tracker.arrival_trend, rate_since_onset=tracker.rate_since_onset)
            seen.append((time, now.arrival_rate, now.expected_rate))
    return seen


@pytest.mark.parametrize("seed", range(5))
def test_a_burst_is_expected_before_the_rate_is_there(seed: int) -> None:
    early = [expected for time, _, expected in looks([(60, 1.0), (2, 10.0)], seed) if 61.0 <= time <= 62.0]
    assert max(early) > 7.0


def test_chance_is_hardly_ever_taken_for_a_burst() -> None:
    for rate in (0.5, 4.0, 40.0):
        seen = looks([(2000, rate)], seed=1)[240:]
        assert sum(expected > now for _, now, expected in seen) < 0.02 * len(seen)


def test_fewer_arrivals_are_no_trend_to_go_by() -> None:
    assert all(expected == rate for time, rate, expected in looks([(60, 8.0), (10, 0.5)], seed=2) if time > 61.0)


def test_a_decision_says_which_rate_it_reckons_with() -> None:
    reasons = {round(each.time, 1): plan.reason for each in sequence("load") if (plan := load(each))}
    assert "1.6/s arriving, 1.7 expected " in reasons[9.0] and "/s arriving one takes" in reasons[22.5]


def test_what_is_expected_does_not_run_beyond_what_comes() -> None:
    """A trend added to the rate came to 1.6 times what really came, by which any layout is overloaded."""
    for seed in range(5):
        expected = [rate for time, _, rate in looks([(60, 1.0), (20, 10.0)], seed) if time > 62.0]
        assert max(expected) < 1.8 * 10.0 and sum(expected) / len(expected) < 1.2 * 10.0
