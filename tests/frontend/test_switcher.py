"""A switch that has begun is carried through: its caller may go away, and its time limit pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from vllm_flying.core.pricing import MoveRates
from vllm_flying.core.topology import Layout
from vllm_flying.frontend import switcher as module
from vllm_flying.frontend.board import BoardGroup, BoardState, LayoutBoard, switch_lock
from vllm_flying.frontend.switcher import Switcher, SwitchFailed
from vllm_flying.settings import Settings

SEPARATE, MERGED = Layout.separate(2), Layout.of([[0, 1]], 2)
NO_COPY = {"target_pages": [1], "first_block": 0, "last_block": 0}
OFFER = {"request_id": "r", "width": 2, "tokens": 500, "pages": [1], "packed": b"r"}


class Engines:
    """Two engines that do as they are told, some operations slowly. What is offered waits for room."""

    num_engines = 2
    seem_idle = True

    def __init__(self, slow: dict[str, float]) -> None:
        self.slow = slow
        self.done: list[tuple[int, str]] = []
        self.group: list[int] = [0]
        self.offers: list[dict[str, Any]] = []
        self.room = 100

    async def call(self, engine: int, operation: str, arguments: dict[str, Any] | None = None) -> Any:
        await asyncio.sleep(self.slow.get(operation, 0.0))
        self.done.append((engine, operation))
        return getattr(self, operation)(engine, **(arguments or {}))

    def prepare(self, engine: int, **_: Any) -> dict[str, Any]:
        return {"free_pages": 10, "returnable_pages": 5, "begun": 0, "finished": 0,
                "paused_widths": [2] if self.offers else []}  # fmt: skip

    def move(self, engine: int, group: list[int], offering: bool, **_: Any) -> dict[str, Any]:
        self.group = group
        offers = self.offers if engine == 0 and offering else []
        return {"free_tokens": self.room, "capacity_tokens": 100, "prefill_s": None, "offers": offers, "staying": 0, "page_tokens": 1,
                "proof": [], "intact": b""}  # fmt: skip

    def admit(self, engine: int, packed: list[bytes], **_: Any) -> dict[str, Any]:
        return {"admitted": {"r": {"target_pages": [1], "first_block": 0, "last_block": 0}} if packed else {}}

    def transfer(self, engine: int, **_: Any) -> dict[str, Any]:
        return {"bytes": 0, "seconds": 0.0, "proof": self.prove(engine)}

    def prove(self, engine: int) -> list[dict[str, Any]]:
        group = self.group if len(self.group) > 1 else [engine]
        return [
            {"worker": member, "engine": member, "tp_size": len(group), "tp_rank": rank, "group": group}
            for rank, member in enumerate(group)
        ]

    def release(self, engine: int, departed: dict[int, list[str]], **_: Any) -> dict[str, Any]:
        if departed:
            self.offers = []
        return {"gone": [], "reclaimed": {}, "free_pages": 0}

    def commit(self, engine: int, **_: Any) -> dict[str, Any]:
        return {"handover": {"0": b"fresh"} if engine == 1 else {}, "lent": None, "kv_tokens": 200}

    def adopt(self, engine: int, packed: bytes) -> int:
        return 1

    def cancel(self, engine: int, epoch: int) -> None:
        return None

    def collect(self, engine: int) -> None:
        return None


def make(directory: Path, **slow: float) -> tuple[Switcher, Engines, LayoutBoard]:
    board = LayoutBoard(directory)
    board.publish(BoardState(0, 1, (BoardGroup((0,), 100), BoardGroup((1,), 100))))
    engines: Any = Engines(slow)
    return Switcher(engines, board, directory, Settings(num_engines=2)), engines, board


def announced(board: LayoutBoard) -> list[tuple[int, ...]]:
    return [group.engines for group in board.read().groups]


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20.0))


@pytest.mark.parametrize("operation", ["prepare", "move", "prove", "commit", "adopt"])
def test_a_caller_that_goes_away_does_not_end_the_switch(tmp_path: Path, operation: str) -> None:
    async def test() -> None:
        switcher, engines, board = make(tmp_path, **{operation: 0.1})
        asking = asyncio.ensure_future(switcher.switch(MERGED))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0.3)
        assert (0, "adopt") in engines.done and announced(board) == [(0, 1)]
        await switcher.switch(SEPARATE)

    run(test())


def test_the_time_limit_does_not_cut_a_switch_in_two(tmp_path: Path) -> None:
    async def test() -> None:
        switcher, engines, board = make(tmp_path, commit=0.3)
        record = await switcher.switch(MERGED, timeout_s=0.1)
        assert record["outcome"] == "committed" and (0, "adopt") in engines.done and announced(board) == [(0, 1)]

    run(test())


def test_what_committed_is_announced_though_others_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FINISH_LIMIT_S", 0.2)

    async def test() -> None:
        switcher, engines, board = make(tmp_path)
        commit = engines.commit

        def failing(engine: int, **arguments: Any) -> dict[str, Any]:
            if engine == 0:
                raise RuntimeError("lost")
            return commit(engine, **arguments)

        engines.commit = failing  # type: ignore[method-assign]
        with pytest.raises(SwitchFailed, match="lost"):
            await switcher.switch(MERGED)
        assert (0, "adopt") in engines.done and announced(board) == [(0, 1)]

    run(test())


def test_a_request_that_ended_in_its_pause_is_looked_for_once(tmp_path: Path) -> None:
    async def test() -> None:
        switcher, engines, _ = make(tmp_path)
        switcher._pauses.leave(time.monotonic(), ["r"], {"r": (0,)}, {(0,): 0.1})
        await switcher.switch(MERGED, "pause")
        engines.done.clear()
        await asyncio.sleep(0.5)
        assert engines.done.count((0, "prepare")) == 1 and switcher._pauses.next_due() is None

    run(test())


@pytest.mark.parametrize("method", ["pause", "migrate"])
def test_requests_without_room_are_fetched_whatever_the_layout_is_by_then(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FETCH_AFTER_S", (0.5,))

    async def test() -> None:
        switcher, engines, _ = make(tmp_path)
        await switcher.switch(MERGED)
        engines.offers = [OFFER]
        record = await switcher.switch(MERGED, "migrate")
        assert record["requests"]["paused"] == 1
        await switcher.switch(SEPARATE, "pause")
        await switcher.switch(MERGED, "pause")
        engines.room = 1000
        engines.done.clear()
        await asyncio.sleep(1.5)
        assert (0, "admit") in engines.done and not engines.offers
        engines.done.clear()
        await asyncio.sleep(1.0)
        assert (0, "prepare") not in engines.done, "nothing is left to fetch"

    run(test())


def test_a_pause_for_its_price_is_kept_as_long_as_it_was_to_be_and_ended_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FETCH_AFTER_S", (0.05,))

    async def test() -> None:
        switcher, engines, _ = make(tmp_path)
        switcher._rates = MoveRates(0.0, 1.0)
        flex = {**OFFER, "request_id": "flex", "width": 1, "tokens": 5, "priority": 1, "kv_bytes": 1000}
        admitted: list[list[str]] = []

        def admit(engine: int, packed: list[bytes], **_: Any) -> dict[str, Any]:
            admitted.append([raw.decode() for raw in packed])
            return {"admitted": {name: NO_COPY for name in admitted[-1]}}

        engines.admit = admit  # type: ignore[method-assign]
        await switcher.switch(MERGED)
        await asyncio.sleep(0.5)
        await switcher.switch(SEPARATE)
        engines.offers = [{**flex, "packed": b"flex"}]
        record = await switcher.switch(MERGED)
        assert record["requests"]["paused"] == 1 and record["why"]["paused"]["price"] == 1 and admitted == []
        engines.offers.append({**OFFER, "tokens": 5, "width": 1})
        await switcher._fetch_paused()
        assert admitted == [["r"]], "who lacked room is fetched, who is left isn't"
        engines.offers = [{**flex, "packed": b"flex"}]
        await asyncio.sleep(0.6)
        assert admitted == [["r"]]
        await asyncio.sleep(0.6)
        assert admitted == [["r"], ["flex"]]
        engines.done.clear()
        await asyncio.sleep(0.3)
        assert (0, "prepare") not in engines.done, "nothing is left to fetch"

    run(test())


def test_a_pause_ends_at_once_for_somebody_who_needs_the_pages(tmp_path: Path) -> None:
    async def test() -> None:
        switcher, engines, _ = make(tmp_path)
        assert not await switcher.end_pauses(), "nobody is left paused"
        switcher._pauses.leave(time.monotonic(), ["r"], {"r": (0,)}, {(0,): 4.0})
        await switcher.switch(MERGED, "pause")
        engines.offers = [{**OFFER, "tokens": 5, "width": 1}]
        with switch_lock(tmp_path):
            ending = asyncio.ensure_future(switcher.end_pauses())
            await asyncio.sleep(0.1)
            assert not ending.done()
        assert await ending and (0, "admit") in engines.done and not engines.offers
        assert switcher._pauses.next_due() is None

    run(test())


def test_a_switch_for_an_urgent_request_tells_the_engines_that_it_follows(tmp_path: Path) -> None:
    told: list[bool] = []

    async def test() -> None:
        switcher, engines, _ = make(tmp_path)
        commit: Any = engines.commit

        def note(engine: int, **arguments: Any) -> dict[str, Any]:
            told.append(arguments["urgent_follows"])
            return dict(commit(engine, **arguments))

        engines.commit = note  # type: ignore[method-assign]
        await switcher.switch(MERGED, reason=module.URGENT)
        await switcher.switch(SEPARATE)

    run(test())
    assert told == [True, True, False, False]
