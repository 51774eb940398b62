"""Live migration: where begun requests go, and which bytes of whose pages make up their KV there.

Pure: no torch, no vllm; numpy for the index arithmetic. In a group of width `w` a page is `w * k` kernel blocks of
`kv_heads / w` heads, `k` being the kernel blocks of a page of one engine by itself. Between two widths the smallest
run of bytes that moves as a whole is one kernel block of the wider one: a *unit*. Every page, in every layout, is
`k * wider` units, so moving KV is copying units, whatever the two widths are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np

from vllm_flying.core.topology import Group


@dataclass(frozen=True)
class Offer:
    """A begun request that its engine doesn't run in the new layout. `tokens` are those with KV in `pages`."""

    request_id: str
    source: Group
    tokens: int
    pages: tuple[int, ...] = ()
    packed: bytes = b""
    state: bytes | None = None
    priority: int = 0
    arrival_time: float = 0.0
    kv_bytes: int = 0
    """Bytes of its KV, on all members of `source` together."""
    most_tokens: int = 0
    """KV tokens that a group must be able to hold to take it: see `core.lengths`."""
    recomputable: bool = False
    begins_again: bool = False
    """Its KV is of no use elsewhere: it is computed again wherever it goes."""


@dataclass(frozen=True)
class KVMove:
    """Kernel blocks `first_block` .. `last_block` - 1 of one request, from a group's pages to another group's.

    Pages are virtual: each member of the group has physical pages of its own behind them.
    """

    source: Group
    source_pages: tuple[int, ...]
    target: Group
    target_pages: tuple[int, ...]
    first_block: int
    last_block: int

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> KVMove:
        """From plain values, as they travel between processes."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**values)

    @property
    def span(self) -> Group:
        """The wider of both groups, which contains the other."""
        return max(self.source, self.target, key=len)


@dataclass(frozen=True)
class Units:
    """Units on their way between two engines, in one order on both sides: page and place in the page, at each end."""

    source_pages: np.ndarray
    source_places: np.ndarray
    target_pages: np.ndarray
    target_places: np.ndarray

    def __len__(self) -> int:
        return len(self.source_pages)


def place_offers(
    offers: Sequence[Offer], room: Mapping[Group, int], capacity: Mapping[Group, int], recomputed: Collection[str] = ()
) -> tuple[dict[Group, list[Offer]], list[Offer]]:
    """Which target group takes each offer, and the offers that none can.

    `room` is the free KV tokens of each target group, `capacity` what it will hold at most; `recomputed` requests wait
    for theirs where they go. A request goes to a group that shares an engine with its source, the emptiest by engine;
    they choose in the order of `_in_turn`. Where a request might outgrow the group it doesn't go.
    """
    left = dict(room)
    placed: dict[Group, list[Offer]] = {group: [] for group in room}
    unplaced = []
    for offer in _in_turn(offers):
        tokens = 0 if offer.request_id in recomputed else offer.tokens
        fitting = [group for group in left if left[group] > tokens and _can_hold(group, offer, capacity)]
        if not fitting:
            unplaced.append(offer)
            continue
        best = max(fitting, key=lambda group: (left[group] / len(group), -group[0]))
        left[best] -= tokens
        placed[best].append(offer)
    return placed, unplaced


def _in_turn(offers: Sequence[Offer]) -> list[Offer]:
    """Urgent ones first, of these the fullest source's, of these early ones.

    A source gets room by what leaves it, and a group has no more room than the fullest of its engines.
    """
    urgent_first = sorted(offers, key=lambda offer: (offer.priority, offer.arrival_time, offer.request_id))
    staying = dict.fromkeys((offer.source for offer in offers), 0.0)
    turns = {}
    for offer in reversed(urgent_first):  # what its source holds when its turn comes: itself and those after it
        staying[offer.source] += offer.tokens / len(offer.source)
        turns[offer.request_id] = (offer.priority, -staying[offer.source])
    return sorted(urgent_first, key=lambda offer: turns[offer.request_id])


def lasting_capacity(
    offers: Sequence[Offer],
    capacity: Mapping[Group, int],
    page_tokens: Mapping[Group, int],
    left: Collection[str] = (),
) -> dict[Group, int]:
    """KV tokens of each target group once all offers that some group can hold have left their pages.

    `capacity` counts all pages of the members, `page_tokens` the tokens of a page there. Other offers keep their pages,
    and so do those that are `left` where they are.
    """
    lasting = dict(capacity)
    while True:
        staying = [
            offer
            for offer in offers
            if offer.request_id in left or not any(_can_hold(group, offer, lasting) for group in lasting)
        ]
        held = {group: max(_pages_held(staying, member) for member in group) for group in lasting}
        shrunk = {group: capacity[group] - held[group] * page_tokens[group] for group in lasting}
        if shrunk == lasting:
            return lasting
        lasting = shrunk


def _can_hold(group: Group, offer: Offer, capacity: Mapping[Group, int]) -> bool:
    return bool(set(group) & set(offer.source)) and capacity[group] >= offer.most_tokens


def _pages_held(offers: Sequence[Offer], engine: int) -> int:
    return len({(offer.source, page) for offer in offers if engine in offer.source for page in offer.pages})


def units_per_page(span: Group, kernel_blocks: int) -> int:
    """Units that every page has when KV moves inside `span`. `kernel_blocks` is those of a page at width 1."""
    return kernel_blocks * len(span)


def alike(moves: Sequence[KVMove]) -> list[list[KVMove]]:
    """Moves by their two groups, in one order for all who have the same moves: such are looked at together."""
    by_groups: dict[tuple[Group, Group], list[KVMove]] = {}
    for move in moves:
        by_groups.setdefault((move.source, move.target), []).append(move)
    return list(by_groups.values())


def num_units(moves: Sequence[KVMove], source_engine: int, target_engine: int) -> int:
    """How many units of `moves`, which are alike, go from one engine to another."""
    blocks = sum(move.last_block - move.first_block for move in moves)
    return blocks * len(_shared_heads(moves[0], source_engine, target_engine))


def units_of(moves: Sequence[KVMove], kernel_blocks: int, source_engine: int, target_engine: int) -> Units:
    """The units of `moves`, which are alike, that go from one engine to another.

    Ordered by move, then by kernel block, then by head range.
    """
    heads = np.asarray(_shared_heads(moves[0], source_engine, target_engine), dtype=np.int64)
    wider = len(moves[0].span)
    ends = []
    for group, all_pages in (
        (moves[0].source, [move.source_pages for move in moves]),
        (moves[0].target, [move.target_pages for move in moves]),
    ):
        blocks_per_page = kernel_blocks * len(group)
        heads_per_block = wider // len(group)
        # Kernel blocks counted through the pages of all moves, one after the other.
        begins = accumulate((len(pages) * blocks_per_page for pages in all_pages), initial=0)
        blocks = [np.arange(begin + m.first_block, begin + m.last_block) for begin, m in zip(begins, moves)]
        block = np.repeat(np.concatenate(blocks), len(heads))
        head = np.tile(heads, sum(map(len, blocks)))
        numbers = np.fromiter(chain.from_iterable(all_pages), dtype=np.int64)
        ends.append(numbers[block // blocks_per_page])
        ends.append((block % blocks_per_page) * heads_per_block + head % heads_per_block)
    return Units(*ends)


def _shared_heads(move: KVMove, source_engine: int, target_engine: int) -> range:
    """Head ranges, each one of `len(span)` equal parts, that the source has and the target wants."""
    wider = len(move.span)

    def held(group: Group, engine: int) -> range:
        if engine not in group:
            return range(0)
        each = wider // len(group)
        first = group.index(engine) * each
        return range(first, first + each)

    source, target = held(move.source, source_engine), held(move.target, target_engine)
    return range(max(source.start, target.start), min(source.stop, target.stop))
