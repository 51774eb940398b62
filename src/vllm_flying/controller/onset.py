"""Since when more requests come than chance explains, and how many per second since then.

Pure. Of all stretches of time up to now, the one counts whose arrivals are the least likely at the rate that was usual before it.
An average follows a burst late, and a trend taken from averages runs beyond it; this does neither.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

# Bursts that began longer ago are in the averages.
LOOKED_BACK_S = 8.0
# A few requests at once are no burst yet.
SHORTEST_S = 0.5
# Over so long arrivals must have been as many as on average lately, or the burst is over.
LATEST_S = 1.0


@dataclass(frozen=True)
class _Look:
    time: float
    added: int
    """Requests since start."""
    usual_rate: float
    """Requests per second, until then."""


@dataclass
class Onset:
    """Looks at how many requests have come."""

    _looks: deque[_Look] = field(default_factory=deque)

    def update(self, now: float, added: int, usual_rate: float) -> None:
        """So many requests have come since start; `usual_rate` is an average over a longer time, per second."""
        self._looks.append(_Look(now, added, usual_rate))
        while len(self._looks) > 1 and self._looks[1].time <= now - LOOKED_BACK_S:
            self._looks.popleft()

    def rate(self, average: float) -> float:
        """Requests per second in the stretch up to now that is the least like chance; 0 where fewer come by now than on `average`."""
        latest = self._stretches(LATEST_S) or self._stretches(SHORTEST_S)[:1]
        if not latest or self._rate_after(latest[-1]) < average:
            return 0.0
        return self._rate_after(max(self._stretches(SHORTEST_S), key=self._beyond_chance))

    def _stretches(self, shortest_s: float) -> list[_Look]:
        """The looks after which stretches begin that are no shorter than this, the oldest first."""
        return [look for look in self._looks if self._looks[-1].time - look.time >= shortest_s]

    def _rate_after(self, since: _Look) -> float:
        now = self._looks[-1]
        return (now.added - since.added) / (now.time - since.time)

    def _beyond_chance(self, since: _Look) -> float:
        """Standard deviations by which arrivals after `since` are more than usual (Anscombe's transform of Poisson counts)."""
        now = self._looks[-1]
        usual = since.usual_rate * (now.time - since.time)
        return 2.0 * (math.sqrt(now.added - since.added + 0.375) - math.sqrt(usual + 0.375))
