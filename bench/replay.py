"""Sends arrivals to a server at their times with `vllm bench serve`, and may watch the server's layout meanwhile."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import httpx

from bench.arrivals import Arrival
from bench.queueing import QueueTime
from bench.recorded import write_timed_trace
from bench.report import stolen_seconds
from bench.stock_client import ServedRequest, bench_serve_together, closed_loop, served_requests
from tests.support.server import Server

Layout = list[list[int]]
# Layouts last for longer than this: a controller has a cooldown.
LOOK_S = 1.0


@dataclass(frozen=True)
class Replay:
    """What was sent and how it was served, and when the server's layout became which; `origin` is second 0.

    `queue_time` is what a request waited on average until it was scheduled, in seconds, by the server's account;
    `stolen_s` the seconds that the host took from the machine meanwhile.
    """

    origin: float
    requests: list[tuple[Arrival, ServedRequest]]
    layouts: list[tuple[float, Layout]]
    queue_time: float
    stolen_s: float


async def replay(server: Server, arrivals: Sequence[Arrival], chunk_tokens: int, watch: bool, seed: int) -> Replay:
    """Every request at its time; prompts without hash ids are other ones with every `seed`."""
    if not arrivals:
        raise ValueError("no requests to send: none arrives in this part of the trace")
    await closed_loop(server, 4, 8, 64, 4, seed)  # both engines warm
    waited, stolen = QueueTime.of(server), stolen_seconds()
    layouts: list[tuple[float, Layout]] = []
    looking = asyncio.ensure_future(_look(server, layouts)) if watch else None
    requests = await _send(server, arrivals, chunk_tokens, seed)
    if looking is not None:
        looking.cancel()
    # The client doesn't say when it began. No request is sent before its time, so the most punctual one tells.
    origin = min(served.start - arrival.time for arrival, served in requests)
    layouts = [(max(0.0, moment - origin), layout) for moment, layout in layouts]
    return Replay(origin, requests, layouts, QueueTime.of(server).mean_since(waited), stolen_seconds() - stolen)


async def _send(
    server: Server, arrivals: Sequence[Arrival], chunk_tokens: int, seed: int
) -> list[tuple[Arrival, ServedRequest]]:
    """A client per priority, since the stock one gives all its requests the same; they begin at about the same time."""
    shares = [[a for a in arrivals if a.priority == priority] for priority in sorted({a.priority for a in arrivals})]
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for number, share in enumerate(shares):
            file = Path(folder) / f"timed_trace_{number}.jsonl"
            write_timed_trace(file, share, chunk_tokens, seed + 1000 * number)
            priority = share[0].priority
            runs.append([
                "--dataset-name", "timed_trace", "--dataset-path", str(file), "--num-prompts", str(len(share)),
                "--timed-trace-chunk-hash-size", str(chunk_tokens), "--self-timed",
                *(["--extra-body", json.dumps({"priority": priority})] if priority else []),
            ])  # fmt: skip
        results = await bench_serve_together(server, runs)
    served = zip(chain(*shares), chain(*map(served_requests, results)), strict=True)
    return sorted(served, key=lambda pair: pair[0].time)


async def _look(server: Server, layouts: list[tuple[float, Layout]]) -> None:
    """Note every change of layout, by this process's performance counter. No engine is asked: it would cost steps."""
    async with httpx.AsyncClient(base_url=server.url, timeout=900.0) as client:
        while True:
            answer = (await client.get("/plugins/flying/layout")).json()
            if not layouts or layouts[-1][1] != answer["groups"]:
                layouts.append((time.perf_counter() - time.time() + answer["since"], answer["groups"]))
            await asyncio.sleep(LOOK_S)
