"""Requests that stand back while an urgent one runs on their engine.

May import vllm. A request that stands back keeps its KV and its place: it goes on as stock vLLM resumes one whose KV came
from a connector. Only where an urgent one finds no pages, the others give up theirs, one by one, as at a stock
preemption. Urgent is a priority better than vLLM's usual 0. No request stands back for longer than a limit, nor for more
than about half of the time where urgent ones keep coming.
"""

from __future__ import annotations

import math
import time
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from vllm_flying.scheduler.preemption import preempt

QUEUED = (RequestStatus.WAITING, RequestStatus.PREEMPTED)
MOVABLE = (RequestStatus.RUNNING, *QUEUED)


def _is_urgent(request: Request) -> bool:
    return request.priority < 0 and not request.is_finished()


def _can_run(request: Request) -> bool:
    """Whether steps get it further: neither its grammar nor more of its input is awaited."""
    if request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
        structured = request.structured_output_request
        return structured is not None and structured.is_grammar_ready
    return request.status in MOVABLE


def _num_pages(scheduler: Any, request: Request) -> int:
    if not request.num_computed_tokens:
        return 0
    (pages,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
    return len(pages)


class Deferral:
    """Of one engine. Costs nothing until an urgent request comes."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._aside: list[Request] = []
        self._expected = False
        """Whether there may be urgent requests."""
        self._looked = -math.inf
        self._was_urgent = False
        self._due = -math.inf
        """Until when an urgent request is awaited; long ago if none is."""
        self._stood_back_s = 0.0
        """Rises while others stand back, and falls as fast while they don't."""
        self._all_share = False
        """The limit is used up: nobody stands back until that time is given back and there is a while without urgent ones."""

    def __len__(self) -> int:
        return sum(not request.is_finished() for request in self._aside)

    def saw(self, request: Request) -> None:
        """A request enters a scheduler of this engine."""
        self._expected |= request.priority < 0

    def await_urgent(self, seconds: float) -> None:
        """One is on its way: others stand back for it already, or a step of theirs would be in its way."""
        self._due, self._expected = time.monotonic() + seconds, True

    @property
    def awaits(self) -> bool:
        """Whether the engine must go on stepping, though with nobody in the steps: `update` ends this."""
        return self._due > -math.inf

    def update(self, scheduler: Any) -> None:
        """Between steps, whatever is in flight: who stands back, and who goes on."""
        if not self._expected and not self._aside:
            return
        self._take_time()
        urgent = [request for request in scheduler.requests.values() if _is_urgent(request)]
        if urgent or self._looked >= self._due:
            self._due = -math.inf
        self._expected = bool(urgent) or self.awaits
        runs = self.awaits or any(_can_run(request) for request in urgent)
        self._was_urgent = scheduler.pause_state == PauseState.UNPAUSED and runs
        if self._was_urgent and not self._all_share:
            self._set_aside(scheduler)
        else:
            self.put_back(scheduler)

    def _take_time(self) -> None:
        """Without memory of it, urgent ones with a step between them would leave the others that step only."""
        now = time.monotonic()
        elapsed, self._looked = now - self._looked, now
        self._stood_back_s = max(0.0, self._stood_back_s + (elapsed if self._aside else -elapsed))
        if self._stood_back_s > self._limit_s:
            self._all_share = True
        elif not self._stood_back_s and not self._was_urgent:
            self._all_share = False

    def _set_aside(self, scheduler: Any) -> None:
        running = [request for request in scheduler.running if request.priority >= 0]
        queued = [request for queue in (scheduler.kv_holding_waiting, scheduler.waiting) for request in queue
                  if request.priority >= 0 and request.status in MOVABLE]  # fmt: skip
        for request in running:
            scheduler.running.remove(request)
            scheduler._inflight_prefills.discard(request)
            request.status = RequestStatus.PREEMPTED
            scheduler.reset_preempted_req_ids.add(request.request_id)  # frees its place in Runner V2's batch
        scheduler.waiting.remove_requests(queued)
        scheduler.kv_holding_waiting.remove_requests(queued)
        self._aside += running + queued

    def make_room(self, scheduler: Any) -> None:
        """After a step with nothing in it: an urgent one that is queued lacks pages, so another one gives up its own."""
        if not self._aside or any(request.num_in_flight_tokens for request in scheduler.requests.values()):
            return  # what is in flight may end and free pages
        queued = (request for queue in (scheduler.kv_holding_waiting, scheduler.waiting) for request in queue)
        urgent = next((request for request in queued if _is_urgent(request) and request.status in QUEUED), None)
        if urgent is None:
            return
        pages = {request: _num_pages(scheduler, request) for request in self._aside if not request.is_finished()}
        missing = -(-urgent.num_tokens // scheduler.block_size) - _num_pages(scheduler, urgent)
        within_reach = scheduler.kv_cache_manager.block_pool.get_num_free_blocks() + sum(pages.values())
        holding = [request for request, num_pages in pages.items() if num_pages]
        if holding and missing <= within_reach:  # whom stock vLLM would preempt first, scheduling by priority
            self._give_up_kv(scheduler, max(holding, key=lambda request: (request.priority, request.arrival_time)))
        else:  # giving up doesn't help it: from here on as after the limit
            self._all_share = True
            self.put_back(scheduler)

    def give_up_kv(self, scheduler: Any) -> None:
        """All that stand back compute their KV again when they go on."""
        for request in self._aside:
            if request.num_computed_tokens and not request.is_finished():
                self._give_up_kv(scheduler, request)

    @staticmethod
    def _give_up_kv(scheduler: Any, request: Request) -> None:
        preempt(scheduler, request)
        scheduler.waiting.remove_requests([request])

    def put_back(self, scheduler: Any) -> None:
        """Let all go on, in the order in which they stood back.

        Who has tokens in flight follows when they are in: stock vLLM resumes a request that has all of its tokens.
        """
        unfinished = [request for request in self._aside if not request.is_finished()]
        self._aside = [request for request in unfinished if request.num_in_flight_tokens]
        for request in unfinished:
            if not request.num_in_flight_tokens:
                # If no step came between, the worker must all the same be told the tokens that it has.
                scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
                scheduler._enqueue_waiting_request(request)
