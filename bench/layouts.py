"""`python -m bench.layouts`: stock DP and TP against the same layouts of one flying server.

Servers take turns and every shape is repeated; what counts are ratios within the run, not absolute times.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from bench.client import run_load
from bench.models import llama_150m
from bench.report import markdown, write
from bench.server import bench_server
from tests.support.server import Server

# name -> (requests at once, prompt tokens, output tokens)
SHAPES = {
    "lone 512/32": (1, 512, 32),
    "96 of 64/48": (96, 64, 48),
    "24 of 512/8": (24, 512, 8),
    "32 of 128/64": (32, 128, 64),
}
LAYOUTS = {"DP": [[0], [1]], "TP": [[0, 1]]}
Samples = dict[tuple[str, str, str], list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="turns of every server")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every shape per turn")
    parser.add_argument("--dtype", default="bfloat16", help="vLLM's --dtype for all servers")
    arguments = parser.parse_args()
    model, dtype = llama_150m(), ("--dtype", arguments.dtype)
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
    table = markdown(["layout", "shape", "tokens/s", "ratio", "TTFT ms", "ratio", "TPOT ms", "ratio"], rows)
    table += f"\n\nStart-up: stock DP {start['stock DP']:.1f} s, flying {start['flying']:.1f} s, "
    table += f"ratio {start['flying'] / start['stock DP']:.2f}. Figures: flying (stock)."
    named = {" / ".join(key): values for key, values in samples.items()}
    write("layouts", {"samples": named, "start_s": starts}, table)


def shapes(samples: Samples, who: str, layout: str, server: Server, repeats: int, turn: int) -> None:
    for shape, (count, length, output) in SHAPES.items():
        run_load(server.url, server.model, min(count, 4), length, 4, seed=999)
        for repeat in range(repeats):
            seed = 10_000 * turn + 100 * repeat + hash((who, layout)) % 97
            result = run_load(server.url, server.model, count, length, output, seed)
            samples.setdefault((who, layout, shape), []).append(result)
            print(f"  {who} {layout} {shape}: {result['tokens_per_s']:.1f} tokens/s", flush=True)


def row(samples: Samples, layout: str, shape: str) -> list[str]:
    cells = [layout, shape]
    for quantity, scale in (("tokens_per_s", 1.0), ("ttft_s", 1e3), ("tpot_s", 1e3)):
        ours, stock = (
            scale * median(sample[quantity] for sample in samples[who, layout, shape]) for who in ("flying", "stock")
        )
        cells += [f"{ours:.1f} ({stock:.1f})", f"{ours / stock:.2f}"]
    return cells


if __name__ == "__main__":
    main()
