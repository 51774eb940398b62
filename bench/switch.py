"""`python -m bench.switch`: how long switches take, idle and under load, between all layouts and by method.

Against a restart of the same server, and with what a client sees of it: the gap between two tokens.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from bench.load import Clients
from bench.models import add_model_options, model_of
from bench.plots import plot_bars
from bench.progress import progress
from bench.report import markdown, percentile, stolen_seconds, write
from bench.server import add_server_options, bench_server, server_flags
from tests.support.server import Server
from vllm_flying.core.topology import available_widths, groups_of_width

RUNNING = ("prepare", "extend")
"""Phases in which engines step, some of them at least."""
Groups = list[list[int]]
Pair = tuple[Groups, Groups]
Record = dict[str, Any]
# vLLM's workers poll for a second after every call; then they sleep, as they do on an idle server.
IDLE_S = 1.5
# How long requests run without a switch, to compare with.
UNSWITCHED_S = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="switches per pair of layouts and case")
    parser.add_argument("--requests", type=int, default=8, help="requests in flight in the loaded cases")
    parser.add_argument("--shape", type=int, nargs=2, default=(64, 64), metavar=("IN", "OUT"),
                        help="tokens of theirs; what comes in its turn has a prompt for which others wait too")  # fmt: skip
    parser.add_argument("--engines", type=int, default=2, choices=(2, 4, 8))
    parser.add_argument("--methods", nargs="+", default=["migrate", "pause"], help="of switches under load")
    add_model_options(parser)
    add_server_options(parser)
    arguments = parser.parse_args()
    layouts = uniform_layouts(arguments.engines)
    pairs, shape = every_pair(layouts), arguments.shape
    in_flight = f"{arguments.requests} requests of {shape[0]} / {shape[1]}"
    cases: dict[str, list[Record]] = {}
    gaps: dict[str, dict[str, float]] = {}
    parts = 1 + (2 + len(arguments.methods)) * arguments.repeats + len(layouts)
    options: dict[str, Any] = {"flying": True, "engines": arguments.engines}
    with progress(parts) as done, bench_server(model_of(arguments), *server_flags(arguments), **options) as server:
        done(f"up after {server.start_seconds:.0f} s")
        cases["idle"] = measure(server, done, pairs, arguments.repeats, "pause", IDLE_S)
        cases["idle, one after the other"] = measure(server, done, pairs, arguments.repeats, "pause", 0.05)
        unswitched: list[Clients] = []
        for groups in layouts:
            server.switch(groups)
            with Clients(server, arguments.requests, *shape) as clients:
                time.sleep(UNSWITCHED_S)
            unswitched.append(clients)
            gaps[f"{groups}, no switch"] = clients.gaps()
            done(f"{in_flight} in {groups}")
        for method in arguments.methods:
            with Clients(server, arguments.requests, *shape) as clients:
                records = measure(server, done, pairs, arguments.repeats, method, pause_s=1.0)
                server.switch(layouts[0], method="migrate", timeout_s=120)  # where paused requests go on
            for index, record in enumerate(records):
                ends = [unswitched[layouts.index(record[end])] for end in ("from", "to")]
                duration = record["ended"] - record["began"]
                record["added_gaps_s"] = clients.gaps_beyond_usual(record["began"], duration)
                record["unswitched_gaps_s"] = [
                    gap for each in ends for gap in each.gaps_beyond_usual(each.began + index % (UNSWITCHED_S - 2), duration)
                ]
            cases[f"{in_flight}, {method}"] = records
            gaps[f"a switch every second, {method}"] = clients.gaps()
        restart = server.start_seconds
    table = "\n\n".join((times_table(cases, pairs, restart), phases_table(cases, pairs), gaps_table(gaps)))
    folder = write("switch", {"cases": cases, "gaps": gaps, "restart_s": restart}, table)
    bars = {
        name: {arrow(*pair): [record["reply_ms"] for record in chosen] for _, pair, chosen in by_pair({name: records}, pairs)}
        for name, records in cases.items()
    }
    plot_bars(folder / "switch.png", "POST to reply", "ms", bars)


def uniform_layouts(engines: int) -> list[Groups]:
    """All groups of one width, narrowest first."""
    widths = (1, *available_widths(engines))
    return [[list(group) for group in groups_of_width(width, engines)] for width in widths]


def every_pair(layouts: Sequence[Groups]) -> list[Pair]:
    """Every layout to every other, each beginning where the one before ended as long as that works out."""
    left, chain = list(itertools.permutations(layouts, 2)), []
    while left:
        following = [pair for pair in left if chain and pair[0] == chain[-1][1]] or left
        chain.append(following[0])
        left.remove(following[0])
    return chain


def measure(
    server: Server, done: Callable[[str], None], pairs: Sequence[Pair], repeats: int, method: str, pause_s: float
) -> list[Record]:
    """The records of switches, with their `reply_ms`, POST to reply, and what the host took meanwhile."""
    records: list[Record] = []
    # The standard library's client: httpx adds a millisecond of its own.
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    for index in range(repeats):
        for source, target in pairs:
            if [group["engines"] for group in server.status()["groups"]] != source:
                post(client, source, method)
                time.sleep(pause_s)
            records.append(post(client, target, method))
            time.sleep(pause_s)
        latest = ", ".join(f"{record['reply_ms']:.1f}" for record in records[-len(pairs) :])
        done(f"{method}, {index + 1} of {repeats}: {latest} ms")
    return records


def post(client: http.client.HTTPConnection, groups: Groups, method: str) -> Record:
    """Switch; RuntimeError if that failed."""
    body = json.dumps({"groups": groups, "method": method, "timeout_s": 120})
    stolen, began = stolen_seconds(), time.perf_counter()
    client.request("POST", "/plugins/flying/switch", body, {"Content-Type": "application/json"})
    reply = client.getresponse().read()
    ended = time.perf_counter()
    record: Record = json.loads(reply)
    if record.get("outcome") != "committed":
        raise RuntimeError(f"the switch to {groups} failed: {reply.decode()}")
    taken = {"began": began, "ended": ended, "reply_ms": 1e3 * (ended - began)}
    return {**record, **taken, "stolen_ms": 1e3 * (stolen_seconds() - stolen)}


def times_table(cases: dict[str, list[Record]], pairs: Sequence[Pair], restart_s: float) -> str:
    rows: list[list[Any]] = []
    for name, (source, target), chosen in by_pair(cases, pairs):
        # On a shared host: switches during which the host left this machine's processors alone.
        undisturbed = [record for record in chosen if not record["stolen_ms"]]
        at_rest = [1e3 * (r["seconds"]["total"] - sum(r["seconds"][phase] for phase in RUNNING)) for r in chosen]
        moved = sum(record["requests"]["moved"] for record in chosen) / len(chosen)
        megabytes = sum(record["kv"]["bytes"] + record["precopied"]["bytes"] for record in chosen) / len(chosen) / 1e6
        rate = median(record["kv"]["bytes_per_s"] for record in chosen) / 1e6
        rows.append([
            name, arrow(source, target), *reply_times(chosen), f"{median(at_rest):.1f}", len(undisturbed),
            *reply_times(undisturbed), f"{moved:.1f}", f"{megabytes:.2f}", f"{rate:.0f}" if rate else "",
            *added_gaps(chosen),
        ])  # fmt: skip
    times = ["reply, median ms", "p99 ms", "beyond steps in flight, median ms"]
    columns = ["case", "layouts", *times, "engines at rest, median ms", "undisturbed", *times, "requests moved",
               "MB between workers", "MB/s", "a client's gap beyond a usual one, P50 ms", "P99 ms",
               "the same in as long a time without a switch, P50 ms", "P99 ms"]  # fmt: skip
    rows.append(["restart", "", f"{1e3 * restart_s:.0f}", *[""] * (len(columns) - 3)])
    return markdown(columns, rows)


def phases_table(cases: dict[str, list[Record]], pairs: Sequence[Pair]) -> str:
    rows = []
    phases = list(dict.fromkeys(phase for records in cases.values() for record in records for phase in record["seconds"]))
    for name, (source, target), chosen in by_pair(cases, pairs):
        medians = (median(1e3 * record["seconds"].get(phase, 0.0) for record in chosen) for phase in phases)
        rows.append([name, arrow(source, target), *(f"{value:.1f}" for value in medians)])
    return markdown(["case", "layouts", *(f"{phase}, median ms" for phase in phases)], rows)


def gaps_table(gaps: dict[str, dict[str, float]]) -> str:
    quantities = ("tpot_ms", "longest_gap_p50_ms", "longest_gap_p99_ms")
    rows = [[name, *(f"{each[quantity]:.0f}" for quantity in quantities)] for name, each in gaps.items()]
    return markdown(["requests in flight", "TPOT ms", "longest gap of a request, P50 ms", "P99 ms"], rows)


def by_pair(cases: dict[str, list[Record]], pairs: Sequence[Pair]) -> list[tuple[str, Pair, list[Record]]]:
    return [
        (name, pair, [record for record in records if [record["from"], record["to"]] == list(pair)])
        for name, records in cases.items()
        for pair in pairs
    ]


def arrow(source: Groups, target: Groups) -> str:
    return f"{source} → {target}"


def reply_times(records: list[Record]) -> list[str]:
    """POST to reply; and without what is copied ahead, and without `prepare`, in which steps in flight end."""
    if not records:
        return [""] * 3
    replies = [record["reply_ms"] for record in records]
    beyond = [r["reply_ms"] - 1e3 * (r["seconds"]["precopy"] + r["seconds"]["prepare"]) for r in records]
    return [f"{median(replies):.1f}", f"{percentile(replies, 99):.1f}", f"{median(beyond):.1f}"]


def added_gaps(records: list[Record]) -> list[str]:
    """Of clients whose requests moved: paused ones wait for their layout, however long it is away. Then the same unswitched."""
    if not any(record["requests"]["moved"] for record in records):
        return [""] * 4
    across = [[1e3 * gap for record in records for gap in record[kind]] for kind in ("added_gaps_s", "unswitched_gaps_s")]
    return [f"{percentile(added, each):.0f}" for added in across for each in (50, 99)]


if __name__ == "__main__":
    main()
