"""The controller looks often while something changes, and seldom otherwise."""

from __future__ import annotations

from vllm_flying.controller.lookout import Lookout


def looks(lookout: Lookout, requests: list[int], began: float = 0.0) -> list[float]:
    """Times of looks, four a second at most, while these many requests are there."""
    times = (began + 0.25 * index for index in range(len(requests)))
    return [time for time, count in zip(times, requests, strict=True) if lookout.is_due(time, count)]


def test_quiet_times_are_looked_at_once_a_second() -> None:
    assert looks(Lookout(restless=False), [1, 2, 0, 3, 1, 1, 2, 0, 1]) == [0.0, 1.0, 2.0]


def test_a_burst_is_seen_at_once_and_so_is_its_end() -> None:
    lookout = Lookout(restless=False)
    assert looks(lookout, [1, 1, 5, 9, 14, 14, 14, 14]) == [0.0, 0.5, 0.75, 1.0]
    assert looks(lookout, [14, 12, 9, 4, 4], began=2.0) == [2.0, 2.5, 2.75]


def test_what_is_open_is_watched() -> None:
    assert looks(Lookout(restless=True), [1, 1, 1, 1]) == [0.0, 0.25, 0.5, 0.75]
