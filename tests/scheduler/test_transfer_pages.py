"""At a migration no page is both read and written, whichever worker does it: workers read each other's KV in place."""

from __future__ import annotations

import random
from typing import Any

import pytest
from vllm.config import VllmConfig

from tests.support.stepping import FOUR_ENGINE_LAYOUTS, SteppedServer, make_request
from vllm_flying.core.migration import KVMove

PAGES = 12


class WatchedServer(SteppedServer):
    """Looks at every transfer while both ends hold their pages."""

    transfers = 0

    def _call(self, engine: int, operation: str, arguments: dict[str, Any], before: Any) -> Any:
        if operation == "transfer":
            self._check([KVMove.from_dict(move) for move in arguments["moves"]])
        return super()._call(engine, operation, arguments, before)

    def _check(self, moves: list[KVMove]) -> None:
        read: set[tuple[int, int]] = set()
        written: list[tuple[int, int]] = []
        for move in moves:
            first, last = (block // len(move.target) for block in (move.first_block, move.last_block - 1))
            read |= set(self._physical(move.source, move.source_pages))
            written += self._physical(move.target, move.target_pages[first : last + 1])
        assert not read & set(written), "a page is read and written"
        assert len(written) == len(set(written)), "a page is written twice"
        self.transfers += bool(moves)

    def _physical(self, group: tuple[int, ...], pages: tuple[int, ...]) -> list[tuple[int, int]]:
        found = []
        for engine in group:
            leases = self.engines[engine].agent.leases
            own = pages if len(group) == 1 else leases.physical(len(group), pages).tolist()
            assert all(own)
            found += [(engine, page) for page in own]
        return found


@pytest.mark.parametrize("seed", range(30))
def test_pages_that_are_read_are_never_written(four_engines: VllmConfig, seed: int) -> None:
    choose = random.Random(seed)
    server = WatchedServer(four_engines, 4, PAGES)
    for number in range(8):
        for letters in choose.sample(("abc", "acb", "bac"), choose.randint(0, 2)):
            leader = choose.choice(server.layout.groups)[0]
            name = f"{letters}{number}"  # of equal characters: of equal prompts
            server.send(leader, make_request(name, choose.randint(1, 90), choose.randint(2, 60)))
        server.step(choose.randint(0, 3))
        server.switch(choose.choice(FOUR_ENGINE_LAYOUTS))
    server.switch(FOUR_ENGINE_LAYOUTS[0])
    server.step(80)


def test_such_servers_do_move_requests(four_engines: VllmConfig) -> None:
    server = WatchedServer(four_engines, 4, PAGES)
    server.send(0, make_request("r", 60, 50))
    server.step(2)
    for layout in (FOUR_ENGINE_LAYOUTS[1], FOUR_ENGINE_LAYOUTS[4], FOUR_ENGINE_LAYOUTS[0]):
        server.switch(layout)
    assert server.transfers == 1 + 1 + 4, "one per group that forms"
