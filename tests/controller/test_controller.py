"""The controller chooses the layout that serves first, leaves none of the engines out, and does not flap."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_topology import layouts
from vllm_flying.controller.controller import Controller
from vllm_flying.controller.cost_model import PROBE_STEPS, StepCost, estimates
from vllm_flying.controller.observation import GroupObservation, Observation, RateTracker, Totals
from vllm_flying.controller.plan import allowed_layouts, least_width, uniform
from vllm_flying.controller.policies import BUILT_IN, auto, load, long_context, manual, policy_by_name, priority
from vllm_flying.controller.response import Load, response_s
from vllm_flying.core.topology import Layout, check_group

# A merged pair: quicker for one request, dearer per decoding request than two engines side by side.
COSTS = {1: (0.020, 0.0004, 0.0004), 2: (0.012, 0.0003, 0.0006), 4: (0.009, 0.00025, 0.0008)}
DP, TP = Layout.separate(2), Layout.of([[0, 1]], 2)


def observation(layout: Layout, time: float = 100.0, arrival_rate: float = 0.0, **of_first: Any) -> Observation:
    groups = []
    for index, group in enumerate(layout.groups):
        values = {"running": 0, "waiting": 0, "paused": 0, "prompt_tokens_queued": 0, "kv_tokens_used": 0,
                  "largest_request": 0, "wanted_width": 1}  # fmt: skip
        values |= of_first if index == 0 else {}
        groups.append(GroupObservation(engines=group, kv_tokens_capacity=1000 * len(group), **values))
    widths = tuple(w for w in (1, 2, 4) if w <= layout.num_engines)
    return Observation(time, layout, tuple(groups), COSTS, widths, 1000, 256, arrival_rate)


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


@settings(max_examples=40, deadline=None)
@given(st.floats(0.001, 0.1), st.floats(0.00001, 0.001), st.floats(0.0001, 0.005), st.integers(0, 999))
def test_step_costs_are_learned(fixed: float, prompt: float, decode: float, seed: int) -> None:
    import random

    source, cost = random.Random(seed), StepCost()
    for _ in range(200):
        tokens, decodes = source.choice([0, 0, 64, 256, 512]), source.randrange(0, 64)
        cost.learn(tokens, decodes, fixed + prompt * tokens + decode * decodes)
    assert cost.numbers() == pytest.approx((fixed, prompt, decode), rel=0.05, abs=2e-5)


def probed(seconds: dict[int, float]) -> list[tuple[int, int, float]]:
    """A probe of passes of so many tokens, where a token costs the same whatever it is."""
    return [kind for tokens, took in seconds.items() for kind in ((0, tokens, took), (tokens - 1, 1, took))]


def test_a_probe_tells_what_prompts_cost_from_what_requests_do() -> None:
    cost = StepCost()
    cost.seed([(p, d, 0.010 + 0.0002 * p + 0.001 * d) for p, d in PROBE_STEPS])
    assert cost.numbers() == pytest.approx((0.010, 0.0002, 0.001), rel=0.05)


def test_a_quiet_hour_is_no_reason_to_forget_what_a_full_batch_costs() -> None:
    cost = StepCost()
    cost.seed(probed({1: 0.010, 16: 0.012, 256: 0.050}))
    for decodes in (1, 8, 16, 32) * 10:
        cost.learn(0, decodes, 0.020 + 0.001 * decodes)
    for _ in range(5000):
        cost.learn(0, 1, 0.021)
        cost.learn(256, 0, 0.020 + 0.0002 * 256)
    assert cost.decode_step_s(32) == pytest.approx(0.052, rel=0.1)


def test_what_has_not_run_costs_what_the_probe_says_and_what_it_does_not_see() -> None:
    cost = StepCost()
    cost.seed(probed({1: 0.010, 16: 0.025, 256: 0.265}))
    for _ in range(50):
        cost.learn(0, 1, 0.015)
    fixed, prompt, decode = cost.numbers()
    assert fixed == pytest.approx(0.014, rel=0.1)
    assert prompt == pytest.approx(0.001, rel=0.1) and decode == pytest.approx(0.001, rel=0.1)


def test_what_a_probe_does_not_see_may_grow_with_the_requests() -> None:
    cost = StepCost()
    cost.seed(probed({1: 0.010, 32: 0.012, 128: 0.020}))
    for decodes in (100, 200, 300) * 20:  # only full batches: what they cost isn't what any step costs
        cost.learn(0, decodes, 0.012 + 0.0003 * decodes)
    assert cost.decode_step_s(1) == pytest.approx(0.012, rel=0.15)
    assert cost.decode_step_s(300) == pytest.approx(0.102, rel=0.05)


def test_one_step_that_was_held_up_changes_little() -> None:
    cost = StepCost()
    for _ in range(40):
        cost.learn(0, 4, 0.02)
    cost.learn(0, 4, 5.0)
    assert cost.decode_step_s(4) < 0.03


@given(
    st.floats(0, 200), st.floats(0, 9000), st.floats(0, 50), st.integers(1, 2000), st.integers(1, 500),
    st.sampled_from([1, 2, 4]), st.integers(1, 256),
)  # fmt: skip
def test_a_response_takes_longer_with_more_to_do_and_never_less_than_alone(
    unfinished: float, queued: float, rate: float, prompt: int, output: int, groups: int, slots: int
) -> None:
    load = Load(unfinished, queued, rate, prompt, output)
    takes = response_s(COSTS[1], groups, load, slots)
    assert takes >= response_s(COSTS[1], groups, Load(1, 0, 0.0, prompt, output), slots) - 1e-9
    assert takes >= response_s(COSTS[1], 2 * groups, load, slots) - 1e-9
    assert takes <= response_s(COSTS[1], groups, Load(2 * unfinished, queued, rate, prompt, output), slots) + 1e-9
    assert takes <= response_s(COSTS[1], groups, Load(unfinished, queued, 2 * rate, prompt, output), slots) + 1e-9


def test_with_a_rising_rate_two_groups_overtake_one() -> None:
    rates = (0.1, 1, 4, 8, 16, 20, 24)
    loads = [Load(0, 0, rate, 64, 24) for rate in rates]
    best = [response_s(COSTS[2], 1, load, 256) < response_s(COSTS[1], 2, load, 256) for load in loads]
    assert best[0] and not best[-1]
    assert best == sorted(best, reverse=True), "once"


def test_a_width_that_has_not_run_costs_what_a_probe_does_not_see_as_well() -> None:
    probes = {1: [0.07, 0.002, 0.002], 2: [0.04, 0.001, 0.001]}
    reports = {width: [*probe, 0, *probe] for width, probe in probes.items()}
    assert estimates(reports)[1] == (0.07, 0.002, 0.002)
    run = [0.06, 0.001, 0.004, 500, *probes[2]]
    seen = estimates({**reports, 2: run})
    assert seen[1] == pytest.approx((0.09, 0.002, 0.005)) and seen[2] == (0.06, 0.001, 0.004)
    few = estimates({1: [0.07, 0.002, 0.2, 3, *probes[1]], 2: run})
    assert few[1] == pytest.approx((0.09, 0.002, 0.005)), "three steps say nothing yet"
    both = estimates({1: [0.08, 0.002, 0.002, 500, *probes[1]], 2: run})
    assert both[1][0] == 0.08


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
