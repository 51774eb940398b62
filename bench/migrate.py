"""`python -m bench.migrate`: how fast KV moves at a switch, against a plain copy of the same bytes between workers."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from bench.client import prompts
from bench.models import llama
from bench.report import markdown, write
from bench.server import bench_server
from tests.support.background import Background
from tests.support.server import Server

DP, TP = [[0], [1]], [[0, 1]]


@dataclass(frozen=True)
class Gaps:
    """Seconds: a usual gap between two tokens, and each request's longest around each switch."""

    step_s: float
    longest: list[float]


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
            records, gaps = measure(server, arguments.requests, tokens, arguments.switches)
            moved = median(record["kv"]["bytes"] for record in records)
            rate = median(record["kv"]["bytes_per_s"] for record in records)
            plain, read = (plain_rate(server, call, int(moved)) for call in ("flying_copy_rate", "flying_read_rate"))
            allowed = moved / arguments.requests / rate + 2 * gaps.step_s + 0.020
            within = sum(gap <= allowed for gap in gaps.longest) / len(gaps.longest)
            data[tokens] = {"records": records, "plain_bytes_per_s": plain, "read_bytes_per_s": read,
                            "gaps_s": gaps.longest, "allowed_gap_s": allowed}
            rows.append([tokens, f"{moved / 1e6:.1f}", f"{rate / 1e6:.0f}", f"{plain / 1e6:.0f}", f"{rate / plain:.2f}",
                         *((f"{read / 1e6:.0f}", f"{rate / read:.2f}") if read else ("", "")),
                         f"{1e3 * gaps.step_s:.0f}", f"{1e3 * median(gaps.longest):.0f}", f"{1e3 * max(gaps.longest):.0f}",
                         f"{1e3 * allowed:.0f}", f"{100 * within:.0f} %"])  # fmt: skip
            print(rows[-1], flush=True)
    columns = ["prompt tokens of each request", "MB between workers", "migration MB/s", "plain exchange MB/s", "ratio",
               "plain read MB/s", "ratio",
               "usual gap, ms", "gap at a switch, median ms", "longest ms", "own KV over that rate + 2 steps + 20 ms",
               "within that"]  # fmt: skip
    write("migrate", data, markdown(columns, rows))


def measure(server: Server, requests: int, tokens: int, switches: int) -> tuple[list[dict[str, Any]], Gaps]:
    """Switch to and fro while so many requests decode."""
    streams = [Background(server, prompt, 1500 - tokens) for prompt in prompts(requests, tokens, tokens)]
    for stream in streams:
        stream.wait_for_tokens()
    records, steps, longest = [], [], []
    for index in range(switches):
        begin = time.monotonic()
        time.sleep(1.5)
        steps += [b - a for stream in streams for a, b in pairwise(stream.times) if a > begin]
        begin = time.monotonic()
        record = server.switch((TP, DP)[index % 2], method="migrate", timeout_s=120)
        end = time.monotonic()
        time.sleep(0.5)
        longest += [max(b - a for a, b in pairwise(s.times) if a < end and b > begin) for s in streams if s.is_alive]
        records.append(record)
    for stream in streams:
        stream.abort()
        stream.join()
    return [record for record in records if record["requests"]["moved"]], Gaps(median(steps), longest)


def plain_rate(server: Server, call: str, num_bytes: int) -> float:
    """Bytes per second between the workers, engines apart."""
    body = {"method": call, "args": [str(num_bytes), "2"]}
    response = server.client.post("/collective_rpc", json=body)
    assert response.status_code == 200, response.text
    return float(response.json()["results"][0])


if __name__ == "__main__":
    main()
