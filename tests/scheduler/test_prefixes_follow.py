"""Hot cached prefixes follow a switch, displace nobody and leave nothing behind: agents and stock schedulers."""

from __future__ import annotations

import time
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from tests.support.stepping import MAX_MODEL_LEN, PAGE_TOKENS, SteppedServer, make_request
from vllm_flying.core.prefixes import RECENT_S
from vllm_flying.core.transaction import UNDOABLE, Phase

DP, TP = [(0,), (1,)], [(0, 1)]
PAGES = 60
LENGTH = 160
"""Tokens of the prefix: 10 pages, 5 in a group."""
PREFIX = list(range(100, 100 + LENGTH))


NAMES = iter(range(10**6))


def ask(server: SteppedServer, engine: int, salt: str | None = None) -> int:
    """A request with the prefix and something of its own; returns how many tokens it found cached."""
    number = next(NAMES)
    own = [1000 + number] * 20
    request = Request(f"r{number}", PREFIX + own, SamplingParams(max_tokens=1), None, cache_salt=salt)
    server.send(engine, request)
    (output,) = server.engines[engine].step()
    assert output.prefill_stats is not None and output.finish_reason is not None
    server.step()
    return int(output.prefill_stats.num_cached_tokens)


def warm(server: SteppedServer, engine: int, hits: int = 2, salt: str | None = None) -> None:
    assert ask(server, engine, salt) == 0
    assert [ask(server, engine, salt) for _ in range(hits)] == [LENGTH] * hits


def check_copies(server: SteppedServer) -> int:
    """No page is read that another copy writes, on any member; returns the copies."""
    copies = server.engines[0].copies
    for engine in server.engines:
        member, leases = engine.agent.engine, engine.agent.leases

        def own(copy: dict[str, Any], end: str, member: int = member, leases: Any = leases) -> set[int]:
            pages, width = copy[f"{end}_pages"], len(copy[end])
            if member not in copy[end]:
                return set()
            return set(pages) if width == 1 else set(leases.physical(width, pages).tolist())

        read = set().union(*(own(copy, "source") for copy in copies))
        written = [page for copy in copies for page in own(copy, "target")]
        assert 0 not in read and read.isdisjoint(written)
    return len(copies)


def test_a_prefix_that_nobody_holds_is_found_in_the_merged_layout(server: SteppedServer) -> None:
    warm(server, 1)
    copies: list[int] = []
    merge = server.switch(TP, before=lambda op, e: copies.append(check_copies(server)) if (op, e) == ("release", 0) else None)
    assert merge.journey.prefixes.report() == {"moved": 1, "tokens": LENGTH} and copies == [1]
    assert not merge.journey.offers and not server.unfinished
    assert server.engines[0].facade.pools[2].num_owned == PAGES, "what was held for it is lent too"
    assert ask(server, 0) == LENGTH
    assert server.engines[0].started[-1].startswith("r")


def test_a_prefix_follows_to_every_part_and_is_found_on_the_way_back(server: SteppedServer) -> None:
    server.switch(TP)
    warm(server, 0)
    copies: list[int] = []
    split = server.switch(DP, before=lambda op, e: copies.append(check_copies(server)) if (op, e) == ("release", 0) else None)
    assert split.journey.prefixes.report() == {"moved": 1, "tokens": LENGTH}
    assert copies == [2] and not server.unfinished
    assert all(engine.facade.pools[1].num_owned == PAGES for engine in server.engines), "held pages are back"
    assert [ask(server, engine) for engine in (0, 1)] == [LENGTH] * 2
    again = server.switch(TP)
    assert not again.journey.prefixes.moved and not again.carries_prefixes, "once may be a coincidence"
    assert ask(server, 0) == LENGTH, "it stayed in place"


def test_what_both_engines_have_is_copied_once_and_what_is_there_never(server: SteppedServer) -> None:
    for engine in (0, 1):
        warm(server, engine)
    merge = server.switch(TP)
    assert len(merge.journey.prefixes.offers) == 2 and len(merge.journey.moves) == 1
    server.switch(DP)
    for engine in (0, 1):
        assert [ask(server, engine) for _ in range(2)] == [LENGTH] * 2
    again = server.switch(TP)
    assert again.carries_prefixes and not again.journey.moves
    assert ask(server, 0) == LENGTH and not server.unfinished


