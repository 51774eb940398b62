"""What becomes of requests at switches: agents and stock schedulers of two engines, without workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.request import RequestStatus

from tests.support.stepping import SteppedServer, make_request
from vllm_flying.scheduler import aborts, agent
from vllm_flying.scheduler.aborts import MOST, UnknownAborts

DP, TP = [(0,), (1,)], [(0, 1)]
PAGES = 10
"""Of 16 tokens, per engine: 160 tokens, and 320 in a group."""


def test_a_half_computed_prompt_that_begins_again_has_begun(server: SteppedServer) -> None:
    server.switch(TP)
    wide = server.engines[0].facade.schedulers[2]
    wide.max_num_scheduled_tokens, wide.use_v2_model_runner = 40, True
    request = make_request("r", 100, 8)
    request.sampling_params.prompt_logprobs = 1  # half collected, they don't travel
    server.send(0, request)
    server.step()
    assert request.num_computed_tokens == 40
    assert server.switch(DP).journey.recomputed == {"r"}
    second = server.switch(TP)
    assert second.journey.arrived == {"r": 0}, "workers know it: it isn't handed over as a new one"
    assert "r" not in server.engines[0].started[1:]
    server.step(20)
    assert server.finished == {"r": "length"}


def test_an_abort_between_hand_over_and_adoption_ends_a_fresh_request(server: SteppedServer) -> None:
    def hang_up(operation: str, engine: int) -> None:
        if operation == "prepare" and engine == 1:
            server.send(1, make_request("r", 20, 8))
        if operation == "adopt":
            server.abort("r")

    server.switch(TP, before=hang_up)
    server.step(3)
    assert not server.unfinished and not server.engines[0].started


@pytest.mark.parametrize("first", ["admit", "transfer"])
def test_an_abort_that_misses_a_moving_request_at_both_ends_ends_it(server: SteppedServer, first: str) -> None:
    request = server.send(1, make_request("r", 20, 50))
    server.step(3)

    def hang_up(operation: str, engine: int) -> None:
        if operation == first and engine == 0:
            server.abort("r", engines=[0])
        if operation == "commit" and engine == 0:
            server.abort("r", engines=[1])

    assert server.switch(TP, before=hang_up).journey.arrived == {"r": 0}
    server.step(3)
    assert request.num_output_tokens == 3 and not server.unfinished


def test_an_abort_of_everything_names_requests_that_are_moving(server: SteppedServer) -> None:
    server.send(1, make_request("r", 20, 50))
    server.step(3)
    told: list[str] = []

    def pause(operation: str, engine: int) -> None:
        if operation == "commit" and engine == 0:
            for each in server.engines:
                told.extend(r.request_id for r in each.facade.finish_requests(None, RequestStatus.FINISHED_ABORTED))

    server.switch(TP, before=pause)
    server.step(3)
    assert told == ["r"] and not server.unfinished


def test_unknown_aborts_are_few_short_lived_and_not_of_later_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(aborts.time, "time", lambda: now[0])
    unknown, request = UnknownAborts(), SimpleNamespace(request_id="r", arrival_time=99.0)
    unknown.note(["r"])
    assert unknown.of([request]) == ["r"]
    assert unknown.of([SimpleNamespace(request_id="r", arrival_time=101.0)]) == [], "its id is in use again"
    unknown.note(str(number) for number in range(MOST))
    assert len(unknown) == MOST and unknown.of([request]) == []
    now[0] += aborts.LIMIT_S + 1
    unknown.note(["s"])
    assert len(unknown) == 1


def test_a_begun_request_that_would_outgrow_its_group_stays_and_holds_up_nobody(server: SteppedServer) -> None:
    server.switch(TP)
    server.send(0, make_request("long", 60, 160))
    server.step(2)
    assert "finds room" in (server.switch(DP).failure or ""), "alone it would be stranded: undone"
    server.send(0, make_request("short", 20, 40))
    server.step(2)
    split = server.switch(DP)
    assert set(split.journey.arrived) == {"short"} and split.journey.unplaced == 1
    server.step(60)
    server.send(0, make_request("later", 20, 3))
    server.step(10)
    assert server.finished == {"short": "length", "later": "length"}
    server.switch(TP)
    server.step(170)
    assert server.finished["long"] == "length" and not server.unfinished


def test_a_begun_request_does_not_go_where_one_that_stays_has_the_pages(server: SteppedServer) -> None:
    server.switch(TP)
    server.send(0, make_request("long", 60, 160))
    server.send(0, make_request("middle", 20, 120))
    server.send(0, make_request("short", 20, 20))
    server.step(2)
    assert set(server.switch(DP).journey.arrived) == {"short"}, "an engine could hold the middle one but for the long one"


def test_a_limit_that_only_fills_the_context_ends_where_the_group_is_full(server: SteppedServer) -> None:
    server.switch(TP)
    request = server.send(0, make_request("chat", 60))
    server.step(2)
    assert request.max_tokens == 2 * PAGES * 16 - 60
    assert server.switch(DP).journey.arrived
    (moved,) = (r for engine in server.engines for r in engine.facade.active.requests.values())
    assert moved.max_tokens == PAGES * 16 - 60
    server.send(0, make_request("later", 20, 3))
    server.step(110)
    assert moved.num_tokens == PAGES * 16 and server.finished == {"chat": "length", "later": "length"}
    server.send(0, other := make_request("other", 60))
    server.step(2)
    assert other.max_tokens == PAGES * 16 - 60
    server.switch(TP)
    (other,) = server.engines[0].facade.active.requests.values()
    assert other.max_tokens == 2 * PAGES * 16 - 60, "a wider group grants more"


@pytest.mark.parametrize("late", [False, True])
def test_a_fresh_request_that_no_engine_holds_waits_aside_for_a_wider_group(server: SteppedServer, late: bool) -> None:
    server.switch(TP)
    long = make_request("long", 100, 120)
    if not late:
        server.send(0, long)
    server.send(0, make_request("chat", 100))
    server.switch(DP)
    if late:  # routed before the switch
        server.send(0, long)
    for engine in (0, 1):
        server.send(engine, make_request(f"short {engine}", 20, 3))
    server.step(80)
    assert server.finished == {"chat": "length", "short 0": "length", "short 1": "length"}
    statuses = [engine.agent.handle("status", {}) for engine in server.engines]
    assert sum(status["waiting"] for status in statuses) == 1
    assert max(status["largest_request"] for status in statuses) == 220, "a policy that looks after it merges"
    server.switch(TP)
    server.step(130)
    assert server.finished["long"] == "length" and not server.unfinished


def test_a_group_formed_for_an_urgent_request_waits_for_it(
    server: SteppedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "AWAIT_URGENT_S", 60.0)
    for engine in server.engines:
        monkeypatch.setattr(engine.facade, "_defers", True)
    server.send(1, make_request("usual", 20, 50))
    server.step(2)
    server.switch(TP, urgent_follows=True)
    usual = server.engines[0].facade.active.requests["usual"]
    server.step(3)
    assert usual.num_output_tokens == 2
    urgent = make_request("urgent", 20, 3)
    urgent.priority = -1
    server.send(0, urgent)
    server.step(3)
    assert server.finished == {"urgent": "length"} and usual.num_output_tokens == 2
    server.step(2)
    assert usual.num_output_tokens == 4
