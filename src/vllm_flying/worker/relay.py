"""How a group's leading worker drives the other members: one message per call over the group's own queue.

May import vllm. The queue is the stock shared-memory MessageQueue of the tensor-parallel group. Only the group's
first worker writes; every other worker of the group reads every message. Workers of the leading engine also get each
call from their own executor and use the relayed copy as a check that both orders agree.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.distributed.parallel_state import GroupCoordinator

POLL_SECONDS = 5.0

Message = tuple[str, Any]


class RelayBroken(RuntimeError):
    """The leader of the group is gone, or sent something else than the executor did."""


class Relay:
    """One worker's end of its group's queue."""

    def __init__(self, group: GroupCoordinator) -> None:
        if group.mq_broadcaster is None:
            raise RelayBroken(f"group {group.unique_name} has no message queue; its members can't be driven")
        self._queue = group.mq_broadcaster
        self._is_writer = group.rank_in_group == 0

    def send(self, method: str, payload: Any = None) -> None:
        """Leading engine's workers: pass a call on to the members of the other engines."""
        if self._is_writer:
            self._queue.enqueue((method, payload))
            return
        relayed, _ = self.receive()
        if relayed != method:
            raise RelayBroken(f"the group's first worker ran {relayed!r} where the executor asked for {method!r}")

    def receive(self, leader_pid: int | None = None) -> Message:
        """The next call. Waits without limit while the leader's process lives."""
        while True:
            try:
                message: Message = self._queue.dequeue(timeout=POLL_SECONDS)
                return message
            except TimeoutError:
                if leader_pid is not None and not _alive(leader_pid):
                    raise RelayBroken(
                        f"the leading worker (process {leader_pid}) is gone; this group can't go on"
                    ) from None


def grammar_comes(scheduler_output: Any) -> bool:
    """Whether members have to be told how to sample after this step. Else they do so at once: a message less per step."""
    return bool(scheduler_output.has_structured_output_requests)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
