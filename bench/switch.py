"""`python -m bench.switch`: how long a switch takes, idle and under load, against a restart of the same server."""

from __future__ import annotations

import argparse
import threading
import time
from statistics import median, quantiles
from typing import Any

from bench.client import prompts, run_load
from bench.models import llama_150m
from bench.report import markdown, write
from bench.server import bench_server
from tests.support.server import Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30, help="merges, and as many splits, per case")
    parser.add_argument("--requests", type=int, default=8, help="requests in flight in the loaded case")
    arguments = parser.parse_args()
    model = llama_150m()
    with bench_server(model, flying=True) as server:
        print(f"Server up after {server.start_seconds:.0f} s.", flush=True)
        cases = {"idle": measure(server, arguments.repeats)}
        cases["under load"] = under_load(server, arguments.repeats, arguments.requests)
        restart = server.start_seconds
    rows = []
    for name, times in cases.items():
        for direction, values in times["ms"].items():
            cuts = quantiles(values, n=100)
            rows.append([name, direction, len(values), f"{median(values):.1f}", f"{cuts[98]:.1f}", times.get("step_ms", "")])
    rows.append(["restart", "", 1, f"{1e3 * restart:.0f}", "", ""])
    table = markdown(["case", "direction", "switches", "median ms", "p99 ms", "decode step ms (DP / TP)"], rows)
    write("switch", {"cases": cases, "restart_s": restart}, table)


def measure(server: Server, repeats: int) -> dict[str, Any]:
    """POST to reply, in milliseconds, pausing what runs."""
    times: dict[str, list[float]] = {"merge": [], "split": []}
    phases: list[dict[str, float]] = []
    for index in range(repeats):
        for direction, groups in (("merge", [[0, 1]]), ("split", [[0], [1]])):
            started = time.perf_counter()
            record = server.switch(groups, method="pause")
            times[direction].append(1e3 * (time.perf_counter() - started))
            phases.append(record["seconds"])
            time.sleep(0.05)
        print(f"\r{index + 1} of {repeats} merges and splits", end="", flush=True)
    print(flush=True)
    return {"ms": times, "phases": phases}


def under_load(server: Server, repeats: int, requests: int) -> dict[str, Any]:
    """The same while requests of both layouts are in flight; the step that a switch has to wait for beside it."""
    steps = []
    for groups in ([[0], [1]], [[0, 1]]):
        server.switch(groups)
        steps.append(1e3 * run_load(server.url, server.model, requests, 64, 32, seed=1)["tpot_s"])
    server.switch([[0], [1]])
    stop = threading.Event()

    def keep_busy(seed: int) -> None:
        while not stop.is_set():
            (prompt,) = prompts(1, 64, seed)
            server.tokens(prompt, 64)
            seed += 100

    threads = [threading.Thread(target=keep_busy, args=(seed,)) for seed in range(requests)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    result = measure(server, repeats)
    stop.set()
    while any(thread.is_alive() for thread in threads):
        for groups in ([[0, 1]], [[0], [1]]):
            server.switch(groups, method="drain", timeout_s=120)
    return {**result, "step_ms": " / ".join(f"{step:.1f}" for step in steps)}


if __name__ == "__main__":
    main()
