"""The controller chooses the layout that serves first, leaves none of the engines out, and does not flap."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_topology import layouts
from vllm_flying.controller.controller import Controller
from vllm_flying.controller.cost_curve import CostCurve
from vllm_flying.controller.observation import GroupObservation, Observation, RateTracker, Totals
from vllm_flying.controller.plan import allowed_layouts, least_width, uniform
from vllm_flying.controller.policies import BUILT_IN, auto, load, long_context, manual, policy_by_name, priority
from vllm_flying.core.topology import Layout, check_group

# A merged pair: quicker for one request, dearer per decoding request than two engines side by side.
COSTS = {
    1: CostCurve.straight(0.020, 0.0004, 0.0004), 2: CostCurve.straight(0.012, 0.0003, 0.0006),
    4: CostCurve.straight(0.009, 0.00025, 0.0008),
}  # fmt: skip
DP, TP = Layout.separate(2), Layout.of([[0, 1]], 2)


def observation(layout: Layout, time: float = 100.0, arrival_rate: float = 0.0, **of_first: Any) -> Observation:
    groups = []
    for index, group in enumerate(layout.groups):
        values = {"running": 0, "waiting": 0, "paused": 0, "prompt_tokens_queued": 0, "kv_tokens_used": 0,
                  "largest_request": 0, "wanted_width": 1}  # fmt: skip
        values |= of_first if index == 0 else {}
        groups.append(GroupObservation(engines=group, kv_tokens_capacity=1000 * len(group), **values))
    widths = tuple(w for w in (1, 2, 4) if w <= layout.num_engines)
    return Observation(time, layout, tuple(groups), COSTS, widths, 1000, dict.fromkeys(widths, 256), arrival_rate)


def test_an_idle_server_merges_and_a_burst_splits_it() -> None:
    plan = load(observation(DP))
    assert plan is not None and plan.layout == TP and plan.gain_s > 0
    assert load(observation(TP)) is None
    burst = observation(TP, running=60, waiting=40, prompt_tokens_queued=6000)
    split = load(burst)
    assert split is not None and split.layout == DP and "100 requests" in split.reason
    assert load(observation(DP, running=60, waiting=40, prompt_tokens_queued=6000)) is None


def test_a_burst_that_the_merged_group_serves_better_leaves_it_merged() -> None:
    assert load(observation(TP, running=6)) is None


def test_a_request_that_needs_room_or_asked_for_width_limits_the_choice() -> None:
    busy = {"running": 60, "waiting": 40, "prompt_tokens_queued": 6000}
    assert auto(observation(TP, **busy, largest_request=1500)) is None, "it fits a merged group only"
    assert auto(observation(TP, **busy, wanted_width=2)) is None, "its hint is being honoured"
    plan = auto(observation(DP, **busy, largest_request=1500))
    assert plan is not None and plan.urgent and plan.layout == TP
    four = observation(Layout.of([[0, 1], [2], [3]], 4), **busy, largest_request=1500)
    assert Layout.of([[0, 1], [2], [3]], 4) in allowed_layouts(four)
    assert all(max(len(group) for group in layout.groups) >= 2 for layout in allowed_layouts(four))


def test_long_context_splits_when_half_of_the_kv_is_free() -> None:
    assert long_context(observation(TP, running=1, kv_tokens_used=1500)) is None
    plan = long_context(observation(TP, running=1, kv_tokens_used=500))
    assert plan is not None and plan.layout == DP


@settings(max_examples=100, deadline=None)
@given(
    layouts(4), st.sampled_from(sorted(BUILT_IN)), st.integers(0, 300), st.integers(0, 9000), st.integers(0, 5000),
    st.sampled_from([1, 2, 4]),
)  # fmt: skip
def test_no_plan_leaves_an_engine_out_or_breaks_alignment(
    layout: Layout, policy: str, running: int, queued: int, largest: int, wanted: int
) -> None:
    seen = observation(
        layout, running=running, prompt_tokens_queued=queued, largest_request=largest, wanted_width=wanted
    )
    plan = BUILT_IN[policy](seen)
    if plan is not None:
        assert sorted(engine for group in plan.layout.groups for engine in group) == [0, 1, 2, 3]
        for group in plan.layout.groups:
            check_group(group, 4)
        if policy in ("load", "auto"):
            assert max(len(group) for group in plan.layout.groups) >= least_width(seen)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.integers(0, 5000), st.floats(0, 20))
def test_constant_load_never_makes_it_oscillate(running: int, queued: int, rate: float) -> None:
    controller, layout, switches, time = Controller(auto), DP, 0, 0.0
    for _ in range(60):
        time += 0.25
        seen = observation(layout, time, rate, running=running, prompt_tokens_queued=queued)
        decision = controller.decide(seen)
        if decision.act and decision.plan is not None:
            layout, switches = decision.plan.layout, switches + 1
            controller.switched(time, 0.03)
    assert switches <= 1


def test_cooldown_margin_and_operators_hold_it_back() -> None:
    controller = Controller(auto, margin=0.0, patience_s=0.0, cooldown_s=2.0, switch_s=0.0)
    assert controller.decide(observation(DP, 100.0)).act
    controller.switched(100.0, 0.01)
    assert "cooldown" in controller.decide(observation(DP, 101.0)).verdict
    assert controller.decide(observation(DP, 102.5)).act
    controller.hold(110.0)
    assert "operator" in controller.decide(observation(DP, 105.0)).verdict
    assert controller.decide(observation(DP, 105.0, largest_request=1500)).act, "urgent plans don't wait"
    assert "margin" in Controller(auto, margin=0.9).decide(observation(DP, 100.0)).verdict


def test_flapping_lengthens_the_cooldown() -> None:
    controller = Controller(auto, cooldown_s=1.0)
    for second in range(12):
        controller.switched(100.0 + second, 0.01)
    assert controller.cooldown(112.0) == 4.0 and controller.cooldown(200.0) == 1.0


def test_a_policy_that_raises_changes_nothing() -> None:
    def broken(seen: Observation) -> None:
        raise KeyError("oops")

    controller = Controller(broken)
    assert not controller.decide(observation(DP)).act and controller.failures == 1


def test_an_urgent_request_gets_one_group_and_the_others_keep_theirs() -> None:
    plan = priority(observation(Layout.separate(4), wanted_width=2, running=3))
    assert plan is not None and plan.urgent and plan.layout == Layout.of([[0, 1], [2], [3]], 4)
    assert priority(observation(plan.layout, wanted_width=2, running=1)) is None
    apart = priority(observation(plan.layout, running=2))
    assert apart is not None and apart.layout == Layout.separate(4)
    assert priority(observation(Layout.separate(4), running=5)) is None


def test_policies_are_found_by_name() -> None:
    assert policy_by_name("manual") is manual
    with pytest.raises(ValueError, match="'fastest' is unknown; there are: manual, load, long_context, priority, auto, schedule"):
        policy_by_name("fastest")


def test_one_long_answer_is_not_what_is_usual() -> None:
    """Lengths are averaged over requests, however few of them come between two looks."""
    rates = RateTracker()
    for number in range(60):
        finished = Totals(requests_finished=number, output_tokens_finished=20 * number)
        rates.update(float(number), finished)
    assert 20.0 <= rates.mean_output_tokens < 24.0
    longer = Totals(requests_finished=60, output_tokens_finished=20 * 59 + 400)
    rates.update(60.0, longer)
    assert rates.mean_output_tokens < 36.0
    others = Totals(requests_finished=124, output_tokens_finished=longer.output_tokens_finished + 64 * 100)
    rates.update(61.0, others)
    assert rates.mean_output_tokens > 95.0, "other requests in numbers show at once"


def test_rates_follow_counters() -> None:
    rates = RateTracker()
    burst = Totals(requests_added=10, prompt_tokens_added=5000)
    rates.update(0.0, Totals())
    rates.update(1.0, burst)
    assert rates.arrival_rate >= 3.5 and rates.mean_prompt_tokens > 200
    for second in range(2, 60):
        rates.update(float(second), burst)
    assert rates.arrival_rate < 0.1


def test_uniform_layouts_have_all_engines() -> None:
    assert uniform(observation(Layout.separate(4)), 2).to_lists() == [[0, 1], [2, 3]]
