"""`python -m bench.switch`: how long a switch takes, idle and under load, against a restart of the same server."""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import threading
import time
from statistics import median, quantiles
from typing import Any

import httpx

from bench.client import Timing, complete, prompts
from bench.models import llama_150m
from bench.report import markdown, stolen_seconds, write
from bench.server import add_server_options, bench_server, server_flags
from tests.support.server import Server

DP, TP = [[0], [1]], [[0, 1]]
# vLLM's workers poll for a second after every call; then they sleep, as they do on an idle server.
IDLE_S = 1.5


class Clients:
    """Streaming clients in a thread, one request after the other each, until the context ends."""

    def __init__(self, server: Server, count: int, prompt_tokens: int = 64, output_tokens: int = 64) -> None:
        self._server = server
        self._count = count
        self._lengths = prompt_tokens, output_tokens
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.timings: list[Timing] = []

    def __enter__(self) -> Clients:
        self._thread.start()
        time.sleep(2.0)
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
            "longest_gap_p99_ms": _p99(longest),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="merges, and as many splits, per case")
    parser.add_argument("--requests", type=int, default=8, help="requests in flight in the loaded case")
    add_server_options(parser)
    arguments = parser.parse_args()
    with bench_server(llama_150m(), *server_flags(arguments), flying=True) as server:
        print(f"Server up after {server.start_seconds:.0f} s.", flush=True)
        idle = measure(server, arguments.repeats, "pause", IDLE_S)
        in_a_row = measure(server, arguments.repeats, "pause", 0.05)
        gaps = {}
        for name, groups in (("DP, no switch", DP), ("TP, no switch", TP)):
            server.switch(groups)
            with Clients(server, arguments.requests) as clients:
                time.sleep(20.0)
            gaps[name] = clients.gaps()
            print(name, gaps[name], flush=True)
        with Clients(server, arguments.requests) as clients:
            migrating = measure(server, arguments.repeats, "migrate", pause_s=1.0)
        gaps["a switch every second"] = clients.gaps()
        with Clients(server, arguments.requests):
            pausing = measure(server, arguments.repeats, "pause", pause_s=0.5)
            server.switch(DP, method="migrate", timeout_s=120)
        restart = server.start_seconds
    in_flight = f"{arguments.requests} requests"
    table = _table({"idle": idle, "idle, one after the other": in_a_row, f"{in_flight}, migrate": migrating, f"{in_flight}, pause": pausing}, restart)
    columns = ["requests in flight", "TPOT ms", "longest gap of a request, P50 ms", "P99 ms"]
    rows = [[name, *(f"{g[k]:.0f}" for k in ("tpot_ms", "longest_gap_p50_ms", "longest_gap_p99_ms"))] for name, g in gaps.items()]
    data = {"idle": idle, "in_a_row": in_a_row, "migrate": migrating, "pause": pausing, "gaps": gaps, "restart_s": restart}
    write("switch", data, f"{table}\n\n{markdown(columns, rows)}")


def measure(server: Server, repeats: int, method: str, pause_s: float) -> list[dict[str, Any]]:
    """Merges and splits; every record with its `reply_ms`, POST to reply, and what the host took meanwhile."""
    records: list[dict[str, Any]] = []
    # The standard library's client: httpx adds a millisecond of its own.
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    for index in range(repeats):
        for groups in (TP, DP):
            body = json.dumps({"groups": groups, "method": method, "timeout_s": 120})
            stolen, started = stolen_seconds(), time.perf_counter()
            client.request("POST", "/plugins/flying/switch", body, {"Content-Type": "application/json"})
            reply = client.getresponse().read()
            reply_ms = 1e3 * (time.perf_counter() - started)
            records.append({**json.loads(reply), "reply_ms": reply_ms, "stolen_ms": 1e3 * (stolen_seconds() - stolen)})
            assert records[-1].get("outcome") == "committed", reply
            time.sleep(pause_s)
        print(f"\r{index + 1} of {repeats} merges and splits", end="", flush=True)
    print(flush=True)
    return records


def _table(cases: dict[str, list[dict[str, Any]]], restart_s: float) -> str:
    rows: list[list[Any]] = []
    for name, records in cases.items():
        for direction, groups in (("merge", TP), ("split", DP)):
            chosen = [record for record in records if record["to"] == groups]
            # On a shared host: switches during which the host left this machine's processors alone.
            undisturbed = [record for record in chosen if not record["stolen_ms"]]
            moved = sum(record["requests"]["moved"] for record in chosen) / len(chosen)
            megabytes = sum(record["kv"]["bytes"] for record in chosen) / len(chosen) / 1e6
            stopped = median(1e3 * (r["seconds"]["total"] - r["seconds"]["prepare"] - r["seconds"]["extend"]) for r in chosen)
            rows.append([name, direction, *_times(chosen), f"{stopped:.1f}", len(undisturbed), *_times(undisturbed), f"{moved:.1f}",
                         f"{megabytes:.2f}"])  # fmt: skip
    rows.append(["restart", "", f"{1e3 * restart_s:.0f}", *[""] * 9])
    columns = ["case", "direction", "reply, median ms", "p99 ms", "beyond steps in flight, median ms",
               "engines at rest, median ms", "undisturbed", "reply, median ms", "p99 ms", "beyond steps in flight, median ms",
               "requests moved", "MB between workers"]  # fmt: skip
    return markdown(columns, rows)


def _times(records: list[dict[str, Any]]) -> list[str]:
    """POST to reply; and without `prepare`, in which steps in flight end."""
    if not records:
        return [""] * 3
    replies = [record["reply_ms"] for record in records]
    beyond = [record["reply_ms"] - 1e3 * record["seconds"]["prepare"] for record in records]
    return [f"{median(replies):.1f}", f"{_p99(replies):.1f}", f"{median(beyond):.1f}"]


def _p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


if __name__ == "__main__":
    main()
