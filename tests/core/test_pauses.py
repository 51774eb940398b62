"""Pauses are expected from those that were seen, and none is for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.test_topology import layouts
from vllm_flying.core.pauses import CLEARLY_EXCEEDED, Pauses
from vllm_flying.core.topology import Layout

NUM_ENGINES, LIMIT_S = 4, 10.0
SEPARATE, PAIR, MERGED = (Layout.of(groups, 4) for groups in (
    [[0], [1], [2], [3]], [[0, 1], [2], [3]], [[0, 1, 2, 3]],
))  # fmt: skip


def seen(*switches: tuple[float, Layout, Layout]) -> Pauses:
    pauses = Pauses(LIMIT_S)
    for now, source, target in switches:
        pauses.switched(now, source, target)
    return pauses


def test_a_group_is_expected_back_after_as_long_as_it_was_away() -> None:
    pauses = seen((100.0, SEPARATE, PAIR))
    assert pauses.expected(101.0, PAIR, PAIR) == {}, "nothing was seen yet"
    pauses.switched(104.0, PAIR, SEPARATE)
    assert pauses.expected(110.0, SEPARATE, PAIR) == {(0,): 4.0, (1,): 4.0}
    assert pauses.expected(110.0, SEPARATE, MERGED) == {}, "of this direction nothing is known"
    assert pauses.expected(110.0, PAIR, SEPARATE) == {}, "nor of this one"
    pauses.switched(110.0, SEPARATE, PAIR)
    assert pauses.expected(111.0, PAIR, MERGED) == {(0,): 3.0, (1,): 3.0}, "those have been away for a second already"
    assert pauses.expected(115.0, PAIR, MERGED) == {}, "they should be back"


def test_the_newest_counts_and_what_is_longer_than_a_pause_may_be_is_not_chosen() -> None:
    pauses = seen((0.0, SEPARATE, PAIR), (4.0, PAIR, SEPARATE), (5.0, SEPARATE, PAIR), (11.0, PAIR, SEPARATE))
    assert 4.0 < pauses.expected(12.0, SEPARATE, PAIR)[(0,)] < 6.0
    long = seen((0.0, SEPARATE, PAIR), (LIMIT_S + 1, PAIR, SEPARATE))
    assert long.expected(20.0, SEPARATE, PAIR) == {}


def test_switches_of_another_server_teach_nothing_wrong() -> None:
    pauses = seen((0.0, SEPARATE, PAIR), (1.0, MERGED, SEPARATE))  # who merged all, and when, is unknown
    assert pauses.expected(2.0, SEPARATE, PAIR) == {}
    assert pauses.expected(2.0, PAIR, MERGED) == {}
    pauses = seen((0.0, SEPARATE, PAIR), (4.0, PAIR, SEPARATE), (5.0, SEPARATE, PAIR))
    assert pauses.expected(6.0, PAIR, PAIR).keys() == {(0,), (1,)}
    assert pauses.expected(6.0, MERGED, MERGED) == {}, "since when they are away now is unknown"


def test_who_is_left_is_fetched_when_its_layout_is_overdue_but_not_before_and_not_if_it_is_back() -> None:
    pauses = seen((0.0, SEPARATE, PAIR))
    pauses.leave(0.0, ["a", "b", "moved"], {"a": (0,), "b": (1,)}, {(0,): 2.0, (1,): 8.0})
    assert pauses.kept(3.9) == {"a", "b"} and pauses.next_due() == 4.0
    assert pauses.overdue(4.1) == {"a"}
    pauses.forget({"a"})
    assert pauses.next_due() == LIMIT_S, "twice as long would be longer than any pause may be"
    pauses.leave(5.0, ["b"], {"b": (1,)}, {(1,): 3.0})
    assert pauses.next_due() == LIMIT_S, "a further switch doesn't begin its pause anew"
    pauses.leave(5.0, ["b"], {"b": (1,)}, {})
    assert pauses.kept(6.0) == {"b"}, "left for what was expected before"
    pauses.switched(6.0, PAIR, SEPARATE)
    assert pauses.next_due() is None and not pauses.kept(6.0)


@given(st.data())
def test_no_pause_is_longer_than_the_limit_or_expected_of_a_group_that_is_there(data: st.DataObject) -> None:
    pauses, layout, now = Pauses(LIMIT_S), SEPARATE, 0.0
    began: dict[str, float] = {}
    for _ in range(data.draw(st.integers(0, 12))):
        now += data.draw(st.floats(0.01, 8.0))
        if data.draw(st.integers(0, 4)) == 0:  # another server's switch
            layout = data.draw(layouts(NUM_ENGINES))
        target = data.draw(layouts(NUM_ENGINES))
        expected = pauses.expected(now, layout, target)
        assert not expected.keys() & set(target.groups) and all(0 < s <= LIMIT_S for s in expected.values())
        pauses.switched(now, layout, target)
        layout = target
        names = {f"{group[0]}.{len(group)}": group for group in expected}
        pauses.leave(now, names, names, expected)
        for name in names:
            began.setdefault(name, now)
        began = {name: since for name, since in began.items() if name in pauses.kept(now)}
        due = pauses.next_due()
        for name, since in began.items():
            assert now - since < LIMIT_S and due is not None and due <= since + LIMIT_S + 1e-9, name
        assert pauses.kept(now + LIMIT_S) == frozenset()
        pauses.forget(pauses.overdue(now))


@pytest.mark.parametrize("expected_s", [0.5, 3.0])
def test_what_was_expected_may_take_clearly_longer(expected_s: float) -> None:
    pauses = Pauses(LIMIT_S)
    pauses.leave(0.0, ["a"], {"a": (0,)}, {(0,): expected_s})
    assert pauses.next_due() == CLEARLY_EXCEEDED * expected_s
