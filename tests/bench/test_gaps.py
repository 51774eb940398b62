"""Gaps between a request's tokens, whole and around a switch."""

from __future__ import annotations

from bench.client import Timing, token_gaps

TOKENS = [1.0, 2.0, 2.0, 5.0, 5.5]


def test_gaps_that_reach_into_a_time() -> None:
    assert token_gaps(TOKENS) == [1.0, 0.0, 3.0, 0.5]
    assert token_gaps(TOKENS, 2.5, 3.0) == [3.0]
    assert token_gaps(TOKENS, 4.0, 5.2) == [3.0, 0.5]
    assert token_gaps(TOKENS, 6.0, 7.0) == []


def test_longest_gap_of_a_request() -> None:
    assert Timing(0.0, TOKENS).longest_gap == 3.0
    assert Timing(0.0, [1.0]).longest_gap == 0.0
