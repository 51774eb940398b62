"""KV that moved is where the new layout looks for it: every token, every head, nothing else touched."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_flying.core.migration import (
    KVMove,
    Offer,
    lasting_capacity,
    num_units,
    place_offers,
    units_of,
    units_per_page,
)
from vllm_flying.core.topology import Group

NUM_ENGINES = 4
KV_HEADS = 4
NUM_PAGES = 40


def groups() -> list[Group]:
    return [
        tuple(range(first, first + width)) for width in (1, 2, 4) for first in range(0, NUM_ENGINES, width)
    ]


def write(pools: np.ndarray, group: Group, pages: dict[int, list[int]], k: int, blocks: int, label: int) -> None:
    """What attention in `group` writes: kernel block by kernel block, a head range per member."""
    heads = KV_HEADS // len(group)
    for rank, engine in enumerate(group):
        for block in range(blocks):
            page, place = divmod(block, k * len(group))
            for head in range(heads):
                pools[engine, pages[engine][page], place * heads + head] = (label, block, rank * heads + head)


@settings(max_examples=60)
@given(st.data())
def test_units_carry_every_token_and_head_to_its_place(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(groups()))
    target = data.draw(st.sampled_from([g for g in groups() if g != source and set(g) & set(source)]))
    k, blocks = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 11))
    skipped = data.draw(st.integers(0, blocks - 1))
    shuffle = random.Random(data.draw(st.integers(0, 99)))
    physical = {e: shuffle.sample(range(NUM_PAGES), NUM_PAGES) for e in range(NUM_ENGINES)}
    count = {group: -(-blocks // (k * len(group))) for group in (source, target)}
    pages = {
        source: {e: physical[e][: count[source]] for e in source},
        target: {e: physical[e][count[source] : count[source] + count[target]] for e in target},
    }
    before = np.full((NUM_ENGINES, NUM_PAGES, k * KV_HEADS, 3), -1)
    write(before, source, pages[source], k, blocks, label=7)
    wanted = before.copy()
    write(wanted, target, pages[target], k, blocks, label=7)
    move = KVMove(source, tuple(range(count[source])), target, tuple(range(count[target])), skipped, blocks)
    per_page = units_per_page(move.span, k)
    after = before.copy()
    view, original = (x.reshape(NUM_ENGINES, NUM_PAGES, per_page, -1, 3) for x in (after, before))
    for s in range(NUM_ENGINES):
        for t in range(NUM_ENGINES):
            units = units_of([move], k, s, t)
            assert len(units) == num_units([move], s, t)
            if len(units):
                from_pages = np.asarray(pages[source][s])[units.source_pages]
                to_pages = np.asarray(pages[target][t])[units.target_pages]
                view[t, to_pages, units.target_places] = original[s, from_pages, units.source_places]
    moved = (wanted != before).any(axis=-1) & (wanted[..., 1] >= skipped)
    assert (after[moved] == wanted[moved]).all()
    assert (after[~moved] == before[~moved]).all()


@given(st.lists(st.tuples(st.integers(1, 90), st.sampled_from(groups())), max_size=20), st.integers(10, 200))
def test_offers_go_where_there_is_room(requests: list[tuple[int, Group]], room: int) -> None:
    offers = [Offer(str(i), source, tokens, arrival_time=i) for i, (tokens, source) in enumerate(requests)]
    rooms = {(0, 1): room, (2,): room, (3,): room}
    placed, unplaced = place_offers(offers, rooms, rooms)
    seen = [offer.request_id for taken in (unplaced, *placed.values()) for offer in taken]
    assert sorted(seen) == sorted(offer.request_id for offer in offers)
    for group, taken in placed.items():
        assert sum(offer.tokens for offer in taken) < room or not taken
        assert all(set(offer.source) & set(group) for offer in taken)
    for offer in unplaced:
        reachable = [g for g in rooms if set(g) & set(offer.source)]
        assert all(sum(o.tokens for o in placed[g]) + offer.tokens >= room for g in reachable)


def test_urgent_requests_choose_first() -> None:
    offers = [Offer("late", (0,), 50, priority=0, arrival_time=2), Offer("urgent", (0,), 50, priority=-1, arrival_time=3)]
    placed, unplaced = place_offers(offers, {(0, 1): 80}, {(0, 1): 80})
    assert [o.request_id for o in placed[0, 1]] == ["urgent"] and [o.request_id for o in unplaced] == ["late"]


def test_the_fullest_engine_is_emptied_first() -> None:
    offers = [Offer(f"{engine}.{i}", (engine,), 50, arrival_time=i) for engine, count in ((0, 3), (1, 4)) for i in range(count)]
    placed, _ = place_offers(offers, {(0, 1): 201}, {(0, 1): 1000})
    assert [offer.request_id for offer in placed[0, 1]] == ["1.0", "0.0", "1.1", "0.1"]


@given(st.permutations([(0,), (0,), (0,), (1,), (1,), (1,)]))
def test_full_engines_are_emptied_in_waves_whoever_came_first(sources: list[Group]) -> None:
    """Each holds three requests of 26 pages; a page of the group is one of either, for twice the tokens."""
    tokens, pages, engine_pages = 830, 26, 127
    waiting = [Offer(str(i), source, tokens, arrival_time=i) for i, source in enumerate(sources)]
    arrived = 0
    while waiting:
        free = min(engine_pages - pages * sum(o.source == (e,) for o in waiting) for e in (0, 1)) - arrived * pages // 2
        placed, unplaced = place_offers(waiting, {(0, 1): free * 64}, {(0, 1): engine_pages * 64})
        assert placed[0, 1], "some of either engine leave, or the fuller one has no room for the others"
        arrived += len(placed[0, 1])
        waiting = unplaced


def test_what_may_outgrow_a_group_does_not_go_there() -> None:
    offers = [Offer("long", (0, 1), 50, most_tokens=150), Offer("short", (0, 1), 50, most_tokens=80)]
    room = {(0,): 90, (1,): 90}
    placed, unplaced = place_offers(offers, room, {(0,): 100, (1,): 100}, {"long"})
    assert [o.request_id for o in placed[0,]] == ["short"] and [o.request_id for o in unplaced] == ["long"]


def test_what_stays_keeps_its_pages_from_the_others() -> None:
    groups, page_tokens = {(0,): 100, (1,): 100, (2, 3): 200}, {(0,): 10, (1,): 10, (2, 3): 20}
    long = Offer("long", (0, 1), 30, pages=(1, 2, 3), most_tokens=150)
    next_long = Offer("next", (0, 1), 30, pages=(3, 4), most_tokens=80)
    wide = Offer("wide", (2,), 30, pages=(3, 4), most_tokens=200)
    assert lasting_capacity([next_long, wide], groups, page_tokens) == groups
    shrunk = {(0,): 60, (1,): 60, (2, 3): 200}
    assert lasting_capacity([long, next_long, wide], groups, page_tokens) == shrunk, "now the next one stays as well"
