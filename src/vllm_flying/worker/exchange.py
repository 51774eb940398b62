"""KV through the process group: gathered, exchanged by `all_to_all`, landed. Works between any two workers.

May import torch. Rounds cover a range of layers and have a bounded staging buffer; while one round travels, the next is
gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from vllm_flying.worker.transfer import Share

# On CPU a round stays in the last cache between gathering, sending and landing, and its buffers in the heap.
CPU_ROUND_BYTES = 8 * 2**20


class Exchange:
    """The transport of workers that can't read each other's memory."""

    def __init__(self, staging_bytes: int) -> None:
        self._round_bytes = staging_bytes

    def copy(self, pool: list[torch.Tensor], share: Share, process_group: Any) -> None:
        """One's own part first, then everybody's at once."""
        device = pool[0].device
        sends, receives = ([torch.from_numpy(rows).to(device) for rows in ends] for ends in (share.leaving, share.arriving))
        mine = share.place_in_span
        for view in pool:
            if len(sends[mine]):
                view.index_copy_(0, receives[mine], view.index_select(0, sends[mine]))
        sends[mine] = receives[mine] = sends[mine][:0]
        under_way: tuple[Any, torch.Tensor, range, list[Any]] | None = None
        for layers, part, num_parts in self._rounds(pool, share):
            outgoing = [_slice(index, part, num_parts) for index in sends]
            incoming = [_slice(index, part, num_parts) for index in receives]
            work, buffer = _post(pool, layers, outgoing, incoming, share, process_group)
            if under_way is not None:
                _land(pool, *under_way)
            under_way = (work, buffer, layers, incoming)
        if under_way is not None:
            _land(pool, *under_way)

    def _rounds(self, pool: list[torch.Tensor], share: Share) -> list[tuple[range, int, int]]:
        """(layers, part, parts) of every round, from the busiest worker of the group, so the same on all of them."""
        most = self._round_bytes if pool[0].device.type != "cpu" else min(self._round_bytes, CPU_ROUND_BYTES)
        traffic = share.traffic * (pool[0].shape[1] * pool[0].element_size())
        layer_bytes = int(max(traffic.sum(axis=0).max(), traffic.sum(axis=1).max()))
        if layer_bytes == 0:
            return []
        each = max(1, min(len(pool), most // layer_bytes))
        parts = -(-layer_bytes // most)
        ranges = [range(first, min(first + each, len(pool))) for first in range(0, len(pool), each)]
        return [(layers, part, parts) for layers in ranges for part in range(parts)]


def _post(
    pool: list[torch.Tensor], layers: range, outgoing: list[Any], incoming: list[Any], share: Share, process_group: Any
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
        share.by_rank([len(layers) * len(index) for index in incoming]),
        share.by_rank([len(layers) * len(index) for index in outgoing]),
        group=process_group,
        async_op=True,
    )
    return work, receive


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
