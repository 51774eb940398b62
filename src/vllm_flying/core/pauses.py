"""How long a group that a switch dissolves stays away, as far as switches have shown it, and who waits for that.

Pure: no torch, no vllm, no clock. A begun request may be left paused, its KV in place, if the expected pause costs less
than moving it (`core.pricing`). What is expected may not come: such a request is fetched like one without room after
twice the expected pause, and at the latest after the limit for any pause.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from vllm_flying.core.pricing import blend
from vllm_flying.core.topology import Group, Layout

Direction = tuple[Group, tuple[Group, ...]]
"""A group, and the groups that its engines are in while it is away."""

# A pause that is longer than expected by this is no longer expected to end.
CLEARLY_EXCEEDED = 2.0


@dataclass(frozen=True)
class Pausing:
    """What one switch may know of pauses."""

    expected_s: Mapping[Group, float] = field(default_factory=dict)
    """For groups that are away after the switch: how long still. Of others nothing is known."""
    flex_delay_weight: float = 1.0
    """What a second of delay counts for a request with a priority above 0; for others it counts 1."""
    kept: frozenset[str] = frozenset()
    """Requests whose pause isn't over yet: they are left where they are."""

    def price(self, source: Group, priority: int) -> float | None:
        """What leaving a request paused costs, in seconds of everybody's delay."""
        expected_s = self.expected_s.get(source)
        return None if expected_s is None else expected_s * (self.flex_delay_weight if priority > 0 else 1.0)


@dataclass
class Pauses:
    """What an API server has seen of switches, and the requests that its own switches left paused."""

    limit_s: float
    """No pause is longer, so none that is expected to be is chosen."""
    _layout: Layout | None = None
    """After the last switch that was seen."""
    _lengths: dict[Direction, float] = field(default_factory=dict)
    _away: dict[Group, tuple[Direction, float]] = field(default_factory=dict)
    """Groups that are away, and since when."""
    _left: dict[str, tuple[Group, float]] = field(default_factory=dict)
    """Requests left paused: the group they wait for, and until when."""

    def expected(self, now: float, source: Layout, target: Layout) -> dict[Group, float]:
        """How long each group that is away after a switch from `source` to `target` will be, if it is known."""
        expected = {
            group: self._lengths.get(_direction(group, target), 0.0)
            for group in source.groups
            if group not in target.groups
        }
        for group, (direction, since) in self._away.items() if self._layout == source else ():
            if group not in target.groups:
                expected[group] = self._lengths.get(direction, 0.0) - (now - since)
        return {group: seconds for group, seconds in expected.items() if 0.0 < seconds <= self.limit_s}

    def switched(self, now: float, source: Layout, target: Layout) -> None:
        """A switch is done: groups are back, others are away from now on. Somebody else may have switched before."""
        if self._layout != source:
            self._away = {}
        self._layout = target
        for group in [group for group in self._away if group in target.groups]:
            direction, since = self._away.pop(group)
            seconds = blend(self._lengths.get(direction), now - since)
            assert seconds is not None
            self._lengths[direction] = seconds
        for group in source.groups:
            if group not in target.groups:
                self._away[group] = (_direction(group, target), now)
        self._left = {i: entry for i, entry in self._left.items() if entry[0] not in target.groups}

    def leave(self, now: float, offered: Collection[str], left: Mapping[str, Group], expected: Mapping[Group, float]) -> None:
        """A switch has left requests paused, and not others that were offered. Who waits already waits no longer for it."""
        for request_id in offered:
            _, until = self._left.get(request_id, (None, None))
            if request_id not in left:
                self._left.pop(request_id, None)
            elif left[request_id] in expected:
                patience_s = min(self.limit_s, CLEARLY_EXCEEDED * expected[left[request_id]])
                until = now + patience_s if until is None else min(until, now + patience_s)
                self._left[request_id] = (left[request_id], until)

    def kept(self, now: float) -> frozenset[str]:
        """Requests that aren't to be fetched yet."""
        return frozenset(request_id for request_id, (_, until) in self._left.items() if now < until)

    def overdue(self, now: float) -> frozenset[str]:
        """Requests that have waited long enough."""
        return frozenset(self._left) - self.kept(now)

    def end(self, now: float) -> None:
        """Everybody has waited long enough."""
        self._left = {i: (group, min(until, now)) for i, (group, until) in self._left.items()}

    def forget(self, request_ids: Iterable[str]) -> None:
        """They have been fetched, or are no more."""
        for request_id in request_ids:
            self._left.pop(request_id, None)

    def next_due(self) -> float | None:
        """When the next one has waited long enough; None if nobody waits."""
        return min((until for _, until in self._left.values()), default=None)


def _direction(group: Group, layout: Layout) -> Direction:
    return group, tuple(other for other in layout.groups if set(other) & set(group))
