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
from bench.server import STOCK, add_server_options, bench_server, server_flags
from tests.support.server import Server

MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_options(parser)
    add_server_options(parser)
    arguments = parser.parse_args()
    model, flags = model_of(arguments), server_flags(arguments)
    processes: dict[str, dict[str, int]] = {}
    with progress(3) as done:
        for layout, options in STOCK.items():
            with bench_server(model, *flags, **options) as server:
                processes[f"stock {layout}=2"] = proportional_bytes(server)
            done(f"stock {layout}: measured")
        with bench_server(model, *flags, flying=True) as server:
            processes["flying, 2 engines, widths 1 and 2"] = proportional_bytes(server)
            workers: list[list[dict[str, Any]]] = server.client.get("/plugins/flying/memory").json()["workers"]
            tokens = {}
            for name, groups in (("apart", [[0], [1]]), ("merged", [[0, 1]])):
                server.switch(groups)
                tokens[name] = sum(group["kv_tokens_capacity"] for group in server.status()["groups"])
        done("flying: measured")
    rows = [
        [name, f"{sum(sizes.values()) / MB:.0f}", "; ".join(f"{process} {size / MB:.0f}" for process, size in sizes.items())]
        for name, sizes in processes.items()
    ]
    table = markdown(["server", "memory of all its processes, MB (PSS)", "of these"], rows)
    table += f"\n\nKV tokens of both engines: {tokens['apart']} apart, {tokens['merged']} merged."
    every = [worker for engine in workers for worker in engine]
    ratio = max(worker["weight_bytes_all_layouts"] / worker["weight_bytes_one_copy"] for worker in every)
    table += f" Weights of all layouts over one copy, unique storages: {ratio:.4f}."
    folder = write("memory", {"processes": processes, "workers": workers, "kv_tokens": tokens}, table)
    bars = {name: {"": [sum(sizes.values()) / MB]} for name, sizes in processes.items()}
    plot_bars(folder / "memory.png", "Memory of all processes", "MB", bars)


def proportional_bytes(server: Server) -> dict[str, int]:
    """Proportional set size of every process of the server by its title: shared pages are counted once, over all of them."""
    sizes: dict[str, int] = {}
    for pid in sorted(_members(os.getpgid(server.pid))):
        title = _title(pid)
        sizes[title] = sizes.get(title, 0) + _pss(pid)
    return sizes


def _title(pid: int) -> str:
    """What vLLM calls the process, or its program."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return Path(words[0].decode().strip()).name


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
