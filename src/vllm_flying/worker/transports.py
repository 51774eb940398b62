"""Which transport KV takes between workers: decided once, at start, by trying; the same one on all workers.

May import torch and vllm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from vllm.logger import init_logger

from vllm_flying.worker.exchange import Exchange
from vllm_flying.worker.host_pool import CanNotShare, HostPool, OtherPool, PoolOffer
from vllm_flying.worker.pull import Pull
from vllm_flying.worker.transfer import Transport

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.flying.worker")


def make_host_pool(kv_cache_config: KVCacheConfig) -> HostPool | CanNotShare:
    """A pool for vLLM's KV cache that other workers can read, or why there is none."""
    sizes = {int(tensor.size) for tensor in kv_cache_config.kv_cache_tensors}
    if len(sizes) != 1:
        return CanNotShare(f"vLLM keeps it in {len(sizes)} buffers")
    try:
        return HostPool(*sizes)
    except CanNotShare as reason:
        return reason


def choose_transport(
    pool: HostPool | CanNotShare,
    layers: Callable[[], list[torch.Tensor]],
    num_engines: int,
    world: Any,
    staging_bytes: int,
) -> Transport:
    """Called by all workers of `world` together; `layers` are those of the pool, on CPU."""
    speaks = torch.distributed.get_rank(world) == 0
    try:
        transport = Pull(_open_all(pool, layers, num_engines, world))
    except CanNotShare as reason:
        if speaks:
            logger.info("KV moves through the process group: %s.", reason)
        return Exchange(staging_bytes)
    if speaks:
        logger.info("KV moves by reads of the other workers' memory.")
    return transport


def _open_all(
    pool: HostPool | CanNotShare, layers: Callable[[], list[torch.Tensor]], num_engines: int, world: Any
) -> dict[int, OtherPool]:
    """By engine the pools of the other workers that hold the same heads. All workers succeed, or none does."""
    offer = _offer(pool, layers)
    local_rank, engine = divmod(torch.distributed.get_rank(world), num_engines)
    offers = _from_all(offer, world)[local_rank * num_engines :][:num_engines]
    others: dict[int, OtherPool] = {}
    failure = offer if isinstance(offer, str) else None
    try:
        for other, theirs in enumerate(offers):
            if other != engine and isinstance(theirs, PoolOffer):
                others[other] = OtherPool(theirs)
    except CanNotShare as error:
        failure = str(error)
    failures = _from_all(failure, world)
    if any(failures):
        for opened in others.values():
            opened.close()
        raise CanNotShare(", ".join(sorted({reason for reason in failures if reason})))
    return others


def _offer(pool: HostPool | CanNotShare, layers: Callable[[], list[torch.Tensor]]) -> PoolOffer | str:
    if not isinstance(pool, HostPool):
        return str(pool)
    try:
        return pool.offer(layers())
    except ValueError as reason:
        return str(reason)


def _from_all(mine: Any, world: Any) -> list[Any]:
    everybodys: list[Any] = [None] * torch.distributed.get_world_size(world)
    torch.distributed.all_gather_object(everybodys, mine, group=world)
    return everybodys
