"""The begun requests of one switch on their way into the new layout: what each phase asks of whom.

Pure: no torch, no vllm. Filled by the transaction with the engines' replies, phase by phase: offers come with the
move, leaders admit them and name their pages, workers copy the KV, sources let go, and pages that became free so are
lent to the new groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from vllm_flying.core.contents import common
from vllm_flying.core.migration import Offer, lasting_capacity, place_offers
from vllm_flying.core.pauses import Pausing
from vllm_flying.core.prefixes import PrefixJourney
from vllm_flying.core.pricing import MoveRates, Price, Ways, choose_ways
from vllm_flying.core.topology import Group, Layout, aligned_group


@dataclass(frozen=True)
class Call:
    """One call to one engine's agent."""

    engine: int
    operation: str
    arguments: dict[str, Any]


@dataclass
class Journey:
    """State of a migration. Without offers no phase of it has a call."""

    epoch: int
    target: Layout
    rates: MoveRates | None = None
    """To price moving by; without, what can move does."""
    last_resort: bool = False
    """Requests for which there is no room are computed again, where they can be at all."""
    pausing: Pausing = field(default_factory=Pausing)
    offers: dict[str, Offer] = field(default_factory=dict)
    immovable: int = 0
    """Begun requests that only their own layout can run."""
    room: dict[Group, int] = field(default_factory=dict)
    """Free KV tokens of the target groups."""
    capacity: dict[Group, int] = field(default_factory=dict)
    """KV tokens of all their members' pages, but for pages that requests keep which have to stay."""
    page_tokens: dict[Group, int] = field(default_factory=dict)
    largest_aside: int = 0
    """KV tokens of the largest request that waits for the new layout."""
    prefill_s: dict[Group, float | None] = field(default_factory=dict)
    """Seconds per prompt token there, if known."""
    recomputed: set[str] = field(default_factory=set)
    """Requests that arrive without their KV."""
    left: set[str] = field(default_factory=set)
    """Requests that stay paused because it costs least."""
    without_room: set[str] = field(default_factory=set)
    """Requests that are recomputed as a last resort."""
    moves: list[dict[str, Any]] = field(default_factory=list)
    arrived: dict[str, int] = field(default_factory=dict)
    """Request -> leader of the group that admitted it."""
    gone: set[str] = field(default_factory=set)
    """Aborted at their source meanwhile."""
    bytes_moved: int = 0
    seconds: float = 0.0
    prefixes: PrefixJourney = field(default_factory=PrefixJourney)
    """Cached prefixes that come along."""
    intact: dict[Group, list[bytes]] = field(default_factory=dict)
    """Per merged group what its members say: bitmaps of the group's pages that hold what it wrote before."""
    _free: dict[int, int] = field(default_factory=dict)
    _returned: dict[int, dict[int, list[int]]] = field(default_factory=dict)

    @property
    def unplaced(self) -> int:
        """Requests that wait, paused, for room in the new layout."""
        return len(self.offers) - len(self.left) - len(self.arrived)

    @property
    def staying(self) -> int:
        """Requests that stay paused: those, what only its own layout can run, and what is left paused for its price."""
        return self.unplaced + self.immovable + len(self.left)

    @property
    def recomputed_tokens(self) -> int:
        """Tokens whose KV was given up; fewer are computed again if the new layout has a prefix cached."""
        return sum(self.offers[i].tokens for i in self.recomputed & self.arrived.keys())

    def moved(self, engine: int, reply: dict[str, Any]) -> None:
        """An engine is in its new group: what it offers, and the room it has if it leads."""
        self.immovable += reply["staying"]
        for raw in reply["offers"]:
            source = aligned_group(engine, raw["width"])
            fields = {key: value for key, value in raw.items() if key not in ("width", "pages")}
            self.offers[raw["request_id"]] = Offer(source=source, pages=tuple(raw["pages"]), **fields)
        for raw in reply.get("prefixes", ()):
            self.prefixes.offered(aligned_group(engine, raw["width"]), raw)
        group = self.target.group_of(engine)
        self.intact.setdefault(group, []).append(reply["intact"])
        if engine == group[0]:
            self.room[group] = reply["free_tokens"]
            self.capacity[group] = reply["capacity_tokens"]
            self.page_tokens[group] = reply["page_tokens"]
            self.prefill_s[group] = reply["prefill_s"]

    def admissions(self, groups: Sequence[Group]) -> list[Call]:
        """Offers to the leaders that have room for them, prefixes to all that share an engine with theirs."""
        begin_again = {offer.request_id for offer in self.offers.values() if offer.begins_again}
        ways, kept = self._ways(), self.offers.keys() & self.pausing.kept
        placed, unplaced, capacity = self._place(groups, ways.recomputed | begin_again, ways.paused | kept)
        if ways.paused - kept and (unplaced or self._is_too_small(capacity)):  # the pages that these hold are missed
            placed, unplaced, capacity = self._place(groups, ways.recomputed | begin_again, kept)
        self.capacity = capacity
        if self.last_resort:
            for offer in unplaced:
                self._place_anew(offer, placed)
        prefixes = {group: self.prefixes.to_admit(group) for group in placed}
        return [
            Call(
                group[0],
                "admit",
                {
                    "epoch": self.epoch,
                    "packed": [offer.packed for offer in offers],
                    "recomputed": [o.request_id for o in offers if o.request_id in self.recomputed],
                    "intact": self._intact(group),
                    "capacity": self.capacity[group],
                    "prefixes": prefixes[group],
                },
            )
            for group, offers in placed.items()
            if offers or prefixes[group]
        ]

    def _place(
        self, groups: Sequence[Group], recomputed: Set[str], left: Set[str]
    ) -> tuple[dict[Group, list[Offer]], list[Offer], dict[Group, int]]:
        self.recomputed, self.left = set(recomputed - left), set(left)
        offers = list(self.offers.values())
        capacity = lasting_capacity(offers, self.capacity, self.page_tokens, left)
        room = {group: self.room[group] for group in groups}
        moving = [offer for offer in offers if offer.request_id not in left]
        return *place_offers(moving, room, capacity, self.recomputed), capacity

    def _is_too_small(self, capacity: Mapping[Group, int]) -> bool:
        """Whether no group holds the largest request that waits, though one could."""
        return max(capacity.values()) < min(self.largest_aside, max(self.capacity.values()))

    def _ways(self) -> Ways:
        if self.rates is None:
            return Ways()
        known = [seconds for seconds in self.prefill_s.values() if seconds is not None]
        prices = {}
        for offer in self.offers.values():
            wide, narrow = self._widths(offer)
            move_s = self.rates.move_s(offer.kv_bytes * (wide - narrow) / wide)
            anew = max(known) * offer.tokens if known and offer.recomputable else None
            pause_s = self.pausing.price(offer.source, offer.priority)
            prices[offer.request_id] = Price(move_s, anew, pause_s)
        return choose_ways(prices, self.rates.rounds_s)

    def _widths(self, offer: Offer) -> tuple[int, int]:
        here = len(offer.source)
        there = max(len(self.target.group_of(engine)) for engine in offer.source)
        return max(here, there), min(here, there)

    def _place_anew(self, offer: Offer, placed: dict[Group, list[Offer]]) -> None:
        """Let a request begin again in the group that can hold it and has least to do."""
        able = [g for g in placed if set(g) & set(offer.source) and self.capacity[g] >= offer.most_tokens]
        if able and offer.recomputable:
            self.recomputed.add(offer.request_id)
            self.without_room.add(offer.request_id)
            placed[min(able, key=lambda group: (len(placed[group]) / len(group), group))].append(offer)

    def admitted(self, leader: int, reply: dict[str, Any]) -> None:
        """A leader has pages for these requests and prefixes."""
        for request_id, admission in reply["admitted"].items():
            offer = self.offers[request_id]
            self.arrived[request_id] = leader
            if admission["last_block"] > admission["first_block"]:
                move = {"source": list(offer.source), "source_pages": list(offer.pages)}
                self.moves.append({**move, "target": list(self.target.group_of(leader)), **admission})
        self.moves += self.prefixes.admitted(self.target.group_of(leader), reply.get("prefixes", {}))

    def transfers(self, groups: Sequence[Group]) -> list[Call]:
        """Copy the KV: every group's workers, at once, since they meet in collectives."""
        if not self.arrived and not self.moves:
            return []
        calls = []
        for group in groups:
            states = {i: self.offers[i].state for i, leader in self.arrived.items() if leader == group[0]}
            known = {i: state for i, state in states.items() if state is not None}
            calls.append(Call(group[0], "transfer", {"epoch": self.epoch, "moves": self.moves, "states": known}))
        return calls

    def transferred(self, reply: dict[str, Any]) -> None:
        """A group's workers are done."""
        self.bytes_moved += reply["bytes"]
        self.seconds = max(self.seconds, reply["seconds"])

    def releases(self, engines: Sequence[int]) -> list[Call]:
        """Sources let go of what arrived elsewhere, and of pages that nobody holds; all workers forget it."""
        forget: dict[int, list[str]] = {}
        own: dict[int, dict[int, list[str]]] = {}
        for request_id in self.arrived:
            source = self.offers[request_id].source
            forget.setdefault(len(source), []).append(request_id)
            own.setdefault(source[0], {}).setdefault(len(source), []).append(request_id)
        return [
            Call(e, "release", {"epoch": self.epoch, "departed": own.get(e, {}), "forget": forget}) for e in engines
        ]

    def released(self, engine: int, reply: dict[str, Any]) -> None:
        """A source's requests and pages are free; pages of a former group go back to all its members."""
        self.gone.update(reply["gone"])
        self._free[engine] = reply["free_pages"]
        for width, pages in reply["reclaimed"].items():
            for member in aligned_group(engine, int(width)):
                self._returned.setdefault(member, {}).setdefault(int(width), []).extend(pages)

    def outcome(self, engine: int) -> dict[str, Any]:
        """What the commit tells an engine about the migration."""
        group = self.target.group_of(engine)
        returned = self._returned.get(engine, {})
        return {
            "gone": sorted(self.gone),
            "returned": returned,
            "extend": self._extension(group),
            "intact": self._intact(group),
            "capacity": {group[0]: tokens for group, tokens in self.capacity.items()},
        }

    def _intact(self, group: Group) -> bytes:
        return common(self.intact.get(group, [])) if len(group) > 1 else b""

    def _extension(self, group: Group) -> int:
        if len(group) == 1 or not all(member in self._free for member in group):
            return 0
        returned = {m: sum(len(pages) for pages in self._returned.get(m, {}).values()) for m in group}
        return min(self._free[member] + returned[member] for member in group)

    def extensions(self, committed: dict[int, dict[str, Any]]) -> list[Call]:
        """Tell the leaders of merged groups what every member lent at the commit."""
        calls = []
        for group in self.target.groups:
            if committed.keys() >= set(group) and self._extension(group) > 0:
                lent = {str(member): committed[member]["lent"][1] for member in group}
                virtual = committed[group[0]]["lent"][0]
                calls.append(Call(group[0], "extend", {"epoch": self.epoch, "virtual": virtual, "physical": lent}))
        return calls

    def reasons(self) -> dict[str, dict[str, int]]:
        """For the switch record: why requests didn't move. `need`: nothing else could be done."""
        recomputed = self.recomputed & self.arrived.keys()
        need = {i for i in recomputed if self.offers[i].begins_again} - self.without_room
        room = len(recomputed & self.without_room)
        return {
            "recomputed": {"price": len(recomputed) - len(need) - room, "room": room, "need": len(need)},
            "paused": {"price": len(self.left), "room": self.unplaced, "need": self.immovable},
        }

    def report(self) -> dict[str, Any]:
        """For the switch record."""
        rate = self.bytes_moved / self.seconds if self.seconds else 0.0
        return {"bytes": self.bytes_moved, "seconds": round(self.seconds, 6), "bytes_per_s": round(rate)}
