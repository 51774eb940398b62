"""KV copied before a switch, between steps: each worker by itself reads what it will need out of the others' pools.

May import torch. Nobody helps with a copy: the pages that are read are full and stay as they are, which the engines make
sure of (see `core.precopy`), and those that are written are nobody's. Moves name every engine's own pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from vllm_flying.core.migration import KVMove, alike, units_of, units_per_page
from vllm_flying.worker.host_pool import OtherPool
from vllm_flying.worker.pull import copy_own, layer_bytes, read_rows


def precopy(
    moves: Iterable[Mapping[str, Any]],
    engine: int,
    kernel_blocks: int,
    layers: Sequence[torch.Tensor],
    others: Mapping[int, OtherPool],
) -> None:
    """Fill this engine's part of every move's target pages. `layers` as `worker.transfer.layer_pages` gives them."""
    mine = [move for move in moves if engine in move["target"]]
    for source in sorted({source for move in mine for source in move["source"]}):
        for batch in alike([kv_move(move, source, engine, kernel_blocks) for move in mine if source in move["source"]]):
            parts = units_per_page(batch[0].span, kernel_blocks)
            own, row_bytes = layer_bytes([layer.view(-1, layer.shape[1] // parts) for layer in layers])
            units = units_of(batch, kernel_blocks, source, engine)
            leaving, arriving = units.source_pages * parts + units.source_places, units.target_pages * parts + units.target_places
            rows = list(zip(leaving.tolist(), arriving.tolist(), strict=True))
            if source == engine:
                copy_own(own, row_bytes, rows)
            else:
                read_rows(others[source], own, row_bytes, rows)


def kv_move(move: Mapping[str, Any], source: int, target: int, kernel_blocks: int) -> KVMove:
    """One end's pages are the source engine's, the other's this engine's: those that matter, pages before them left out."""
    first, pages = move["first_page"], move["target_pages"][str(target)]
    blocks = kernel_blocks * len(move["target"])
    first_source = first * len(move["target"]) // len(move["source"])
    return KVMove(
        source=tuple(move["source"]),
        source_pages=(0,) * first_source + tuple(move["source_pages"][str(source)]),
        target=tuple(move["target"]),
        target_pages=(0,) * first + tuple(pages),
        first_block=first * blocks,
        last_block=(first + len(pages)) * blocks,
    )
