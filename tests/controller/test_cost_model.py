"""What a step costs is learned from the steps that were run, and from a probe where none were."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flying.controller.cost_curve import CostCurve
from vllm_flying.controller.cost_model import PROBE_STEPS, StepCost, estimates


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.001, 0.1), st.floats(0.00001, 0.001), st.floats(0.0001, 0.005), st.floats(0, 0.005), st.floats(0, 0.005),
    st.integers(0, 999),
)  # fmt: skip
def test_step_costs_are_learned(step: float, prompt: float, decode: float, more: float, most: float, seed: int) -> None:
    source, cost, truth = random.Random(seed), StepCost(), CostCurve(step, prompt, (decode, more, most))
    for _ in range(400):
        tokens, decodes = source.choice([0, 0, 64, 256, 512]), int(2 ** source.uniform(0, 7))
        cost.learn(tokens, decodes, truth.of(tokens, decodes))
    for tokens, decodes in ((0, 1), (0, 8), (0, 24), (0, 100), (256, 1), (256, 32)):
        assert cost.curve().of(tokens, decodes) == pytest.approx(truth.of(tokens, decodes), rel=0.1)


def test_what_full_batches_cost_says_nothing_of_a_few_requests() -> None:
    """As in a group of two that was overloaded: a lone request must look neither dear nor cheap there for that."""

    def truth(prompt_tokens: int, decodes: int) -> float:
        return 0.0125 + 0.00015 * prompt_tokens + 0.0005 * decodes + 0.00002 * decodes**2

    cost = StepCost()
    cost.seed([(p, d, 0.9 * truth(p, d)) for p, d in PROBE_STEPS])
    for step in range(400):
        few = 1 + step % 4
        cost.learn(0, few, truth(0, few))
    for step in range(200):
        tokens, many = 64 * (step % 3), 32 + step % 32
        cost.learn(tokens, many, truth(tokens, many))
    for decodes in (1, 2, 4, 40):
        assert cost.decode_step_s(decodes) == pytest.approx(truth(0, decodes), rel=0.06)


def probed(seconds: dict[int, float]) -> list[tuple[int, int, float]]:
    """A probe of passes of so many tokens, where a token costs the same whatever it is."""
    return [kind for tokens, took in seconds.items() for kind in ((0, tokens, took), (tokens - 1, 1, took))]


def test_a_probe_tells_what_prompts_cost_from_what_requests_do() -> None:
    cost = StepCost()
    cost.seed([(p, d, 0.010 + 0.0002 * p + 0.001 * d) for p, d in PROBE_STEPS])
    for kind in ((0, 1), (0, 64), (500, 0)):
        assert cost.curve().of(*kind) == pytest.approx(0.010 + 0.0002 * kind[0] + 0.001 * kind[1], rel=0.05)


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
    assert cost.curve().prompt_token_s == pytest.approx(0.001, rel=0.1)
    for decodes in (1, 16, 256):
        assert cost.decode_step_s(decodes) == pytest.approx(0.014 + 0.001 * decodes, rel=0.1)


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


def test_a_width_that_has_not_run_costs_what_a_probe_does_not_see_as_well() -> None:
    probes = {1: (0.07, 0.002, 0.002), 2: (0.04, 0.001, 0.001)}

    def report(width: int, steps: int, *numbers: float) -> dict[str, Any]:
        curves = (CostCurve.straight(*numbers), CostCurve.straight(*probes[width]))
        return {"curve": curves[0].to_dict(), "steps": steps, "probe": curves[1].to_dict()}

    unknown = {width: report(width, 0, *probe) for width, probe in probes.items()}
    assert estimates(unknown)[1] == CostCurve.straight(*probes[1])
    run = report(2, 500, 0.06, 0.001, 0.004)
    seen = estimates({**unknown, 2: run})
    assert seen[1] == CostCurve.straight(pytest.approx(0.09), 0.002, pytest.approx(0.005))
    assert seen[2] == CostCurve.straight(0.06, 0.001, 0.004)
    few = estimates({1: report(1, 3, 0.07, 0.002, 0.2), 2: run})
    assert few[1] == seen[1], "three steps say nothing yet"
    both = estimates({1: report(1, 500, 0.08, 0.002, 0.002), 2: run})
    assert both[1].step_s == 0.08


def test_a_width_that_has_not_run_gets_the_smaller_guess_of_what_its_requests_cost() -> None:
    """Known: 0.0006 s per request beyond a probe's 0.0002, four times as much. Half of that probe: 0.0007, or 0.0004."""
    known, unknown = CostCurve.straight(0.010, 0.0002, 0.0002), CostCurve.straight(0.008, 0.0001, 0.0001)
    reports = {
        1: {"curve": CostCurve.straight(0.011, 0.0002, 0.0008).to_dict(), "steps": 500, "probe": known.to_dict()},
        2: {"curve": unknown.to_dict(), "steps": 0, "probe": unknown.to_dict()},
    }
    assert estimates(reports)[2] == CostCurve.straight(pytest.approx(0.009), 0.0001, pytest.approx(0.0004))
    cheaper = {**reports, 1: {**reports[1], "curve": CostCurve.straight(0.011, 0.0002, 0.0001).to_dict()}}
    assert estimates(cheaper)[2].decode_s == (0.0001,), "never cheaper than its probe"
