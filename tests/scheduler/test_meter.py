"""An engine counts how long requests took that one group had from arrival to last token, and no others."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.stepping import SteppedServer, make_config
from vllm_flying.scheduler import meter as module
from vllm_flying.scheduler.meter import FIRST_STEPS, EngineMeter


def request(arrival_time: float, finished: bool = True) -> Any:
    return SimpleNamespace(
        arrival_time=arrival_time, num_prompt_tokens=10, num_output_tokens=3, is_finished=lambda: finished
    )  # fmt: skip


def step(meter: EngineMeter, *requests: Any) -> None:
    scheduled = {str(index): 1 for index in range(len(requests))}
    output = SimpleNamespace(num_scheduled_tokens=scheduled, total_num_scheduled_tokens=len(requests))
    meter.step_begins(output, dict(zip(scheduled, requests)))
    meter.step_ends(output, 1)


def test_requests_of_one_group_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: now[0], perf_counter=lambda: now[0]))
    meter = EngineMeter([1, 2])
    step(meter, request(998.0), request(999.0, finished=False))
    report = meter.report()
    assert (report["requests_served"], report["seconds_served"]) == (1, 2.0)
    assert (report["prompt_tokens_served"], report["output_tokens_served"]) == (10, 3)
    meter.group_changed()
    now[0] = 1004.0
    step(meter, request(999.0), request(1001.0))
    report = meter.report()
    assert report["requests_finished"] == 3
    assert (report["requests_served"], report["seconds_served"]) == (2, 5.0), "one began in another group"


def test_first_steps_are_counted_but_not_learned_from() -> None:
    meter = EngineMeter([1, 2])
    for _ in range(FIRST_STEPS):
        step(meter, request(1.0))
    report = meter.report()
    assert report["requests_finished"] == FIRST_STEPS and not report["costs"]
    step(meter, request(1.0))
    assert meter.costs[1].steps == 1


def test_a_commit_begins_another_group(checkpoints: Path) -> None:
    server = SteppedServer(make_config(make_checkpoint("llama", checkpoints), 2), 2, pages=8)
    before = time.time()
    server.switch([(0, 1)])
    meter = server.engines[0].facade.meter
    step(meter, request(before - 1.0), request(time.time()))
    assert (meter.requests_finished, meter.requests_served) == (2, 1)
