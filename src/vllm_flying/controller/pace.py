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
# Steps of known kinds, in each of two layouts, before their paces are compared.
COMPARED_STEPS = 128
# How far what is known of a layout follows such a comparison at least. The first is half believed and each later one less: as
# the machine may have changed meanwhile, what is known would else wander with it, from switch to switch, until a layout
# looks too quick to be left, or too slow to be chosen again.
LEAST_TRUST = 0.15


@dataclass
class Pace:
    """Steps take `factor` times what they usually take."""

    factor: float = 1.0
    lasting: float = 1.0
    """The same over a longer while."""
    _layout: object = None
    """In which steps run."""
    _told: int = 0
    """Steps in it that told the pace."""
    _ratios: float = 0.0
    """Of these to what they usually take, summed up."""
    _left_at: float | None = None
    """The pace at which the layout before was left, until this one's is compared to it."""
    _comparisons: int = 0

    def usual(self, seconds: float, expected: float | None, layout: object = None) -> float:
        """What a step that took `seconds` usually takes; `expected` by what is known of such steps, if enough is."""
        if layout is not self._layout:
            self._left_at = self.lasting if self._told >= COMPARED_STEPS else None
            self._layout, self._told, self._ratios = layout, 0, 0.0
        if expected is not None:
            ratio = min(max(seconds / expected, 1 / HELD_UP), HELD_UP)
            self._told += 1
            self._ratios += ratio
            self.factor += SHARE * (ratio - self.factor)
            self.lasting += LASTING_SHARE * (ratio - self.lasting)
        return seconds / self.factor

    def misjudged(self) -> float:
        """What is to be multiplied with all that is known of the present layout. 1 but once after a change of layouts.

        A machine is no slower for a switch. If steps are, beside what they usually take, then what was learned of one of
        the layouts came from moments slower, or quicker, than they were taken for; nothing else would ever tell.
        """
        if self._left_at is None or self._told < COMPARED_STEPS:
            return 1.0
        self._comparisons += 1
        factor = (self._ratios / self._told / self._left_at) ** max(1.0 / (1 + self._comparisons), LEAST_TRUST)
        self._left_at = None
        self.factor /= factor
        self.lasting /= factor
        return float(factor)

    def layout_changed(self) -> None:
        """What was slow for a moment is forgotten.

        A layout is left when its steps are slow, by chance too; at the pace of that moment all that is new in the next
        layout would look quicker than it is, for good.
        """
        self.factor = self.lasting
