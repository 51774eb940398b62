"""Servers for benchmarks: the tests' own, with what a benchmark adds."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench.allocator import preload
from tests.support.server import Server

STOCK: dict[str, dict[str, Any]] = {"DP": {"flying": False}, "TP": {"flying": False, "engines": 1, "tensor_parallel": 2}}
"""What `bench_server` takes for stock vLLM in the static layouts of two workers."""


def add_server_options(parser: argparse.ArgumentParser, dtype: str = "bfloat16") -> None:
    """What `server_flags` takes."""
    parser.add_argument("--dtype", default=dtype, help="vLLM's --dtype for all servers")
    parser.add_argument("--compiled", action="store_true", help="torch.compile as vLLM does by default, not eager")


def server_flags(arguments: argparse.Namespace) -> list[str]:
    """Of every server, stock and flying."""
    return ["--dtype", arguments.dtype, "--no-enforce-eager" if arguments.compiled else "--enforce-eager"]


def bench_server(
    model: Path,
    *arguments: str,
    flying: bool,
    engines: int = 2,
    tensor_parallel: int = 1,
    settings: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    kv_mib: int = 512,
) -> Server:
    """A bf16 server on this machine, one core per worker, and one API server: as many as stock vLLM has when started as here.

    vLLM's own command makes one per engine: more processes for as many cores.
    """
    api_servers = ["--api-server-count", "1"] if flying else []
    log = Path(tempfile.mkdtemp(prefix="vllm-flying-bench-")) / "log"
    return Server(
        model, log, "--dtype", "bfloat16", "--max-model-len", "2048",
        "--tensor-parallel-size", str(tensor_parallel), *api_servers, *arguments,
        engines=engines, flying=flying, settings=settings, environment=preload() | (environment or {}),
        kv_bytes=kv_mib << 20, workers_per_engine=tensor_parallel,
    )  # fmt: skip
