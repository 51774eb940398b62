"""`python -m bench.layouts`: stock DP and TP against the same layouts of one flying server.

Servers take turns and every shape is repeated, with the same prompts for stock and flying; what counts are ratios within
the run, not absolute times. The load is that of `vllm bench serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import zlib
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.models import llama
from bench.report import markdown, write
from bench.server import bench_server
from bench.stock_client import closed_loop
from tests.support.server import Server


@dataclass(frozen=True)
class Shape:
    """A closed loop: so many requests with at most `concurrency` in flight, and their lengths in tokens."""

    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.concurrency}, {self.prompt_tokens} / {self.output_tokens}"


SHAPES = (Shape(1, 2, 512, 32), Shape(48, 96, 64, 48), Shape(12, 24, 512, 8), Shape(16, 32, 128, 64))
# What the client calls a quantity, and what the table does.
QUANTITIES = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "TTFT ms",
    "median_tpot_ms": "TPOT ms",
    "median_itl_ms": "ITL ms",
    "p99_itl_ms": "P99 ITL ms",
}
LAYOUTS = {"DP": [[0], [1]], "TP": [[0, 1]]}
Samples = dict[tuple[str, str, str], list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="turns of every server")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every shape per turn")
    parser.add_argument("--dtype", default="bfloat16", help="vLLM's --dtype for all servers")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    arguments = parser.parse_args()
    model, dtype = llama(arguments.layers, arguments.hidden), ("--dtype", arguments.dtype)
    samples: Samples = {}
    starts: dict[str, list[float]] = {}
    for turn in range(arguments.rounds):
        print(f"== turn {turn + 1} of {arguments.rounds}", flush=True)
        with bench_server(model, *dtype, flying=False) as server:
            starts.setdefault("stock DP", []).append(server.start_seconds)
            shapes(samples, "stock", "DP", server, arguments.repeats, turn)
        with bench_server(model, *dtype, flying=False, engines=1, tensor_parallel=2) as server:
            shapes(samples, "stock", "TP", server, arguments.repeats, turn)
        with bench_server(model, *dtype, flying=True) as server:
            starts.setdefault("flying", []).append(server.start_seconds)
            for layout, groups in LAYOUTS.items():
                server.switch(groups)
                shapes(samples, "flying", layout, server, arguments.repeats, turn)
    rows = [row(samples, layout, shape) for layout in LAYOUTS for shape in SHAPES]
    start = {name: median(values) for name, values in starts.items()}
    columns = [column for name in QUANTITIES.values() for column in (name, "ratio")]
    table = markdown(["layout", "in flight, prompt / output", *columns], rows)
    table += f"\n\nStart-up: stock DP {start['stock DP']:.1f} s, flying {start['flying']:.1f} s, "
    table += f"ratio {start['flying'] / start['stock DP']:.2f}. Figures: flying (stock)."
    named = {" / ".join(key): values for key, values in samples.items()}
    write("layouts", {"samples": named, "start_s": starts}, table)


def shapes(samples: Samples, who: str, layout: str, server: Server, repeats: int, turn: int) -> None:
    for shape in SHAPES:
        warm_up = Shape(4, 4, shape.prompt_tokens, 4)
        run(server, warm_up, f"{turn} {layout} {shape} warm-up")
        for repeat in range(repeats):
            result = run(server, shape, f"{turn} {layout} {shape} {repeat}")
            samples.setdefault((who, layout, str(shape)), []).append(result)
            print(f"  {who} {layout} {shape}: {result['output_throughput']:.1f} tokens/s", flush=True)


def run(server: Server, shape: Shape, prompts: str) -> dict[str, Any]:
    """The client's figures. Runs differ in `prompts`, as engines keep the prefixes of earlier ones."""
    seed = zlib.crc32(prompts.encode())
    lengths = shape.prompt_tokens, shape.output_tokens
    result = asyncio.run(closed_loop(server, shape.concurrency, shape.requests, *lengths, seed))
    return {name: value for name, value in result.items() if not isinstance(value, list)}


def row(samples: Samples, layout: str, shape: Shape) -> list[str]:
    cells = [layout, str(shape)]
    for quantity in QUANTITIES:
        flying, stock = (
            median(sample[quantity] for sample in samples[who, layout, str(shape)]) for who in ("flying", "stock")
        )
        cells += [f"{flying:.1f} ({stock:.1f})", f"{flying / stock:.2f}"]
    return cells


if __name__ == "__main__":
    main()
