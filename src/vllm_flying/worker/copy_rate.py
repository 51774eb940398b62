"""What the way between workers can do at best: one plain copy of contiguous bytes, sent or read in place.

May import torch. For benchmarks: a migration's rate is compared to it. Called on all engines at once while they are apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from itertools import cycle
from typing import Any

import torch
import torch.distributed

from vllm_flying.worker.host_pool import OtherPool

REPEATS = 5


def plain_copy_rate(num_bytes: int, process_group: Any, device: torch.device) -> float:
    """Bytes per second, best of several, when all members of the group exchange `num_bytes` between them."""
    members = torch.distributed.get_world_size(process_group)
    each = num_bytes // (members * (members - 1) * 8)
    send = torch.ones(each * members, dtype=torch.int64, device=device)
    receive = torch.zeros_like(send)
    own = torch.distributed.get_rank(process_group)
    sizes = [0 if rank == own else each for rank in range(members)]

    def copy() -> None:
        torch.distributed.all_to_all_single(
            receive[: sum(sizes)], send[: sum(sizes)], sizes, sizes, group=process_group
        )
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()

    return float(each * 8 * members * (members - 1) / _shortest(copy, process_group))


def plain_read_rate(num_bytes: int, process_group: Any, others: Collection[OtherPool]) -> float:
    """The same when they read it in each other's pools instead; every worker is done when all are."""
    members = torch.distributed.get_world_size(process_group)
    each = num_bytes // (members * len(others))
    target = memoryview(bytearray(each))

    def copy() -> None:
        for other in others:
            other.read(0, 0, target)
        torch.distributed.barrier(process_group)

    return float(each * members * len(others) / _shortest(copy, process_group))


def plain_move_rate(num_bytes: int, process_group: Any, others: Collection[OtherPool], own: memoryview) -> float:
    """The same where every worker copies, besides, as many bytes of its `own` pool: all that a migration copies.

    Every time they are others, as a migration's are. The rate counts what is read in other pools, as a migration's does.
    """
    members = torch.distributed.get_world_size(process_group)
    each = num_bytes // (members * len(others))
    read, copied = (memoryview(bytearray(each * len(others))) for _ in range(2))
    begins = cycle(range(0, len(own) - len(copied), len(copied)) or [0])

    def copy() -> None:
        begin = next(begins)
        for place, other in enumerate(others):
            other.read(0, begin, read[place * each : (place + 1) * each])
        copied[:] = own[begin : begin + len(copied)]
        torch.distributed.barrier(process_group)

    return float(each * members * len(others) / _shortest(copy, process_group))


def _shortest(copy: Callable[[], None], process_group: Any) -> float:
    seconds = []
    for _ in range(REPEATS):
        torch.distributed.barrier(process_group)
        started = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
