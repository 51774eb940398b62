"""A request is placed where it can't outgrow the group, unless its limit says nothing."""

from __future__ import annotations

import pytest

from vllm_flying.core.lengths import granted_tokens, kv_tokens_expected, kv_tokens_needed


@pytest.mark.parametrize(
    ("num_tokens", "prompt", "max_tokens", "needed", "expected"),
    [
        (100, 100, 50, 150, 150),
        (140, 100, 50, 150, 150),
        (100, 100, 900, 101, 189),
        (400, 100, 900, 401, 564),
        (990, 100, 5000, 991, 1000),
    ],
)
def test_lengths(num_tokens: int, prompt: int, max_tokens: int, needed: int, expected: int) -> None:
    assert kv_tokens_needed(num_tokens, prompt, max_tokens, 1000) == needed
    assert kv_tokens_expected(num_tokens, prompt, max_tokens, 1000) == expected


def test_a_group_grants_what_it_holds_and_a_wider_one_more() -> None:
    assert [granted_tokens(100, 900, kv) for kv in (400, 800, 2000)] == [300, 700, 900]
