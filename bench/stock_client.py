"""vLLM's own load client, `vllm bench serve`, run inside this process: its imports take longer than many a run.

Touches the server over HTTP only and keeps what the client prints to itself: figures come from its result.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.support.server import Server

OPTIONS = (
    *("--temperature", "0"),  # otherwise sampled, as the server's defaults say
    # Servers close idle connections after five seconds, and a request sent at that moment fails.
    *("--header", "Connection=close"),
    *("--metric-percentiles", "50,90,99"),
    "--disable-tqdm",
    "--save-detailed",  # every request's times in the result; no file is written
)


@dataclass(frozen=True)
class ServedRequest:
    """What the client saw of a request, in seconds; `itls` are the gaps between chunks of one token or more."""

    start: float
    ttft: float
    itls: list[float]
    output_tokens: int
    error: str = ""
    """Why it failed; then the other figures mean nothing."""

    @property
    def end(self) -> float:
        return self.start + self.ttft + sum(self.itls)

    @property
    def tpot(self) -> float:
        return sum(self.itls) / max(1, self.output_tokens - 1)


async def bench_serve(server: Server, *options: str) -> dict[str, Any]:
    """The client's result with `options` of `vllm bench serve`. Raises RuntimeError if a request failed."""
    (result,) = await bench_serve_together(server, [options])
    if result["failed"]:
        error = next(error for error in result["errors"] if error)
        raise RuntimeError(f"{result['failed']} of {len(result['errors'])} requests to {server.url} failed: {error}")
    return result


async def bench_serve_together(server: Server, runs: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The results of several clients at once, each with its options; requests may have failed."""
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    common = ["--base-url", server.url, "--model", server.model, *OPTIONS]
    with contextlib.redirect_stdout(io.StringIO()):
        return await asyncio.gather(*(main_async(parser.parse_args([*common, *options])) for options in runs))


async def closed_loop(
    server: Server, concurrency: int, requests: int, prompt_tokens: int, output_tokens: int, seed: int
) -> dict[str, Any]:
    """So many requests with random prompts of their own, at most `concurrency` in flight."""
    return await _random(server, ("--max-concurrency", str(concurrency)), requests, prompt_tokens, output_tokens, seed)


async def open_loop(
    server: Server, rate: float, requests: int, prompt_tokens: int, output_tokens: int, seed: int
) -> dict[str, Any]:
    """So many requests with random prompts of their own, by Poisson at `rate` per second."""
    return await _random(server, ("--request-rate", str(rate)), requests, prompt_tokens, output_tokens, seed)


async def _random(
    server: Server, pacing: Sequence[str], requests: int, prompt_tokens: int, output_tokens: int, seed: int
) -> dict[str, Any]:
    return await bench_serve(
        server, "--dataset-name", "random", *pacing, "--num-prompts", str(requests),
        "--input-len", str(prompt_tokens), "--output-len", str(output_tokens), "--seed", str(seed),
    )  # fmt: skip


def served_requests(result: dict[str, Any]) -> list[ServedRequest]:
    """The requests of a result, in the order of their data set; starts are on this process's performance counter."""
    columns = (result[key] for key in ("start_times", "ttfts", "itls", "output_lens", "errors"))
    return [ServedRequest(*row) for row in zip(*columns, strict=True)]
