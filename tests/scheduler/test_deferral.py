"""Others stand back for an urgent request, in order, never for ever, and nobody is lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import RequestStatus

from vllm_flying.scheduler import deferral as module
from vllm_flying.scheduler.deferral import Deferral


class Request(SimpleNamespace):
    def is_finished(self) -> bool:
        return RequestStatus.is_finished(self.status)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def make_request(name: int, priority: int, begun: bool) -> Request:
    status = RequestStatus.RUNNING if begun else RequestStatus.WAITING
    counts = {"num_computed_tokens": 5 * begun, "num_in_flight_tokens": 0}
    return Request(name=name, request_id=str(name), priority=priority, status=status, resumable=False, **counts)


class Scheduler:
    """The queues of a stock scheduler, with stock queues in them."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = {request.name: request for request in requests}
        self.running = [request for request in requests if request.status == RequestStatus.RUNNING]
        self.waiting: Any = create_request_queue(SchedulingPolicy.FCFS)
        self.kv_holding_waiting: Any = create_request_queue(SchedulingPolicy.FCFS)
        self.pause_state = PauseState.UNPAUSED
        self.prev_step_scheduled_req_ids: set[str] = set()
        self.reset_preempted_req_ids: set[str] = set()
        self._inflight_prefills: set[Request] = set(self.running)
        for request in requests:
            if request.status == RequestStatus.WAITING:
                self._enqueue_waiting_request(request)

    def _enqueue_waiting_request(self, request: Request) -> None:
        (self.kv_holding_waiting if request.num_computed_tokens else self.waiting).add_request(request)

    def schedulable(self) -> list[int]:
        queues = (self.running, self.kv_holding_waiting, self.waiting)
        return [request.name for queue in queues for request in queue]


requests = st.lists(st.tuples(st.sampled_from([-1, 0, 1]), st.booleans()), max_size=8)


@given(requests)
def test_urgent_ones_run_alone_and_then_all_go_on_in_order(kinds: list[tuple[int, bool]]) -> None:
    made = [make_request(name, priority, begun) for name, (priority, begun) in enumerate(kinds)]
    scheduler, deferral = Scheduler(made), Deferral(limit_s=100)
    before = scheduler.schedulable()
    for request in made:
        deferral.saw(request)  # type: ignore[arg-type]
    deferral.update(scheduler)
    urgent = [request.name for request in made if request.priority < 0]
    assert scheduler.schedulable() == ([name for name in before if name in urgent] if urgent else before)
    assert len(deferral) == (len(made) - len(urgent) if urgent else 0)
    for name in urgent:
        made[name].status = RequestStatus.FINISHED_STOPPED
        scheduler.running = [request for request in scheduler.running if request.name != name]
        scheduler.waiting.remove_requests([made[name]])
    deferral.update(scheduler)
    assert scheduler.schedulable() == [name for name in before if name not in urgent]
    assert len(deferral) == 0
    assert all(not request.is_finished() or request.name in urgent for request in made)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One number: what the clock says."""
    moment = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: moment[0])
    return moment


def beside_an_urgent_one() -> tuple[list[Any], Scheduler, Deferral]:
    """Request 1 is urgent and 0 isn't; nobody has stood back yet, and may for five seconds."""
    made = [make_request(0, 0, True), make_request(1, -1, True)]
    scheduler, deferral = Scheduler(made), Deferral(limit_s=5)
    deferral.saw(made[1])  # type: ignore[arg-type]
    return made, scheduler, deferral


def test_nobody_stands_back_for_longer_than_the_limit(now: list[float]) -> None:
    _, scheduler, deferral = beside_an_urgent_one()
    deferral.update(scheduler)
    assert scheduler.schedulable() == [1]
    now[0] = 105.1
    for _ in range(2):
        deferral.update(scheduler)
        assert sorted(scheduler.schedulable()) == [0, 1]


def test_who_was_aborted_meanwhile_does_not_come_back() -> None:
    made, scheduler, deferral = beside_an_urgent_one()
    deferral.update(scheduler)
    made[0].status = RequestStatus.FINISHED_ABORTED
    deferral.put_back(scheduler)
    assert scheduler.schedulable() == [1]


@given(st.lists(st.tuples(st.floats(0.05, 6.0), st.floats(0.05, 1.0)), min_size=40, max_size=60))
def test_urgent_ones_that_keep_coming_leave_the_others_about_half_of_the_time(turns: list[tuple[float, float]]) -> None:
    """Each turn is seconds with an urgent one, and seconds without; a step takes 50 ms."""
    limit_s, step_s, now = 2.0, 0.05, 1000.0
    other = make_request(0, 0, True)
    scheduler, deferral = Scheduler([other]), Deferral(limit_s)
    kept_from, longest, without_step = 0.0, 0.0, 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.time, "monotonic", lambda: now)
        for name, (urgent_s, quiet_s) in enumerate(turns, 1):
            urgent = make_request(name, -1, True)
            scheduler.requests[name] = urgent
            scheduler.running.append(urgent)
            deferral.saw(urgent)  # type: ignore[arg-type]
            ends = now + urgent_s
            while now < ends + quiet_s:
                if now >= ends and urgent in scheduler.running:
                    urgent.status = RequestStatus.FINISHED_STOPPED
                    scheduler.running.remove(urgent)
                    del scheduler.requests[name]
                deferral.update(scheduler)
                without_step = 0.0 if 0 in scheduler.schedulable() else without_step + step_s
                kept_from += step_s * (without_step > 0)
                longest = max(longest, without_step)
                now += step_s
    assert longest <= limit_s + 2 * step_s
    assert kept_from <= (now - 1000.0) / 2 + limit_s + 2 * step_s
    assert 0 in scheduler.schedulable()


def test_after_a_quiet_while_the_whole_limit_holds_again(now: list[float]) -> None:
    made, scheduler, deferral = beside_an_urgent_one()
    for moment in (100.0, 105.1):
        now[0] = moment
        deferral.update(scheduler)
    made[1].status = RequestStatus.FINISHED_STOPPED
    scheduler.running.remove(made[1])
    deferral.update(scheduler)
    again = make_request(2, -1, True)
    scheduler.requests[2] = again
    scheduler.running.append(again)
    now[0] = 111.0
    deferral.saw(again)  # type: ignore[arg-type]
    deferral.update(scheduler)
    assert scheduler.schedulable() == [2]
