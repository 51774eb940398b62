"""What becomes of requests at switches: agents and stock schedulers of two engines, without workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import VllmConfig
from vllm.v1.request import RequestStatus

from tests.support.checkpoints import make_checkpoint
from tests.support.stepping import SteppedServer, make_config, make_request
from vllm_flying.scheduler import aborts
from vllm_flying.scheduler.aborts import MOST, UnknownAborts

DP, TP = [(0,), (1,)], [(0, 1)]
PAGES = 10
"""Of 16 tokens, per engine."""


@pytest.fixture(scope="module")
def config(checkpoints: Path) -> VllmConfig:
    return make_config(make_checkpoint("llama", checkpoints), num_engines=2)


@pytest.fixture
def server(config: VllmConfig) -> SteppedServer:
    return SteppedServer(config, 2, PAGES)


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
