"""What becomes of begun requests at a switch with the method `auto`: finish, move, be computed again, or stay paused.

Pure. Each way is priced in seconds of delay: finishing by the steps that are left, moving by the KV's bytes over the
rate seen so far, recomputing by the tokens over the prefill rate of the new layout, pausing by how long the request's
own layout is likely to be away (`core.pauses`). The last delays one request, not all: it counts less for those that can
wait. What isn't known yet isn't chosen: until something was measured, requests move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Weight of the newest observation.
FRESH = 0.3


@dataclass(frozen=True)
class MoveRates:
    """What a migration costs. `rounds_s`: its calls, whatever the bytes."""

    rounds_s: float | None = None
    seconds_per_byte: float | None = None

    def learn(self, record: Mapping[str, Any]) -> MoveRates:
        """The rates after one more switch, whose record this is."""
        kv, seconds = record["kv"], record["seconds"]
        if not record["requests"]["moved"]:
            return self
        rounds = max(0.0, seconds["admit"] + seconds["transfer"] + seconds["release"] - kv["seconds"])
        # Of what is left after copies ahead of a switch the time is rounds, not bytes.
        per_byte = kv["seconds"] / kv["bytes"] if kv["bytes"] and not record["precopied"]["bytes"] else None
        return MoveRates(blend(self.rounds_s, rounds), blend(self.seconds_per_byte, per_byte))

    def without_copies(self) -> MoveRates:
        """For a switch that finds nearly all KV in place."""
        return MoveRates(self.rounds_s, 0.0)

    def move_s(self, num_bytes: float) -> float | None:
        """Seconds to copy so much; the rounds apart."""
        return None if self.seconds_per_byte is None else num_bytes * self.seconds_per_byte


def blend(old: float | None, new: float | None) -> float | None:
    """A running mean, in which the newest observation counts most."""
    if old is None or new is None:
        return new if old is None else old
    return old + FRESH * (new - old)


@dataclass(frozen=True)
class Price:
    """Seconds of everybody's delay that each way costs for one request; None where nothing is known."""

    move_s: float | None
    recompute_s: float | None
    pause_s: float | None = None

    @property
    def unmoved_s(self) -> float | None:
        """The cheaper of the two ways that copy nothing."""
        known = [seconds for seconds in (self.recompute_s, self.pause_s) if seconds is not None]
        return min(known, default=None)

    @property
    def pauses(self) -> bool:
        """Whether that is to leave it paused."""
        return self.pause_s is not None and self.pause_s == self.unmoved_s


@dataclass(frozen=True)
class Ways:
    """Requests that don't move."""

    recomputed: frozenset[str] = frozenset()
    paused: frozenset[str] = frozenset()


def choose_ways(prices: Mapping[str, Price], rounds_s: float | None) -> Ways:
    """The ways that cost least together. The rounds are saved only if nothing moves at all."""
    unmoved = {i: price.unmoved_s for i, price in prices.items() if price.unmoved_s is not None}
    moved = {i: price.move_s for i, price in prices.items() if price.move_s is not None}
    cheaper = {i for i in unmoved.keys() & moved.keys() if unmoved[i] < moved[i]}
    if rounds_s is not None and len(unmoved) == len(prices):
        moving_s = sum(moved.get(i, 0.0) - unmoved[i] for i in prices if i not in cheaper)
        if rounds_s + moving_s > 0:
            cheaper = set(prices)
    paused = frozenset(i for i in cheaper if prices[i].pauses)
    return Ways(frozenset(cheaper) - paused, paused)


def finishing_pays(steps_left: int, step_s: float | None, num_bytes: float, rates: MoveRates) -> bool:
    """Whether an engine's begun requests are done sooner than they would be moved."""
    copy_s = rates.move_s(num_bytes)
    if step_s is None or copy_s is None:
        return False
    return steps_left * step_s <= (rates.rounds_s or 0.0) + copy_s
