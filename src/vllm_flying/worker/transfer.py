"""Copies KV between the workers of merging or splitting groups: all of them at once, both ways.

May import torch. Everything a worker needs to know is in the list of moves, which all workers have, so nobody asks
anybody: each derives what leaves it and what it gets. How the bytes travel is the transport's: `worker.exchange` or
`worker.pull`. What a worker keeps for itself never leaves it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from vllm_flying.core.migration import KVMove, Units, alike, num_units, units_of, units_per_page
from vllm_flying.core.topology import Group


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


@dataclass(frozen=True)
class Share:
    """One worker's share in copying inside `span`: rows of each layer of its pool, a row being one unit.

    Rows that arrive are free pages', rows that leave are held until all workers are done: no row is both.
    """

    span: Group
    place: TransferPlace
    leaving: list[np.ndarray]
    """For each engine of the span the rows that go there, in the order in which it has them arriving."""
    arriving: list[np.ndarray]
    traffic: np.ndarray
    """Units of one layer from each engine to each other; the same on all workers."""

    @property
    def place_in_span(self) -> int:
        """This worker's engine among those of the span."""
        return self.span.index(self.place.engine)

    def by_rank(self, by_engine: list[int]) -> list[int]:
        """Sizes for every rank of the group: only workers of the same local rank hold shards of the same heads."""
        sizes = [0] * (len(self.span) * self.place.engine_tp)
        first = self.place.local_rank * len(self.span)
        sizes[first : first + len(self.span)] = by_engine
        return sizes


class Transport(Protocol):
    """A way for bytes between workers; the same one on all workers of a server."""

    def copy(self, pool: list[torch.Tensor], share: Share, process_group: Any) -> None:
        """Copy the rows of every layer. Called by all workers of the group with their shares of the same moves.

        When it returns, nobody reads this worker's rows any more.
        """


def layer_pages(runner: Any, kernel_blocks: int) -> list[torch.Tensor]:
    """Every layer's part of the KV pool as [pages, its bytes in a page / 8], for `kernel_blocks` per page."""
    layers = []
    for cache in runner.kv_caches:
        if not cache.is_contiguous():
            raise ValueError("the KV cache of a layer is not contiguous; this KV cache layout can't be moved")
        num_pages = cache.shape[0] // kernel_blocks
        layers.append(cache.view(torch.uint8).view(num_pages, -1).view(torch.int64))
    return layers


def share_of(moves: Sequence[KVMove], span: Group, place: TransferPlace) -> Share:
    """What this worker has to do for those of `moves` whose span is `span`."""
    batches = alike([_with_own_pages(move, place) for move in moves if move.span == span])
    parts = units_per_page(span, place.kernel_blocks)
    traffic = np.zeros((len(span), len(span)), dtype=np.int64)
    for s, source in enumerate(span):
        for t, target in enumerate(span):
            if s != t:
                traffic[s, t] = sum(num_units(batch, source, target) for batch in batches)

    def units(source: int, target: int) -> list[Units]:
        some = [batch for batch in batches if num_units(batch, source, target)]
        return [units_of(batch, place.kernel_blocks, source, target) for batch in some]

    leaving, arriving = [], []
    for other in span:
        away = units(place.engine, other)
        home = away if other == place.engine else units(other, place.engine)
        leaving.append(_joined(u.source_pages * parts + u.source_places for u in away))
        arriving.append(_joined(u.target_pages * parts + u.target_places for u in home))
    return Share(span, place, leaving, arriving, traffic)


def _with_own_pages(move: KVMove, place: TransferPlace) -> KVMove:
    """`move` in this worker's pages, at the ends that it has a part in."""

    def own(group: Group, pages: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(place.physical(len(group), pages)) if place.engine in group else pages

    return replace(move, source_pages=own(move.source, move.source_pages), target_pages=own(move.target, move.target_pages))


def _joined(rows: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *rows])


def move_kv(
    moves: Sequence[KVMove],
    place: TransferPlace,
    layers: list[torch.Tensor],
    process_group_of: Callable[[int], Any],
    transport: Transport,
) -> dict[str, Any]:
    """Copy the KV of all `moves` that concern this worker, narrower spans first.

    Returns the seconds it took, and the bytes that went between workers of this local rank, in each span's first
    engine only, so that the sum over all workers counts them once.
    """
    started = time.perf_counter()
    moved = 0
    for span in sorted({move.span for move in moves}, key=len):
        if place.engine in span:
            share = share_of(moves, span, place)
            row = layers[0].shape[1] // units_per_page(span, place.kernel_blocks)
            transport.copy([layer.view(-1, row) for layer in layers], share, process_group_of(len(span)))
            if place.engine == span[0]:
                moved += int(share.traffic.sum()) * row * layers[0].element_size() * len(layers)
    return {"bytes": moved, "seconds": time.perf_counter() - started}
