"""Aborts of requests that an engine doesn't have, which may be on their way to it.

Pure: no torch, no vllm. A client that goes away while its request is between two engines is heard by all engines, and by
none that has the request. Most unknown aborts are of requests that are over, or with another engine: they are forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

MOST = 1024
LIMIT_S = 60.0
"""Requests travel for milliseconds; a switch that hangs is given up after `switch_timeout_s`, 30 s unless set."""


class UnknownAborts:
    """Ids with the time of their abort, the oldest first."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._times)

    def note(self, request_ids: Iterable[str]) -> None:
        """Nobody knows these here."""
        now = time.time()
        for request_id in request_ids:
            self._times.pop(request_id, None)
            self._times[request_id] = now
        while self._times:
            oldest = next(iter(self._times))
            if len(self._times) <= MOST and now - self._times[oldest] <= LIMIT_S:
                return
            del self._times[oldest]

    def of(self, requests: Iterable[Any]) -> list[str]:
        """Ids of those that were aborted. A request that came after the abort only has the same id."""
        return [r.request_id for r in requests if r.arrival_time <= self._times.get(r.request_id, -1.0)]
