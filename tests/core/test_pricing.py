"""Requests take the way that delays them least, as far as anything is known."""

from __future__ import annotations

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from vllm_flying.core.journey import Journey
from vllm_flying.core.migration import Offer
from vllm_flying.core.pauses import Pausing
from vllm_flying.core.pricing import MoveRates, Price, Ways, choose_ways, finishing_pays
from vllm_flying.core.topology import Layout

seconds = st.floats(0, 10)
maybe = st.none() | seconds
prices = st.dictionaries(st.text(max_size=2), st.builds(Price, maybe, maybe, maybe), max_size=6)
known = st.dictionaries(st.sampled_from("abcd"), st.builds(Price, seconds, seconds, maybe), max_size=4)


def record(moved: int, num_bytes: int, copy_s: float, rounds_s: float) -> dict[str, object]:
    return {
        "requests": {"moved": moved},
        "kv": {"bytes": num_bytes, "seconds": copy_s}, "precopied": {"bytes": 0},
        "seconds": {"admit": rounds_s, "transfer": copy_s, "release": 0.0},
    }


def total_s(by_request: dict[str, Price], ways: Ways, rounds_s: float) -> float:
    """What these ways cost; fails if one isn't known."""
    costs = [by_request[i].recompute_s for i in ways.recomputed] + [by_request[i].pause_s for i in ways.paused]
    moving = by_request.keys() - ways.recomputed - ways.paused
    costs += [by_request[i].move_s or 0.0 for i in moving]
    assert None not in costs, "what isn't known isn't chosen"
    return sum(cost or 0.0 for cost in costs) + (rounds_s if moving else 0.0)


@given(prices, maybe)
def test_no_choice_is_dearer_than_moving_everything(by_request: dict[str, Price], rounds_s: float | None) -> None:
    ways = choose_ways(by_request, rounds_s)
    assert not ways.recomputed & ways.paused
    assert total_s(by_request, ways, rounds_s or 0.0) <= total_s(by_request, Ways(), rounds_s or 0.0) + 1e-9


@given(known, seconds)
def test_what_is_chosen_costs_least(by_request: dict[str, Price], rounds_s: float) -> None:
    chosen_s = total_s(by_request, choose_ways(by_request, rounds_s), rounds_s)
    options = [
        [way for way, cost in (("move", 0.0), ("recompute", 0.0), ("pause", price.pause_s)) if cost is not None]
        for price in by_request.values()
    ]
    for choice in itertools.product(*options):
        by_way = {way: frozenset(i for i, w in zip(by_request, choice) if w == way) for way in ("recompute", "pause")}
        assert chosen_s <= total_s(by_request, Ways(by_way["recompute"], by_way["pause"]), rounds_s) + 1e-9


@given(st.integers(-3, 3), seconds, st.floats(0, 1))
def test_only_those_that_can_wait_have_a_cheap_pause(priority: int, expected_s: float, weight: float) -> None:
    pausing = Pausing({(0,): expected_s}, weight)
    assert pausing.price((0,), priority) == expected_s * (weight if priority > 0 else 1.0)
    assert pausing.price((1,), priority) is None


def test_while_nothing_is_known_requests_move() -> None:
    assert choose_ways({"a": Price(None, 0.0, 0.0), "b": Price(1.0, None)}, None) == Ways()
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


def journey(
    rates: MoveRates | None, prefill_s: float | None, last_resort: bool = False, pausing: Pausing | None = None
) -> Journey:
    """Engine 0 and 1 merge; three requests, of which one is too large for the room that there is."""
    merged = Journey(1, Layout.of([[0, 1]], 2), rates, last_resort, pausing or Pausing())
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


def flex(priority: int, pausing: Pausing, priced: bool = True) -> Journey:
    """As `journey`, but the huge request has a priority and pages of its own; moving it takes 2.5 s, the long one 0.45 s."""
    merged = journey(MoveRates(0.0, 1e-6) if priced else None, None, pausing=pausing)
    merged.offers["huge"] = dataclasses.replace(merged.offers["huge"], priority=priority, pages=tuple(range(100)))
    return merged


def left(merged: Journey) -> set[str]:
    admitted(merged)
    return merged.left


def test_a_request_that_can_wait_stays_where_that_costs_less_than_to_move_it() -> None:
    merged = flex(1, Pausing({(0,): 6.0}, 0.01))
    assert admitted(merged) == (2, []) and merged.left == {"huge"}
    assert (merged.unplaced, merged.staying) == (3 - 1, 3), "the others are on their way"
    merged.admitted(0, {"admitted": {i: {"target_pages": [], "first_block": 0, "last_block": 0} for i in ("short", "long")}})
    assert (merged.unplaced, merged.staying) == (0, 1)
    assert merged.reasons()["paused"] == {"price": 1, "room": 0, "need": 0}
    assert left(flex(0, Pausing({(0,): 6.0}, 0.01))) == set()
    assert left(flex(0, Pausing({(0,): 0.6}, 0.01))) == {"huge"}, "a pause that is shorter than the copying is for anybody"
    assert left(flex(1, Pausing())) == left(flex(1, Pausing({(0, 1): 0.001}))) == set(), "nothing is known of its group"


def test_nobody_is_left_with_pages_that_others_lack() -> None:
    merged = flex(1, Pausing({(0,): 6.0}, 0.01))
    merged.capacity = {(0, 1): 2000}  # less the 1600 tokens of those pages: too few for the long one
    merged.offers["huge"] = dataclasses.replace(merged.offers["huge"], most_tokens=1000)
    assert admitted(merged) == (2, []) and merged.left == set()
    assert merged.capacity == {(0, 1): 2000}
    merged = flex(1, Pausing({(0,): 6.0}, 0.01))
    merged.largest_aside = 5000  # of 6000 that there are, and 4400 without those pages
    assert left(merged) == set()


def test_a_pause_that_is_not_over_is_kept_without_any_price() -> None:
    merged = flex(1, Pausing(kept=frozenset({"huge", "gone"})), priced=False)
    merged.room = {(0, 1): 10000}
    assert admitted(merged) == (2, []) and merged.left == {"huge"}
