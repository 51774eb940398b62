"""How slow the machine is now beside its usual self, whatever the layout: shared machines have slow minutes.

Pure. Without it, the layout that ran in a slow minute would look dear, and the other one cheap, until it runs again.
"""

from __future__ import annotations

from dataclasses import dataclass

# What the newest step counts.
SHARE = 1 / 32
# A step that takes so many times what it usually does was held up by something else.
HELD_UP = 4.0


@dataclass
class Pace:
    """Steps take `factor` times what they usually take."""

    factor: float = 1.0

    def usual(self, seconds: float, expected: float | None) -> float:
        """What a step that took `seconds` usually takes; `expected` by what is known of such steps, if enough is."""
        if expected is not None:
            ratio = min(max(seconds / expected, 1 / HELD_UP), HELD_UP)
            self.factor += SHARE * (ratio - self.factor)
        return seconds / self.factor
