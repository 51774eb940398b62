"""Requests go to an engine that serves, and aborts reach a request wherever it is.

May import vllm. Wraps four methods of the API server's side: admission (before vLLM registers the request; of each of
several answers to one prompt before it is sent, since vLLM registers these on a way of their own), the choice of the
engine, and the address of aborts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import DPAsyncMPClient, DPLBAsyncMPClient

from vllm_flying.frontend.router import router_of
from vllm_flying.patches.apply import Patch

_admitted: ContextVar[bool] = ContextVar("admitted", default=False)
"""Whether the request that this task sends has been admitted."""


def _admit_first(add_request: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(add_request)
    async def admit_and_add(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        router = router_of(self.engine_core, self.vllm_config)
        if router is not None:
            await router.admit(request)
        token = _admitted.set(True)
        try:
            return await add_request(self, request, *args, **kwargs)
        finally:
            _admitted.reset(token)

    return admit_and_add


def _admit_the_others(send: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(send)
    async def admit_and_send(self: Any, request: Any) -> None:
        router = None if _admitted.get() else router_of(self, self.vllm_config)
        if router is not None:
            await router.admit(request)
        await send(self, request)

    return admit_and_send


def _route(choose: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(choose)
    def choose_by_layout(self: Any, request: Any) -> Any:
        router = router_of(self, self.vllm_config)
        is_new = request.request_id not in self.reqs_in_flight
        prefix = router.route(request) if router is not None and is_new else ()
        chosen = choose(self, request)
        if router is not None:
            router.record(chosen, prefix)
        return chosen

    return choose_by_layout


def _abort_everywhere(abort: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(abort)
    async def abort_where_it_may_be(self: Any, request_ids: list[str]) -> None:
        router = router_of(self, self.vllm_config)
        if router is None or not router.has_switched:
            await abort(self, request_ids)
        elif request_ids and not self.resources.engine_dead:
            # A request may have been handed to another engine; engines ignore ids they don't know.
            for engine in self.core_engines:
                await self._abort_requests(request_ids, engine)

    return abort_where_it_may_be


def frontend_patches() -> list[Patch]:
    """What an API server applies when the plugin is enabled."""
    return [
        Patch(AsyncLLM, "_add_request", _admit_first),
        Patch(DPAsyncMPClient, "add_request_async", _admit_the_others),
        Patch(DPLBAsyncMPClient, "get_core_engine_for_request", _route),
        Patch(DPLBAsyncMPClient, "abort_requests_async", _abort_everywhere),
    ]
