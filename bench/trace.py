"""`python -m bench.trace`: the same arrivals against static DP, static TP and a flying server that decides by itself.

All servers are up at once and take turns, so that what the machine does to one it does to all; an idle server costs
about nothing. Each turn has arrivals of its own, the same for every server, sent by `vllm bench serve`. Ratios are those of
a turn, and of these the median: where the machine wanders, more and shorter turns say more than a few long ones, and
`--burst-share` scales every burst to the machine as it is then. One start of a server differs from the next, too:
`--restart` starts all of them anew for every turn.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.arrivals import Arrival, Phase, mixed, poisson, window
from bench.figures import Objectives, compare, line, table
from bench.models import add_model_options, model_of
from bench.plots import plot_timeline
from bench.progress import progress
from bench.recorded import read
from bench.replay import Replay, replay
from bench.report import write
from bench.server import STOCK, add_server_options, bench_server, server_flags
from bench.stock_client import closed_loop
from bench.targets import targets
from tests.support.server import Server

SERVERS: dict[str, dict[str, Any]] = STOCK | {"auto": {"flying": True, "settings": {"policy": "auto"}}}
SATURATED = 64
"""Requests in flight that a pair serves about as many tokens per second with as it ever does."""


class _Run:
    """What was measured so far, and the turns that measure it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model = model_of(arguments)
        # Rounded up: hash ids then cover every prompt, which the client would cut short otherwise.
        self.chunk_tokens = math.ceil(arguments.timed_trace_chunk_hash_size * arguments.length_scale)
        self.recorded = read(arguments.trace, arguments.timed_trace_sec_multiplier) if arguments.trace else []
        self.results: dict[str, list[Replay]] = {name: [] for name in arguments.only}
        self.decisions: list[str] = []
        self.step_costs: dict[str, Any] = {}
        self.rates: list[float] = []

    def take(self, turns: Iterable[int], done: Callable[[str], None]) -> None:
        """Start all servers, let them take these turns, stop them."""
        with ExitStack() as stack:
            up: dict[str, Server] = {}
            for name in self.arguments.only:
                options: dict[str, Any] = SERVERS[name] | {"kv_mib": self.arguments.kv_mib}
                flags = [*server_flags(self.arguments), *_mix_flags(self.arguments, name)]
                up[name] = stack.enter_context(bench_server(self.model, *flags, **options))
                done(f"{name}: up after {up[name].start_seconds:.0f} s")
            for turn in turns:
                self._take_turn(turn, up, done)
            if "auto" in up:
                self.decisions += up["auto"].client.get("/plugins/flying/decisions").json()["sentences"]
                self.step_costs = up["auto"].status()["step_costs"]

    def _take_turn(self, turn: int, up: dict[str, Server], done: Callable[[str], None]) -> None:
        arguments, title = self.arguments, f"turn {turn + 1} of {self.arguments.turns}"
        if arguments.burst_share:
            arguments.burst = (_burst_rate(arguments, up["TP"], turn), *arguments.burst[1:])
            self.rates.append(arguments.burst[0])
            done(f"{title}: {self.rates[-1]:.1f}/s in the burst")
        arrivals = _arrivals(arguments, self.recorded, turn)
        for name in arguments.only[turn % len(up) :] + arguments.only[: turn % len(up)]:
            watch, seed = name == "auto", arguments.seed + turn
            self.results[name].append(asyncio.run(replay(up[name], arrivals, self.chunk_tokens, watch, seed)))
            done(f"{title}, {name}: {line(self.results[name][-1])}")


