"""Layouts are partitions into aligned power-of-two ranges, and ranks nest."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flying.core.topology import (
    Layout,
    LayoutError,
    available_widths,
    group_world_ranks,
    groups_of_width,
    tensor_parallel_rank,
    world_rank,
)

SIZES = st.sampled_from([1, 2, 4, 8, 16])


@st.composite
def layouts(draw: st.DrawFn, num_engines: int) -> Layout:
    """Any valid layout: split ranges in halves at random."""

    def split(first: int, width: int) -> list[list[int]]:
        if width > 1 and draw(st.booleans()):
            return split(first, width // 2) + split(first + width // 2, width // 2)
        return [list(range(first, first + width))]

    return Layout.of(split(0, num_engines), num_engines)


@given(st.data(), SIZES)
def test_every_engine_is_in_exactly_one_group(data: st.DataObject, num_engines: int) -> None:
    layout = data.draw(layouts(num_engines))
    named = [engine for group in layout.groups for engine in group]
    assert sorted(named) == list(range(num_engines))
    for group in layout.groups:
        assert group[0] % len(group) == 0
        assert all(layout.group_of(engine) == group for engine in group)


@given(st.data(), SIZES)
def test_a_layout_does_not_change_into_itself(data: st.DataObject, num_engines: int) -> None:
    layout = data.draw(layouts(num_engines))
    assert layout.changed_engines(layout) == ()
    other = data.draw(layouts(num_engines))
    changed = set(layout.changed_engines(other))
    assert changed == set(other.changed_engines(layout))
    for group in other.groups:
        # A group changes as a whole or not at all.
        assert changed.isdisjoint(group) or changed.issuperset(group)


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ([[0, 1, 2], [3]], "3 engines"),
        ([[1, 2], [0], [3]], "aligned"),
        ([[0, 1], [1], [2], [3]], "overlap"),
        ([[0, 1], [2]], r"engines \[3\] are in no group"),
        ([[0, 2], [1], [3]], "ascending range"),
        ([[0, 1], [2, 3], [4, 5]], "outside"),
        ([[], [0, 1], [2, 3]], "empty"),
    ],
)
def test_what_is_no_layout_is_refused_by_name(groups: list[list[int]], text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        Layout.of(groups, 4)


@given(SIZES, st.sampled_from([1, 2, 4]))
def test_world_ranks_are_a_permutation_and_groups_keep_their_order(num_engines: int, engine_tp: int) -> None:
    ranks = {world_rank(e, local, num_engines) for e in range(num_engines) for local in range(engine_tp)}
    assert ranks == set(range(num_engines * engine_tp))
    for width in (1, *available_widths(num_engines)):
        for group in groups_of_width(width, num_engines):
            listed = group_world_ranks(group, engine_tp, num_engines)
            assert listed == sorted(listed), "torch sorts the ranks of a group: ours must be sorted already"
            for engine in group:
                for local in range(engine_tp):
                    rank = tensor_parallel_rank(group, engine, local)
                    assert listed[rank] == world_rank(engine, local, num_engines)
                    # The resident shard `local` of engine_tp contains shard `rank` of the group.
                    assert rank // width == local


def test_widths_that_do_not_divide_are_refused() -> None:
    assert available_widths(6) == (2,)
    assert available_widths(8, [2, 8]) == (2, 8)
    with pytest.raises(LayoutError, match=r"\[3\]"):
        available_widths(8, [3])
