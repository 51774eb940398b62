"""Urgent requests in stock schedulers: they get steps and pages, and the others' tokens stay what they would have been.

The engine core and its worker are replaced by a loop that keeps as many steps in flight as vLLM's does.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.checkpoints import make_checkpoint
from tests.support.stepping import PAGE_TOKENS, make_kv_cache_config
from vllm_flying.scheduler import deferral as module
from vllm_flying.scheduler.facade import FlyingScheduler


class Engine:
    """One engine; `in_flight_steps` is 1 for vLLM's synchronous and 2 for its asynchronous loop."""

    def __init__(self, config: VllmConfig, num_pages: int, in_flight_steps: int) -> None:
        config.scheduler_config.async_scheduling = in_flight_steps > 1
        config.cache_config.num_gpu_blocks = num_pages + 1
        manager = StructuredOutputManager(config)
        self.facade = FlyingScheduler(config, make_kv_cache_config(num_pages), manager, PAGE_TOKENS, log_stats=False)
        self.most = in_flight_steps
        self.in_flight: deque[tuple[Any, dict[str, list[int]]]] = deque()
        self.batch: set[str] = set()
        self.slots: set[str] = set()

    def add(self, name: str, prompt: int, output: int, priority: int = 0) -> Request:
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        request = Request(name, [5] * prompt, params, None, priority=priority, arrival_time=float(len(self.all)))
        self.facade.add_request(request)
        return request

    def begin(self, *requests: Request) -> None:
        """Until every one of them has a token."""
        while not all(request.num_output_tokens for request in requests):
            self.turn()

    @property
    def all(self) -> dict[str, Request]:
        return self.facade.active.requests

    def turn(self) -> list[str] | None:
        """As `EngineCore.step_with_batch_queue`; returns who is in the step that was scheduled, if one was."""
        scheduled = None
        if self.facade.has_requests():
            output = self.facade.schedule()
            scheduled = list(output.num_scheduled_tokens)
            self.run(output)
            if len(self.in_flight) < self.most and (scheduled or self.facade.has_requests()):
                return scheduled
        if self.in_flight:
            output, tokens = self.in_flight.popleft()
            ids = list(tokens)
            index = {name: i for i, name in enumerate(ids)}
            self.facade.update_from_output(output, ModelRunnerOutput(ids, index, [tokens[name] for name in ids]))
        return scheduled

    def run(self, output: Any) -> None:
        """A sampled token is its own position.

        Runner V1 needs all tokens of whoever wasn't in the batch before, Runner V2 a slot for every request it knows.
        """
        self.slots -= output.finished_req_ids | output.preempted_req_ids
        self.slots |= output.num_scheduled_tokens.keys()
        assert len(self.slots) <= self.facade.active.max_num_running_reqs
        cached = output.scheduled_cached_reqs
        for name, num_output_tokens in zip(cached.req_ids, cached.num_output_tokens, strict=True):
            if num_output_tokens and (name in cached.resumed_req_ids or name not in self.batch):
                assert name in cached.all_token_ids
        self.batch = set(output.num_scheduled_tokens)
        requests = [self.all[name] for name in output.num_scheduled_tokens]
        tokens = {r.request_id: [] if r.is_prefill_chunk else [r.num_computed_tokens] for r in requests}
        self.in_flight.append((output, tokens))

    def steps_until_done(self, *requests: Request, most: int = 400) -> list[list[str]]:
        steps: list[list[str]] = []
        for _ in range(most):
            if all(request.is_finished() for request in requests):
                while steps and not steps[-1]:
                    steps.pop()  # made while the last tokens were in flight
                return steps
            scheduled = self.turn()
            steps += [] if scheduled is None else [scheduled]
        raise AssertionError(f"not done after {most} turns")


def assert_complete(*requests: Request) -> None:
    for request in requests:
        first = request.num_prompt_tokens
        assert request.status == RequestStatus.FINISHED_LENGTH_CAPPED
        assert list(request.output_token_ids) == list(range(first, first + request.max_tokens))


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    return clock


@pytest.fixture
def config(checkpoints: Path) -> VllmConfig:
    settings = {"policy": "priority", "deferred_limit_s": 5}
    arguments = EngineArgs(
        model=str(make_checkpoint("llama", checkpoints)),
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=8,
        enable_prefix_caching=False,
        additional_config={"flying": settings},
    )
    return arguments.create_engine_config()


