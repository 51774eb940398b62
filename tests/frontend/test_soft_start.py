"""With the method `soft`, a hinted or urgent request begins on a free engine before its group is formed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.frontend.test_switcher import Engines
from vllm_flying.core.hints import HINT_KEY
from vllm_flying.frontend import router as module
from vllm_flying.frontend.board import BoardGroup, BoardState, LayoutBoard
from vllm_flying.frontend.router import Router
from vllm_flying.frontend.runtime import VARIABLE
from vllm_flying.frontend.served import ServedLayouts, served_layouts
from vllm_flying.frontend.soft_start import SoftStart
from vllm_flying.settings import Settings

IDS = [b"0", b"1"]


class DrainingEngines(Engines):
    """Engine 0 has old requests until `old_are_done`; engine 1 has none."""

    def __init__(self) -> None:
        super().__init__({})
        self.old_are_done = asyncio.Event()

    async def drain(self, engine: int, epoch: int) -> dict[str, int]:
        if engine == 0:
            await self.old_are_done.wait()
        return {"finished": 1 - engine}

    async def _call_utility_async(self, *arguments: Any, engine: bytes) -> Any:
        operation, values = arguments[3]
        number = IDS.index(engine)
        if operation == "drain":
            return await self.drain(number, **values)
        return await self.call(number, operation, values)


class Server:
    """A router whose client reaches those engines."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.engines = DrainingEngines()
        self.client = SimpleNamespace(
            core_engines=IDS, client_count=1, engine_inflight=Counter({b"0": 1}), lb_engines=[[0, 1, 0.0], [0, 0, 0.0]],
            reqs_in_flight={}, _call_utility_async=self.engines._call_utility_async,
        )
        self.board = LayoutBoard(directory)
        self.board.publish(BoardState(0, 1, (BoardGroup((0,), 100), BoardGroup((1,), 100))))
        fields = {"num_engines": 2, "switch_method": "soft", **settings}
        self.router = Router(self.client, Settings(**fields), 4096)

    async def send(self, name: str, pinned: int | None = None, **fields: Any) -> tuple[bytes, ServedLayouts]:
        """What vLLM does with a request, as far as the router sees it: the engine that takes it, and the header's source."""
        extra = {HINT_KEY: fields["hint"]} if "hint" in fields else None
        request = SimpleNamespace(
            request_id=name, resumable=False, prompt_token_ids=list(range(fields.get("prompt", 20))), cache_salt=None,
            sampling_params=SimpleNamespace(max_tokens=8, extra_args=extra), data_parallel_rank=pinned,
            priority=fields.get("priority", 0),
        )
        record = ServedLayouts()
        served_layouts.set(record)
        await self.router.admit(request)
        prefix = self.router.route(request)
        engine = IDS[request.data_parallel_rank or 0]
        self.client.reqs_in_flight[name] = engine
        self.client.engine_inflight[engine] += 1
        self.router.record(engine, prefix)
        return engine, record

    def send_later(self, name: str, **fields: Any) -> asyncio.Task[tuple[bytes, ServedLayouts]]:
        return asyncio.ensure_future(self.send(name, **fields))

    async def merge(self) -> None:
        self.engines.old_are_done.set()
        await asyncio.sleep(0.2)
        assert [group.engines for group in self.board.read().groups] == [(0, 1)]


@pytest.fixture
def hinted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, bool]]:
    """Calls of the metric."""
    counted: list[tuple[str, bool]] = []
    metrics = module.metrics()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(metrics, "hinted", lambda hint, honoured: counted.append((hint, honoured)))
    return counted


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 20.0))


def test_it_begins_where_nothing_is_to_be_waited_for_and_both_layouts_are_named(
    tmp_path: Path, hinted: list[tuple[str, bool]]
) -> None:
    async def test() -> None:
        server = Server(tmp_path)
        # Another API server has sent engine 0 what it has to finish.
        server.client.engine_inflight, server.client.lb_engines = Counter(), [[0, 0, 0.0], [0, 0, 0.0]]
        engine, record = await asyncio.wait_for(server.send("r", hint="tp2"), 1.0)
        assert engine == b"1" and record.header() == "tp1; engines=1" and hinted == []
        await server.merge()
        assert record.header() == "tp1; engines=1 | tp2; engines=0,1" and hinted == [("tp2", True)]

    run(test())


