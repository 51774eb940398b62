"""KV between real processes: both transports bring every byte to its place, and workers agree on one of them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.transfer_workers import LAYERS, PAGE_BYTES, PAGES, WORKERS, Task, TransferWorkers, contents
from vllm_flying.core.migration import KVMove, units_of, units_per_page
from vllm_flying.core.topology import Group, aligned_group
from vllm_flying.worker.copy_rate import REPEATS
from vllm_flying.worker.host_pool import CanNotShare, HostPool

FIRST_VIRTUAL = 100  # far from physical numbers


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransferWorkers]:
    running = TransferWorkers(tmp_path_factory.mktemp("workers"))
    yield running
    running.stop()


class Pages:
    """Gives out pages of every engine, each once, and virtual numbers for those of groups."""

    def __init__(self, num_engines: int, shuffle: random.Random) -> None:
        self.free = {engine: shuffle.sample(range(PAGES), PAGES) for engine in range(num_engines)}
        self.physical: dict[tuple[int, int], dict[int, int]] = {}
        self._next = FIRST_VIRTUAL

    def take(self, group: Group, count: int) -> tuple[int, ...]:
        if len(group) == 1:
            return tuple(self.free[group[0]].pop() for _ in range(count))
        virtual = tuple(range(self._next, self._next + count))
        self._next += count
        for engine in group:
            table = self.physical.setdefault((engine, len(group)), {})
            table.update({page: self.free[engine].pop() for page in virtual})
        return virtual


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """Moves between groups of any two widths, of which each source and target page is another's."""
    num_engines, kernel_blocks = draw(st.sampled_from([2, 4])), draw(st.integers(1, 2))
    pages = Pages(num_engines, random.Random(draw(st.integers(0, 99))))
    widths = [width for width in (1, 2, 4) if width <= num_engines]
    moves = []
    for _ in range(draw(st.integers(1, 5))):
        engine, blocks = draw(st.integers(0, num_engines - 1)), draw(st.integers(1, 9))
        widths_of_ends = draw(st.permutations(widths))[:2]
        source, target = (aligned_group(engine, width) for width in widths_of_ends)
        if len(source) == 1:
            target = aligned_group(source[0], len(target))
        elif len(target) == 1:
            target = (draw(st.sampled_from(source)),)
        counts = [-(-blocks // (kernel_blocks * len(group))) for group in (source, target)]
        if min(map(len, pages.free.values())) < sum(counts):
            break
        ends = [pages.take(group, count) for group, count in zip((source, target), counts, strict=True)]
        moves.append(KVMove(source, ends[0], target, ends[1], draw(st.integers(0, blocks - 1)), blocks))
    return Task(moves, kernel_blocks, num_engines, pages.physical)


def wanted(task: Task) -> tuple[list[np.ndarray], int]:
    """Every worker's pool after `task`, unit by unit, and the bytes that changed workers."""
    pools, sent = [contents(rank) for rank in range(WORKERS)], 0

    def own(group: Group, engine: int, pages: np.ndarray) -> list[int]:
        return [page if len(group) == 1 else task.physical[engine, len(group)][page] for page in pages.tolist()]

    for move in task.moves:
        parts = units_per_page(move.span, task.kernel_blocks)
        for rank in range(WORKERS):
            target = rank % task.num_engines
            for source in move.span:
                units = units_of([move], task.kernel_blocks, source, target)
                before = contents(rank - target + source).reshape(LAYERS, PAGES, parts, -1)
                there = before[:, own(move.source, source, units.source_pages), units.source_places]
                after = pools[rank].reshape(LAYERS, PAGES, parts, -1)
                after[:, own(move.target, target, units.target_pages), units.target_places] = there
                sent += there.nbytes if source != target else 0
    return pools, sent


def same(replies: list[tuple[np.ndarray, int]], task: Task) -> bool:
    pools, sent = wanted(task)
    unequal = [rank for rank, (after, _) in enumerate(replies) if not np.array_equal(after, pools[rank])]
    assert not unequal, f"workers {unequal} have other KV than they should"
    assert sum(moved for _, moved in replies) == sent
    return True


@settings(max_examples=40)
@given(tasks())
def test_both_transports_bring_every_byte_to_its_place(workers: TransferWorkers, task: Task) -> None:
    for transport in ("exchange", "pull"):
        assert same(workers.run("transfer", task, transport), task)


MERGE_AND_SPLIT = Task(
    [
        KVMove((0,), (3, 5), (0, 1), (100,), 0, 2),
        KVMove((2, 3), (101,), (3,), (7, 8), 0, 2),
        KVMove((0, 1), (102,), (0, 1, 2, 3), (103,), 0, 2),
    ],
    1,
    4,
    {(0, 2): {100: 1, 102: 14}, (1, 2): {100: 2, 102: 15}, (2, 2): {101: 11}, (3, 2): {101: 12}}
    | {(engine, 4): {103: 20 + engine} for engine in range(4)},
)


@pytest.mark.parametrize("rank", range(WORKERS))
def test_nobody_reads_before_a_source_is_there(workers: TransferWorkers, rank: int) -> None:
    assert same(workers.run("transfer", MERGE_AND_SPLIT, "pull", rank), MERGE_AND_SPLIT)


@pytest.mark.parametrize("rank", range(WORKERS))
def test_a_source_goes_on_when_all_have_read(workers: TransferWorkers, rank: int) -> None:
    assert same(workers.run("transfer", MERGE_AND_SPLIT, "pull", -1, rank), MERGE_AND_SPLIT)


def test_a_plain_move_reads_as_much_as_is_said_and_other_bytes_every_time(workers: TransferWorkers) -> None:
    each = 128
    for reads in workers.run("plain_move", each * WORKERS * (WORKERS - 1)):
        assert len(reads) == REPEATS * (WORKERS - 1) and {size for _, size in reads} == {each}
        assert len({offset for offset, _ in reads}) == REPEATS


@pytest.mark.parametrize("how", ["no pool", "no such file", "another host's process"])
@pytest.mark.parametrize("odd", [0, 2])
def test_if_one_can_not_share_nobody_does(workers: TransferWorkers, how: str, odd: int) -> None:
    assert workers.run("agree", how, odd) == [("Exchange", 0)] * WORKERS


def test_workers_of_a_host_share(workers: TransferWorkers) -> None:
    assert workers.run("agree", "all can", 0) == [("Pull", WORKERS - 1)] * WORKERS


def test_a_pool_is_in_memory_once_and_counts_once(workers: TransferWorkers) -> None:
    size = 32 << 20
    for own, others in workers.run("memory", size):
        assert abs(own - size) < size / 8
        assert abs(others) < size / 8


def test_a_pool_keeps_its_size_and_what_is_no_size_leaves_nothing_open() -> None:
    pool = HostPool(PAGES * PAGE_BYTES)
    file = pool.offer([pool.buffer]).fd
    for size in (0, 2 * PAGES * PAGE_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(file, size)
    assert not pool.buffer.any()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(CanNotShare, match="-1 bytes"):
        HostPool(-1)
    assert os.listdir("/proc/self/fd") == before
