"""`python -m bench.layouts`: stock DP and TP against the same layouts of one flying server, by load and length.

All servers are up and take turns, shape by shape, with the same prompts for stock and flying; what counts are ratios of
neighbouring runs, not absolute times. The load is that of `vllm bench serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

from bench.models import add_model_options, model_of
from bench.plots import plot_bars
from bench.progress import progress
from bench.report import markdown, write
from bench.server import STOCK, add_server_options, bench_server, server_flags
from bench.stock_client import closed_loop, open_loop
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

    async def run(self, server: Server, seed: int) -> dict[str, Any]:
        """The client's figures."""
        return await closed_loop(server, self.concurrency, self.requests, self.prompt_tokens, self.output_tokens, seed)


@dataclass(frozen=True)
class Rate:
    """An open loop: so many requests that come by Poisson at a rate per second, and their lengths in tokens."""

    rate: float
    requests: int
    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.rate:g} per second, {self.prompt_tokens} / {self.output_tokens}"

    async def run(self, server: Server, seed: int) -> dict[str, Any]:
        """The client's figures."""
        return await open_loop(server, self.rate, self.requests, self.prompt_tokens, self.output_tokens, seed)


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
Samples = dict[tuple[str, str, str], list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of every shape on every server")
    add_server_options(parser)
    metavar = ("IN_FLIGHT", "REQUESTS", "IN", "OUT")
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=metavar, help="by default four shapes")
    metavar = ("RATE", "REQUESTS", "IN", "OUT")
    parser.add_argument("--rate", type=float, nargs=4, action="append", metavar=metavar, help="requests per second")
    add_model_options(parser)
    arguments = parser.parse_args()
    rates = [Rate(rate, *map(int, numbers)) for rate, *numbers in arguments.rate or ()]
    shapes: Sequence[Shape | Rate] = [*(Shape(*numbers) for numbers in arguments.shape or ()), *rates] or SHAPES
    model, flags = model_of(arguments), server_flags(arguments)
    samples: Samples = {}
    parts = 3 + arguments.repeats * len(LAYOUTS) * (1 + 2 * len(shapes))
    with ExitStack() as stack:
        done = stack.enter_context(progress(parts))
        flying = stack.enter_context(bench_server(model, *flags, flying=True))
        done(f"flying: up after {flying.start_seconds:.0f} s")
        stock: dict[str, Server] = {}
        for layout, options in STOCK.items():
            stock[layout] = stack.enter_context(bench_server(model, *flags, **options))
            done(f"stock {layout}: up after {stock[layout].start_seconds:.0f} s")
        for repeat, (layout, groups) in product(range(arguments.repeats), LAYOUTS.items()):
            flying.switch(groups)
            done(f"== repeat {repeat + 1} of {arguments.repeats}, {layout}")
            servers = {"flying": flying, "stock": stock[layout]}
            for shape, who in product(shapes, sorted(servers, reverse=repeat % 2 == 1)):
                sample = run(servers[who], shape, repeat, layout)
                samples.setdefault((who, layout, str(shape)), []).append(sample)
                done(f"  {who} {layout} {shape}: {sample['output_throughput']:.1f} tokens/s")
    rows = [row(samples, layout, shape) for layout in LAYOUTS for shape in shapes]
    columns = [column for name in QUANTITIES.values() for column in (name, "ratio")]
    table = markdown(["layout", "in flight or rate, prompt / output", *columns], rows)
    table += "\n\nFlying (stock), medians; ratio: median of the runs' own ratios (least to most)."
    folder = write("layouts", {"samples": {" / ".join(key): values for key, values in samples.items()}}, table)
    bars = {
        f"{layout} {shape}": {name: ratios(samples, layout, shape, key) for key, name in list(QUANTITIES.items())[:3]}
        for layout, shape in product(LAYOUTS, shapes)
    }
    plot_bars(folder / "layouts.png", "Flying over stock in the same layout", "ratio", bars, level=1.0)


def run(server: Server, shape: Shape | Rate, repeat: int, layout: str) -> dict[str, Any]:
    """The client's figures, after a warm-up. Prompts are the repeat's own, as engines keep those of earlier ones."""
    for load in (Shape(4, 4, shape.prompt_tokens, 4), shape):
        result = asyncio.run(load.run(server, zlib.crc32(f"{repeat} {layout} {load}".encode())))
    return {name: value for name, value in result.items() if not isinstance(value, list)}


def row(samples: Samples, layout: str, shape: Shape | Rate) -> list[str]:
    cells = [layout, str(shape)]
    for quantity in QUANTITIES:
        flying, stock = (median(values(samples, who, layout, shape, quantity)) for who in ("flying", "stock"))
        of_runs = ratios(samples, layout, shape, quantity)
        cells += [f"{flying:.1f} ({stock:.1f})", f"{median(of_runs):.2f} ({min(of_runs):.2f} to {max(of_runs):.2f})"]
    return cells


def ratios(samples: Samples, layout: str, shape: Shape | Rate, quantity: str) -> list[float]:
    """Flying over stock, run by run."""
    flying, stock = (values(samples, who, layout, shape, quantity) for who in ("flying", "stock"))
    return [own / other for own, other in zip(flying, stock, strict=True)]


def values(samples: Samples, who: str, layout: str, shape: Shape | Rate, quantity: str) -> list[float]:
    return [sample[quantity] for sample in samples[who, layout, str(shape)]]


if __name__ == "__main__":
    main()
