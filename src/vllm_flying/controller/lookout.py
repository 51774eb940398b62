"""When the controller looks at the engines: often while something changes, else now and then.

Pure. Engines answer between two steps, so every look makes requests wait a little, most of all where engines, workers and
API servers share few cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_flying.controller.observation import Observation

# Between two looks while nothing changes.
REST_S = 1.0
# More or fewer requests than at the last look that are a change: these, and this share of them.
FEW_REQUESTS = 2
SHARE = 0.25


@dataclass
class Lookout:
    """What was there at the last look."""

    restless: bool = True
    """Whether the last look left something open: a layout that may be better soon, requests that wait."""
    _time: float = -math.inf
    _requests: int = 0

    def is_due(self, now: float, requests: int) -> bool:
        """Whether to look now, with so many unfinished requests as far as is known without asking. If so, it is the last look."""
        changed = abs(requests - self._requests) > max(FEW_REQUESTS, SHARE * self._requests)
        if not (self.restless or changed or now - self._time >= REST_S):
            return False
        self._time, self._requests = now, requests
        return True

    def saw(self, observation: Observation, better_layout: bool) -> None:
        """What the look brought: whether a policy would rather have another layout, and who waits."""
        self.restless = better_layout or any(group.waiting or group.paused for group in observation.groups)
