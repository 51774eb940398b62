"""KV copied before a switch, while engines go on: so that it rests for what was computed since, however much there is.

Pure: no torch, no vllm, no clock. Pages that are full are never written again, so they can be copied ahead of time, a few
at a time between steps, into free pages of those who will need them. What arrives there counts as a prefix that the new
layout cached before and that stayed in place (`core.contents`): the switch finds it if it still holds, and copies the
rest. So nothing here has to be undone. What it costs, beside the copies: the switch comes some steps later, and up to half
of the free pages are out of reach until then, with the cached prefixes that were in those that are used.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_flying.core.contents import common
from vllm_flying.core.journey import Call
from vllm_flying.core.migration import Offer, place_offers
from vllm_flying.core.topology import Group, Layout

# A switch isn't put off for longer: more is copied at a time instead.
MOST_ROUNDS = 32
# Of the pages that are free at either end: requests go on meanwhile, and need some.
FREE_SHARE = 2
# Token ids travel as int32.
TOKEN_BYTES = 4


class PrecopyFailed(RuntimeError):
    """Nothing was copied ahead; everything is as it was. The text says why."""


@dataclass(frozen=True)
class Precopied:
    """What a switch finds in place."""

    requests: int = 0
    bytes: int = 0
    """That went between workers."""
    seconds: float = 0.0
    """That workers copied, steps between them left out."""
    took_s: float = 0.0
    """From the first call to the last reply, engines going on meanwhile."""

    def report(self) -> dict[str, Any]:
        """For the switch record."""
        return {"requests": self.requests, "bytes": self.bytes, "seconds": round(self.seconds, 6)}


NOTHING_COPIED = Precopied()


@dataclass
class _Target:
    """One group of the new layout, and what is copied for it."""

    group: Group
    page_tokens: int
    most_pages: int
    """Of every member, for what is copied."""
    prefixes: list[dict[str, Any]] = field(default_factory=list)
    """Requests as the target's cache takes them, cut to full pages."""
    pages: int = 0
    """Of every member, if nothing is in place."""
    missing: list[tuple[str, int, list[int]]] = field(default_factory=list)
    """Request, its first page that isn't in place, and the group's numbers for that and all that follow."""

    def take(self, prefix: dict[str, Any]) -> None:
        """Copy what a request has of full pages, as far as there is room."""
        pages = min(len(prefix["tokens"]) // TOKEN_BYTES // self.page_tokens, self.most_pages - self.pages)
        if pages:
            self.pages += pages
            self.prefixes.append({**prefix, "tokens": prefix["tokens"][: pages * self.page_tokens * TOKEN_BYTES]})

    @property
    def num_missing(self) -> int:
        return sum(len(pages) for _, _, pages in self.missing)


Rounds = Generator[list[Call], Mapping[int, Any], Precopied]
"""Gives the calls of a round, all to be made at once, and is sent the replies by engine."""


def precopy(source: Layout, target: Layout, round_bytes: int, least_bytes: int) -> Rounds:
    """Copy ahead of a migration from `source` to `target`, `round_bytes` per worker between two steps.

    It takes `MOST_ROUNDS`, however much there is. What is no more than `least_bytes` per worker in all is left to the
    switch. PrecopyFailed if it can't be done. Then, and if an engine fails, nothing needs to be undone: engines drop what is
    unsettled when they prepare for a switch, or are surveyed again.
    """
    engines = sorted(source.changed_engines(target))
    leaders = sorted({source.group_of(engine)[0] for engine in engines})
    surveys = yield [Call(engine, "precopy_survey", _places(engine, source, target)) for engine in engines]
    page_bytes = surveys[engines[0]]["page_bytes"]
    targets, offers = _targets(source, target, surveys)
    if max((each.pages for each in targets), default=0) * page_bytes <= least_bytes:
        return NOTHING_COPIED

    counts = {leader: _pages_to_reserve(source.group_of(leader), targets) for leader in leaders}
    reserved = yield [Call(leader, "precopy_reserve", {"count": count}) for leader, count in counts.items()]
    intact = {each.group: common([surveys[engine]["intact"] for engine in each.group]) for each in targets}
    plans = yield [_plan_call(engine, source, reserved, targets, offers, intact) for engine in engines]
    for each in targets:
        places = plans[each.group[0]]["places"]
        each.missing = [(p["name"], places[p["name"]]["first"], places[p["name"]]["pages"]) for p in each.prefixes]

    copied, seconds = 0, 0.0
    missing = max(each.num_missing for each in targets)
    if missing * page_bytes > least_bytes:
        most = max(1, round_bytes // page_bytes, -(-missing // MOST_ROUNDS))
        moves = [_moves(each, offers, plans, most) for each in targets]
        for number in range(max(map(len, moves))):
            now = [move for each in moves if number < len(each) for move in each[number]]
            replies = yield [Call(leader, "precopy_copy", {"moves": now}) for leader in leaders]
            if not all(reply["done"] for reply in replies.values()):
                raise PrecopyFailed("a worker could not copy; its log says why")
            seconds += max(reply["seconds"] for reply in replies.values())
        copied = sum(_bytes_between_workers(each, offers, page_bytes) for each in targets)
        checks = yield [Call(leader, "precopy_check", {}) for leader in leaders]
        valid = {request_id for reply in checks.values() for request_id in reply["valid"]}
    else:
        valid = set()  # little enough to be copied at rest
    yield [Call(e, "precopy_settle", _settlement(_target_of(e, targets), valid)) for e in engines]
    if valid:  # now that every member knows which of its pages hold
        yield [Call(each.group[0], "precopy_expect", {"valid": sorted(valid)}) for each in targets]
    return Precopied(sum(bool(pages) for each in targets for i, _, pages in each.missing if i in valid), copied, seconds)


def _places(engine: int, source: Layout, target: Layout) -> dict[str, Any]:
    return {"group": list(source.group_of(engine)), "width": len(target.group_of(engine))}


def _targets(source: Layout, target: Layout, surveys: Mapping[int, Any]) -> tuple[list[_Target], dict[str, Offer]]:
    """The groups that form, and what goes to which: as the switch will place it, if nothing changes until then."""
    offers, prefixes = {}, {}
    for engine, survey in surveys.items():
        for raw in survey["requests"]:
            fields = {key: value for key, value in raw.items() if key not in ("pages", "prefix")}
            offers[raw["request_id"]] = Offer(source=source.group_of(engine), pages=tuple(raw["pages"]), **fields)
            prefixes[raw["request_id"]] = raw["prefix"]
    groups = [group for group in target.groups if group[0] in surveys]
    targets, room, capacity = {}, {}, {}
    for group in groups:
        page_tokens = surveys[group[0]]["page_tokens"] * len(group)
        leaders = {source.group_of(engine)[0] for engine in group}
        free = min(surveys[e]["free_pages"] + surveys[source.group_of(e)[0]]["returnable_pages"] for e in group)
        room[group], capacity[group] = free * page_tokens, surveys[group[0]]["num_pages"] * page_tokens
        free_now = [surveys[e]["returnable_pages" if len(source.group_of(e)) > 1 else "free_pages"] for e in leaders]
        targets[group] = _Target(group, page_tokens, min(free_now) // FREE_SHARE)
    placed, _ = place_offers(list(offers.values()), room, capacity)
    for group, arriving in placed.items():
        for offer in arriving:
            targets[group].take(prefixes[offer.request_id])
    return list(targets.values()), offers


def _target_of(engine: int, targets: list[_Target]) -> _Target:
    return next(each for each in targets if engine in each.group)


def _pages_to_reserve(group: Group, targets: list[_Target]) -> int:
    """A page that a group gives up is one of each member: the targets inside it use the same ones."""
    return max(each.pages for each in targets if set(each.group) & set(group))


def _plan_call(
    engine: int,
    source: Layout,
    reserved: Mapping[int, Any],
    targets: list[_Target],
    offers: Mapping[str, Offer],
    intact: Mapping[Group, bytes],
) -> Call:
    group, mine = source.group_of(engine), _target_of(engine, targets)
    going = {prefix["name"] for each in targets for prefix in each.prefixes}
    arguments = {
        **reserved[group[0]],
        "intact": intact[mine.group],
        "sources": {i: list(offer.pages) for i, offer in offers.items() if offer.source == group and i in going},
        "prefixes": mine.prefixes if engine == mine.group[0] else [],
    }
    return Call(engine, "precopy_plan", arguments)


def _moves(target: _Target, offers: Mapping[str, Offer], plans: Mapping[int, Any], most: int) -> list[list[dict[str, Any]]]:
    """Per round what is copied for one group: `most` of its pages. Pages are those of each engine itself."""
    rounds: list[list[dict[str, Any]]] = [[]]
    left, taken = most, 0
    for request_id, first, pages in target.missing:
        source = offers[request_id].source
        while pages:
            count = min(left, len(pages))
            rounds[-1].append({
                "source": list(source),
                "target": list(target.group),
                "first_page": first,
                "source_pages": {str(e): _behind(first, count, target.group, source, plans[e]["sources"][request_id]) for e in source},
                "target_pages": {str(e): plans[e]["reserved"][taken : taken + count] for e in target.group},
            })  # fmt: skip
            first, pages, taken, left = first + count, pages[count:], taken + count, left - count
            if not left:
                rounds.append([])
                left = most
    return [each for each in rounds if each]


def _behind(first: int, count: int, target: Group, source: Group, pages: list[int]) -> list[int]:
    """Those of a request's pages in `source` that hold `count` of its pages in `target`, from the `first` on."""
    return pages[first * len(target) // len(source) : -(-(first + count) * len(target) // len(source))]


def _bytes_between_workers(target: _Target, offers: Mapping[str, Offer], page_bytes: int) -> int:
    """Of workers of one local rank; an engine has a share of what it needs itself."""
    width, total = len(target.group), 0
    for request_id, _, pages in target.missing:
        widths = sorted((width, len(offers[request_id].source)))
        total += len(pages) * page_bytes * width * (widths[1] - widths[0]) // widths[1]
    return total


def _settlement(target: _Target, valid: set[str]) -> dict[str, list[int]]:
    """The group's numbers for pages that hold now, and which of the reserved pages these are."""
    virtual: list[int] = []
    places: list[int] = []
    taken = 0
    for request_id, _, pages in target.missing:
        if request_id in valid:
            virtual += pages
            places += range(taken, taken + len(pages))
        taken += len(pages)
    return {"virtual": virtual, "places": places}
