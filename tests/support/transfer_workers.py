"""Worker processes that move KV for real: process groups, a pool each, and a transport that they agree on."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

from vllm_flying.core.migration import KVMove
from vllm_flying.core.topology import Group, group_world_ranks, groups_of_width
from vllm_flying.worker.copy_rate import plain_move_rate
from vllm_flying.worker.exchange import Exchange
from vllm_flying.worker.host_pool import CanNotShare, HostPool, OtherPool, PoolOffer
from vllm_flying.worker.pull import Pull
from vllm_flying.worker.transfer import TransferPlace, Transport, move_kv
from vllm_flying.worker.transports import choose_transport

WORKERS, LAYERS, PAGES, PAGE_BYTES = 4, 2, 24, 256
STAGING_BYTES = 192
REPLY_LIMIT_S = 120.0


@dataclass(frozen=True)
class Task:
    """One transfer. `physical`: (engine, width) -> virtual page -> page."""

    moves: Sequence[KVMove]
    kernel_blocks: int
    num_engines: int
    physical: dict[tuple[int, int], dict[int, int]]


def contents(rank: int) -> np.ndarray:
    """What a worker's pool holds before a transfer."""
    return np.random.default_rng(rank).integers(1, 256, (LAYERS, PAGES, PAGE_BYTES), dtype=np.uint8)


class TransferWorkers:
    """`WORKERS` processes that do the same at the same time."""

    def __init__(self, directory: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(WORKERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, str(directory / "rendezvous"), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, name: str, *arguments: Any) -> list[Any]:
        """Call a method of `Worker` in all of them; what each returns, by rank."""
        for pipe in self._pipes:
            pipe.send((name, arguments))
        replies = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(REPLY_LIMIT_S), f"worker {rank} doesn't answer"
            replies.append(pipe.recv())
        assert not any(isinstance(reply, Exception) for reply in replies), str(replies)
        return replies

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
            process.join()


class Worker:
    """In such a process."""

    def __init__(self, rank: int, rendezvous: str) -> None:
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS
        )
        self._rank = rank
        self._pool = HostPool(LAYERS * PAGES * PAGE_BYTES)
        self._layers = list(self._pool.buffer.view(torch.int64).view(LAYERS, PAGES, -1))
        self._groups: dict[tuple[int, Group], Any] = {}
        for engines in (2, 4):
            for group in [g for width in (2, 4) if width <= engines for g in groups_of_width(width, engines)]:
                ranks = group_world_ranks(group, WORKERS // engines, engines)
                self._groups[engines, group] = torch.distributed.new_group(ranks)
        self._pulls = {engines: self._choose(self._pool, self._layers, engines) for engines in (2, 4)}

    def transfer(self, task: Task, transport: str, late: int = -1, slow: int = -1) -> tuple[np.ndarray, int]:
        """The pool after the transfer, and the bytes counted. Worker `late` comes late, worker `slow` reads slowly.

        Then the pool is overwritten at once, as steps would.
        """
        if self._rank == late:
            time.sleep(0.2)
        pool = self._pool.buffer.view(torch.uint8).view(LAYERS, PAGES, PAGE_BYTES)
        pool.copy_(torch.from_numpy(contents(self._rank)))
        local_rank, engine = divmod(self._rank, task.num_engines)

        def physical(width: int, pages: Sequence[int]) -> list[int]:
            return list(pages) if width == 1 else [task.physical[engine, width][page] for page in pages]

        place = TransferPlace(engine, local_rank, WORKERS // task.num_engines, task.kernel_blocks, physical)
        way: Transport = Exchange(STAGING_BYTES)
        if transport == "pull":
            way = self._pulls[task.num_engines]
        if self._rank == slow:
            way = Pull({engine: SlowPool(pool) for engine, pool in self._pulls[task.num_engines].others.items()})
        mine = {len(g): pg for (n, g), pg in self._groups.items() if n == task.num_engines and engine in g}
        moved = move_kv(task.moves, place, self._layers, mine.__getitem__, way)["bytes"]
        after = pool.numpy().copy()
        pool.zero_()
        return after, moved

    def agree(self, how: str, odd: int) -> tuple[str, int]:
        """The transport chosen where worker `odd` is as `how` says, and the files left open by it."""
        pool: HostPool | CanNotShare = self._pool
        if self._rank == odd and how != "all can":
            pool = CanNotShare("no memory") if how == "no pool" else LostPool(self._pool, how)
        before = len(os.listdir("/proc/self/fd"))
        transport = self._choose(pool, self._layers, 4)
        return type(transport).__name__, len(os.listdir("/proc/self/fd")) - before

    def memory(self, num_bytes: int) -> tuple[int, int]:
        """Resident bytes that a pool takes, and what reading all of the other workers' pools adds to them."""
        target = memoryview(bytearray(b"\1" * (1 << 20)))
        before = _resident_bytes()
        pool = HostPool(num_bytes)
        own = _resident_bytes() - before
        pull = self._choose(pool, [pool.buffer], 4)
        before = _resident_bytes()
        for other in pull.others.values():
            for offset in range(0, num_bytes, len(target)):
                other.read(0, offset, target)
        return own, _resident_bytes() - before

    def plain_move(self, num_bytes: int) -> list[tuple[int, int]]:
        """Offset and size of every read behind the rate that migrations are compared to."""
        others = [WatchedPool(pool) for pool in self._pulls[4].others.values()]
        own = memoryview(self._pool.buffer.numpy()).cast("B")
        assert plain_move_rate(num_bytes, torch.distributed.group.WORLD, others, own) > 0
        return [read for other in others for read in other.reads]

    def _choose(self, pool: HostPool | CanNotShare, layers: list[torch.Tensor], num_engines: int) -> Any:
        return choose_transport(pool, lambda: layers, num_engines, torch.distributed.group.WORLD, STAGING_BYTES)


class SlowPool(OtherPool):
    """Another's pool, read late."""

    def __init__(self, pool: OtherPool) -> None:
        vars(self).update(vars(pool))

    def read(self, layer: int, offset: int, target: memoryview) -> None:
        time.sleep(0.02)
        super().read(layer, offset, target)


class WatchedPool(OtherPool):
    """Another's pool, and what was read of it."""

    def __init__(self, pool: OtherPool) -> None:
        vars(self).update(vars(pool))
        self.reads: list[tuple[int, int]] = []

    def read(self, layer: int, offset: int, target: memoryview) -> None:
        self.reads.append((offset, len(target)))
        super().read(layer, offset, target)


class LostPool(HostPool):
    """A pool that others don't find where it is said to be."""

    def __init__(self, pool: HostPool, how: str) -> None:
        self._lost, self._how = pool, how

    def offer(self, layers: Sequence[torch.Tensor]) -> PoolOffer:
        offer = self._lost.offer(layers)
        return replace(offer, name="other") if self._how == "another host's process" else replace(offer, fd=9999)


def _resident_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss:"))


def _work(rank: int, rendezvous: str, pipe: Any) -> None:
    worker = Worker(rank, rendezvous)
    while True:
        name, arguments = pipe.recv()
        try:
            reply = getattr(worker, name)(*arguments)
        except Exception as error:
            reply = error
        pipe.send(reply)
