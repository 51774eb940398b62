"""How much speaks for leaving a layout: gains add up over time, so that noise switches nothing and a lasting gain does.

Pure. A great gain convinces at once, a small one after a while, one below the margin never.
"""

from __future__ import annotations

from dataclasses import dataclass

# What is seen at one look counts for no longer than this.
LONGEST_LOOK_S = 1.0
# No more than so many times what convinces is remembered: a load that changes is followed soon.
MOST = 2.0


@dataclass
class Evidence:
    """The sum over time of the share that would be gained, beyond `margin`; convinced at `patience_s`."""

    margin: float
    patience_s: float
    _sum_s: float = 0.0
    _time: float | None = None

    def look(self, now: float, share: float) -> bool:
        """Another layout would save this share of the time (nothing, if there is no better one). Whether to leave."""
        elapsed = 0.0 if self._time is None else min(LONGEST_LOOK_S, now - self._time)
        self._time = now
        beyond = min(share, 1.0) - self.margin
        self._sum_s = max(0.0, min(MOST * self.patience_s, self._sum_s + beyond * elapsed))
        return beyond > 0.0 and self._sum_s >= self.patience_s

    def forget(self) -> None:
        """Another layout now: what spoke against the former one is past."""
        self._sum_s = 0.0
