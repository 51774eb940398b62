"""Requests give up their KV and compute it again: stock preemption, for requests that aren't running too.

May import vllm.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.request import Request, RequestStatus


def preempt(scheduler: Any, request: Request, drop_stale_output: bool = False) -> None:
    """Free the request's pages; it comes first in `waiting`. It must be in no queue."""
    request.status = RequestStatus.RUNNING  # of these only does stock vLLM free the pages
    scheduler._preempt_request(request, time.monotonic(), drop_stale_output)


def preempt_all(scheduler: Any) -> None:
    """Free every page that running and queued requests hold, as stock `reset_prefix_cache` does for running ones.

    That one can't be called: it counts pages that another layout owns as held.
    """
    for request in reversed([r for r in scheduler.kv_holding_waiting if r.status == RequestStatus.PREEMPTED]):
        scheduler.kv_holding_waiting.remove_requests([request])
        preempt(scheduler, request)
    while scheduler.running:
        preempt(scheduler, scheduler.running.pop(), drop_stale_output=True)
    scheduler.prev_step_scheduled_req_ids.clear()  # they may be resumed in the next step already
