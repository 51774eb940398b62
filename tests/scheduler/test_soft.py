"""Switches with the method `soft`: agents and stock schedulers of two engines, without workers."""

from __future__ import annotations

import pytest
from vllm.v1.request import Request

from tests.support.stepping import SteppedServer, make_request
from vllm_flying.core.transaction import Phase
from vllm_flying.frontend.record import switch_record
from vllm_flying.scheduler.errors import SwitchRefused

DP, TP = [(0,), (1,)], [(0, 1)]
PAGES = 10
"""Of 16 tokens, per engine."""


def begin(server: SteppedServer, name: str, engine: int, max_tokens: int) -> Request:
    request = server.send(engine, make_request(name, 20, max_tokens))
    server.step(2)
    assert request.num_output_tokens == 2
    return request


def states(server: SteppedServer) -> list[str]:
    return [str(engine.agent.handle("status", {})["state"]) for engine in server.engines]


def test_a_request_begins_on_the_free_engine_and_its_kv_moves_at_the_merge(server: SteppedServer) -> None:
    old = begin(server, "old", 0, 10)
    late = make_request("late", 20, 40)
    steps = 0

    def meanwhile() -> None:
        nonlocal steps
        steps += 1
        if steps == 1:
            assert states(server) == ["switching", "serving"]
            server.send(0, late)
            server.send(1, make_request("new", 30, 40))
        assert late.num_computed_tokens == 0, "an engine that drains does nothing else"

    merge = server.switch(TP, "soft", meanwhile=meanwhile)
    assert merge.phase is Phase.COMMITTED and old.num_output_tokens == 10 and server.finished == {"old": "length"}
    assert merge.journey.arrived.keys() == {"new"} and merge.journey.offers["new"].tokens == 30 + 8 - 1
    assert not merge.journey.recomputed
    assert switch_record(merge, {}, "test")["requests"] == {"finished": 1, "moved": 1, "recomputed": 0, "paused": 0}
    server.step(60)
    assert server.finished == {"old": "length", "new": "length", "late": "length"} and not server.unfinished
    assert server.scheduled_tokens == (20 + 10 - 1) + (30 + 40 - 1) + (20 + 40 - 1), "no token is computed twice"


def test_an_engine_that_is_done_serves_what_was_kept_aside_until_the_others_are(server: SteppedServer) -> None:
    begin(server, "short", 1, 6)
    begin(server, "long", 0, 20)
    aside = server.send(1, make_request("aside", 20, 40))

    def meanwhile() -> None:
        if "short" in server.finished and aside.num_output_tokens:
            assert states(server) == ["switching", "serving"]

    merge = server.switch(TP, "soft", meanwhile=meanwhile)
    assert aside.num_output_tokens > 10, "it was begun long before the merge"
    assert merge.journey.arrived.keys() == {"aside"}
    assert switch_record(merge, {}, "test")["requests"]["finished"] == 2
    server.step(40)
    assert server.finished["aside"] == "length" and not server.unfinished


def test_a_group_drains_before_it_splits(server: SteppedServer) -> None:
    server.switch(TP)
    begin(server, "old", 0, 10)
    aside = server.send(0, make_request("aside", 20, 5))
    split = server.switch(DP, "soft")
    assert split.phase is Phase.COMMITTED and server.finished == {"old": "length"} and not split.journey.offers
    assert not aside.num_output_tokens
    server.step(10)
    assert server.finished["aside"] == "length" and not server.unfinished


@pytest.mark.parametrize("reason", ["time limit", None])
def test_a_drain_that_is_called_off_leaves_everything_where_it_is(server: SteppedServer, reason: str | None) -> None:
    begin(server, "old", 0, 100)
    aside, steps = make_request("aside", 20, 5), 0

    def meanwhile() -> str | None:
        nonlocal steps
        steps += 1
        if steps == 1:
            server.send(0, aside)
            server.send(1, make_request("new", 20, 5))
        if steps == 4 and reason is None:
            raise SystemExit  # the API server is gone
        return reason if steps == 4 else None

    if reason is None:
        with pytest.raises(SystemExit):
            server.switch(TP, "soft", meanwhile=meanwhile)
        with pytest.raises(SwitchRefused, match="switched already"):
            server.switch(TP)
        server.step(120)
    else:
        assert server.switch(TP, "soft", meanwhile=meanwhile).phase is Phase.ROLLED_BACK
        assert states(server) == ["serving", "serving"]
        server.step()
        assert aside.num_output_tokens == 1
        server.step(120)
    assert server.finished == dict.fromkeys(("old", "new", "aside"), "length") and not server.unfinished
    assert server.switch(TP).phase is Phase.COMMITTED


def test_an_abort_ends_the_wait(server: SteppedServer) -> None:
    begin(server, "old", 0, 100)
    steps = 0

    def meanwhile() -> None:
        nonlocal steps
        steps += 1
        assert steps < 10
        if steps == 3:
            server.abort("old")

    merge = server.switch(TP, "soft", meanwhile=meanwhile)
    assert merge.phase is Phase.COMMITTED and not merge.journey.offers and not server.unfinished


def test_a_refusal_of_the_switch_after_the_drain_undoes_it_as_any_other(server: SteppedServer) -> None:
    begin(server, "old", 0, 5)

    def before(operation: str, engine: int) -> None:
        if operation == "prepare" and engine == 1:
            server.engines[1].agent.epoch = 99  # it has seen a later switch

    with pytest.raises(SwitchRefused, match="is over"):
        server.switch(TP, "soft", before=before)
    server.engines[1].agent.epoch = 0
    for engine in server.engines:
        engine.agent.cancel(server.epoch)
    assert states(server) == ["serving", "serving"]
