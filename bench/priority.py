"""`python -m bench.priority`: an urgent request in a busy server, against the same request alone on a wide group."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import httpx

from bench.client import Timing, complete, prompts
from bench.load import Clients
from bench.models import add_model_options, model_of
from bench.plots import plot_bars
from bench.progress import progress
from bench.report import markdown, write
from bench.server import add_server_options, bench_server, server_flags
from tests.support.server import Server

DP, TP = [[0], [1]], [[0, 1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8, help="urgent requests per case")
    parser.add_argument("--requests", type=int, default=8, help="usual requests in flight")
    parser.add_argument("--shape", type=int, nargs=2, default=(256, 32), metavar=("IN", "OUT"), help="urgent ones'")
    parser.add_argument("--every", type=float, default=6.0, help="seconds between urgent requests")
    add_model_options(parser)
    add_server_options(parser)
    arguments = parser.parse_args()
    settings = {"policy": "priority", "manual_hold_s": 3600.0}
    model = model_of(arguments)
    cases: dict[str, list[Timing]] = {}
    throughput: dict[str, float] = {}
    with progress(3 * arguments.repeats) as done:
        with bench_server(model, *server_flags(arguments), flying=True, settings=settings) as server:
            server.switch(TP)
            cases["alone, wide group"] = asyncio.run(send(server, arguments, done, 0.5, seed=1))
            server.switch(DP)
        settings["manual_hold_s"] = 0.0
        with bench_server(model, *server_flags(arguments), flying=True, settings=settings) as server:
            for name, options in (("usual", {}), ("urgent", {"priority": -1})):
                with Clients(server, arguments.requests) as clients:
                    started = time.perf_counter()
                    cases[f"busy, {name}"] = asyncio.run(send(server, arguments, done, arguments.every, seed=2, **options))
                    ended = time.perf_counter()
                tokens = [moment for timing in clients.timings for moment in timing.tokens]
                throughput[name] = sum(started < moment < ended for moment in tokens) / (ended - started)
    alone = figures(cases["alone, wide group"])
    rows = []
    for name, timings in cases.items():
        own = figures(timings)
        rows.append([name, *(f"{own[k]:.0f} ({own[k] / alone[k]:.2f})" for k in own)])
    table = markdown(["case", "TTFT ms (ratio)", "TPOT ms (ratio)"], rows)
    table += f"\n\nThe others' tokens/s: {throughput['usual']:.1f} while the extra requests are usual ones, "
    table += f"{throughput['urgent']:.1f} while they are urgent ({throughput['urgent'] / throughput['usual']:.2f})."
    data: dict[str, Any] = {name: [[t.ttft, t.tpot] for t in timings] for name, timings in cases.items()}
    folder = write("priority", {"cases": data, "throughput": throughput}, table)
    bars = {
        name: {"TTFT": [1e3 * t.ttft / alone["ttft"] for t in timings], "TPOT": [1e3 * t.tpot / alone["tpot"] for t in timings]}
        for name, timings in cases.items()
    }
    plot_bars(folder / "priority.png", "Of the request alone on a wide group", "ratio", bars, level=1.0)


async def send(
    server: Server, arguments: argparse.Namespace, done: Callable[[str], None], every_s: float, seed: int, **options: Any
) -> list[Timing]:
    """The extra requests, one after the other."""
    timings = []
    async with httpx.AsyncClient(base_url=server.url, timeout=900.0) as client:
        for prompt in prompts(arguments.repeats, arguments.shape[0], seed):
            await asyncio.sleep(every_s)
            timings.append(await complete(client, server.model, prompt, arguments.shape[1], **options))
            done(f"TTFT {1e3 * timings[-1].ttft:.0f} ms, TPOT {1e3 * timings[-1].tpot:.1f} ms")
    return timings


def figures(timings: list[Timing]) -> dict[str, float]:
    """Medians, in milliseconds."""
    return {"ttft": 1e3 * median(t.ttft for t in timings), "tpot": 1e3 * median(t.tpot for t in timings)}


if __name__ == "__main__":
    main()
