"""`python -m bench.layouts`: stock DP and TP against the same layouts of one flying server.

All servers are up and take turns, shape by shape, with the same prompts for stock and flying; what counts are ratios of
neighbouring runs, not absolute times. The load is that of `vllm bench serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

from bench.models import add_model_options, model_of
from bench.report import markdown, write
from bench.server import add_server_options, bench_server, server_flags
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


SHAPES = (Shape(1, 2, 512, 32), Shape(96, 96, 64, 48), Shape(24, 24, 512, 8), Shape(32, 32, 128, 64))
# What the client calls a quantity, and what the table does.
QUANTITIES = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "TTFT ms",
    "median_tpot_ms": "TPOT ms",
    "median_itl_ms": "ITL ms",
    "p99_itl_ms": "P99 ITL ms",
}
LAYOUTS = {"DP": [[0], [1]], "TP": [[0, 1]]}
STOCK: dict[str, dict[str, int]] = {"DP": {}, "TP": {"engines": 1, "tensor_parallel": 2}}
Samples = dict[tuple[str, str, str], list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of every shape on every server")
    add_server_options(parser)
    metavar = ("IN_FLIGHT", "REQUESTS", "IN", "OUT")
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=metavar, help="by default four shapes")
    add_model_options(parser)
    arguments = parser.parse_args()
    shapes = tuple(Shape(*numbers) for numbers in arguments.shape or ()) or SHAPES
    model, flags = model_of(arguments), server_flags(arguments)
    samples: Samples = {}
    with ExitStack() as stack:
        flying = stack.enter_context(bench_server(model, *flags, flying=True))
        stock = {
            layout: stack.enter_context(bench_server(model, *flags, flying=False, **options))
            for layout, options in STOCK.items()
        }
        for repeat, (layout, groups) in product(range(arguments.repeats), LAYOUTS.items()):
            print(f"== repeat {repeat + 1} of {arguments.repeats}, {layout}", flush=True)
            flying.switch(groups)
            servers = {"flying": flying, "stock": stock[layout]}
            for shape, who in product(shapes, sorted(servers, reverse=repeat % 2 == 1)):
                sample = run(servers[who], shape, repeat, layout)
                samples.setdefault((who, layout, str(shape)), []).append(sample)
                print(f"  {who} {layout} {shape}: {sample['output_throughput']:.1f} tokens/s", flush=True)
    rows = [row(samples, layout, shape) for layout in LAYOUTS for shape in shapes]
    columns = [column for name in QUANTITIES.values() for column in (name, "ratio")]
    table = markdown(["layout", "in flight, prompt / output", *columns], rows)
    table += "\n\nFlying (stock), medians; ratio: median of the runs' own ratios (least to most)."
    write("layouts", {"samples": {" / ".join(key): values for key, values in samples.items()}}, table)


def run(server: Server, shape: Shape, repeat: int, layout: str) -> dict[str, Any]:
    """The client's figures, after a warm-up. Prompts are the repeat's own, as engines keep those of earlier ones."""
    for load in (Shape(4, 4, shape.prompt_tokens, 4), shape):
        seed = zlib.crc32(f"{repeat} {layout} {load}".encode())
        lengths = load.prompt_tokens, load.output_tokens
        result = asyncio.run(closed_loop(server, load.concurrency, load.requests, *lengths, seed))
    return {name: value for name, value in result.items() if not isinstance(value, list)}


def row(samples: Samples, layout: str, shape: Shape) -> list[str]:
    cells = [layout, str(shape)]
    for quantity in QUANTITIES:
        flying, stock = (
            [sample[quantity] for sample in samples[who, layout, str(shape)]] for who in ("flying", "stock")
        )
        ratios = [own / other for own, other in zip(flying, stock, strict=True)]
        cells += [
            f"{median(flying):.1f} ({median(stock):.1f})",
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        ]
    return cells


if __name__ == "__main__":
    main()
