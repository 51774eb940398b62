"""The source side of a migration: what an engine offers of its paused requests, and letting go of what has arrived.

May import vllm. Until a request is released here nothing about it has changed, so a switch can be undone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.request import Request, RequestStatus

from vllm_flying.core import pricing
from vllm_flying.core.pricing import MoveRates
from vllm_flying.scheduler.facade import FlyingScheduler
from vllm_flying.scheduler.handover import has_begun, pack_begun
from vllm_flying.scheduler.limits import kv_tokens_needed


def paused_widths(facade: FlyingScheduler) -> list[int]:
    """Widths in which this engine keeps unfinished requests, the active one included, or pages of a former group.

    Requests that end while their layout is no more leave such pages behind.
    """
    return [
        width
        for width, scheduler in facade.schedulers.items()
        if scheduler.requests or (width > 1 and _is_inactive(facade, width) and facade.pools[width].num_owned)
    ]


def _is_inactive(facade: FlyingScheduler, width: int) -> bool:
    return facade.parked or width != facade.active_width


def begun_requests(facade: FlyingScheduler, active_width: int | None) -> dict[int, list[Request]]:
    """Begun requests by width, but for those of `active_width`, which go on here."""
    return {
        width: [r for r in scheduler.requests.values() if has_begun(r) and not r.is_finished()]
        for width, scheduler in facade.schedulers.items()
        if width != active_width
    }


def kept(facade: FlyingScheduler) -> tuple[int, int]:
    """Begun requests of all widths, and the tokens of their KV: what a new layout may have to find room for."""
    requests = [request for requests in begun_requests(facade, None).values() for request in requests]
    return len(requests), sum(request.num_computed_tokens for request in requests)


def can_move(request: Request) -> bool:
    """Whether another layout can go on with a begun request."""
    return request.status in (RequestStatus.RUNNING, RequestStatus.PREEMPTED, RequestStatus.WAITING)


def _must_begin_again(request: Request, use_v2_model_runner: bool) -> bool:
    """Runner V2 collects prompt logprobs in a buffer of its own, which doesn't travel."""
    collects = request.sampling_params.prompt_logprobs is not None
    return use_v2_model_runner and collects and request.num_computed_tokens < request.num_prompt_tokens


def make_offer(facade: FlyingScheduler, width: int, request: Request, state: bytes | None) -> dict[str, Any]:
    """One request as plain values: see `core.migration.Offer`."""
    manager = facade.schedulers[width].kv_cache_manager
    begins_again = _must_begin_again(request, facade.schedulers[width].use_v2_model_runner)
    (pages,) = manager.get_block_ids(request.request_id) if request.num_computed_tokens else ([],)
    return {
        **placing(facade, request, pages),
        "width": width,
        "packed": pack_begun(request),
        "state": state,
        "kv_bytes": len(pages) * page_bytes(facade) * width,
        "begins_again": begins_again,
        # Prompt logprobs are collected on the way through the prompt: halfway, they would be collected twice.
        "recomputable": begins_again or request.sampling_params.prompt_logprobs is None,
    }


def placing(facade: FlyingScheduler, request: Request, pages: Sequence[int]) -> dict[str, Any]:
    """What decides where one request goes, as fields of `core.migration.Offer`."""
    return {
        "request_id": request.request_id,
        "tokens": request.num_computed_tokens,
        "pages": list(pages),
        "priority": request.priority,
        "arrival_time": request.arrival_time,
        "most_tokens": kv_tokens_needed(request, facade.max_model_len),
    }


def page_bytes(facade: FlyingScheduler) -> int:
    """Bytes of a page on all workers of one engine."""
    config = facade.kv_cache_config
    pool_bytes = sum(int(tensor.size) for tensor in config.kv_cache_tensors)
    return pool_bytes // int(config.num_blocks) * facade.engine_tp


def finishing_pays(facade: FlyingScheduler, rates: MoveRates) -> bool:
    """Whether the begun requests of the active layout are done sooner than they would be moved."""
    if facade.parked or not facade.active.requests:
        return False
    begun = list(facade.active.requests.values())
    cost = facade.meter.costs[facade.active_width]
    # A prompt that isn't computed yet may take any number of steps.
    known = cost.known and all(request.num_computed_tokens >= request.num_prompt_tokens for request in begun)
    return pricing.finishing_pays(
        steps_left=max(request.max_tokens - request.num_output_tokens for request in begun),
        step_s=cost.decode_step_s(len(begun)) if known else None,
        num_bytes=facade.pools[facade.active_width].num_used * page_bytes(facade) * facade.active_width,
        rates=rates,
    )


def release(facade: FlyingScheduler, width: int, request_ids: Iterable[str]) -> list[str]:
    """Let go of requests that have arrived elsewhere; returns those that were gone already."""
    scheduler = facade.schedulers[width]
    gone = []
    for request_id in request_ids:
        request = scheduler.requests.pop(request_id, None)
        if request is None:
            gone.append(request_id)
            continue
        if request in scheduler.running:
            scheduler.running.remove(request)
        scheduler.waiting.remove_requests([request])
        scheduler.kv_holding_waiting.remove_requests([request])
        scheduler.deferred_waiting.discard(request)
        scheduler._inflight_prefills.discard(request)
        scheduler.prev_step_scheduled_req_ids.discard(request_id)
        scheduler.kv_cache_manager.free(request)
    return gone


def reclaim(facade: FlyingScheduler) -> dict[int, list[int]]:
    """Virtual pages of groups this engine led once that nobody holds any more: to go back to all members."""
    reclaimed = {}
    for width, pool in facade.pools.items():
        if width > 1 and _is_inactive(facade, width) and pool.num_free:
            reclaimed[width] = pool.withdraw(pool.num_free).tolist()
    return reclaimed
