"""TTFT and TPOT against the operator's targets: what meets them comes first, and no targets change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.controller.test_controller import DP, TP, observation
from vllm_flying.controller.controller import Controller
from vllm_flying.controller.cost_curve import CostCurve
from vllm_flying.controller.observation import Observation, RateTracker, Totals
from vllm_flying.controller.plan import allowed_layouts
from vllm_flying.controller.policies import auto, load, predicted_response
from vllm_flying.controller.response import NO_TARGETS, Response, Targets
from vllm_flying.core.topology import Layout

targets = st.builds(Targets, *[st.none() | st.floats(0.001, 1.0)] * 2)
loads = st.fixed_dictionaries({"running": st.integers(0, 200), "prompt_tokens_queued": st.integers(0, 9000)})


def times(seen: Observation, layout: Layout) -> Response:
    predicted = predicted_response(seen, layout)
    assert predicted is not None
    return predicted


@given(st.sampled_from([DP, TP]), loads, st.floats(0, 20), targets)
def test_the_best_of_those_that_meet_the_targets_else_the_best(
    layout: Layout, busy: dict[str, Any], rate: float, wanted: Targets
) -> None:
    seen = replace(observation(layout, arrival_rate=rate, **busy), targets=wanted)
    plan = load(seen)
    chosen = layout if plan is None else plan.layout
    every = {other: times(seen, other) for other in allowed_layouts(seen)}
    meeting = {other: took for other, took in every.items() if took.missed(wanted) == 0}
    among = meeting or every
    assert chosen in among and every[chosen].total_s == min(took.total_s for took in among.values())
    if plan is not None:
        assert plan.missed == (every[layout].missed(wanted) if meeting else 0)
        assert ("target" in plan.reason) == (plan.missed > 0)


def test_what_is_missed_is_a_share_of_the_target() -> None:
    took = Response(ttft_s=0.3, tpot_s=0.05, total_s=2.0)
    assert took.missed(NO_TARGETS) == 0
    assert took.missed(Targets(ttft_s=0.3, tpot_s=0.1)) == 0
    assert round(took.missed(Targets(ttft_s=0.2, tpot_s=0.04)), 6) == 0.5
    assert round(took.missed(Targets(tpot_s=0.04)), 6) == 0.25


def test_a_missed_target_is_a_reason_though_requests_are_done_later() -> None:
    # One group: dear decodes. Prompts are so long that TTFT is what prompts cost, outputs so long that decodes matter.
    costs = {1: CostCurve.straight(0.020, 0.0008, 0.0001), 2: CostCurve.straight(0.020, 0.0004, 0.0020)}
    seen = replace(observation(DP, running=8), costs=costs, mean_prompt_tokens=1000.0, mean_output_tokens=200.0)
    one, two = times(seen, DP), times(seen, TP)
    assert two.total_s > 1.2 * one.total_s and two.ttft_s < 0.6 * one.ttft_s
    assert load(seen) is None
    missing = replace(seen, targets=Targets(ttft_s=0.6))
    plan = load(missing)
    assert plan is not None and plan.layout == TP and plan.gain_s < 0 and plan.missed > 0.3
    assert "the TTFT target of 600 ms is missed" in plan.reason

    controller = Controller(auto)
    switches = [look for look in range(20) if controller.decide(replace(missing, time=100 + 0.25 * look)).act]
    assert switches and switches[0] >= 2, "evidence, as for a gain"
    there = replace(observation(TP, running=8), costs=costs, mean_prompt_tokens=1000.0, mean_output_tokens=200.0)
    assert auto(replace(there, targets=missing.targets)) is None, "and it stays"
    hardly = replace(seen, targets=Targets(ttft_s=one.ttft_s * 0.97))
    controller = Controller(auto)
    assert not any(controller.decide(replace(hardly, time=100 + 0.25 * look)).act for look in range(400)), "the margin"


def test_the_trend_is_what_comes_lately_beside_what_came_before() -> None:
    rates, added = RateTracker(), 0

    def come(second_from: int, second_to: int, rate: int) -> float:
        nonlocal added
        for second in range(second_from, second_to):
            rates.update(float(second), Totals(requests_added=added))
            added += rate
        return rates.arrival_trend

    assert abs(come(0, 120, 5)) < 0.1, "constant"
    assert come(120, 125, 20) > 5, "a burst begins"
    assert abs(come(125, 240, 20)) < 0.1
    assert come(240, 245, 2) < -5, "it is over"
