"""KV read in place: every worker takes what it gets out of the others' pools, one copy per byte.

May import torch. For workers of one host whose pools are `worker.host_pool`s. The process group carries row numbers
only, since a group's pages lie elsewhere on every member; they also say that a source's steps are at rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed

from vllm_flying.worker.host_pool import OtherPool
from vllm_flying.worker.transfer import Share


class Pull:
    """The transport of workers that can read each other's memory."""

    def __init__(self, others: Mapping[int, OtherPool]) -> None:
        self.others = others
        """By engine the pools of the workers with this one's local rank."""

    def copy(self, pool: list[torch.Tensor], share: Share, process_group: Any) -> None:
        """One's own part first, while the others get ready."""
        layers, row_bytes = layer_bytes(pool)
        mine = share.place_in_span
        own = list(zip(share.leaving[mine].tolist(), share.arriving[mine].tolist(), strict=True))
        if not share.traffic.any():
            copy_own(layers, row_bytes, own)
            return
        rows, work = _tell_rows(share, process_group)
        copy_own(layers, row_bytes, own)
        work.wait()
        try:
            for engine, leaving, arriving in zip(share.span, rows, share.arriving, strict=True):
                if engine != share.place.engine:
                    read_rows(self.others[engine], layers, row_bytes, list(zip(leaving.tolist(), arriving.tolist(), strict=True)))
        finally:  # whoever fails must not keep the others waiting
            torch.distributed.barrier(process_group)


def layer_bytes(pool: Sequence[torch.Tensor]) -> tuple[list[memoryview], int]:
    """Every layer of a pool as bytes, and the bytes of one of its rows."""
    return [memoryview(layer.numpy()).cast("B") for layer in pool], pool[0].shape[1] * pool[0].element_size()


def read_rows(source: OtherPool, layers: list[memoryview], row_bytes: int, rows: list[tuple[int, int]]) -> None:
    """Rows of another worker's pool into one's own: (there, here)."""
    for number, layer in enumerate(layers):
        for there, here in rows:
            source.read(number, there * row_bytes, layer[here * row_bytes : (here + 1) * row_bytes])


def copy_own(layers: list[memoryview], row_bytes: int, rows: list[tuple[int, int]]) -> None:
    """Rows of one's own pool: (from, to)."""
    for layer in layers:
        for there, here in rows:
            layer[here * row_bytes : (here + 1) * row_bytes] = layer[there * row_bytes : (there + 1) * row_bytes]


def _tell_rows(share: Share, process_group: Any) -> tuple[list[np.ndarray], Any]:
    """Per engine of the span, its rows that come here, once the work is done; tells the others theirs."""
    mine = share.place_in_span

    def sizes(rows: list[np.ndarray]) -> list[int]:
        return [0 if other == mine else len(each) for other, each in enumerate(rows)]

    leaving, arriving = sizes(share.leaving), sizes(share.arriving)
    send = torch.from_numpy(np.concatenate([rows[:size] for rows, size in zip(share.leaving, leaving, strict=True)]))
    receive = torch.empty(sum(arriving), dtype=torch.int64)
    work = torch.distributed.all_to_all_single(
        receive, send, share.by_rank(arriving), share.by_rank(leaving), group=process_group, async_op=True
    )
    return np.split(receive.numpy(), np.cumsum(arriving)[:-1]), work