in_flight_steps = pytest.mark.parametrize("in_flight_steps", [1, 2])


@in_flight_steps
def test_an_urgent_one_gets_the_pages_of_the_last(config: VllmConfig, in_flight_steps: int, now: list[float]) -> None:
    engine = Engine(config, 10, in_flight_steps)
    others = [engine.add("a", 72, 8), engine.add("b", 72, 8)]
    engine.begin(*others)
    urgent = engine.add("u", 20, 5, priority=-1)
    steps = engine.steps_until_done(urgent)
    assert steps.count([]) <= in_flight_steps
    assert [other.num_preemptions for other in others] == [0, 1]
    engine.steps_until_done(*others)
    assert_complete(urgent, *others)


@in_flight_steps
def test_an_urgent_one_outgrows_what_is_free(config: VllmConfig, in_flight_steps: int, now: list[float]) -> None:
    engine = Engine(config, 10, in_flight_steps)
    others = [engine.add("a", 60, 4), engine.add("b", 60, 4)]
    engine.begin(*others)
    urgent = engine.add("u", 20, 40, priority=-1)
    steps = engine.steps_until_done(urgent)
    assert steps.count([]) <= 3 * in_flight_steps
    engine.steps_until_done(*others)
    assert_complete(urgent, *others)


@in_flight_steps
def test_nobody_stands_back_for_what_no_pages_help(config: VllmConfig, in_flight_steps: int, now: list[float]) -> None:
    engine = Engine(config, 10, in_flight_steps)
    other = engine.add("a", 60, 30)
    engine.begin(other)
    engine.facade.pools[1].withdraw(4)  # held by another layout
    urgent = engine.add("u", 100, 5, priority=-1)
    assert engine.steps_until_done(other).count([]) <= 3 * in_flight_steps
    assert_complete(other)
    assert not urgent.num_output_tokens


@in_flight_steps
def test_nobody_stands_back_while_a_grammar_is_compiled(
    config: VllmConfig, in_flight_steps: int, now: list[float]
) -> None:
    engine = Engine(config, 20, in_flight_steps)
    other = engine.add("a", 20, 30)
    urgent = engine.add("u", 20, 5, priority=-1)
    compiled = [False]

    class Structured:
        is_grammar_ready = property(lambda self: compiled[0])
        grammar = property(lambda self: None)

    urgent.structured_output_request = Structured()  # type: ignore[assignment]
    urgent.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    while other.num_output_tokens < 5:
        assert engine.turn() != []
    compiled[0] = True
    urgent.structured_output_request = None
    urgent.status = RequestStatus.WAITING
    steps = engine.steps_until_done(urgent)
    assert steps.count(["u"]) >= 4
    assert [] not in steps
    engine.steps_until_done(other)
    assert_complete(urgent, other)


@in_flight_steps
def test_an_urgent_one_has_its_steps_to_itself(config: VllmConfig, in_flight_steps: int, now: list[float]) -> None:
    engine = Engine(config, 40, in_flight_steps)
    others = [engine.add("a", 20, 30), engine.add("b", 40, 30)]
    engine.begin(*others)
    urgent = engine.add("u", 20, 10, priority=-1)
    late = engine.add("c", 20, 5)
    assert engine.steps_until_done(urgent)[:10] == [["u"]] * 10
    engine.steps_until_done(*others, late)
    assert_complete(urgent, late, *others)


@in_flight_steps
def test_overlapping_urgent_ones_keep_nobody_waiting(config: VllmConfig, in_flight_steps: int, now: list[float]) -> None:
    engine = Engine(config, 100, in_flight_steps)
    other = engine.add("a", 20, 20)
    for number in range(40):
        engine.add(f"u{number}", 10, 6, priority=-1)
        for _ in range(4):
            engine.turn()
            now[0] += 0.1
    assert now[0] < 117
    assert_complete(other)


