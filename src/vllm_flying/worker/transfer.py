"""Copies KV between the workers of merging or splitting groups: all of them at once, both ways.

May import torch. Everything a worker needs to know is in the list of moves, which all workers have, so nobody asks
anybody: each derives what it sends and what it gets. Rounds cover a range of layers and have a bounded staging
buffer; while one round travels, the next is gathered. What a worker keeps for itself never leaves it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed

from vllm_flying.core.migration import KVMove, num_units, units_of, units_per_page
from vllm_flying.core.topology import Group

# On CPU a round stays in the last cache between gathering, sending and landing, and its buffers in the heap.
CPU_ROUND_BYTES = 8 * 2**20


@dataclass(frozen=True)
class TransferPlace:
    """Where a worker stands in a transfer, and its way from virtual pages to its own."""

    engine: int
    local_rank: int
    engine_tp: int
    kernel_blocks: int
    """Per page at width 1."""
    physical: Callable[[int, Sequence[int]], Sequence[int]]
    """(width, virtual pages) -> this worker's pages."""


def layer_pages(runner: Any, kernel_blocks: int) -> list[torch.Tensor]:
    """Every layer's part of the KV pool as [pages, its bytes in a page / 8], for `kernel_blocks` per page."""
    layers = []
    for cache in runner.kv_caches:
        if not cache.is_contiguous():
            raise ValueError("the KV cache of a layer is not contiguous; this KV cache layout can't be moved")
        num_pages = cache.shape[0] // kernel_blocks
        layers.append(cache.view(torch.uint8).view(num_pages, -1).view(torch.int64))
    return layers


