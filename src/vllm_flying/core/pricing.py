"""What becomes of begun requests at a switch with the method `auto`: finish, move, or be computed again.

Pure. Each way is priced in seconds of delay: finishing by the steps that are left, moving by the KV's bytes over the
rate seen so far, recomputing by the tokens over the prefill rate of the new layout. What isn't known yet isn't chosen:
until something was measured, requests move.
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
        per_byte = kv["seconds"] / kv["bytes"] if kv["bytes"] else None
        return MoveRates(_blend(self.rounds_s, rounds), _blend(self.seconds_per_byte, per_byte))

    def move_s(self, num_bytes: float) -> float | None:
        """Seconds to copy so much; the rounds apart."""
        return None if self.seconds_per_byte is None else num_bytes * self.seconds_per_byte


def _blend(old: float | None, new: float | None) -> float | None:
    if old is None or new is None:
        return new if old is None else old
    return old + FRESH * (new - old)


@dataclass(frozen=True)
class Price:
    """Seconds for one request; None where nothing is known."""

    move_s: float | None
    recompute_s: float | None


def to_recompute(prices: Mapping[str, Price], rounds_s: float | None) -> set[str]:
    """Requests that are computed again sooner than they move. The rounds are saved only if nothing moves at all."""
    cheaper = {
        request_id
        for request_id, price in prices.items()
        if price.move_s is not None and price.recompute_s is not None and price.recompute_s < price.move_s
    }
    known = [price.recompute_s for price in prices.values() if price.recompute_s is not None]
    moves = [price.move_s or 0.0 for price in prices.values()]
    if rounds_s is not None and len(known) == len(prices) and sum(known) < rounds_s + sum(moves):
        return set(prices)
    return cheaper


def finishing_pays(steps_left: int, step_s: float | None, num_bytes: float, rates: MoveRates) -> bool:
    """Whether an engine's begun requests are done sooner than they would be moved."""
    copy_s = rates.move_s(num_bytes)
    if step_s is None or copy_s is None:
        return False
    return steps_left * step_s <= (rates.rounds_s or 0.0) + copy_s
