"""The communicator pool: one saved set of vLLM's parallel-state globals per group width.

May import torch and vllm. All groups are created once, at start, in the same order on every worker; a switch only
puts a saved set back, which takes microseconds and talks to nobody.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from vllm_flying.core.topology import group_world_ranks, groups_of_width, world_rank

# Every module global of vLLM that a model or a runner reads a communicator from.
GLOBALS = ("_TP", "_PP", "_DP", "_EP", "_DCP", "_PCP", "_ETP", "_ENGRAM_DP", "_EPLB")


@dataclass(frozen=True)
class WorkerPlace:
    """Where this worker stands among all workers of all engines."""

    engine: int
    local_rank: int
    num_engines: int
    engine_tp: int

    @property
    def rank(self) -> int:
        """Rank in the world of all workers."""
        return world_rank(self.engine, self.local_rank, self.num_engines)

    @property
    def world_size(self) -> int:
        """Workers of all engines together."""
        return self.num_engines * self.engine_tp


def join_world(place: WorkerPlace, rendezvous: str, local_rank: int, backend: str, timeout_s: float) -> None:
    """Meet the workers of all engines in one process group. Blocks until all are there, at most `timeout_s`."""
    parallel_state.init_distributed_environment(
        place.world_size, place.rank, rendezvous, local_rank, backend, timedelta(seconds=timeout_s)
    )


def all_pids(place: WorkerPlace) -> list[int]:
    """Process ids of all workers, by world rank."""
    pids: list[Any] = [None] * place.world_size
    torch.distributed.all_gather_object(pids, os.getpid(), group=parallel_state.get_world_group().cpu_group)
    return pids


def build_communicators(
    place: WorkerPlace, vllm_config: VllmConfig, widths: tuple[int, ...], backend: str
) -> dict[int, dict[str, Any]]:
    """Communicators for width 1 and each of `widths`; leaves those of width 1 in place.

    The groups that aren't tensor parallel have one member in every layout, so they are made once, by vLLM.
    """
    with set_current_vllm_config(vllm_config):
        parallel_state.initialize_model_parallel(1, backend=backend)
    alone = current_communicators()
    pool: dict[int, dict[str, Any]] = {}
    for width in (1, *widths):
        if width * place.engine_tp == 1:
            pool[width] = alone
            continue
        group_ranks = [
            group_world_ranks(group, place.engine_tp, place.num_engines)
            for group in groups_of_width(width, place.num_engines)
        ]
        tensor_parallel = parallel_state.init_model_parallel_group(
            group_ranks,
            parallel_state.get_world_group().local_rank,
            backend,
            use_message_queue_broadcaster=True,
            group_name="tp",
        )
        pool[width] = {**alone, "_TP": tensor_parallel, "_ETP": tensor_parallel}
    use_communicators(pool[1])
    return pool


def current_communicators() -> dict[str, Any]:
    """The parallel-state globals as they are now."""
    return {name: getattr(parallel_state, name) for name in GLOBALS}


def use_communicators(saved: dict[str, Any]) -> None:
    """Put a saved set of parallel-state globals back."""
    for name, value in saved.items():
        setattr(parallel_state, name, value)
