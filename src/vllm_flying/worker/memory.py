"""What a worker holds: bytes of weights and KV, counted over unique storages.

May import torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vllm_flying.loader.resident import resident_weights


def unique_storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes of the distinct storages behind `tensors`; empty ones left out."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def memory_report(table: Any) -> dict[str, Any]:
    """Weight bytes alone and with all layouts; per width KV pool, page geometry and how many of its pages are backed."""
    resident = resident_weights()
    alone = unique_storages(_weights(table[1].runner.model))
    together = dict(alone)
    for layout in table.wide:
        together.update(unique_storages(_weights(layout.runner.model)))
    tiles = resident.tile_bytes()
    return {
        "weight_bytes_one_copy": sum(alone.values()) + tiles,
        "weight_bytes_all_layouts": sum(together.values()) + tiles,
        "tile_bytes": tiles,
        "kv": {layout.width: _kv(layout) for layout in (table[1], *table.wide)},
    }


def _weights(model: torch.nn.Module) -> Iterable[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _kv(layout: Any) -> dict[str, int]:
    """`backed_pages`: of a group, by a page of this worker; an engine by itself numbers its own pages."""
    config = layout.runner.kv_cache_config
    spec = config.kv_cache_groups[0].kv_cache_spec
    storage = layout.runner.kv_caches[0].untyped_storage()
    return {
        "pool_address": storage.data_ptr(),
        "pool_bytes": storage.nbytes(),
        "num_pages": config.num_blocks,
        "page_bytes": spec.page_size_bytes,
        "page_tokens": spec.block_size,
        "backed_pages": len(layout.pages),
    }
