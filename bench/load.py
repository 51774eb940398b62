"""Streaming clients that go on until they are told to stop, as a load under which something is measured."""

from __future__ import annotations

import asyncio
import threading
import time
from statistics import median

import httpx

from bench.client import Timing, complete, prompts, token_gaps
from bench.report import percentile
from tests.support.server import Server


class Clients:
    """Streaming clients in a thread, one request after the other each, until the context ends."""

    def __init__(self, server: Server, count: int, prompt_tokens: int = 64, output_tokens: int = 64) -> None:
        self._server = server
        self._count = count
        self._lengths = prompt_tokens, output_tokens
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.timings: list[Timing] = []
        self.began = 0.0
        """When all were under way, on the performance counter."""

    def __enter__(self) -> Clients:
        self._thread.start()
        time.sleep(2.0)
        self.began = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _run(self) -> None:
        async with httpx.AsyncClient(base_url=self._server.url, timeout=900.0) as client:
            await asyncio.gather(*[self._one(client, seed) for seed in range(self._count)])

    async def _one(self, client: httpx.AsyncClient, seed: int) -> None:
        while not self._stop.is_set():
            seed += 100
            (prompt,) = prompts(1, self._lengths[0], seed)
            self.timings.append(await complete(client, self._server.model, prompt, self._lengths[1]))

    def gaps(self) -> dict[str, float]:
        """Longest gap between two tokens of a request, and the usual one, in milliseconds."""
        longest = [1e3 * timing.longest_gap for timing in self.timings]
        return {
            "requests": len(longest),
            "tpot_ms": median(1e3 * timing.tpot for timing in self.timings),
            "longest_gap_p50_ms": median(longest),
            "longest_gap_p99_ms": percentile(longest, 99),
        }

    def gaps_beyond_usual(self, began: float, duration: float) -> list[float]:
        """How much longer than usual each request's longest gap was, in seconds, of those that reach into this time."""
        across = (token_gaps(timing.tokens, began, began + duration) for timing in self.timings)
        usual = self.usual_gap()
        return [max(each) - usual for each in across if each]

    def usual_gap(self) -> float:
        """Seconds between two tokens that didn't come together; the median."""
        return median(gap for timing in self.timings for gap in token_gaps(timing.tokens) if gap)
