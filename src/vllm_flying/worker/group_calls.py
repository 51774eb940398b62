"""Calls that all workers of a group must run together, whichever engine they belong to: proof and migration.

May import torch and vllm. The leading engine's executor calls `flying_together` on its own workers; these relay the call to the
workers of the group's other engines. Everything here happens between steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_flying.core.migration import KVMove
from vllm_flying.core.topology import aligned_group
from vllm_flying.worker.communicators import WorkerPlace
from vllm_flying.worker.copy_rate import plain_copy_rate, plain_move_rate, plain_read_rate
from vllm_flying.worker.host_pool import OtherPool
from vllm_flying.worker.kv_views import kernel_block_size, raw_pool
from vllm_flying.worker.layout_table import LayoutTable
from vllm_flying.worker.precopy import precopy
from vllm_flying.worker.pull import Pull
from vllm_flying.worker.request_state import export_states, forget_states, install_states
from vllm_flying.worker.transfer import TransferPlace, Transport, layer_pages, move_kv

logger = init_logger("vllm.flying.worker")

PREFIX = "_flying_do_"


class GroupCalls:
    """Part of the worker extension."""

    vllm_config: Any
    device: Any
    _flying: LayoutTable
    _flying_place: WorkerPlace
    _flying_transport: Transport

    def flying_together(self, operation: str, *arguments: Any) -> Any:
        """Leading engine: run an operation on every worker of this worker's group."""
        layout = self._flying.active
        if layout.width > 1:
            assert layout.relay is not None
            layout.relay.send(operation, arguments)
        return self._flying_do(operation, arguments)

    def flying_kernel_block_tokens(self) -> int:
        """Tokens per kernel block, the same in all layouts."""
        return kernel_block_size(self._flying[1].runner)

    def flying_copy_rate(self, num_bytes: str, width: str) -> float:
        """Bytes per second of a plain exchange in the group of `width`. Arguments as vLLM's RPC route brings them."""
        group = self._flying[int(width)].tensor_parallel_group.device_group
        return plain_copy_rate(int(num_bytes), group, self.device)

    def flying_read_rate(self, num_bytes: str, width: str) -> float:
        """The same of plain reads of the other workers' memory; 0 where KV doesn't move like this."""
        group, others = self._flying[int(width)].tensor_parallel_group.device_group, self._flying_others(int(width))
        return plain_read_rate(int(num_bytes), group, others) if others else 0.0

    def flying_move_rate(self, num_bytes: str, width: str) -> float:
        """The same with as many bytes copied within each worker, which is what a migration does in all."""
        group, others = self._flying[int(width)].tensor_parallel_group.device_group, self._flying_others(int(width))
        own = memoryview(raw_pool(self._flying[1].runner).numpy()).cast("B") if others else memoryview(b"")
        return plain_move_rate(int(num_bytes), group, others, own) if others else 0.0

    def _flying_others(self, width: int) -> list[OtherPool]:
        transport, members = self._flying_transport, aligned_group(self._flying_place.engine, width)
        pools = transport.others.items() if isinstance(transport, Pull) else ()
        return [pool for engine, pool in pools if engine in members]

    def flying_export(self, request_ids: dict[int, list[str]]) -> dict[str, bytes]:
        """What the runners of former layouts (by width) know of begun requests."""
        states: dict[str, bytes] = {}
        for width, ids in request_ids.items():
            states |= export_states(self._flying[width].runner, ids)
        return states

    def _flying_do(self, operation: str, arguments: Sequence[Any]) -> Any:
        return getattr(self, PREFIX + operation)(*arguments)

    def _flying_do_prove(self) -> list[dict[str, Any]]:
        """Every member's identity, sent through the very communicator that the layers of this layout use."""
        group = self._flying.active.tensor_parallel_group
        place = self._flying_place
        mine = torch.tensor(
            [[place.rank, place.engine, group.world_size, group.rank_in_group]], dtype=torch.float32, device=self.device
        )
        rows = mine if group.world_size == 1 else group.all_gather(mine, dim=0)
        return [
            {"worker": int(w), "engine": int(e), "tp_size": int(size), "tp_rank": int(rank), "group": list(group.ranks)}
            for w, e, size, rank in rows.tolist()
        ]

    def _flying_do_transfer(self, moves: list[dict[str, Any]], states: Mapping[str, bytes]) -> dict[str, Any]:
        """Copy KV into the present layout, have its runner know the requests, and prove: see `_flying_do_prove`."""
        install_states(self._flying.active.runner, states)
        kv_moves = [KVMove.from_dict(move) for move in moves]
        moved = move_kv(
            kv_moves,
            TransferPlace(
                engine=self._flying_place.engine,
                local_rank=self._flying_place.local_rank,
                engine_tp=self._flying_place.engine_tp,
                kernel_blocks=self._flying[1].kernel_blocks_per_page,
                physical=self._flying_physical,
            ),
            self._flying_layers(),
            lambda width: self._flying[width].tensor_parallel_group.device_group,
            self._flying_transport,
        )
        return moved | {"proof": self._flying_do_prove()}

    def _flying_layers(self) -> list[torch.Tensor]:
        alone = self._flying[1]
        return layer_pages(alone.runner, alone.kernel_blocks_per_page)

    def flying_reads_others(self) -> bool:
        """Whether workers read each other's KV in place, without the other's help."""
        return isinstance(self._flying_transport, Pull)

    def _flying_do_precopy(self, moves: list[dict[str, Any]]) -> dict[str, Any]:
        """Copy KV ahead of a switch. The group's slowest worker's seconds, and whether all did: one that can't must not end it."""
        started, done = time.perf_counter(), True
        try:
            assert isinstance(self._flying_transport, Pull)
            place, others = self._flying_place, self._flying_transport.others
            precopy(moves, place.engine, self._flying[1].kernel_blocks_per_page, self._flying_layers(), others)
        except Exception:
            logger.exception("KV can't be copied ahead of a switch.")
            done = False
        group = self._flying.active.tensor_parallel_group
        mine = torch.tensor([[float(done), time.perf_counter() - started]], device=self.device)
        everybodys = mine if group.world_size == 1 else group.all_gather(mine, dim=0)
        return {"done": bool(everybodys[:, 0].all()), "seconds": float(everybodys[:, 1].max())}

    def _flying_physical(self, width: int, pages: Sequence[int]) -> Sequence[int]:
        return pages if width == 1 else self._flying[width].pages.physical(pages)

    def _flying_do_forget(self, request_ids: dict[int, list[str]]) -> None:
        """Drop requests from the runners of the layouts they left, by width."""
        for width, ids in request_ids.items():
            forget_states(self._flying[int(width)].runner, ids)

    def _flying_do_extend(self, virtual: bytes, physical: dict[str, bytes]) -> None:
        """Learn more pages of the present group. int32 each."""
        own = physical[str(self._flying_place.engine)]
        self._flying.active.pages.add(np.frombuffer(virtual, dtype=np.int32), np.frombuffer(own, dtype=np.int32))
