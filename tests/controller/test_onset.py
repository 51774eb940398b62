"""When a burst most likely began, and what has come per second since then."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flying.controller.onset import LOOKED_BACK_S, Onset

LOOK_S = 0.25


def rates(arrivals: list[int], usual_rate: float, average: float = 0.0) -> list[float]:
    """The rate after every look, so many requests having come since the last one."""
    onset, added, seen = Onset(), 0, []
    for look, new in enumerate(arrivals):
        added += new
        onset.update(look * LOOK_S, added, usual_rate)
        seen.append(onset.rate(average))
    return seen


@pytest.mark.parametrize("burst", [4, 8, 20])
def test_from_half_a_second_on_the_rate_is_that_of_the_burst(burst: int) -> None:
    """Of the stretches that begin with the burst or later, the longest one is the least like chance."""
    quiet = [1, 0, 0, 0] * 8
    seen = rates([*quiet, *[burst] * 16], usual_rate=1.0)[len(quiet) :]
    assert seen[1:] == pytest.approx([burst / LOOK_S] * 15)


def test_it_is_over_once_fewer_come_than_on_average() -> None:
    seen = rates([0] * 8 + [5] * 8 + [0] * 8, usual_rate=1.0, average=12.0)
    assert min(seen[10:15]) > 0.0 and seen[-5:] == [0.0] * 5


def test_before_there_is_a_stretch_nothing_is_known() -> None:
    assert rates([7, 7], usual_rate=1.0) == [0.0, 0.0]


def test_after_a_long_rest_the_stretch_begins_with_it() -> None:
    """In quiet times looks are rare."""
    onset = Onset()
    onset.update(0.0, 0, usual_rate=0.1)
    onset.update(20.0, 2, usual_rate=0.1)
    assert onset.rate(0.1) == 0.1
    onset.update(20.5, 12, usual_rate=0.1)
    assert onset.rate(0.1) == 20.0


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.floats(0.0, 50.0))
def test_it_is_the_rate_of_some_stretch_that_was_looked_back_on(arrivals: list[int], usual_rate: float) -> None:
    got = rates(arrivals, usual_rate)[-1]
    longest = int(LOOKED_BACK_S / LOOK_S)
    possible = [sum(arrivals[-looks:]) / (looks * LOOK_S) for looks in range(2, min(longest, len(arrivals) - 1) + 1)]
    assert got == 0.0 or any(got == pytest.approx(rate) for rate in possible)
