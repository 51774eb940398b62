"""What is predicted for a usual request grows with what there is to do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.controller.test_controller import COSTS
from vllm_flying.controller.response import Load, response, response_s


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


def test_a_first_token_takes_its_own_step_and_half_of_the_one_in_flight() -> None:
    curve = COSTS[1]
    alone = response(curve, 1, Load(1, 0, 0.0, 64, 24), 256)
    assert abs(alone.ttft_s - 1.5 * curve.of(0, 1) - 64 * curve.prompt_token_s) < 1e-9
    assert abs(alone.total_s - alone.ttft_s - 23 * alone.tpot_s) < 1e-9, "the other 23 tokens"


def test_with_a_rising_rate_two_groups_overtake_one() -> None:
    rates = (0.1, 1, 4, 8, 16, 20, 24)
    loads = [Load(0, 0, rate, 64, 24) for rate in rates]
    best = [response_s(COSTS[2], 1, load, 256) < response_s(COSTS[1], 2, load, 256) for load in loads]
    assert best[0] and not best[-1]
    assert best == sorted(best, reverse=True), "once"
