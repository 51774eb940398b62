"""What a switch gained is measured against the old layout under what clients did, or is unknown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.controller.test_controller import COSTS, DP, TP, observation
from vllm_flying.controller.observation import Observation, Totals
from vllm_flying.controller.plan import Plan
from vllm_flying.controller.policies import load
from vllm_flying.controller.realised_gain import (
    MOSTLY_UNDONE,
    NO_COSTS,
    NOTHING_DONE,
    GainMeasurement,
    RealisedGain,
    realised_gain,
)
from vllm_flying.controller.response import HORIZON_S, Load, response_s

EARLIER = Totals(
    requests_added=100,
    requests_served=90,
    seconds_served=300.0,
    prompt_tokens_served=9000,
    output_tokens_served=4000,
)


def after(time: float, totals: Totals, **of_first: Any) -> Observation:
    """A look at the merged layout."""
    return replace(observation(TP, time, **of_first), totals=totals)


def served(requests: int, seconds_each: float, added: int | None = None, prompt: int = 64, output: int = 32) -> Totals:
    """The totals after so many more requests than `EARLIER` has."""
    more = Totals(
        requests_added=requests if added is None else added,
        requests_served=requests,
        seconds_served=requests * seconds_each,
        prompt_tokens_served=requests * prompt,
        output_tokens_served=requests * output,
    )
    return Totals(*(getattr(EARLIER, name) + getattr(more, name) for name in vars(EARLIER)))


def gain(decided_on: Observation, totals: Totals, **of_first: Any) -> RealisedGain:
    return realised_gain(decided_on, after(101.0, EARLIER), after(109.0, totals, **of_first))


@given(st.integers(1, 400), st.floats(0.01, 100.0), st.integers(1, 2000), st.integers(1, 500), st.integers(0, 300))
def test_the_gain_is_what_the_old_layout_takes_for_these_requests_less_what_was_measured(
    requests: int, seconds: float, prompt: int, output: int, unfinished: int
) -> None:
    found = gain(observation(DP, running=unfinished), served(requests, seconds, prompt=prompt, output=output))
    staying = response_s(COSTS[1], 2, Load(unfinished, 0, requests / 8.0, prompt, output), 256)
    assert found.measured_s == pytest.approx(seconds) and found.staying_s == pytest.approx(staying)
    assert found.gain_s == pytest.approx(staying - seconds) and found.unknown is None and found.requests == requests


@given(st.integers(0, 300), st.integers(0, 9000))
def test_requests_that_pile_up_in_the_new_layout_do_not_make_the_old_one_look_slow(running: int, queued: int) -> None:
    totals = served(20, 5.0, added=30)
    assert gain(observation(DP), totals, running=running, prompt_tokens_queued=queued) == gain(observation(DP), totals)


@given(st.integers(0, 50), st.integers(0, 200))
def test_a_gain_is_known_if_requests_were_done_and_not_only_the_quick_ones(requests: int, added: int) -> None:
    found = gain(observation(DP), served(requests, 1.0, added))
    assert (found.gain_s is None) == (found.unknown is not None)
    expected = NOTHING_DONE if not requests else MOSTLY_UNDONE if added > 2 * requests else None
    assert found.unknown == expected


def test_without_costs_of_the_old_layout_it_is_unknown() -> None:
    decided_on = replace(observation(DP), costs={2: COSTS[2]})
    assert gain(decided_on, served(5, 1.0)).unknown == NO_COSTS


def test_with_requests_that_take_what_was_predicted_the_gain_is_the_predicted_one() -> None:
    decided_on = replace(observation(DP, arrival_rate=1.0), mean_prompt_tokens=64.0, mean_output_tokens=32.0)
    plan = load(decided_on)
    assert plan is not None and plan.layout == TP
    takes = response_s(COSTS[2], 1, decided_on.load, 256)
    assert gain(decided_on, served(8, takes)).gain_s == pytest.approx(plan.gain_s)


def test_it_is_followed_until_the_horizon_or_the_next_layout() -> None:
    measurement = GainMeasurement(Plan(TP, "load", "it is quiet", gain_s=0.5), observation(DP))
    assert measurement.result().unknown == NOTHING_DONE, "nobody has looked"
    assert not measurement.look(after(101.0, EARLIER))
    assert not measurement.look(after(101.0 + HORIZON_S / 2, served(4, 1.0)))
    early = measurement.result()
    assert measurement.look(replace(observation(DP, 107.0), totals=served(50, 9.0))), "the layout has changed"
    assert measurement.result() == early and early.requests == 4 and early.window_s == HORIZON_S / 2
    assert measurement.look(after(101.0 + HORIZON_S, served(6, 1.0)))
    assert measurement.result().requests == 6
