"""`python -m bench.migrate`: how fast KV moves at a switch, against a plain copy of the same bytes between workers."""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from statistics import median
from typing import Any

import httpx

from bench.client import Timing, complete, prompts
from bench.models import llama
from bench.report import markdown, write
from bench.server import bench_server
from tests.support.server import Server

DP, TP = [[0], [1]], [[0, 1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024], help="prompt tokens per request")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--switches", type=int, default=8, help="per prompt length; an even number")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # vLLM's route for calls to workers
    model = llama(arguments.layers, arguments.hidden)
    rows, data = [], {}
    with bench_server(model, "--dtype", arguments.dtype, flying=True, environment=environment) as server:
        for tokens in arguments.tokens:
            records, timings = measure(server, arguments.requests, tokens, arguments.switches)
            moved = median(record["kv"]["bytes"] for record in records)
            rate = median(record["kv"]["bytes_per_s"] for record in records)
            plain = plain_rate(server, int(moved))
            allowed = max(timing.tpot for timing in timings) * 2 + moved / arguments.requests / rate + 0.020
            gaps = [timing.longest_gap for timing in timings]
            data[tokens] = {"records": records, "plain_bytes_per_s": plain, "gaps_s": gaps, "allowed_gap_s": allowed}
            rows.append([tokens, f"{moved / 1e6:.1f}", f"{rate / 1e6:.0f}", f"{plain / 1e6:.0f}", f"{rate / plain:.2f}",
                         f"{1e3 * max(gaps):.0f}", f"{1e3 * allowed:.0f}"])  # fmt: skip
            print(rows[-1], flush=True)
    columns = ["prompt tokens of each request", "MB between workers", "migration MB/s", "plain copy MB/s", "ratio",
               "longest gap of any request, ms", "own KV over that rate + 2 steps + 20 ms"]  # fmt: skip
    write("migrate", data, markdown(columns, rows))


def measure(server: Server, requests: int, tokens: int, switches: int) -> tuple[list[dict[str, Any]], list[Timing]]:
    """Switch to and fro while so many requests decode."""
    output = 40 + 12 * switches
    timings: list[Timing] = []

    async def load() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=900.0) as client:
            timings.extend(
                await asyncio.gather(*[complete(client, server.model, p, output) for p in prompts(requests, tokens, tokens)])
            )

    thread = threading.Thread(target=lambda: asyncio.run(load()))
    thread.start()
    while sum(group["running"] for group in server.status()["groups"]) < requests:
        time.sleep(0.05)
    while any(group["waiting"] for group in server.status()["groups"]):
        time.sleep(0.05)
    time.sleep(2.0 + tokens / 200)  # the prompts are computed
    records = []
    for index in range(switches):
        record = server.switch((TP, DP)[index % 2], method="migrate", timeout_s=120)
        if record["requests"]["moved"]:
            records.append(record)
        time.sleep(0.5)
    thread.join()
    return records, timings


def plain_rate(server: Server, num_bytes: int) -> float:
    """Bytes per second between the workers, engines apart."""
    body = {"method": "flying_copy_rate", "args": [str(num_bytes), "2"]}
    response = server.client.post("/collective_rpc", json=body)
    assert response.status_code == 200, response.text
    return float(response.json()["results"][0])


if __name__ == "__main__":
    main()
