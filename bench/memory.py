"""`python -m bench.memory`: what layouts cost in memory: weights and KV in the workers, and the servers' processes whole."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.models import add_model_options, model_of
from bench.plots import plot_bars
from bench.progress import progress
from bench.report import markdown, write
from bench.server import add_server_options, bench_server, server_flags
from tests.support.server import Server

MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_options(parser)
    add_server_options(parser)
    arguments = parser.parse_args()
    model, flags = model_of(arguments), server_flags(arguments)
    processes: dict[str, float] = {}
    with progress(2) as done:
        with bench_server(model, *flags, flying=False) as server:
            processes["stock DP=2"] = proportional_bytes(server)
        done("stock DP: measured")
        with bench_server(model, *flags, flying=True) as server:
            processes["flying, 2 engines, widths 1 and 2"] = proportional_bytes(server)
            workers: list[list[dict[str, Any]]] = server.client.get("/plugins/flying/memory").json()["workers"]
            tokens = {}
            for name, groups in (("apart", [[0], [1]]), ("merged", [[0, 1]])):
                server.switch(groups)
                tokens[name] = sum(group["kv_tokens_capacity"] for group in server.status()["groups"])
        done("flying: measured")
    rows = [[name, f"{size / MB:.0f}"] for name, size in processes.items()]
    table = markdown(["server", "memory of all its processes, MB (PSS)"], rows)
    table += f"\n\nKV tokens of both engines: {tokens['apart']} apart, {tokens['merged']} merged."
    every = [worker for engine in workers for worker in engine]
    ratio = max(worker["weight_bytes_all_layouts"] / worker["weight_bytes_one_copy"] for worker in every)
    table += f" Weights of all layouts over one copy, unique storages: {ratio:.4f}."
    folder = write("memory", {"processes": processes, "workers": workers, "kv_tokens": tokens}, table)
    bars = {name: {"": [size / MB]} for name, size in processes.items()}
    plot_bars(folder / "memory.png", "Memory of all processes", "MB", bars)


def proportional_bytes(server: Server) -> float:
    """Proportional set size of every process of the server: shared pages are counted once, over all of them."""
    return float(sum(_pss(pid) for pid in _members(os.getpgid(server.pid))))


def _members(group: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == group:
                    yield int(entry.name)
            except ProcessLookupError:
                continue


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