@pytest.mark.parametrize("acts", [False, True])
@pytest.mark.parametrize("engine", [0, 1])
@pytest.mark.parametrize("phase", [Phase.PREPARE, *sorted(UNDOABLE, key=lambda phase: phase.value)])
@pytest.mark.parametrize("first", [DP, TP])
def test_an_undone_switch_leaves_prefixes_where_they_were(
    server: SteppedServer, first: Any, phase: Phase, engine: int, acts: bool
) -> None:
    if phase is Phase.MOVE and engine == 0 and not acts:
        pytest.skip("members wait for their leader: one that can't move is a dead engine, not a refusal")
    if first is TP:
        server.switch(TP)
    warm(server, 0)
    undone = server.attempt(TP if first is DP else DP, phase, engine, acts)
    asked = phase is not Phase.PROVE and not (first is DP and engine == 1 and phase in (Phase.ADMIT, Phase.TRANSFER))
    assert undone.phase is (Phase.ROLLED_BACK if asked else Phase.COMMITTED)
    server.layout = undone.target if not asked else server.layout
    assert not server.unfinished
    assert ask(server, 0) == LENGTH
    leases = [engine.agent.leases.lent_pages() for engine in server.engines]
    merged = len(server.layout.groups) == 1
    assert [len(pages) for pages in leases] == [PAGES if merged else 0] * 2
    again = server.switch(DP if merged else TP)
    assert again.phase is Phase.COMMITTED and not server.unfinished
    if asked:
        assert again.journey.prefixes.moved, "what was never copied isn't found where it was to go"


def test_begun_requests_come_first_and_a_full_target_takes_none(server: SteppedServer) -> None:
    warm(server, 1)
    for engine, tokens in ((0, 545), (1, 200)):
        server.send(engine, make_request(f"long {engine}", tokens, 30))
    server.step(2)
    merge = server.switch(TP)
    assert merge.prepared[1]["prefix_pages"] and not merge.carries_prefixes, "there is room, but not for everything"
    assert set(merge.journey.arrived) == {"long 0", "long 1"} and not merge.journey.unplaced
    assert not merge.journey.prefixes.offers
    assert server.engines[0].facade.pools[2].num_owned == PAGES
    server.step(40)
    assert set(server.finished) >= {"long 0", "long 1"} and not server.unfinished


def test_a_target_gives_prefixes_a_share_of_its_free_pages_only(server: SteppedServer) -> None:
    server.switch(TP)
    warm(server, 0)

    def fill(operation: str, engine: int) -> None:
        if operation == "admit" and engine == 1:
            pool = server.engines[1].facade.active.kv_cache_manager.block_pool
            held.extend(pool.get_new_blocks(pool.get_num_free_blocks() - 4 * LENGTH // PAGE_TOKENS + 1))

    held: list[Any] = []
    split = server.switch(DP, before=fill)
    assert [move["target"] for move in split.journey.moves] == [[0]]
    server.engines[1].facade.active.kv_cache_manager.block_pool.free_blocks(held)
    assert (ask(server, 0), ask(server, 1)) == (LENGTH, 0) and not server.unfinished


def test_a_salted_prefix_is_found_with_its_salt_only(server: SteppedServer) -> None:
    warm(server, 1, salt="mine")
    assert server.switch(TP).journey.prefixes.moved
    assert ask(server, 0, salt="other") == ask(server, 0) == 0
    assert ask(server, 0, salt="mine") == LENGTH


@pytest.mark.parametrize("moment", [None, "move", "admit", "transfer", "release", "commit"])
def test_a_reset_forgets_prefixes_wherever_they_are(server: SteppedServer, moment: str | None) -> None:
    warm(server, 1)

    def reset(operation: str = "", engine: int = 0) -> None:
        if operation == moment and engine == 0:
            for each in server.engines:
                each.facade.reset_prefix_cache()

    if moment is None:
        for each in server.engines:
            assert each.facade.reset_prefix_cache()
    merge = server.switch(TP, before=reset)
    assert merge.phase is Phase.COMMITTED and not server.unfinished
    assert merge.carries_prefixes is (moment is not None)
    assert ask(server, 0) == 0
    server.switch(DP)
    assert ask(server, 1) == 0 and not server.unfinished


def test_what_is_short_rare_or_long_ago_costs_no_round(server: SteppedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def operations(groups: Any) -> set[str]:
        told: set[str] = set()
        server.switch(groups, before=lambda operation, engine: told.add(operation))
        return told

    warm(server, 1, hits=1)
    for number in range(3):  # two pages, again and again
        server.send(1, make_request("short", 40 + number, 1))
        server.step(2)
    assert operations(TP) == {"prepare", "move", "commit"}
    server.switch(DP)
    assert [ask(server, 1) for _ in range(2)] == [LENGTH] * 2
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + RECENT_S + 1)
    assert operations(TP) == {"prepare", "move", "commit"}


def test_a_switch_that_moves_nothing_carries_no_prefixes(server: SteppedServer) -> None:
    warm(server, 1)
    assert not server.switch(TP, method="pause").journey.prefixes.offers and not server.unfinished
    assert LENGTH < MAX_MODEL_LEN and ask(server, 0) == 0
