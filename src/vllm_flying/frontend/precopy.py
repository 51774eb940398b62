"""Has the engines copy KV ahead of a switch: runs the rounds of `core.precopy`.

Pure but for the engine calls. Whatever goes wrong here costs the copies and their time: the switch then does without, and
engines drop what isn't settled when they prepare for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from vllm_flying.core.precopy import NOTHING_COPIED, Precopied, Rounds
from vllm_flying.frontend.engines import EngineCalls

logger = logging.getLogger("vllm.flying.switch")

# Engines answer between steps, and each round is a step or two. What isn't done by then isn't waited for.
LIMIT_S = 10.0


async def copy_ahead(engines: EngineCalls, rounds: Rounds, limit_s: float) -> Precopied:
    """Run the rounds to their end; what was copied doesn't count if they fail or take too long."""
    started = time.perf_counter()
    try:
        async with asyncio.timeout(min(limit_s, LIMIT_S)):
            copied = await _run(engines, rounds)
            return replace(copied, took_s=time.perf_counter() - started)
    except Exception as error:  # an engine's own words, the time limit, or a worker that can't
        logger.warning("No KV is copied ahead of this switch: %s", str(error) or type(error).__name__)
        return replace(NOTHING_COPIED, took_s=time.perf_counter() - started)


async def _run(engines: EngineCalls, rounds: Rounds) -> Precopied:
    calls = next(rounds)
    while True:
        replies = await asyncio.gather(*[engines.call(call.engine, call.operation, call.arguments) for call in calls])
        try:
            calls = rounds.send({call.engine: reply for call, reply in zip(calls, replies, strict=True)})
        except StopIteration as end:
            copied: Precopied = end.value
            return copied
