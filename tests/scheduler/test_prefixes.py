"""A prefix that is found in a cache is there, on every member, whatever happened to its pages at switches.

Two agents over stock block pools; their workers are replaced by a note of what each physical page holds.
"""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from vllm_flying.core.contents import common, to_bitmap
from vllm_flying.core.leases import as_pages
from vllm_flying.scheduler import registry
from vllm_flying.scheduler.agent import EngineAgent
from vllm_flying.scheduler.page_pool import PagePool
from vllm_flying.settings import Settings

NUM_PAGES = 5
GROUP = (0, 1)


class Member:
    """One engine: its agent, its pools by width, what its pages hold, and blocks that requests hold."""

    def __init__(self, engine: int) -> None:
        self.blocks = {width: BlockPool(NUM_PAGES, True, 1) for width in (1, 2)}
        pools = {width: PagePool(pool, owns_all=width == 1) for width, pool in self.blocks.items()}
        self.facade = SimpleNamespace(
            pools=pools, active_width=1, parked=False, kv_cache_config=SimpleNamespace(num_blocks=NUM_PAGES)
        )
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(data_parallel_index=engine), model_config=SimpleNamespace(seed=0)
        )
        registry.register(config, self.facade)
        self.agent = EngineAgent(config, Settings(num_engines=2), self.call_workers)
        self.holds: dict[int, int] = {}
        self.held: dict[int, list[Any]] = {1: [], 2: []}
        self.released: Any = None

    def call_workers(self, method: str, arguments: tuple[Any, ...], non_block: bool = False) -> Any:
        if method == "flying_release":
            MEMBERS[1].released = (*arguments, [])
        return [[]] if not non_block else SimpleNamespace(result=lambda: [self.released])

    def physical(self, width: int, page: int) -> int:
        return page if width == 1 else int(self.agent.leases.physical(2, [page])[0])


MEMBERS: list[Member] = []


class Prefixes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        MEMBERS[:] = [Member(0), Member(1)]
        self.names = count(1)
        self.merged = False
        self.epoch = 0

    def active(self, engine: int) -> tuple[Member, int]:
        return (MEMBERS[0], 2) if self.merged else (MEMBERS[engine], 1)

    @rule(engine=st.integers(0, 1), pages=st.integers(1, NUM_PAGES - 1), cached=st.booleans(), ends=st.booleans())
    def a_request_runs(self, engine: int, pages: int, cached: bool, ends: bool) -> None:
        member, width = self.active(engine)
        pool = member.blocks[width]
        blocks = pool.get_new_blocks(min(pages, pool.get_num_free_blocks()))
        for block in blocks:
            name = next(self.names)
            for owner in MEMBERS if self.merged else [member]:
                owner.holds[owner.physical(width, block.block_id)] = name
            if cached:
                pool._insert_block_hash(make_block_hash_with_group_id(BlockHash(b"%d" % name), 0), block, 1)
        if ends:
            pool.free_blocks(blocks)
        else:
            member.held[width] += blocks

    @rule(engine=st.integers(0, 1), which=st.integers(0, 100), paused=st.booleans())
    def a_request_ends(self, engine: int, which: int, paused: bool) -> None:
        member, width = self.active(engine)
        if paused:
            member, width = (MEMBERS[engine], 1) if self.merged else (MEMBERS[0], 2)
        if member.held[width]:
            member.blocks[width].free_blocks([member.held[width].pop(which % len(member.held[width]))])

    @rule(engine=st.integers(0, 1), which=st.integers(0, 100))
    def a_prefix_is_hit(self, engine: int, which: int) -> None:
        member, width = self.active(engine)
        cached = [b for b in member.blocks[width].blocks if b.block_hash is not None]
        if cached:
            block = cached[which % len(cached)]
            member.blocks[width].touch([block])
            member.held[width].append(block)

    @precondition(lambda self: not self.merged)
    @rule(fewer=st.sampled_from([0, 0, 0, 1]), undone=st.sampled_from([False, False, False, True]))
    def merge(self, fewer: int, undone: bool) -> None:
        free = min(member.facade.pools[1].num_free for member in MEMBERS)
        room = NUM_PAGES - 1 - len(MEMBERS[0].agent.leases.virtual_pages(2))
        lease = max(0, min(free, room) - fewer)
        self.epoch += 1
        intact = [member.agent._join(GROUP, lease, self.epoch, False)[0] for member in MEMBERS]
        if undone:
            self.leave(undoing=True)
            return
        MEMBERS[0].agent._confirm_prefixes(common([to_bitmap(pages, NUM_PAGES) for pages in intact]))
        self.merged = True

    @precondition(lambda self: self.merged)
    @rule()
    def split(self) -> None:
        self.leave(undoing=False)
        self.merged = False

    def leave(self, undoing: bool) -> None:
        for member in MEMBERS:
            member.agent._leave(undoing)

    @precondition(lambda self: not self.merged)
    @rule(engine=st.integers(0, 1))
    def prefixes_are_reset(self, engine: int) -> None:
        for pool in MEMBERS[engine].facade.pools.values():
            pool.forget_prefixes()

    @invariant()
    def what_is_cached_is_there(self) -> None:
        for engine in (0, 1):
            member, width = self.active(engine)
            for block in member.blocks[width].blocks:
                if block.block_hash is not None:
                    name = int(block.block_hash[: -len(make_block_hash_with_group_id(BlockHash(b""), 0))])
                    for owner in MEMBERS if self.merged else [member]:
                        page = owner.physical(width, block.block_id)
                        assert page, "a cached page that the pool doesn't own"
                        assert owner.holds[page] == name


TestPrefixes = Prefixes.TestCase
TestPrefixes.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)


def run(engine: int, width: int, pages: int) -> list[Any]:
    """A request that caches as many pages; returns their hashes."""
    pool = MEMBERS[engine].blocks[width]
    blocks = pool.get_new_blocks(pages)
    hashes = [make_block_hash_with_group_id(BlockHash(b"%d-%d" % (width, block.block_id)), 0) for block in blocks]
    for block, name in zip(blocks, hashes, strict=True):
        pool._insert_block_hash(name, block, 1)
    pool.free_blocks(blocks)
    return hashes


def test_prefixes_of_both_layouts_survive_a_round_of_switches() -> None:
    machine = Prefixes()
    machine.merge(0, False)
    wide = run(0, 2, 2)
    machine.split()
    alone = run(1, 1, 2)
    machine.merge(0, False)
    assert all(MEMBERS[0].blocks[2].cached_block_hash_to_block.get_one_block(name) for name in wide)
    machine.split()
    assert all(MEMBERS[1].blocks[1].cached_block_hash_to_block.get_one_block(name) for name in alone)
    machine.merge(0, False)
    run(0, 2, 4)
    machine.split()
    assert not all(MEMBERS[1].blocks[1].cached_block_hash_to_block.get_one_block(name) for name in alone)
    assert len(as_pages(sorted(MEMBERS[0].agent.leases.lent_pages()))) == 0


def test_an_undone_merge_that_paired_pages_anew_leaves_no_wrong_prefix() -> None:
    machine = Prefixes()
    machine.merge(0, False)
    machine.a_request_runs(0, 4, cached=True, ends=True)
    machine.split()
    for engine in (0, 1):
        machine.a_request_runs(engine, 1, cached=False, ends=False)
    machine.merge(0, True)
    machine.merge(0, False)
    assert MEMBERS[0].blocks[2].blocks[2].block_hash is not None
    machine.what_is_cached_is_there()
