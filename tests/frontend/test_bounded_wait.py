"""A request that waits for a merge waits no longer than a limit; then it runs where it can."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from tests.frontend.test_soft_start import Server, run
from vllm_flying.frontend.board import switch_lock
from vllm_flying.frontend.runtime import VARIABLE

LIMIT_S = 0.3


@pytest.mark.parametrize("method", ["pause", "migrate", "soft"])
@pytest.mark.parametrize("obstacle", ["another switch", "an engine that doesn't answer"])
def test_the_wait_for_a_group_ends(obstacle: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))

    async def test() -> None:
        server = Server(tmp_path, switch_method=method, switch_timeout_s=LIMIT_S)
        server.client.engine_inflight.update({b"0": 1, b"1": 2})  # so that with `soft` none can begin before the merge
        if obstacle != "another switch":
            server.engines.slow["prepare"] = server.engines.slow["drain"] = 30.0
            _, record = await asyncio.wait_for(server.send("r", hint="tp2"), 10 * LIMIT_S)
        else:
            with switch_lock(server.router.directory):
                started = time.monotonic()
                _, record = await asyncio.wait_for(server.send("r", hint="tp2"), 10 * LIMIT_S)
                assert time.monotonic() - started >= LIMIT_S, "it does wait"
        assert record.header().startswith("tp1; "), "it runs in the layout that there is"
        assert [group.engines for group in server.board.read().groups] == [(0,), (1,)]

    run(test())
