"""Calls from an API server to the engines' agents, over vLLM's own utility channel.

May import vllm.
"""

from __future__ import annotations

import asyncio
from typing import Any

from vllm_flying.executor import CONTROL


class EngineCalls:
    """Reaches single engines through vLLM's data-parallel client."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @property
    def num_engines(self) -> int:
        """Engines of this server."""
        return len(self._client.core_engines)

    @property
    def unfinished(self) -> int:
        """Requests of all engines, as far as this front end knows: it hears of others' ten times a second."""
        reported = sum(waiting + running for waiting, running, _ in self._client.lb_engines)
        return int(max(len(self._client.reqs_in_flight), reported))

    @property
    def seem_idle(self) -> bool:
        """Whether no engine has a request, as far as this front end knows."""
        return not self.unfinished

    async def call(self, engine: int, operation: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run `operation` in the agent of `engine`; an Exception carries the engine's own words."""
        return await self._client._call_utility_async(
            "collective_rpc",
            CONTROL,
            None,
            (operation, arguments or {}),
            None,
            engine=self._client.core_engines[engine],
        )

    async def call_all(self, operation: str) -> list[Any]:
        """Run `operation` in every engine's agent at once."""
        return list(await asyncio.gather(*[self.call(engine, operation) for engine in range(self.num_engines)]))
