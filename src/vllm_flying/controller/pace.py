"""How slow the machine is now beside its usual self, whatever the layout: shared machines have slow minutes.

Pure. Without it, the layout that ran in a slow minute would look dear, and the other one cheap, until it runs again.
"""

from __future__ import annotations

from dataclasses import dataclass

# What the newest step counts, for the pace of now and for the lasting one.
SHARE = 1 / 32
LASTING_SHARE = 1 / 256
# A step that takes so many times what it usually does was held up by something else.
HELD_UP = 4.0


@dataclass
class Pace:
    """Steps take `factor` times what they usually take."""

    factor: float = 1.0
    lasting: float = 1.0
    """The same over a longer while."""

    def usual(self, seconds: float, expected: float | None) -> float:
        """What a step that took `seconds` usually takes; `expected` by what is known of such steps, if enough is."""
        if expected is not None:
            ratio = min(max(seconds / expected, 1 / HELD_UP), HELD_UP)
            self.factor += SHARE * (ratio - self.factor)
            self.lasting += LASTING_SHARE * (ratio - self.lasting)
        return seconds / self.factor

    def layout_changed(self) -> None:
        """What was slow for a moment is forgotten.

        A layout is left when its steps are slow, by chance too; at the pace of that moment all that is new in the next
        layout would look quicker than it is, for good.
        """
        self.factor = self.lasting
