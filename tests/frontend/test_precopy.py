"""Copies ahead of a switch that fail or take too long are given up, and are nobody's problem."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import pytest

from vllm_flying.core.journey import Call
from vllm_flying.core.precopy import NOTHING_COPIED, Precopied
from vllm_flying.frontend.precopy import copy_ahead


class Engines:
    num_engines = 2

    def __init__(self, fails: str = "", slow: str = "") -> None:
        self.fails, self.slow = fails, slow
        self.done: list[tuple[int, str]] = []

    async def call(self, engine: int, operation: str, arguments: dict[str, Any] | None = None) -> Any:
        if operation == self.slow:
            await asyncio.sleep(10)
        if operation == self.fails and engine == 1:
            raise RuntimeError("no pages")
        self.done.append((engine, operation))
        return engine


def rounds() -> Generator[list[Call], Any, Precopied]:
    replies = yield [Call(engine, "precopy_survey", {}) for engine in (0, 1)]
    assert replies == {0: 0, 1: 1}
    yield [Call(engine, "precopy_settle", {}) for engine in (0, 1)]
    return Precopied(requests=3, bytes=4, seconds=0.5)


def run(engines: Any) -> Precopied:
    return asyncio.run(copy_ahead(engines, rounds(), limit_s=0.2))


def test_rounds_are_run_to_their_end() -> None:
    engines = Engines()
    copied = run(engines)
    assert copied.report() == {"requests": 3, "bytes": 4, "seconds": 0.5} and 0 < copied.took_s < 0.2
    assert engines.done == [(0, "precopy_survey"), (1, "precopy_survey"), (0, "precopy_settle"), (1, "precopy_settle")]


@pytest.mark.parametrize("trouble", [{"fails": "precopy_survey"}, {"fails": "precopy_settle"}, {"slow": "precopy_settle"}])
def test_what_fails_does_not_count(trouble: dict[str, str]) -> None:
    copied = run(Engines(**trouble))
    assert copied.report() == NOTHING_COPIED.report() and 0 < copied.took_s < 1
