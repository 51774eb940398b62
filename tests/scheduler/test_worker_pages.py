"""Workers of a merged group back exactly the pages that its engines lent: any other page in a step is a KeyError."""

from __future__ import annotations

import random

import pytest
from vllm.config import VllmConfig

from tests.support.stepping import FOUR_ENGINE_LAYOUTS, SteppedServer, make_request

PAGES = 12


def check(server: SteppedServer) -> int:
    """Pages lent by all engines to the groups they are in."""
    lent = 0
    for engine in server.engines:
        width = len(engine.agent.group)
        if width > 1:
            virtual, physical = engine.agent.leases.backing(width)
            assert len(engine.worker_pages[width]) == len(virtual)
            assert engine.worker_pages[width].physical(virtual.tolist()) == physical.tolist()
            lent += len(virtual)
    return lent


@pytest.mark.parametrize("seed", range(20))
def test_workers_back_what_is_lent_and_nothing_else(four_engines: VllmConfig, seed: int) -> None:
    choose = random.Random(seed)
    server, lent = SteppedServer(four_engines, 4, PAGES), 0
    for number in range(12):
        for each in range(choose.randint(0, 3)):
            leader = choose.choice(server.layout.groups)[0]
            server.send(leader, make_request(f"{number}.{each}", choose.randint(1, 90), choose.randint(2, 60)))
        server.step(choose.randint(0, 3))
        server.switch(choose.choice(FOUR_ENGINE_LAYOUTS), choose.choice(["migrate", "migrate", "pause"]))
        lent += check(server)
    assert lent
