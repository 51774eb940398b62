"""Requests go where their beginning was served, never at the price of room, width or balance."""

from __future__ import annotations

from functools import partial

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.test_hints_and_routing import group_states
from tests.core.test_topology import layouts
from vllm_flying.core.affinity import CHUNK_TOKENS, MOST_CHUNKS, Prefix, PrefixAffinity, prefix_keys
from vllm_flying.core.routing import GroupState, candidates, choose_group
from vllm_flying.core.topology import Layout

SLACK = 2.0


def prompt(*chunks: int, rest: int = 0) -> list[int]:
    """A prompt of full chunks, the same for the same number, and `rest` tokens."""
    return [token for chunk in chunks for token in [chunk] * CHUNK_TOKENS] + [9] * rest


def keys(*chunks: int) -> Prefix:
    return prefix_keys(prompt(*chunks))


def groups_of(layout: Layout, *loads: float) -> list[GroupState]:
    return [GroupState(group, load, 1000) for group, load in zip(layout.groups, loads, strict=True)]


beginnings = st.lists(st.integers(0, 2), max_size=4).map(lambda chunks: keys(*chunks))
histories = st.lists(st.tuples(beginnings, st.integers(0, 7)), max_size=12)


def after(history: list[tuple[Prefix, int]]) -> PrefixAffinity:
    affinity = PrefixAffinity(slack=SLACK)
    for prefix, engine in history:
        affinity.remember(prefix, engine)
    return affinity


@given(st.lists(st.integers(0, 2), max_size=5), st.lists(st.integers(0, 2), max_size=5), st.integers(0, 63))
def test_two_prompts_share_a_key_for_every_full_chunk_they_begin_with(one: list[int], two: list[int], rest: int) -> None:
    common = next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))
    first, second = prefix_keys(prompt(*one, rest=rest)), keys(*two)
    assert (len(first), len(second)) == (len(one), len(two)), "what fills no chunk has no key"
    assert first[:common] == second[:common]
    assert not set(first[common:]) & set(second[common:])


def test_long_prompts_have_so_many_keys_and_other_salts_have_others() -> None:
    assert len(keys(*range(MOST_CHUNKS + 5))) == MOST_CHUNKS
    assert not set(prefix_keys(prompt(1, 2), "a")) & set(prefix_keys(prompt(1, 2), "b"))


@given(histories, st.integers(0, 6))
def test_the_size_is_bounded_and_what_was_used_last_is_kept(history: list[tuple[Prefix, int]], most: int) -> None:
    affinity = PrefixAffinity(most_entries=most)
    for prefix, engine in history:
        affinity.remember(prefix, engine)
        assert len(affinity) <= most
        if prefix and most:
            assert affinity.preferred([GroupState((engine,), 0, 1)], prefix[:most]) is not None
            assert affinity.preferred([GroupState((engine,), 0, 1)], prefix[:1]) is not None, "the part most others share"


@settings(max_examples=300)
@given(group_states(), histories, beginnings, st.integers(0, 900), st.sampled_from([None, 1, 2, 4, 8]))
def test_the_longest_match_within_the_bounds_is_preferred(
    groups: list[GroupState], history: list[tuple[Prefix, int]], prefix: Prefix, tokens: int, width: int | None
) -> None:
    affinity = after(history)
    possible = candidates(groups, tokens, width)
    least = min((group.load / len(group.engines) for group in possible), default=0)

    def match(group: GroupState) -> int:
        served = {key for keys_, engine in history if engine in group.engines for key in keys_}
        return sum(key in served for key in prefix)

    near = [group for group in possible if group.load / len(group.engines) <= least + SLACK]
    chosen = affinity.preferred(possible, prefix)
    if chosen is None:
        assert not any(match(group) for group in near)
    else:
        assert chosen in near and tokens <= chosen.kv_tokens
        assert match(chosen) == max(match(group) for group in near) > 0
    route = choose_group(groups, tokens, width, prefer=partial(affinity.preferred, prefix=prefix))
    assert (route is None) == (not possible)
    if route is not None:
        plain = choose_group(groups, tokens, width)
        assert plain is not None and route.honoured == plain.honoured
        assert route.group == (chosen or plain.group)


def test_a_conversation_stays_and_what_all_begin_with_spreads() -> None:
    apart = Layout.separate(2)
    affinity = after([(keys(1, 2), 0), (keys(1, 3), 1)])
    busier = groups_of(apart, 2, 0)
    chosen = affinity.preferred(busier, keys(1, 2, 5))
    assert chosen is not None and chosen.leader == 0, "the conversation's own engine"
    chosen = affinity.preferred(busier, keys(1, 4))
    assert chosen is not None and chosen.leader == 1, "both know the beginning, one has less to do"
    chosen = affinity.preferred(groups_of(apart, 3, 0), keys(1, 2, 5))
    assert chosen is not None and chosen.leader == 1, "too much to do: the next best match"
    assert affinity.preferred(groups_of(apart, 0, 0), keys(7)) is None


def test_the_load_of_wide_groups_counts_per_engine() -> None:
    mixed = Layout.of([[0, 1], [2], [3]], 4)
    affinity = after([(keys(1), 0)])
    chosen = affinity.preferred(groups_of(mixed, 4, 0, 0), keys(1))
    assert chosen is not None and chosen.engines == (0, 1)
    assert affinity.preferred(groups_of(mixed, 5, 0, 0), keys(1)) is None


@given(histories, layouts(8))
def test_what_a_member_served_its_group_knows(history: list[tuple[Prefix, int]], layout: Layout) -> None:
    affinity = after(history)
    for prefix, _ in history:
        chosen = affinity.preferred(groups_of(layout, *[0.0] * len(layout.groups)), prefix)
        assert (chosen is None) == (not prefix)
        if chosen is not None:
            assert any(engine in chosen.engines for served, engine in history if set(served) & set(prefix))
