"""Gaps between a request's tokens, whole and around a switch."""

from __future__ import annotations

from typing import Any, cast

import pytest

from bench.client import Timing, token_gaps
from bench.load import Clients

TOKENS = [1.0, 2.0, 2.0, 5.0, 5.5]


def test_gaps_that_reach_into_a_time() -> None:
    assert token_gaps(TOKENS) == [1.0, 0.0, 3.0, 0.5]
    assert token_gaps(TOKENS, 2.5, 3.0) == [3.0]
    assert token_gaps(TOKENS, 4.0, 5.2) == [3.0, 0.5]
    assert token_gaps(TOKENS, 6.0, 7.0) == []


def test_longest_gap_of_a_request() -> None:
    assert Timing(0.0, TOKENS).longest_gap == 3.0
    assert Timing(0.0, [1.0]).longest_gap == 0.0


def test_gaps_beyond_the_usual_one_in_a_time() -> None:
    clients = Clients(cast(Any, None), 2)
    clients.timings = [Timing(0.0, TOKENS), Timing(0.0, [1.0, 2.0, 3.0, 4.0]), Timing(9.0, [9.5, 10.5])]
    assert clients.usual_gap() == 1.0
    assert clients.gaps_beyond_usual(2.5, 0.7) == pytest.approx([2.0, 0.0])
    assert clients.gaps_beyond_usual(20.0, 5.0) == []
