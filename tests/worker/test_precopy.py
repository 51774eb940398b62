"""KV copied ahead of a switch: every unit comes to its place, out of real pools, and nothing else is touched."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from vllm_flying.core.topology import Group, aligned_group
from vllm_flying.worker.host_pool import HostPool, OtherPool
from vllm_flying.worker.precopy import precopy

ENGINES, PAGES, LAYERS, KERNEL_BLOCKS = 4, 12, 2, 2
UNITS = ENGINES * KERNEL_BLOCKS
"""Of a page: a kernel block of the widest group each."""
UNIT_BYTES = 64


@pytest.fixture
def pools() -> Iterator[tuple[list[list[torch.Tensor]], dict[int, OtherPool]]]:
    """Every engine's layers, [pages, bytes / 8], and the way others have to them."""
    page_bytes = UNITS * UNIT_BYTES
    memory = [HostPool(LAYERS * PAGES * page_bytes) for _ in range(ENGINES)]
    layers = [list(pool.buffer.view(torch.int64).view(LAYERS, PAGES, page_bytes // 8)) for pool in memory]
    others = {engine: OtherPool(pool.offer(own)) for engine, (pool, own) in enumerate(zip(memory, layers, strict=True))}
    for own in layers:
        for layer in own:
            layer.random_()
    yield layers, others
    for pool in others.values():
        pool.close()


def kv_of(layers: list[list[torch.Tensor]], layer: int, group: Group, pages: dict[str, list[int]]) -> np.ndarray:
    """What a group's pages hold: [kernel block, head range, bytes], of as many head ranges as the widest group has members."""
    each = ENGINES // len(group)
    parts = []
    for engine in group:
        own = layers[engine][layer][pages[str(engine)]].numpy()
        parts.append(own.reshape(len(own) * KERNEL_BLOCKS * len(group), each, -1))
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("seed", range(20))
def test_a_groups_pages_are_filled_from_another_groups(
    pools: tuple[list[list[torch.Tensor]], dict[int, OtherPool]], seed: int
) -> None:
    layers, others = pools
    choose = random.Random(seed)
    narrow, wide = sorted(choose.sample([1, 2, 4], 2))
    inner, outer = aligned_group(engine := choose.randrange(ENGINES), narrow), aligned_group(engine, wide)
    source, target = choose.choice([(inner, outer), (outer, inner)])
    free = {engine: choose.sample(range(PAGES), PAGES) for engine in range(ENGINES)}
    first, count = choose.randint(0, 1), 1
    begin, end = first * len(target) // len(source), -(-(first + count) * len(target) // len(source))
    move: dict[str, Any] = {
        "source": list(source), "target": list(target), "first_page": first,
        "source_pages": {str(e): [free[e].pop() for _ in range(begin, end)] for e in source},
        "target_pages": {str(e): [free[e].pop() for _ in range(count)] for e in target},
    }  # fmt: skip
    before = [[layer.clone() for layer in own] for own in layers]
    for worker in range(ENGINES):
        precopy([move], worker, KERNEL_BLOCKS, layers[worker], others)
    blocks = KERNEL_BLOCKS * len(target)
    for number in range(LAYERS):
        skipped = begin * KERNEL_BLOCKS * len(source)
        wanted = kv_of(before, number, source, move["source_pages"])[first * blocks - skipped : (first + count) * blocks - skipped]
        assert (kv_of(layers, number, target, move["target_pages"]) == wanted).all()
    for engine in range(ENGINES):
        written = move["target_pages"].get(str(engine), [])
        for now, then in zip(layers[engine], before[engine], strict=True):
            untouched = [page for page in range(PAGES) if page not in written]
            assert torch.equal(now[untouched], then[untouched])
