"""`python -m bench.trace`: the same arrivals against static DP, static TP and a flying server that decides by itself.

All servers are up at once and take turns, so that what the machine does to one it does to all; an idle server costs
about nothing. Each turn has arrivals of its own, the same for every server.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median, quantiles

import httpx

from bench.arrivals import Arrival, Phase, poisson, trace
from bench.client import Timing, complete, prompts
from bench.models import llama
from bench.plots import plot_timeline
from bench.report import markdown, write
from bench.server import bench_server
from tests.support.server import Server

QUANTITIES = ("ttft", "tpot")
Row = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--trace", type=Path, help="CSV of timestamp, input length, output length; else a burst")
    parser.add_argument("--start", type=float, default=0.0, help="seconds into the trace")
    parser.add_argument("--seconds", type=float, default=90.0, help="length of the run")
    parser.add_argument("--time-scale", type=float, default=1.0, help="above 1 slows the trace down")
    parser.add_argument("--length-scale", type=float, default=1.0, help="below 1 shortens its requests")
    parser.add_argument("--quiet", type=float, nargs=3, default=(0.5, 256, 32), metavar=("RATE", "IN", "OUT"))
    parser.add_argument("--burst", type=float, nargs=3, default=(12.0, 64, 24), metavar=("RATE", "IN", "OUT"))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", choices=("DP", "TP", "auto"), nargs="+", default=["DP", "TP", "auto"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3, help="of every server")
    arguments = parser.parse_args()
    model = llama(arguments.layers, arguments.hidden)
    results: dict[str, list[list[tuple[Arrival, Timing]]]] = {name: [] for name in arguments.only}
    layouts: list[list[tuple[float, list[list[int]]]]] = []
    records: list[str] = []
    servers = {
        "DP": {"flying": False},
        "TP": {"flying": False, "engines": 1, "tensor_parallel": 2},
        "auto": {"flying": True, "settings": {"policy": "auto"}},
    }
    with ExitStack() as stack:
        up: dict[str, Server] = {}
        for name in arguments.only:
            server = bench_server(model, "--dtype", arguments.dtype, **servers[name])  # type: ignore[arg-type]
            up[name] = stack.enter_context(server)
            print(f"== {name}: up after {server.start_seconds:.0f} s", flush=True)
        for turn in range(arguments.turns):
            arrivals = _arrivals(arguments, turn)
            order = arguments.only[turn % len(up) :] + arguments.only[: turn % len(up)]
            for name in order:
                timings, seen = asyncio.run(replay(up[name], arrivals, name == "auto", 10_000 * (turn + 1)))
                results[name].append(timings)
                layouts += [seen] if name == "auto" else []
                print(f"turn {turn + 1} of {arguments.turns}, {name}: {_line(timings)}", flush=True)
        if "auto" in up:
            records = up["auto"].client.get("/plugins/flying/decisions").json()["sentences"]
            print("\n".join(records[-20:]), flush=True)
    table = _table(results)
    folder = write(
        "trace",
        {
            "arguments": {key: str(value) for key, value in vars(arguments).items()},
            "requests": {
                name: [[[a.time, a.phase, t.sent, t.tokens] for a, t in turn] for turn in turns]
                for name, turns in results.items()
            },
            "layouts": layouts,
            "decisions": records,
        },
        table,
    )
    plot_timeline(folder / "timeline.png", {name: turns[0] for name, turns in results.items()}, (layouts or [[]])[0])


def _line(timings: Sequence[tuple[Arrival, Timing]]) -> str:
    row = figures(timings, "all")
    return f"mean TTFT {row['mean ttft ms']:.0f} ms, mean TPOT {row['mean tpot ms']:.0f} ms, {row['tokens/s']:.1f} tokens/s"


def _table(results: Mapping[str, Sequence[Sequence[tuple[Arrival, Timing]]]]) -> str:
    """Medians over turns; in brackets the ratio to the better static server, below 1 being better but for tokens/s."""
    first = next(iter(results.values()))[0]
    phases = dict.fromkeys([*(arrival.phase for arrival, _ in first), "all"])
    rows = []
    for phase in phases:
        by_name = {name: [figures(turn, phase) for turn in turns] for name, turns in results.items()}
        for quantity in figures(first, phase):
            values = {name: median(row[quantity] for row in turns) for name, turns in by_name.items()}
            static = [value for name, value in values.items() if name != "auto"] or list(values.values())
            best = max(static) if quantity == "tokens/s" else min(static)
            rows.append([phase, quantity, *(f"{value:.3g} ({value / best:.2f})" for value in values.values())])
    return markdown(["phase", "quantity", *results], rows)


def _arrivals(arguments: argparse.Namespace, turn: int) -> list[Arrival]:
    if arguments.trace:
        start = arguments.start + turn * arguments.seconds / arguments.time_scale
        return trace(arguments.trace, start, arguments.seconds, arguments.time_scale, arguments.length_scale)
    third = arguments.seconds / 3

    def phase(name: str, shape: Sequence[float]) -> Phase:
        return Phase(name, third, shape[0], int(shape[1]), int(shape[2]))

    quiet, burst = arguments.quiet, arguments.burst
    return poisson([phase("quiet", quiet), phase("burst", burst), phase("quiet", quiet)], arguments.seed + turn)


async def replay(
    server: Server, arrivals: Sequence[Arrival], watch: bool, first_seed: int = 10_000
) -> tuple[list[tuple[Arrival, Timing]], list[tuple[float, list[list[int]]]]]:
    """Send every request at its time, its prompt from a seed of its own; times in the result count from the start."""
    layouts: list[tuple[float, list[list[int]]]] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # the server closes idle ones
    async with httpx.AsyncClient(base_url=server.url, timeout=900.0, limits=limits) as client:
        for _ in range(2):  # both engines warm
            await asyncio.gather(*[complete(client, server.model, p, 4) for p in prompts(4, 64, 7)])
        started = time.perf_counter()

        async def one(index: int, arrival: Arrival) -> tuple[Arrival, Timing]:
            await asyncio.sleep(max(0.0, arrival.time - (time.perf_counter() - started)))
            (prompt,) = prompts(1, arrival.prompt_tokens, first_seed + index)
            timing = await complete(client, server.model, prompt, arrival.output_tokens)
            return arrival, Timing(timing.sent - started, [t - started for t in timing.tokens])

        async def look() -> None:
            while True:
                groups = (await client.get("/plugins/flying/status")).json()["groups"]
                now = [group["engines"] for group in groups]
                if not layouts or layouts[-1][1] != now:
                    layouts.append((time.perf_counter() - started, now))
                await asyncio.sleep(0.5)

        looking = asyncio.ensure_future(look()) if watch else None
        results = await asyncio.gather(*[one(i, arrival) for i, arrival in enumerate(arrivals)])
        if looking is not None:
            looking.cancel()
    return results, layouts


def figures(results: Sequence[tuple[Arrival, Timing]], phase: str) -> Row:
    """What a user of this phase saw."""
    chosen = [timing for arrival, timing in results if phase in ("all", arrival.phase)]
    row: Row = {}
    for quantity in QUANTITIES:
        values = [1e3 * getattr(timing, quantity) for timing in chosen]
        cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
        row |= {
            f"mean {quantity} ms": mean(values),
            f"P50 {quantity} ms": cuts[49],
            f"P90 {quantity} ms": cuts[89],
            f"P99 {quantity} ms": cuts[98],
        }
    span = max(t.tokens[-1] for t in chosen) - min(t.sent for t in chosen)
    row["tokens/s"] = sum(len(timing.tokens) for timing in chosen) / span
    return row


if __name__ == "__main__":
    main()
