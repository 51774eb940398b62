"""A move that is undone leaves pages with whom they were: agents and stock schedulers of two engines, without workers."""

from __future__ import annotations

import pytest

from tests.support.stepping import SteppedServer, make_request
from vllm_flying.core.transaction import Phase

DP, TP = [(0,), (1,)], [(0, 1)]
PAGES = 10


def lent(server: SteppedServer) -> list[set[int]]:
    """Virtual pages of the group that each engine backs."""
    return [engine.agent.leases.virtual_pages(2) for engine in server.engines]


@pytest.mark.parametrize("acts", [False, True])
@pytest.mark.parametrize("second_ends", ["later", "before", "meanwhile"])
def test_pages_of_requests_that_ended_in_a_former_group_stay_lent_by_all_or_none(
    server: SteppedServer, second_ends: str, acts: bool
) -> None:
    server.switch(TP)
    for name in ("first", "second"):
        server.send(0, make_request(name, 40, 50))
    server.step(2)
    server.switch(DP, method="pause")
    server.abort("first", *["second"] * (second_ends == "before"))

    def hang_up(operation: str, engine: int) -> None:
        if (operation, engine, second_ends) == ("move", 1, "meanwhile"):
            server.abort("second")

    undone = server.attempt(TP, Phase.MOVE, 1, acts, hang_up)
    assert undone.phase is Phase.ROLLED_BACK
    assert lent(server)[0] == lent(server)[1], "nobody gives back what another one doesn't"
    assert server.switch(TP).phase is Phase.COMMITTED
    assert lent(server) == [set(range(1, PAGES + 1))] * 2
    server.step(60)
    assert (server.finished.get("second") == "length") is (second_ends == "later")
    assert server.switch(DP).phase is Phase.COMMITTED and lent(server) == [set()] * 2
    assert not server.unfinished
    assert [engine.facade.pools[1].num_owned for engine in server.engines] == [PAGES] * 2