@pytest.mark.parametrize("policy", ["priority", "auto"])
def test_an_urgent_one_does_too(tmp_path: Path, hinted: list[tuple[str, bool]], policy: str) -> None:
    async def test() -> None:
        server = Server(tmp_path, policy=policy)
        server.router._control = asyncio.ensure_future(asyncio.sleep(0))  # no controller beside it
        engine, record = await asyncio.wait_for(server.send("r", priority=-1), 1.0)
        assert engine == b"1"
        await server.merge()
        assert record.header() == "tp1; engines=1 | tp2; engines=0,1" and hinted == []

    run(test())


def test_one_that_is_done_before_the_merge_had_no_such_group(tmp_path: Path, hinted: list[tuple[str, bool]]) -> None:
    async def test() -> None:
        server = Server(tmp_path)
        _, record = await server.send("r", hint="tp2")
        del server.client.reqs_in_flight["r"]
        await server.merge()
        assert record.header() == "tp1; engines=1" and hinted == [("tp2", False)]

    run(test())


def test_without_a_merge_the_hint_counts_as_not_honoured(tmp_path: Path, hinted: list[tuple[str, bool]]) -> None:
    async def test() -> None:
        server = Server(tmp_path, switch_timeout_s=0.1)
        _, record = await server.send("r", hint="tp2")
        await asyncio.sleep(0.3)
        assert record.header() == "tp1; engines=1" and hinted == [("tp2", False)]
        assert [group.engines for group in server.board.read().groups] == [(0,), (1,)]
        assert (1, "cancel") in server.engines.done

    run(test())


@pytest.mark.parametrize("reason", ["taken", "small", "pinned", "migrate"])
def test_it_waits_for_the_group_where_no_engine_can_begin_at_once(
    tmp_path: Path, hinted: list[tuple[str, bool]], reason: str
) -> None:
    async def test() -> None:
        server = Server(tmp_path, switch_method="migrate" if reason == "migrate" else "soft")
        if reason == "migrate":
            server.engines.slow["prepare"] = 0.4
        if reason == "taken":
            await server.send("first", hint="tp2")
        fields: dict[str, Any] = {"small": {"prompt": 120}, "pinned": {"pinned": 1}}.get(reason, {})
        sending = server.send_later("r", hint="tp2", **fields)
        await asyncio.sleep(0.2)
        assert not sending.done()
        server.engines.old_are_done.set()
        _, record = await sending
        assert record.header() == "tp2; engines=0,1" and ("tp2", True) in hinted
        assert server.engines.done.count((0, "commit")) == 1, "one switch serves all that wait"

    run(test())


def test_a_client_that_goes_away_does_not_end_what_others_wait_for(tmp_path: Path, hinted: list[tuple[str, bool]]) -> None:
    async def test() -> None:
        server = Server(tmp_path)
        server.client.engine_inflight[b"1"] = 1
        first, second = server.send_later("first", hint="tp2"), server.send_later("second", hint="tp2")
        await asyncio.sleep(0.1)
        first.cancel()
        await asyncio.sleep(0.1)
        server.client.engine_inflight[b"1"] = 0
        assert (await asyncio.wait_for(second, 1.0))[0] == b"1", "the engine has become free meanwhile"
        await server.merge()
        assert hinted == [("tp2", True)]

    run(test())


def test_all_that_wait_for_a_width_share_one_attempt_and_its_failure() -> None:
    async def test() -> None:
        attempts, over = [], asyncio.Event()

        async def form(width: int, reason: str) -> None:
            attempts.append(reason)
            await over.wait()
            raise ValueError("no such layout")

        start = SoftStart(form, lambda width: ())
        waiting = [asyncio.ensure_future(start.begin(2, name, lambda engines: None, lambda: None)) for name in "ab"]
        await asyncio.sleep(0.05)
        over.set()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert attempts == ["a"] and [str(outcome) for outcome in outcomes] == ["no such layout"] * 2

    run(test())
