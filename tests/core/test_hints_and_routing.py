"""Hints are never ignored silently; requests never go to a parked engine; formed groups are layouts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_topology import layouts
from vllm_flying.core.hints import VALUES, Hint, HintError, parse_hint, urgent_width
from vllm_flying.core.routing import GroupState, choose_group, deal, groups_with_width
from vllm_flying.core.topology import Layout


def test_values() -> None:
    assert parse_hint(None) == Hint("auto")
    assert parse_hint(" TP2 ") == Hint("tp2")
    for bad in ("tp3", "", 2, ["tp"]):
        with pytest.raises(HintError) as error:
            parse_hint(bad)
        assert all(value in str(error.value) for value in VALUES)


@pytest.mark.parametrize(
    ("value", "engine_tp", "width"),
    [("auto", 1, None), ("dp", 1, 1), ("throughput", 2, 1), ("tp", 1, 4), ("latency", 1, 4), ("long_context", 2, 4),
     ("tp2", 1, 2), ("tp4", 1, 4), ("tp2", 2, 1), ("tp8", 2, 4)],
)  # fmt: skip
def test_widths(value: str, engine_tp: int, width: int | None) -> None:
    assert Hint(value).width({1, 2, 4}, engine_tp) == width


def test_a_degree_that_does_not_exist_is_refused() -> None:
    with pytest.raises(HintError, match=r"\[1, 2, 4\], not 8"):
        Hint("tp8").width({1, 2, 4}, 1)


@st.composite
def group_states(draw: st.DrawFn) -> list[GroupState]:
    layout = draw(layouts(8))
    return [
        GroupState(group, draw(st.floats(0, 100)), 100 * len(group) + draw(st.integers(-50, 0))) for group in layout.groups
    ]


@given(group_states(), st.integers(0, 900), st.sampled_from([None, 1, 2, 4, 8]), st.none() | st.integers(0, 7))
def test_routes(groups: list[GroupState], tokens: int, width: int | None, pinned: int | None) -> None:
    route = choose_group(groups, tokens, width, pinned)
    candidates = [group for group in groups if pinned is None or pinned in group.engines]
    fitting = [group for group in candidates if group.kv_tokens >= tokens]
    if route is None:
        assert not fitting
        return
    assert route.group in fitting
    assert route.group.leader == route.group.engines[0]
    assert route.honoured == (width is None or len(route.group.engines) == width)
    if width is not None and any(len(group.engines) == width for group in fitting):
        assert route.honoured
    if pinned is None and width is None:
        assert all(route.group.load / len(route.group.engines) <= g.load / len(g.engines) for g in fitting)


@given(st.data(), st.sampled_from([1, 2, 4, 8]))
def test_formed_groups_are_a_layout_with_that_width(data: st.DataObject, width: int) -> None:
    before = data.draw(layouts(8))
    after = Layout.of(groups_with_width(before.groups, width, 8), 8)
    assert any(len(group) == width for group in after.groups)
    if any(len(group) == width for group in before.groups):
        assert after == before


@pytest.mark.parametrize(
    ("widths", "num_engines", "width"), [((1, 2), 2, 2), ((1, 2, 4), 4, 2), ((1, 4), 4, 4), ((1, 2, 4, 8), 8, 4)]
)
def test_an_urgent_group_leaves_engines_to_the_others(widths: tuple[int, ...], num_engines: int, width: int) -> None:
    assert urgent_width(widths, num_engines) == width


def test_fresh_requests_are_dealt_in_turn_among_those_that_can_hold_them() -> None:
    capacity = {0: 100, 1: 100, 2: 200}
    assert deal([10] * 5, [0, 1, 2], capacity) == {0: [0, 3], 1: [1, 4], 2: [2]}
    assert deal([150, 10, 10, 150, 10], [0, 1, 2], capacity) == {0: [1, 4], 1: [2], 2: [0, 3]}
    assert deal([300], [0, 1, 2], capacity) == {0: [], 1: [], 2: [0]}, "kept aside where most is"
    assert deal([], [0], {}) == {0: []}