class Transfer:
    """One worker's part in copying the KV of `moves` whose span is `span`."""

    def __init__(self, moves: Sequence[KVMove], span: Group, place: TransferPlace, staging_bytes: int) -> None:
        self._moves = [move for move in moves if move.span == span]
        self._span = span
        self._place = place
        self._round_bytes = staging_bytes
        self.bytes_moved = 0
        """Between workers of this worker's local rank."""

    def run(self, layers: list[torch.Tensor], process_group: Any) -> None:
        """Copy; every worker of the group must call this at the same time with the same moves."""
        parts = units_per_page(self._span, self._place.kernel_blocks)
        pool = [layer.view(-1, layer.shape[1] // parts) for layer in layers]
        device = pool[0].device
        if device.type == "cpu":
            self._round_bytes = min(self._round_bytes, CPU_ROUND_BYTES)
        sends = [self._leaving(other, parts, device) for other in self._span]
        receives = [self._arriving(other, parts, device) for other in self._span]
        mine = self._span.index(self._place.engine)
        for view in pool:
            if len(sends[mine]):
                view.index_copy_(0, receives[mine], view.index_select(0, sends[mine]))
        sends[mine] = receives[mine] = sends[mine][:0]
        unit_bytes = pool[0].shape[1] * 8
        traffic = self._traffic() * unit_bytes
        self.bytes_moved = int(traffic.sum()) * len(pool)
        self._exchange(pool, sends, receives, self._rounds(len(pool), traffic), process_group)

    def _exchange(
        self,
        pool: list[torch.Tensor],
        sends: list[Any],
        receives: list[Any],
        rounds: list[tuple[range, int, int]],
        process_group: Any,
    ) -> None:
        under_way: tuple[Any, torch.Tensor, range, list[Any]] | None = None
        for layers, part, num_parts in rounds:
            outgoing = [_slice(index, part, num_parts) for index in sends]
            incoming = [_slice(index, part, num_parts) for index in receives]
            work, buffer = self._post(pool, layers, outgoing, incoming, process_group)
            if under_way is not None:
                _land(pool, *under_way)
            under_way = (work, buffer, layers, incoming)
        if under_way is not None:
            _land(pool, *under_way)

    def _post(
        self, pool: list[torch.Tensor], layers: range, outgoing: list[Any], incoming: list[Any], process_group: Any
    ) -> tuple[Any, torch.Tensor]:
        """Gather what leaves, for each other worker its units of all `layers`, and send it off."""
        width = pool[0].shape[1]
        send = pool[0].new_empty((len(layers) * sum(len(index) for index in outgoing), width))
        receive = pool[0].new_empty((len(layers) * sum(len(index) for index in incoming), width))
        position = 0
        for index in outgoing:
            for layer in layers:
                if len(index):
                    torch.index_select(pool[layer], 0, index, out=send[position : position + len(index)])
                    position += len(index)
        work = torch.distributed.all_to_all_single(
            receive,
            send,
            self._by_rank([len(layers) * len(index) for index in incoming]),
            self._by_rank([len(layers) * len(index) for index in outgoing]),
            group=process_group,
            async_op=True,
        )
        return work, receive

    def _by_rank(self, by_engine: list[int]) -> list[int]:
        """Sizes for every rank of the group: only workers of the same local rank hold shards of the same heads."""
        sizes = [0] * (len(self._span) * self._place.engine_tp)
        first = self._place.local_rank * len(self._span)
        sizes[first : first + len(self._span)] = by_engine
        return sizes

    def _rounds(self, num_layers: int, traffic: np.ndarray) -> list[tuple[range, int, int]]:
        """(layers, part, parts) of every round, from the busiest worker of the group, so the same on all of them."""
        layer_bytes = int(max(traffic.sum(axis=0).max(), traffic.sum(axis=1).max()))
        if layer_bytes == 0:
            return []
        each = max(1, min(num_layers, self._round_bytes // layer_bytes))
        parts = -(-layer_bytes // self._round_bytes)
        ranges = [range(first, min(first + each, num_layers)) for first in range(0, num_layers, each)]
        return [(layers, part, parts) for layers in ranges for part in range(parts)]

    def _traffic(self) -> np.ndarray:
        """Units of one layer from each engine to each other."""
        traffic = np.zeros((len(self._span), len(self._span)), dtype=np.int64)
        for s, source in enumerate(self._span):
            for t, target in enumerate(self._span):
                if s != t:
                    traffic[s, t] = sum(num_units(move, source, target) for move in self._moves)
        return traffic

    def _leaving(self, target: int, parts: int, device: Any) -> torch.Tensor:
        """Rows of this worker's pool that go to `target`."""
        pairs = ((move, units_of(move, self._place.kernel_blocks, self._place.engine, target)) for move in self._moves)
        return _tensor(
            [self._rows(m.source, units.source_pages, units.source_places, parts) for m, units in pairs if len(units)],
            device,
        )

    def _arriving(self, source: int, parts: int, device: Any) -> torch.Tensor:
        """Rows of this worker's pool that come from `source`, in the order in which they are sent."""
        pairs = ((move, units_of(move, self._place.kernel_blocks, source, self._place.engine)) for move in self._moves)
        return _tensor(
            [self._rows(m.target, units.target_pages, units.target_places, parts) for m, units in pairs if len(units)],
            device,
        )

    def _rows(self, group: Group, pages: np.ndarray, places: np.ndarray, parts: int) -> np.ndarray:
        own = np.asarray(self._place.physical(len(group), pages.tolist()), dtype=np.int64)
        rows: np.ndarray = own * parts + places
        return rows


def _slice(index: torch.Tensor, part: int, num_parts: int) -> torch.Tensor:
    return index[len(index) * part // num_parts : len(index) * (part + 1) // num_parts]


def _land(pool: list[torch.Tensor], work: Any, buffer: torch.Tensor, layers: range, incoming: list[Any]) -> None:
    work.wait()
    position = 0
    for index in incoming:
        for layer in layers:
            if len(index):
                pool[layer].index_copy_(0, index, buffer[position : position + len(index)])
                position += len(index)


def _tensor(rows: list[np.ndarray], device: Any) -> torch.Tensor:
    joined = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    return torch.from_numpy(joined).to(device)


def move_kv(
    moves: Sequence[KVMove],
    place: TransferPlace,
    layers: list[torch.Tensor],
    process_group_of: Callable[[int], Any],
    staging_bytes: int,
) -> dict[str, Any]:
    """Copy the KV of all `moves` that concern this worker, narrower spans first.

    Returns the seconds it took, and the bytes that went between workers of this local rank, in each span's first
    engine only, so that the sum over all workers counts them once.
    """
    started = time.perf_counter()
    moved = 0
    for span in sorted({move.span for move in moves}, key=len):
        if place.engine in span:
            transfer = Transfer(moves, span, place, staging_bytes)
            transfer.run(layers, process_group_of(len(span)))
            moved += transfer.bytes_moved if place.engine == span[0] else 0
    return {"bytes": moved, "seconds": time.perf_counter() - started}
