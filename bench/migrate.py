"""`python -m bench.migrate`: how fast KV moves at a switch, against a plain copy of the same bytes between workers."""

from __future__ import annotations

import argparse
import asyncio
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import httpx

from bench.client import complete, prompts, token_gaps
from bench.models import add_model_options, model_of
from bench.plots import plot_bars
from bench.progress import progress
from bench.report import markdown, stolen_seconds, write
from bench.server import add_server_options, bench_server, server_flags
from tests.support.background import Background
from tests.support.server import Server
from vllm_flying.settings import Settings

DP, TP = [[0], [1]], [[0, 1]]
LONG_TOKENS = 1900
"""Of the prompts that fill the KV caches; the servers' limit is 2048."""
COLUMNS = ["prompt tokens of each request", "copies ahead", "MB between workers ahead, at rest", "migration MB/s",
           "plain exchange MB/s", "ratio", "plain read MB/s", "ratio", "plain read and own copy MB/s", "ratio",
           "engines at rest, ms", "usual gap apart, merged, ms", "gap at a switch, median ms", "longest ms",
           "own KV over that rate + 2 steps + 20 ms", "within that", "undisturbed ones"]  # fmt: skip
RESTING = ("move", "admit", "transfer", "prove", "release", "commit")
"""Phases in which all engines stand still."""
REFERENCES = ("flying_copy_rate", "flying_read_rate", "flying_move_rate")
"""Plain copies between workers: sent, read in place, and read in place with as much copied within each worker."""

RATES = {"migration": "bytes_per_s", "plain exchange": "plain_bytes_per_s", "plain read": "read_bytes_per_s",
         "plain read and own copy": "read_and_copy_bytes_per_s"}  # fmt: skip
"""What the plot calls a rate, and what the results do."""


@dataclass(frozen=True)
class Gaps:
    """Seconds: usual gaps between two tokens, apart and merged, and each request's longest around each switch.

    Those of switches during which the host took time from this machine are apart.
    """

    apart_s: float
    merged_s: float
    undisturbed: list[float]
    disturbed: list[float]

    @property
    def two_steps_s(self) -> float:
        """One before a switch and one after it."""
        return self.apart_s + self.merged_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024], help="prompt tokens per request")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--switches", type=int, default=8, help="per prompt length; an even number")
    parser.add_argument("--precopy-bytes", type=int, nargs="+", default=[Settings.precopy_bytes, 0], help="see docs/settings.md")
    add_model_options(parser)
    add_server_options(parser, "float32")
    arguments = parser.parse_args()
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # vLLM's routes for calls to workers and for resetting prefixes
    model = model_of(arguments)
    rows, data = [], {}
    with progress(len(arguments.precopy_bytes) * (2 + len(arguments.tokens))) as done:
        for most in arguments.precopy_bytes:
            options: dict[str, Any] = {"environment": environment, "settings": {"precopy_bytes": most}}
            with bench_server(model, *server_flags(arguments), flying=True, **options) as server:
                done(f"up after {server.start_seconds:.0f} s; filling its KV cache")
                done(asyncio.run(fill(server)))
                for tokens in arguments.tokens:
                    row, data[f"{tokens} tokens, {most} bytes ahead"] = of_length(server, tokens, arguments)
                    rows.append([tokens, "yes" if most else "no", *row])
                    done(", ".join(f"{name}: {cell}" for name, cell in zip(COLUMNS, rows[-1], strict=True)))
    folder = write("migrate", data, markdown(COLUMNS, rows))
    bars = {case: {name: [of_case[key] / 1e6] for name, key in RATES.items() if of_case[key]} for case, of_case in data.items()}
    plot_bars(folder / "migrate.png", "KV between workers", "MB/s", bars)