@in_flight_steps
@pytest.mark.parametrize("ends", ["abort", "limit", "switch"])
def test_who_goes_on_at_once_loses_no_token(
    config: VllmConfig, in_flight_steps: int, ends: str, now: list[float]
) -> None:
    for turns in range(in_flight_steps + 2):
        engine = Engine(config, 40, in_flight_steps)
        others = [engine.add("a", 20, 10), engine.add("b", 40, 10)]
        engine.begin(*others)
        urgent = engine.add("u", 20, 5, priority=-1)
        engine.facade._update_deferral()
        for _ in range(turns):
            engine.turn()
        if ends == "abort":
            engine.facade.finish_requests("u", RequestStatus.FINISHED_ABORTED)
        elif ends == "limit":
            now[0] += 100
        else:  # as EngineAgent.prepare
            engine.facade.deferral.put_back(engine.facade.active)
            engine.facade.stopped = True
            while engine.facade.steps_in_flight:
                engine.turn()
            assert not len(engine.facade.deferral)
            engine.facade.stopped = False
        engine.steps_until_done(*others)
        assert_complete(*others, *([] if ends == "abort" else [urgent]))
        assert not any(other.num_preemptions for other in others)


@in_flight_steps
def test_a_pause_lets_begun_ones_end(config: VllmConfig, in_flight_steps: int, now: list[float]) -> None:
    engine = Engine(config, 40, in_flight_steps)
    other = engine.add("a", 20, 10)
    engine.begin(other)
    urgent = engine.add("u", 20, 5, priority=-1)
    engine.facade._update_deferral()
    engine.facade.set_pause_state(PauseState.PAUSED_NEW)
    while engine.facade.has_requests() or engine.in_flight:
        engine.turn()
    assert_complete(other)
    assert not urgent.num_output_tokens
    engine.facade.set_pause_state(PauseState.UNPAUSED)
    engine.steps_until_done(urgent)
    assert_complete(urgent)


@in_flight_steps
def test_an_urgent_one_finds_a_slot_in_a_full_batch(config: VllmConfig, in_flight_steps: int, now: list[float]) -> None:
    engine = Engine(config, 40, in_flight_steps)
    others = [engine.add(str(number), 20, 10) for number in range(8)]
    engine.begin(*others)
    urgent = engine.add("u", 20, 5, priority=-1)
    engine.steps_until_done(urgent, *others)
    assert_complete(urgent, *others)


@in_flight_steps
def test_resetting_prefixes_takes_all_pages_back(config: VllmConfig, in_flight_steps: int, now: list[float]) -> None:
    for stands_back in (True, False):
        engine = Engine(config, 40, in_flight_steps)
        others = [engine.add("a", 20, 10), engine.add("b", 40, 10)]
        engine.begin(*others)
        urgent = engine.add("u", 20, 10, priority=-1)
        engine.turn()
        engine.turn()
        engine.facade.pools[1].withdraw(5)  # held by another layout
        if not stands_back:
            engine.facade.set_pause_state(PauseState.PAUSED_ALL)
            while engine.in_flight:
                engine.turn()
        assert engine.facade.reset_prefix_cache(reset_running_requests=True)
        engine.facade.set_pause_state(PauseState.UNPAUSED)
        engine.steps_until_done(*others, urgent)
        assert [r.num_preemptions for r in (*others, urgent)] == [1, 1, 1]
        assert_complete(*others, urgent)


@in_flight_steps
@pytest.mark.parametrize("comes", [True, False])
def test_an_awaited_one_finds_no_step_of_others(
    config: VllmConfig, in_flight_steps: int, comes: bool, now: list[float]
) -> None:
    engine = Engine(config, 20, in_flight_steps)
    other = engine.add("a", 60, 20)
    engine.begin(other)
    engine.facade.await_urgent(0.02)
    for _ in range(4):
        assert engine.facade.has_requests() and engine.facade.has_unfinished_requests()
        assert not engine.turn()
        now[0] += 0.004
    if comes:
        urgent = engine.add("u", 20, 5, priority=-1)
        steps = engine.steps_until_done(urgent)
        assert [step for step in steps if step] == [["u"]] * 5
        assert_complete(urgent)
    else:
        now[0] += 0.01
        assert engine.turn() == ["a"]
    engine.steps_until_done(other)
    assert_complete(other)
    assert not engine.facade.has_unfinished_requests()


@in_flight_steps
def test_an_awaited_one_that_does_not_come_leaves_an_idle_engine_at_rest(
    config: VllmConfig, in_flight_steps: int, now: list[float]
) -> None:
    engine = Engine(config, 20, in_flight_steps)
    engine.facade.await_urgent(0.02)
    for _ in range(3):
        engine.turn()
        now[0] += 0.01
    assert not engine.facade.has_requests()
