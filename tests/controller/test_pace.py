"""A slow machine is told from a dear layout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flying.controller.cost_model import StepCost
from vllm_flying.controller.pace import HELD_UP, Pace


@given(st.floats(0.3, 3.5))
def test_a_lasting_slowness_is_the_paces_and_not_the_costs(slow: float) -> None:
    cost, pace = StepCost(), Pace()
    for steps, factor in ((4000, 1.0), (200, slow)):
        for index in range(steps):
            decodes = 1 + index % 4
            cost.learn(0, decodes, factor * (0.020 + 0.001 * decodes), pace)
            if index % 16 == 0:
                cost.curve()
    assert pace.factor == pytest.approx(slow, rel=0.1)
    assert cost.decode_step_s(2) == pytest.approx(0.022, rel=0.1)


def test_steps_of_another_layout_are_learned_at_the_present_pace() -> None:
    alone, merged, pace = StepCost(), StepCost(), Pace()
    for factor in (1.0, 1.5):
        for _ in range(200):
            merged.learn(0, 1, 0.010 * factor, pace)
            merged.curve()
    for _ in range(40):
        alone.learn(0, 1, 0.020 * 1.5, pace)
    assert alone.decode_step_s(1) == pytest.approx(0.020, rel=0.1)


def test_what_is_new_in_a_layout_is_held_against_its_probe() -> None:
    alone, merged, pace = StepCost(), StepCost(), Pace()
    alone.seed([(0, 1, 0.016), (31, 1, 0.030), (0, 32, 0.040)])
    merged.seed([(0, 1, 0.008), (31, 1, 0.015), (0, 32, 0.030)])
    for _ in range(200):
        merged.learn(0, 1, 0.010, pace, [alone])
        merged.curve()
    pace.factor = pace.lasting = 1.5  # a burst made steps slow that are not known well
    for index in range(500):
        decodes = max(1, 30 - index // 10)
        alone.learn(0, decodes, 1.25 * (0.0152 + 0.000775 * decodes), pace, [merged])
        alone.curve()
    assert alone.decode_step_s(1) == pytest.approx(0.020, rel=0.12), "two thirds of it by the pace alone"
    assert pace.factor == pytest.approx(1.0, rel=0.15)


def test_a_slow_moment_is_forgotten_with_the_layout_and_a_slow_minute_is_not() -> None:
    pace = Pace()
    for steps, ratio, after in ((1000, 1.4, 1.4), (40, 2.0, 1.5)):
        for _ in range(steps):
            pace.usual(ratio, 1.0)
        pace.layout_changed()
        assert pace.factor == pytest.approx(after, rel=0.05)


def test_steps_that_cost_more_than_a_straight_line_says_are_no_slow_machine() -> None:
    cost, pace = StepCost(), Pace()
    for _ in range(4000):
        for decodes in (1, 2, 4):
            cost.learn(0, decodes, 0.010 + 0.0005 * decodes, pace)
        cost.curve()
    for decodes in [40, 41, 42] * 100:  # a burst
        cost.learn(0, decodes, 0.060, pace)
        cost.curve()
    assert pace.factor == pytest.approx(1.0, rel=0.05)
    assert cost.decode_step_s(41) == pytest.approx(0.060, rel=0.1)


def test_one_step_that_was_held_up_changes_little() -> None:
    pace = Pace()
    assert pace.usual(10.0, 0.01) < 10.0
    assert 1.0 < pace.factor <= 1.0 + (HELD_UP - 1.0) / 32
    pace.usual(1.0, None)
    assert pace.factor <= 1.0 + (HELD_UP - 1.0) / 32, "of steps that nobody knows nothing is learned"


def test_a_layout_that_was_learned_at_a_wrong_pace_is_judged_right_after_some_switches() -> None:
    alone, merged, pace = StepCost(), StepCost(), Pace()
    for _ in range(400):
        merged.learn(0, 1, 0.010, pace)
        merged.curve()
    pace.factor = pace.lasting = 1.4  # slow for a moment
    for _ in range(400):
        alone.learn(0, 1, 0.020, pace)  # in which the slowness is over
        alone.curve()
    assert alone.decode_step_s(1) / merged.decode_step_s(1) == pytest.approx(2.0 / 1.4, rel=0.05)
    for _ in range(8):
        for cost, seconds in ((merged, 0.010), (alone, 0.020)):
            pace.layout_changed()
            for _ in range(300):
                cost.learn(0, 1, seconds, pace)
                cost.curve()
    assert alone.decode_step_s(1) / merged.decode_step_s(1) == pytest.approx(2.0, rel=0.05)
    assert pace.factor * alone.decode_step_s(1) == pytest.approx(0.020, rel=0.05)