def of_length(server: Server, tokens: int, arguments: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Of requests with such prompts: a row of the table, and what it comes from."""
    records, gaps = measure(server, arguments.requests, tokens, arguments.switches)
    ahead, at_rest = (median(record[when]["bytes"] for record in records) for when in ("precopied", "kv"))
    seconds = median(record["kv"]["seconds"] + record["precopied"]["seconds"] for record in records)
    resting = median(sum(record["seconds"][phase] for phase in RESTING) for record in records)
    moved, rate = ahead + at_rest, (ahead + at_rest) / seconds
    plain, read, work = (plain_rate(server, call, int(moved)) for call in REFERENCES)
    allowed = moved / arguments.requests / rate + gaps.two_steps_s + 0.020
    longest = gaps.undisturbed + gaps.disturbed
    data = {"records": records, "bytes_per_s": rate, "plain_bytes_per_s": plain, "read_bytes_per_s": read,
            "read_and_copy_bytes_per_s": work, "gaps_s": gaps.undisturbed, "disturbed_gaps_s": gaps.disturbed, "allowed_gap_s": allowed}
    row = [f"{ahead / 1e6:.1f}, {at_rest / 1e6:.1f}", f"{rate / 1e6:.0f}", *against(rate, plain),
           *(cell for best in (read, work) for cell in (against(rate, best) if best else ("", ""))), f"{1e3 * resting:.1f}",
           f"{1e3 * gaps.apart_s:.0f}, {1e3 * gaps.merged_s:.0f}", f"{1e3 * median(longest):.0f}", f"{1e3 * max(longest):.0f}",
           f"{1e3 * allowed:.0f}", share_within(longest, allowed), share_within(gaps.undisturbed, allowed)]  # fmt: skip
    return row, data


def share_within(gaps: list[float], allowed: float) -> str:
    """How many are no longer than that; of how many."""
    return f"{100 * sum(gap <= allowed for gap in gaps) / len(gaps):.0f} % of {len(gaps)}" if gaps else ""


def against(rate: float, best: float) -> tuple[str, str]:
    """A plain copy's rate, and the share of it that a migration reaches."""
    return f"{best / 1e6:.0f}", f"{rate / best:.2f}"


async def fill(server: Server) -> str:
    """Have every page of the KV caches written once: on some virtual machines the first write to a page is slow."""
    tokens = sum(group["kv_tokens_capacity"] for group in server.status()["groups"])
    gate = asyncio.Semaphore(8)
    async with httpx.AsyncClient(base_url=server.url, timeout=300.0) as client:

        async def one(prompt: list[int]) -> None:
            async with gate:
                await complete(client, server.model, prompt, 1)

        count = math.ceil(1.25 * tokens / LONG_TOKENS)
        await asyncio.gather(*[one(prompt) for prompt in prompts(count, LONG_TOKENS, 0)])
    return f"{tokens} tokens of KV cache filled with {count} prompts"


def measure(server: Server, requests: int, tokens: int, switches: int) -> tuple[list[dict[str, Any]], Gaps]:
    """Switch to and fro while so many requests decode."""
    streams = [Background(server, prompt, 1500 - tokens) for prompt in prompts(requests, tokens, tokens)]
    for stream in streams:
        stream.wait_for_tokens()
    records: list[dict[str, Any]] = []
    steps: tuple[list[float], list[float]] = ([], [])
    undisturbed: list[float] = []
    disturbed: list[float] = []
    for index in range(switches):
        begin = time.monotonic()
        time.sleep(1.5)
        steps[index % 2].extend(b - a for stream in streams for a, b in pairwise(stream.times) if a > begin)
        # Or all but the newest KV would still be in place where it was before the last switch, and nothing be copied.
        assert server.client.post("/reset_prefix_cache").status_code == 200
        begin, stolen = time.monotonic(), stolen_seconds()
        record = server.switch((TP, DP)[index % 2], method="migrate", timeout_s=120)
        end = time.monotonic()
        time.sleep(0.5)
        longest = undisturbed if stolen_seconds() == stolen else disturbed
        longest += [max(token_gaps(stream.times, begin, end)) for stream in streams if stream.is_alive]
        records.append(record)
    for stream in streams:
        stream.abort()
        stream.join()
    return [record for record in records if record["requests"]["moved"]], Gaps(median(steps[0]), median(steps[1]), undisturbed, disturbed)


def plain_rate(server: Server, call: str, num_bytes: int) -> float:
    """Bytes per second between the workers, engines apart."""
    body = {"method": call, "args": [str(num_bytes), "2"]}
    response = server.client.post("/collective_rpc", json=body)
    assert response.status_code == 200, response.text
    return float(response.json()["results"][0])


if __name__ == "__main__":
    main()
