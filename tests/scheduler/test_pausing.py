"""Requests that can wait stay paused over a merge, their KV in place: agents and stock schedulers, without workers."""

from __future__ import annotations

from vllm.v1.request import Request

from tests.support.stepping import SteppedServer, make_request
from vllm_flying.core.pauses import Pausing
from vllm_flying.core.pricing import MoveRates
from vllm_flying.core.transaction import Phase
from vllm_flying.frontend.record import switch_record

DP, TP = [(0,), (1,)], [(0, 1)]
PAGES = 10
"""Of 16 tokens, per engine."""
RATES = MoveRates(rounds_s=0.001, seconds_per_byte=1e-6)
SOON = Pausing({(0,): 1.0, (1,): 1.0}, flex_delay_weight=0.001)
"""Both engines are expected to be apart again in a second."""


def begin(server: SteppedServer, name: str, engine: int, prompt: int, max_tokens: int, priority: int) -> Request:
    request = make_request(name, prompt, max_tokens)
    request.priority = priority
    server.send(engine, request)
    server.step(2)
    return request


def test_a_flex_request_waits_for_its_layout_and_an_ordinary_one_moves(server: SteppedServer) -> None:
    flex = begin(server, "flex", 0, 100, 40, priority=1)
    begin(server, "usual", 1, 30, 40, priority=0)
    merge = server.switch(TP, "auto", rates=RATES, pausing=SOON)
    assert merge.phase is Phase.COMMITTED
    assert merge.journey.left == {"flex"} and merge.journey.arrived.keys() == {"usual"}
    record = switch_record(merge, {}, "test")
    assert record["requests"] == {"finished": 0, "moved": 1, "recomputed": 0, "paused": 1}
    assert record["why"]["paused"] == {"price": 1, "room": 0, "need": 0}
    before, pages = flex.num_output_tokens, server.engines[0].facade.pools[1].num_used
    server.step(10)
    assert flex.num_output_tokens == before and server.engines[0].facade.pools[1].num_used == pages
    split = server.switch(DP, "auto", rates=RATES, pausing=SOON)
    assert split.journey.arrived.keys() == {"usual"} and not split.journey.left
    server.step(60)
    assert server.finished == {"flex": "length", "usual": "length"} and not server.unfinished
    assert server.scheduled_tokens == (100 + 40 - 1) + (30 + 40 - 1), "no token is computed twice"


def test_a_group_waits_likewise_over_a_split(server: SteppedServer) -> None:
    server.switch(TP)
    begin(server, "flex", 0, 40, 40, priority=1)
    split = server.switch(DP, "auto", rates=RATES, pausing=Pausing({(0, 1): 1.0}, 0.001))
    assert split.journey.left == {"flex"} and server.engines[0].facade.num_paused == 1
    server.switch(TP, "auto", rates=RATES)
    server.step(60)
    assert server.finished == {"flex": "length"} and not server.unfinished
    assert server.scheduled_tokens == 40 + 40 - 1


def test_both_move_where_nothing_is_known_of_the_pause(server: SteppedServer) -> None:
    begin(server, "flex", 0, 40, 40, priority=1)
    begin(server, "usual", 1, 30, 40, priority=0)
    merge = server.switch(TP, "auto", rates=RATES)
    assert merge.journey.arrived.keys() == {"flex", "usual"} and not merge.journey.left


def test_the_only_begun_request_may_be_left_without_undoing_the_switch(server: SteppedServer) -> None:
    begin(server, "flex", 0, 40, 40, priority=1)
    merge = server.switch(TP, "auto", rates=RATES, pausing=SOON)
    assert merge.phase is Phase.COMMITTED and merge.journey.left == {"flex"} and not merge.journey.unplaced


def test_it_moves_where_a_request_that_has_not_begun_needs_the_room(server: SteppedServer) -> None:
    begin(server, "flex", 0, 60, 40, priority=1)
    server.send(1, make_request("large", 100, 100))
    merge = server.switch(TP, "auto", rates=RATES, pausing=SOON)
    assert merge.journey.arrived.keys() == {"flex"} and not merge.journey.left
    server.step(150)
    assert server.finished == {"flex": "length", "large": "length"} and not server.unfinished


def test_it_is_fetched_once_its_pause_is_over_and_not_with_those_that_lack_room(server: SteppedServer) -> None:
    begin(server, "flex", 0, 40, 40, priority=1)
    begin(server, "usual", 1, 30, 40, priority=0)
    server.switch(TP, "pause")
    fetch = server.switch(TP, "migrate", pausing=Pausing(kept=frozenset({"flex"})))
    assert fetch.journey.arrived.keys() == {"usual"} and fetch.journey.left == {"flex"}
    fetch = server.switch(TP, "migrate", pausing=Pausing())
    assert fetch.journey.arrived.keys() == {"flex"} and not fetch.journey.left
    server.step(60)
    assert server.finished == {"flex": "length", "usual": "length"} and not server.unfinished
    assert server.scheduled_tokens == (40 + 40 - 1) + (30 + 40 - 1)
