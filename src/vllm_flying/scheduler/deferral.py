"""Requests that stand back while an urgent one runs on their engine.

May import vllm. A request that stands back keeps its KV and its place: it goes on as stock vLLM resumes one whose KV came
from a connector. Urgent is a priority better than vLLM's usual 0. No request stands back for longer than a limit.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.request import Request, RequestStatus

MOVABLE = (RequestStatus.RUNNING, RequestStatus.WAITING, RequestStatus.PREEMPTED)


class Deferral:
    """Of one engine. Costs nothing until an urgent request comes."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._aside: list[Request] = []
        self._expected = False
        """Whether there may be urgent requests."""
        self._since: float | None = None

    def __len__(self) -> int:
        return len(self._aside)

    def saw(self, request: Request) -> None:
        """A request enters a scheduler of this engine."""
        self._expected |= request.priority < 0

    def update(self, scheduler: Any) -> None:
        """Before a step, with none in flight: who stands back, and who goes on."""
        if not self._expected:
            return
        if not any(r.priority < 0 and not r.is_finished() for r in scheduler.requests.values()):
            self._expected, self._since = False, None
            self.put_back(scheduler)
            return
        if self._since is None:
            self._since = time.monotonic()
        if time.monotonic() - self._since > self._limit_s:
            self.put_back(scheduler)
        else:
            self._set_aside(scheduler)

    def _set_aside(self, scheduler: Any) -> None:
        running = [request for request in scheduler.running if request.priority >= 0]
        queued = [request for queue in (scheduler.kv_holding_waiting, scheduler.waiting) for request in queue
                  if request.priority >= 0 and request.status in MOVABLE]  # fmt: skip
        for request in running:
            scheduler.running.remove(request)
            scheduler._inflight_prefills.discard(request)
            request.status = RequestStatus.PREEMPTED
        scheduler.waiting.remove_requests(queued)
        scheduler.kv_holding_waiting.remove_requests(queued)
        self._aside += running + queued

    def put_back(self, scheduler: Any) -> None:
        """Let all go on, in the order in which they stood back."""
        aside, self._aside = self._aside, []
        for request in aside:
            if not request.is_finished():
                scheduler._enqueue_waiting_request(request)
