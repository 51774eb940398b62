"""Reads a request's hint and service tier, and names the layout that served it.

Imports neither torch nor vllm. The hint may stand in the body's field `parallelism_hint`, in its `vllm_xargs`, or in
the header `X-Parallelism-Hint`; it is handed on in `vllm_xargs`, vLLM's own place for extra arguments. The tiers
`priority` and `flex` are handed on as vLLM's `priority`. Bodies with neither pass through byte for byte.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_flying.core.hints import HINT_KEY, PRIORITY_OF_TIER, TIER_KEY, HintError, parse_hint
from vllm_flying.frontend.served import ServedLayouts, served_layouts

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
HINT_HEADER = b"x-parallelism-hint"
LAYOUT_HEADER = b"x-flying-layout"
# Passes of the event loop from the last engine request of an HTTP request to its response's head: several answers go to
# several engines, one after the other. No time: the head's work is done while the engine takes the request, not in its step.
ROUTED_WITHIN = 5


class ParallelismHintMiddleware:
    """Pure ASGI. Does nothing while `is_enabled()` is false."""

    def __init__(self, app: App, is_enabled: Callable[[], bool] = lambda: True) -> None:
        self.app = app
        self._is_enabled = is_enabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one HTTP request; everything that doesn't generate text passes through."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or path not in PATHS or not self._is_enabled():
            await self.app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:  # the client is gone
            return
        try:
            body = _with_wishes(body, _header(scope, HINT_HEADER))
        except HintError as error:
            await _refuse(send, str(error))
            return
        headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
        scope["headers"] = [*headers, (b"content-length", str(len(body)).encode())]
        record = ServedLayouts()
        token, response = served_layouts.set(record), _LayoutHeader(send, record)
        try:
            await self.app(scope, _replay(body, receive), response)
        finally:
            served_layouts.reset(token)
            response.close()


class _LayoutHeader:
    """Adds `x-flying-layout` to the response.

    A streamed response starts before its request is routed: its start is held back until then, and goes ahead of the first
    token, as vLLM's does, so that nobody deals with headers while the token waits.
    """

    def __init__(self, send: Send, record: ServedLayouts) -> None:
        self._send = send
        self._record = record
        self._held: Message | None = None
        self._sending = asyncio.Lock()
        self._soon: asyncio.Task[None] | None = None
        record.on_add = self._start_soon

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._held = message
            return
        await self._start()
        await self._send(message)

    def close(self) -> None:
        """The response is over."""
        if self._soon is not None:
            self._soon.cancel()

    def _start_soon(self) -> None:
        if self._soon is None:
            self._soon = asyncio.create_task(self._start_once_routed())

    async def _start_once_routed(self) -> None:
        routed, passes = 0, 0
        while passes < ROUTED_WITHIN:
            if len(self._record.layouts) > routed:
                routed, passes = len(self._record.layouts), 0
            passes += 1
            await asyncio.sleep(0)
        await self._start()

    async def _start(self) -> None:
        async with self._sending:
            start, self._held = self._held, None
            if start is None:
                return
            if self._record.layouts:
                start["headers"] = [*start.get("headers", []), (LAYOUT_HEADER, self._record.header().encode())]
            await self._send(start)


def _with_wishes(body: bytes, header: str | None) -> bytes:
    """`body` with its hint and its tier where vLLM reads them; unchanged if it has neither. HintError for a bad hint."""
    if header is None and HINT_KEY.encode() not in body and TIER_KEY.encode() not in body:
        return body
    try:
        fields = json.loads(body)
    except ValueError:
        return body  # vLLM answers
    if not isinstance(fields, dict):
        return body
    hint, priority = _take_hint(fields, header), _tier_priority(fields)
    if hint is None and priority is None:
        return body
    if hint is not None:
        extra = fields.get("vllm_xargs")
        fields["vllm_xargs"] = {**(extra if isinstance(extra, dict) else {}), HINT_KEY: hint}
    if priority is not None:
        fields["priority"] = priority
    return json.dumps(fields).encode()


def _take_hint(fields: dict[str, Any], header: str | None) -> str | None:
    """The one hint in all places; the field of our own is taken out. HintError if it is bad or there are several."""
    extra = fields.get("vllm_xargs")
    places = {
        f"field {HINT_KEY}": fields.pop(HINT_KEY, None),
        f"vllm_xargs.{HINT_KEY}": extra.get(HINT_KEY) if isinstance(extra, dict) else None,
        "header X-Parallelism-Hint": header,
    }
    given = {place: parse_hint(value).value for place, value in places.items() if value is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{place} = {value!r}" for place, value in given.items())
        raise HintError(f"the request carries different hints: {listed}; send one")
    return next(iter(given.values()), None)


def _tier_priority(fields: dict[str, Any]) -> int | None:
    """The priority that the service tier stands for; None if it is the usual one or the request has its own."""
    tier = fields.get(TIER_KEY)
    return PRIORITY_OF_TIER.get(tier) if isinstance(tier, str) and "priority" not in fields else None


async def _read(receive: Receive) -> bytes | None:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), None)


async def _refuse(send: Send, text: str) -> None:
    error = {"message": text, "type": "BadRequestError", "param": HINT_KEY, "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