def main() -> None:
    arguments = _options()
    run = _Run(arguments)
    turns = range(arguments.turns)
    starts = [[turn] for turn in turns] if arguments.restart else [turns]
    parts = len(arguments.only) * (len(starts) + len(turns)) + (len(turns) if arguments.burst_share else 0)
    with progress(parts) as done:
        for of_one_start in starts:
            run.take(of_one_start, done)
    print("\n".join(run.decisions[-20:]), run.step_costs, sep="\n", flush=True)
    data = {
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "requests": {name: [_requests(turn) for turn in turns] for name, turns in run.results.items()},
        "layouts": [turn.layouts for turn in run.results.get("auto", ())],
        "burst_rates": run.rates,
        "stolen_s": {name: [turn.stolen_s for turn in turns] for name, turns in run.results.items()},
        "decisions": run.decisions,
        "step_costs": run.step_costs,
    }
    comparison = compare(run.results, Objectives(*arguments.objectives))
    folder = write("trace", data, f"{table(comparison)}\n\n{targets(comparison)}\n\n{_stolen(run.results)}")
    plot_timeline(folder / "timeline.png", {name: turns[0] for name, turns in run.results.items()})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    kinds = "CSV of timestamp, input length, output length, or a timed trace of `vllm bench serve`; else a burst"
    parser.add_argument("--trace", type=Path, help=kinds)
    parser.add_argument("--timed-trace-sec-multiplier", type=float, default=1.0, help="seconds per unit of its times")
    parser.add_argument(
        "--timed-trace-chunk-hash-size", type=int, default=16, help="tokens per hash id of a timed trace"
    )
    parser.add_argument("--start", type=float, default=0.0, help="seconds into the trace")
    parser.add_argument("--seconds", type=float, default=90.0, help="length of the run")
    parser.add_argument("--burst-seconds", type=float, help="of these, in the middle; by default a third")
    parser.add_argument("--time-scale", type=float, default=1.0, help="above 1 slows the trace down")
    parser.add_argument("--length-scale", type=float, default=1.0, help="below 1 shortens its requests")
    parser.add_argument("--output-scale", type=float, help="the same for outputs alone; by default as --length-scale")
    parser.add_argument("--quiet", type=float, nargs=3, default=(0.5, 256, 32), metavar=("RATE", "IN", "OUT"))
    parser.add_argument("--burst", type=float, nargs=3, default=(12.0, 64, 24), metavar=("RATE", "IN", "OUT"))
    share = f"instead of the burst's RATE: this of what static TP serves with {SATURATED} in flight as a turn begins"
    parser.add_argument("--burst-share", type=float, default=0.0, help=share)
    parser.add_argument(
        "--objectives", type=float, nargs=2, default=(2000, 250), metavar=("TTFT", "TPOT"), help="ms, for the goodput"
    )
    parser.add_argument("--urgent", type=float, default=0.0, metavar="SHARE", help="of requests sent with priority -1")
    parser.add_argument("--long", type=float, nargs=3, default=(0.0, 0, 0), metavar=("SHARE", "IN", "OUT"))
    parser.add_argument("--kv-mib", type=int, default=512, help="KV cache of every worker")
    add_model_options(parser)
    add_server_options(parser)
    parser.add_argument("--only", choices=("DP", "TP", "auto"), nargs="+", default=["DP", "TP", "auto"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3, help="of every server")
    restart = "start the servers anew for every turn: one start of a server differs from the next by up to a tenth"
    parser.add_argument("--restart", action="store_true", help=restart)
    arguments = parser.parse_args()
    if arguments.burst_share and "TP" not in arguments.only:
        parser.error(f"--burst-share is of what static TP serves; --only {' '.join(arguments.only)} leaves it out")
    return arguments


def _burst_rate(arguments: argparse.Namespace, server: Server, turn: int) -> float:
    """Requests per second."""
    _, prompt_tokens, output_tokens = (int(each) for each in arguments.burst)
    loop = closed_loop(server, SATURATED, 3 * SATURATED, prompt_tokens, output_tokens, arguments.seed + 1000 + turn)
    return float(arguments.burst_share * asyncio.run(loop)["request_throughput"])


def _requests(replayed: Replay) -> list[dict[str, Any]]:
    """For the JSON file; times in seconds after the replay's start."""
    return [
        {"time": arrival.time, "phase": arrival.phase, **asdict(served), "start": served.start - replayed.origin}
        for arrival, served in replayed.requests
    ]


def _stolen(results: Mapping[str, Sequence[Replay]]) -> str:
    """Turns in which servers had other machines say little."""
    seconds = "; ".join(f"{name} {', '.join(f'{turn.stolen_s:.1f}' for turn in turns)}" for name, turns in results.items())
    return f"Seconds that the host took, turn by turn: {seconds}."


def _mix_flags(arguments: argparse.Namespace, name: str) -> list[str]:
    """Stock vLLM minds priorities if told to, and starts if a request of the greatest length fits its KV cache."""
    by_priority = ["--scheduling-policy", "priority"] if arguments.urgent else []
    return [*by_priority, *(["--max-model-len", "auto"] if arguments.long[0] and name == "DP" else [])]


def _arrivals(arguments: argparse.Namespace, recorded: Sequence[Arrival], turn: int) -> list[Arrival]:
    """The turn's own, with its urgent and long requests."""
    share, *long = arguments.long
    usual = _usual_arrivals(arguments, recorded, turn)
    return mixed(usual, arguments.urgent, share, (int(long[0]), int(long[1])), arguments.seed + turn)


def _usual_arrivals(arguments: argparse.Namespace, recorded: Sequence[Arrival], turn: int) -> list[Arrival]:
    """The turn's own: the next part of the recording, or a burst from a seed of its own."""
    if recorded:
        start = arguments.start + turn * arguments.seconds / arguments.time_scale
        outputs = arguments.output_scale or arguments.length_scale
        return window(recorded, start, arguments.seconds, arguments.time_scale, arguments.length_scale, outputs)
    busy = arguments.burst_seconds or arguments.seconds / 3
    quiet = _phase("quiet", (arguments.seconds - busy) / 2, arguments.quiet)
    return poisson([quiet, _phase("burst", busy, arguments.burst), quiet], arguments.seed + turn)


def _phase(name: str, seconds: float, shape: Sequence[float]) -> Phase:
    return Phase(name, seconds, shape[0], int(shape[1]), int(shape[2]))


if __name__ == "__main__":
    main()
