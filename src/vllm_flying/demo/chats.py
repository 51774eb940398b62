"""Chats streamed from a server, with the times that a user sees.

Standard library and httpx.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import httpx


@dataclass
class Chat:
    """One answer as it comes in."""

    question: str
    phase: str
    layout: str = ""
    answer: str = ""
    started: float = 0.0
    token_times: list[float] = field(default_factory=list)
    finished: bool = False
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token."""
        return self.token_times[0] - self.started if self.token_times else None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between tokens after the first."""
        times = self.token_times
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    @property
    def longest_gap_s(self) -> float:
        """Longest wait between two tokens."""
        return max((b - a for a, b in zip(self.token_times, self.token_times[1:])), default=0.0)


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines as server-sent events have them. httpx's own also end at U+2028 and others, which text may hold."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line


async def stream_chat(client: httpx.AsyncClient, model: str, chat: Chat, max_tokens: int) -> None:
    """Send the question; fill `chat` while the answer streams in."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": chat.question}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    chat.started = time.monotonic()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                chat.error = f"HTTP {response.status_code}: {(await response.aread()).decode()[:200]}"
                return
            chat.layout = response.headers.get("x-flying-layout", "")
            async for line in _lines(response):
                if not line.startswith(b"data: {"):
                    continue
                part = json.loads(line[6:])
                if "error" in part:  # vLLM reports a failure after the start of the stream as a part of it
                    chat.error = f"the stream ended with {part['error']}"
                    return
                for choice in part["choices"]:
                    if choice["delta"].get("content"):
                        chat.answer += choice["delta"]["content"]
                        chat.token_times.append(time.monotonic())
                    chat.finished |= choice["finish_reason"] is not None
    except httpx.HTTPError as error:
        chat.error = repr(error)
    else:
        if not chat.finished:
            chat.error = "the stream ended without a finish_reason"
