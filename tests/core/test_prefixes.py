"""Which cached prefixes are worth moving, and where they go."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from vllm_flying.core.prefixes import (
    ENOUGH_HITS,
    LEAST_TOKENS,
    MOST_PREFIXES,
    RECENT_S,
    HitPrefixes,
    MoveBounds,
    PrefixJourney,
    worth_moving,
)
from vllm_flying.core.pricing import MoveRates

PAGE_TOKENS = 64


def chain(path: str) -> list[bytes]:
    """Hashes of blocks that are chained as vLLM's: each stands for all up to it."""
    return [path[: end + 1].encode() for end in range(len(path))]


def hit(prefixes: HitPrefixes, now: float, path: str) -> None:
    prefixes.hit(now, list(range(len(path) + 3)), len(path), None, chain(path))


@given(st.lists(st.tuples(st.floats(0, RECENT_S), st.text("ab", min_size=1, max_size=3)), max_size=40))
def test_a_prefix_is_hot_that_was_hit_often_with_short_breaks(hits: list[tuple[float, str]]) -> None:
    prefixes, now, seen = HitPrefixes(), 0.0, dict[str, list[float]]()
    for wait_s, path in hits:
        now += wait_s
        hit(prefixes, now, path)
        seen.setdefault(path, [])
        for other, times in seen.items():
            if path.startswith(other):
                times.append(now)
    assert len(prefixes) == len(seen) <= MOST_PREFIXES

    def is_hot(times: list[float]) -> bool:
        last = [*times[-ENOUGH_HITS:], now]
        return len(times) >= ENOUGH_HITS and all(b - a <= RECENT_S for a, b in pairwise(last))

    hot = prefixes.hot(now)
    assert {prefix.hashes[-1].decode() for prefix in hot} == {path for path, times in seen.items() if is_hot(times)}
    assert [prefix.hits for prefix in hot] == sorted((prefix.hits for prefix in hot), reverse=True)
    assert not prefixes.hot(now + RECENT_S + 1)


def test_prefixes_hit_once_make_room_first_and_a_new_one_gets_its_chance() -> None:
    prefixes = HitPrefixes()
    for now in (0.0, 1.0):
        hit(prefixes, now, "system")
    for number in range(3 * MOST_PREFIXES):
        hit(prefixes, 2.0 + number / 10, chr(1000 + number))
    assert len(prefixes) == MOST_PREFIXES
    assert [prefix.length for prefix in prefixes.hot(10.0)] == [len("system")]
    for number in range(MOST_PREFIXES):
        for now in (20.0, 20.1):
            hit(prefixes, now + number, chr(2000 + number) * 2)
    assert len(prefixes.hot(36.0)) == MOST_PREFIXES and all(prefix.length == 2 for prefix in prefixes.hot(36.0))
    prefixes.forget()
    assert not prefixes.hot(36.0)


@given(
    st.lists(st.lists(st.integers(1, 30), unique=True, max_size=8), max_size=8),
    st.integers(0, 20),
    st.integers(0, 2000),
    st.sampled_from([None, 1e-6, 1e-3]),
    st.sampled_from([None, 1e-6, 1e-3]),
)
def test_what_moves_keeps_to_its_bounds_and_pays(
    prefixes: list[list[int]], most_pages: int, most_bytes: int, per_byte: float | None, prefill_s: float | None
) -> None:
    bounds = MoveBounds(most_pages, most_bytes, PAGE_TOKENS, 100, 0.5, MoveRates(None, per_byte), prefill_s)
    chosen = worth_moving(prefixes, bounds)
    pages = {page for index in chosen for page in prefixes[index]}
    assert len(pages) <= most_pages and 100 * len(pages) <= most_bytes
    assert all(len(prefixes[index]) * PAGE_TOKENS >= LEAST_TOKENS for index in chosen)
    if per_byte and prefill_s and 50 * per_byte >= PAGE_TOKENS * prefill_s:
        assert not chosen
    elif most_pages == 20 and most_bytes == 2000 and prefixes and len(prefixes[0]) >= 2:
        assert chosen[0] == 0, "the most wanted one is chosen first"


def test_a_split_brings_a_prefix_to_every_part_and_copies_count_once() -> None:
    journey = PrefixJourney()
    for engine, hits in ((0, 2), (2, 5)):
        prefix = {"name": f"p{engine}", "tokens": b"", "salt": None}
        journey.offered((engine, engine + 1), {"pages": [1, 2], "hits": hits, "prefix": prefix})
    names = {group: [prefix["name"] for prefix in journey.to_admit(group)] for group in ((0,), (1,), (2,), (0, 1, 2, 3))}
    assert names == {(0,): ["p0"], (1,): ["p0"], (2,): ["p2"], (0, 1, 2, 3): ["p2", "p0"]}
    admission = {"tokens": 64, "target_pages": [7, 8], "first_block": 0, "last_block": 4}
    (move,) = journey.admitted((0,), {"p0": admission})
    assert move == {
        "source": [0, 1], "source_pages": [1, 2], "target": [0], "target_pages": [7, 8], "first_block": 0, "last_block": 4
    }  # fmt: skip
    journey.admitted((1,), {"p0": {**admission, "tokens": 32}})
    assert journey.report() == {"moved": 1, "tokens": 64}
