"""With the method `soft`, a request that waits for its group may begin before: on an engine that will be part of it.

Pure: no torch, no vllm. Only the API server that runs the switch knows which engines are done with their old requests; in
the others requests wait for the group, as with every other method.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

LOOK_AGAIN_S = 0.01

Form = Callable[[int, str], Awaitable[None]]
"""Has a group of a width formed, for a reason; returns when there is one, or there can't be."""
Serving = Callable[[int], Sequence[int]]
"""Engines that serve until they are merged into a group of this width."""
Choose = Callable[[Sequence[int]], int | None]
"""Which of these engines could begin with a request at once."""


class SoftStart:
    """Groups that are being formed for requests of this API server, at most one of each width."""

    def __init__(self, form: Form, serving: Serving) -> None:
        self._form = form
        self._serving = serving
        self._forming: dict[int, asyncio.Task[None]] = {}

    async def begin(self, width: int, reason: str, choose: Choose, then: Callable[[], None]) -> int | None:
        """Have a group formed; returns an engine to begin on meanwhile, or None once there is nothing to wait for.

        Of a request that begins meanwhile, `then` is called when there is nothing to wait for any more.
        """
        forming = self._forming.get(width)
        if forming is None:
            forming = self._forming[width] = asyncio.ensure_future(self._form(width, reason))
            forming.add_done_callback(lambda task: self._ended(width, task))
        while not forming.done():
            engine = choose(self._serving(width))
            if engine is not None:
                forming.add_done_callback(lambda task: then())
                return engine
            await asyncio.wait({forming}, timeout=LOOK_AGAIN_S)
        forming.result()
        return None

    def _ended(self, width: int, task: asyncio.Task[None]) -> None:
        del self._forming[width]
        if not task.cancelled():
            task.exception()  # is told to those who wait; nobody may do so any more
