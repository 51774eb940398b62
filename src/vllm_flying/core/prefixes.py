"""Cached prefixes that are worth it follow a switch: which these are, and their way into the new layout.

Pure: no torch, no vllm, no clock. A prefix that no begun request holds travels beside them: it has tokens and pages, but
no client. It is a guess about requests to come, so it never costs a begun one its place: it takes free room that
nobody needs, comes last, and is dropped first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_flying.core.pricing import MoveRates
from vllm_flying.core.topology import Group

# Prefixes remembered per layout: system prompts are few, and every admitted request is compared to all of them.
MOST_PREFIXES = 16
# A prefix is hot that was hit so often, each time within so many seconds of the last: once may be a coincidence.
ENOUGH_HITS = 2
RECENT_S = 60.0
# Shorter ones are computed in the step that the rest of a prompt needs anyway.
LEAST_TOKENS = 128
# Of free pages, at either end: the others may be needed, or hold cached prefixes too.
FREE_SHARE = 4


@dataclass
class HitPrefix:
    """A prefix that requests found cached. `tokens` are a prompt's that begins with it."""

    tokens: Sequence[int]
    length: int
    salt: str | None
    hashes: Sequence[bytes]
    """Of its blocks, in its layout; the last one stands for all of it, salt included."""
    hits: int = 0
    last_hit: float = 0.0

    def hit(self, now: float) -> None:
        """A request found it."""
        self.hits = self.hits + 1 if now - self.last_hit <= RECENT_S else 1
        self.last_hit = now

    def is_hot(self, now: float) -> bool:
        """Whether others are likely to ask for it soon."""
        return self.hits >= ENOUGH_HITS and now - self.last_hit <= RECENT_S

    def begins(self, hashes: Sequence[bytes]) -> bool:
        """Whether the prefix with these hashes begins with this one."""
        count = len(self.hashes)
        return count <= len(hashes) and hashes[count - 1] == self.hashes[-1]


class HitPrefixes:
    """The prefixes hit in one layout, a few of them. Those hit once, and then those hit longest ago, make room."""

    def __init__(self) -> None:
        self._prefixes: dict[bytes, HitPrefix] = {}

    def __len__(self) -> int:
        return len(self._prefixes)

    def hit(self, now: float, tokens: Sequence[int], length: int, salt: str | None, hashes: Sequence[bytes]) -> None:
        """A request found `length` of its tokens cached, whose blocks have `hashes`. So it found their beginnings."""
        last = hashes[-1]
        if last not in self._prefixes:
            self._prefixes[last] = HitPrefix(tokens, length, salt, tuple(hashes))
        for prefix in self._prefixes.values():
            if prefix.begins(hashes):
                prefix.hit(now)
        if len(self._prefixes) > MOST_PREFIXES:
            others = [key for key in self._prefixes if key != last]
            del self._prefixes[min(others, key=lambda k: (self._prefixes[k].is_hot(now), self._prefixes[k].last_hit))]

    def hot(self, now: float) -> list[HitPrefix]:
        """Those worth moving, the most wanted first."""
        hot = [prefix for prefix in self._prefixes.values() if prefix.is_hot(now)]
        return sorted(hot, key=lambda prefix: (-prefix.hits, -prefix.length))

    def forget(self) -> None:
        """The cache was reset."""
        self._prefixes.clear()


@dataclass(frozen=True)
class MoveBounds:
    """What limits the prefixes that leave one layout of one engine."""

    most_pages: int
    most_bytes: int
    page_tokens: int
    page_bytes: int
    """On all members of the group together."""
    travelling: float = 1.0
    """The share of these that leaves its engine."""
    rates: MoveRates = field(default_factory=MoveRates)
    prefill_s: float | None = None
    """Seconds per prompt token in the new layout, if known."""

    def is_cheaper_moved(self, pages: int) -> bool:
        """Where a price isn't known yet, prefixes move, as requests do."""
        move_s = self.rates.move_s(pages * self.page_bytes * self.travelling)
        if move_s is None or self.prefill_s is None:
            return True
        return move_s < pages * self.page_tokens * self.prefill_s


def worth_moving(prefixes: Sequence[Sequence[int]], bounds: MoveBounds) -> list[int]:
    """Which of the prefixes, given by their cached pages, the most wanted first, are moved. A shared page counts once."""
    chosen, taken = [], set[int]()
    for index, pages in enumerate(prefixes):
        more = set(pages) - taken
        if not more or len(pages) * bounds.page_tokens < LEAST_TOKENS or not bounds.is_cheaper_moved(len(more)):
            continue
        total = len(taken) + len(more)
        if total <= bounds.most_pages and total * bounds.page_bytes <= bounds.most_bytes:
            taken |= more
            chosen.append(index)
    return chosen


@dataclass(frozen=True)
class PrefixOffer:
    """A cached prefix whose pages its engine holds until the switch is decided."""

    source: Group
    pages: tuple[int, ...]
    hits: int
    prefix: dict[str, Any]
    """What the target needs to cache it: its name, token ids and salt."""


@dataclass
class PrefixJourney:
    """The prefixes of one switch on their way."""

    offers: dict[str, PrefixOffer] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    """Name -> tokens copied into a new layout, the most where there are several."""

    def offered(self, source: Group, raw: Mapping[str, Any]) -> None:
        """A source offers one."""
        offer = PrefixOffer(source, tuple(raw["pages"]), raw["hits"], raw["prefix"])
        self.offers[offer.prefix["name"]] = offer

    def to_admit(self, group: Group) -> list[dict[str, Any]]:
        """What a target group is asked to take, the most wanted first: whatever comes from one of its members.

        Where a group splits, every part gets its prefixes: they are wanted wherever requests go.
        """
        near = [offer for offer in self.offers.values() if set(group) & set(offer.source)]
        return [offer.prefix for offer in sorted(near, key=lambda offer: -offer.hits)]

    def admitted(self, group: Group, reply: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """The copies to make for what a target group has pages for."""
        moves = []
        for name, admission in reply.items():
            offer = self.offers[name]
            places = {key: admission[key] for key in ("target_pages", "first_block", "last_block")}
            move = {"source": list(offer.source), "source_pages": list(offer.pages), "target": list(group)}
            moves.append({**move, **places})
            self.moved[name] = max(self.moved.get(name, 0), admission["tokens"])
        return moves

    def report(self) -> dict[str, int]:
        """For the switch record."""
        return {"moved": len(self.moved), "tokens": sum(self.moved.values())}
