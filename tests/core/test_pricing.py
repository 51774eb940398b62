"""Requests take the way that delays them least, as far as anything is known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_flying.core.journey import Journey
from vllm_flying.core.migration import Offer
from vllm_flying.core.pricing import MoveRates, Price, finishing_pays, to_recompute
from vllm_flying.core.topology import Layout

seconds = st.floats(0, 10)
maybe = st.none() | seconds
prices = st.dictionaries(st.text(max_size=2), st.builds(Price, maybe, maybe), max_size=6)


def record(moved: int, num_bytes: int, copy_s: float, rounds_s: float) -> dict[str, object]:
    return {
        "requests": {"moved": moved},
        "kv": {"bytes": num_bytes, "seconds": copy_s},
        "seconds": {"admit": rounds_s, "transfer": copy_s, "release": 0.0},
    }


@given(prices, maybe)
def test_no_choice_is_dearer_than_moving_everything(by_request: dict[str, Price], rounds_s: float | None) -> None:
    again = to_recompute(by_request, rounds_s)
    assert all(by_request[request_id].recompute_s is not None for request_id in again)
    moving = [price for request_id, price in by_request.items() if request_id not in again]
    chosen_s = sum(by_request[request_id].recompute_s or 0.0 for request_id in again)
    chosen_s += sum(price.move_s or 0.0 for price in moving) + (rounds_s or 0.0 if moving else 0.0)
    all_moved_s = sum(price.move_s or 0.0 for price in by_request.values()) + (rounds_s or 0.0 if by_request else 0.0)
    assert chosen_s <= all_moved_s + 1e-9


def test_while_nothing_is_known_requests_move() -> None:
    assert to_recompute({"a": Price(None, 0.0), "b": Price(1.0, None)}, None) == set()
    assert not finishing_pays(1, None, 1e6, MoveRates(0.01, 1e-9))
    assert not finishing_pays(1, 0.001, 1e6, MoveRates())


def test_rates_are_learned_from_switches_that_moved_something() -> None:
    rates = MoveRates().learn(record(0, 0, 0.0, 0.5))
    assert rates == MoveRates()
    rates = rates.learn(record(2, 1000, 0.001, 0.004))
    assert rates.move_s(2000) == 0.002
    assert rates.rounds_s == 0.004
    rates = rates.learn(record(1, 0, 0.0, 0.014))
    assert 0.004 < (rates.rounds_s or 0.0) < 0.014 and rates.move_s(1000) == 0.001


def test_a_last_step_is_waited_for_and_a_long_answer_is_not() -> None:
    rates = MoveRates(0.005, 1e-9)
    assert finishing_pays(1, 0.010, 10e6, rates)
    assert not finishing_pays(2, 0.010, 10e6, rates)


def journey(rates: MoveRates | None, prefill_s: float | None, last_resort: bool = False) -> Journey:
    """Engine 0 and 1 merge; three requests, of which one is too large for the room that there is."""
    merged = Journey(1, Layout.of([[0, 1]], 2), rates, last_resort)
    for name, tokens in (("short", 10), ("long", 900), ("huge", 5000)):
        merged.offers[name] = Offer(
            name, (0,), tokens, kv_bytes=tokens * 1000, most_tokens=tokens + 100, recomputable=True
        )
    merged.room, merged.capacity, merged.prefill_s = {(0, 1): 2000}, {(0, 1): 6000}, {(0, 1): prefill_s}
    merged.page_tokens = {(0, 1): 16}
    return merged


def admitted(merged: Journey) -> tuple[int, list[str]]:
    (call,) = merged.admissions([(0, 1)])
    return len(call.arguments["packed"]), call.arguments["recomputed"]


def test_dear_moves_are_computed_again_and_cheap_ones_are_not() -> None:
    assert admitted(journey(MoveRates(0.0, 1e-9), prefill_s=1e-3)) == (2, [])
    assert admitted(journey(MoveRates(0.0, 1e-5), prefill_s=1e-3)) == (3, ["huge", "long", "short"])
    assert admitted(journey(None, prefill_s=1e-9)) == (2, [])


def test_without_room_only_the_last_resort_lets_go_of_kv() -> None:
    assert admitted(journey(None, prefill_s=None)) == (2, [])
    merged = journey(None, prefill_s=None, last_resort=True)
    assert admitted(merged) == (3, ["huge"])
    too_large = journey(None, prefill_s=None, last_resort=True)
    too_large.capacity = {(0, 1): 5099}
    assert admitted(too_large) == (2, [])
