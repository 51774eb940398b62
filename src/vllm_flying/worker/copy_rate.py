"""What the transport between workers can do at best: one plain exchange of contiguous bytes.

May import torch. For benchmarks: a migration's rate is compared to it. Called on all engines at once while they are apart.
"""

from __future__ import annotations

import time
from typing import Any

import torch

REPEATS = 5


def plain_copy_rate(num_bytes: int, process_group: Any, device: torch.device) -> float:
    """Bytes per second, best of several, when all members of the group exchange `num_bytes` between them."""
    members = torch.distributed.get_world_size(process_group)
    each = num_bytes // (members * (members - 1) * 8)
    send = torch.ones(each * members, dtype=torch.int64, device=device)
    receive = torch.zeros_like(send)
    own = torch.distributed.get_rank(process_group)
    sizes = [0 if rank == own else each for rank in range(members)]
    seconds = []
    for _ in range(REPEATS):
        torch.distributed.barrier(process_group)
        started = time.perf_counter()
        torch.distributed.all_to_all_single(
            receive[: sum(sizes)], send[: sum(sizes)], sizes, sizes, group=process_group
        )
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        seconds.append(time.perf_counter() - started)
    return float(each * 8 * members * (members - 1) / min(seconds))
