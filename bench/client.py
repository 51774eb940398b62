"""A streaming client for what `vllm bench serve` doesn't do: loads that end when they are told to."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx


@dataclass
class Timing:
    """One request: when it was sent and when each token came."""

    sent: float
    tokens: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def tpot(self) -> float:
        return (self.tokens[-1] - self.tokens[0]) / max(1, len(self.tokens) - 1)

    @property
    def longest_gap(self) -> float:
        return max(token_gaps(self.tokens), default=0.0)


def token_gaps(times: Sequence[float], began: float = -math.inf, ended: float = math.inf) -> list[float]:
    """Between two tokens each, those that reach into the time from `began` to `ended`."""
    return [b - a for a, b in pairwise(times) if a < ended and b > began]


async def complete(
    client: httpx.AsyncClient, model: str, prompt: list[int], max_tokens: int, **options: Any
) -> Timing:
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True, **options}  # fmt: skip
    timing = Timing(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                now = time.perf_counter()
                for choice in json.loads(line[6:])["choices"]:
                    timing.tokens += [now] * len(choice.get("token_ids") or ())
    return timing


def prompts(count: int, length: int, seed: int, vocabulary: int = 32000) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]
