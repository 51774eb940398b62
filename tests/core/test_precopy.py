"""The rounds of copies ahead of a switch: how much at a time, each page once, and what is known of it afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_flying.core.precopy import MOST_ROUNDS, PrecopyFailed, precopy
from vllm_flying.core.topology import Layout

DP, TP = Layout.of([[0], [1]], 2), Layout.of([[0, 1]], 2)
PAGE_TOKENS, PAGE_BYTES, FREE_PAGES = 4, 10, 100


def survey(requests: dict[str, int]) -> dict[str, Any]:
    """What an engine or group says that has such requests, with so many tokens each."""
    begun = [
        {"request_id": name, "tokens": tokens, "pages": list(range(1, 2 + tokens // PAGE_TOKENS)), "priority": 0,
         "arrival_time": 0.0, "most_tokens": 2 * tokens,
         "prefix": {"name": name, "tokens": np.arange(tokens, dtype=np.int32).tobytes(), "salt": None}}
        for name, tokens in requests.items()
    ]  # fmt: skip
    return {"free_pages": FREE_PAGES, "returnable_pages": FREE_PAGES, "page_tokens": PAGE_TOKENS,
            "page_bytes": PAGE_BYTES, "num_pages": 4 * FREE_PAGES, "intact": b"", "requests": begun}  # fmt: skip


class Engines:
    """Engines that have nothing in place, whose reserved pages are numbered from 1000 on."""

    def __init__(self, source: Layout, requests: list[dict[str, int]], page_tokens: int) -> None:
        self.source, self.requests, self.page_tokens = source, requests, page_tokens
        self.copied: list[dict[int, list[int]]] = []
        """Per round and engine the pages written."""
        self.settled: dict[int, Any] = {}
        self.reserved = 0
        self.gone: set[str] = set()
        """Requests that lost their pages meanwhile."""
        self.expected: list[tuple[int, list[str]]] = []

    def reply(self, engine: int, operation: str, arguments: dict[str, Any]) -> Any:
        return getattr(self, operation.removeprefix("precopy_"))(engine, **arguments)

    def survey(self, engine: int, group: list[int], width: int) -> dict[str, Any]:
        assert tuple(group) == self.source.group_of(engine) and PAGE_TOKENS * width == self.page_tokens
        return survey(self.requests[engine])

    def reserve(self, engine: int, count: int) -> dict[str, Any]:
        self.reserved = count
        return {"reserved": list(range(1000, 1000 + count)), "written": []}

    def plan(self, engine: int, reserved: list[int], sources: Any, prefixes: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        numbers = iter(range(2000, 3000))
        places = {}
        for prefix in prefixes:
            count, rest = divmod(len(prefix["tokens"]) // 4, self.page_tokens)
            assert not rest, "full pages only"
            places[prefix["name"]] = {"first": 0, "pages": [next(numbers) for _ in range(count)]}
        return {"reserved": reserved, "sources": sources, "places": places}

    def copy(self, engine: int, moves: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.copied or engine in self.copied[-1]:
            self.copied.append({})
        self.copied[-1][engine] = [page for move in moves for page in move["target_pages"].get(str(engine), [])]
        return {"done": True, "seconds": 0.5}

    def check(self, engine: int) -> dict[str, Any]:
        return {"valid": [name for name in self.requests[engine] if name not in self.gone]}

    def settle(self, engine: int, **settlement: Any) -> None:
        self.settled[engine] = settlement

    def expect(self, engine: int, valid: list[str]) -> None:
        assert len(self.settled) == 2, "members first"
        self.expected.append((engine, valid))


def run(engines: Engines, target: Layout, round_bytes: int) -> Any:
    rounds = precopy(engines.source, target, round_bytes, round_bytes)
    calls = next(rounds)
    while True:
        try:
            calls = rounds.send({call.engine: engines.reply(call.engine, call.operation, call.arguments) for call in calls})
        except StopIteration as end:
            return end.value


REQUESTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 90), max_size=4)


@given(REQUESTS, REQUESTS, st.integers(1, 60))
def test_a_merge_copies_every_full_page_once_a_few_at_a_time(one: dict[str, int], other: dict[str, int], most: int) -> None:
    renamed = {name.upper(): tokens for name, tokens in other.items()}
    engines = Engines(DP, [one, renamed], 2 * PAGE_TOKENS)
    copied = run(engines, TP, most)
    full = sum(tokens // (2 * PAGE_TOKENS) for tokens in (one | renamed).values())
    if full * PAGE_BYTES <= most:
        assert not engines.copied and not copied.requests
        return
    written = [pages[0] for pages in engines.copied]
    assert all(len(pages) * PAGE_BYTES <= max(most, PAGE_BYTES, full * PAGE_BYTES / 32 + PAGE_BYTES) for pages in written)
    assert len(written) <= MOST_ROUNDS
    done = [page for pages in written for page in pages]
    assert sorted(done) == sorted(set(done)) and len(done) <= engines.reserved <= FREE_PAGES // 2
    assert copied.seconds == 0.5 * len(written) and copied.bytes == len(done) * PAGE_BYTES
    virtual = engines.settled[0]["virtual"]
    assert len(set(virtual)) == len(done) and engines.settled[0]["places"] == list(range(len(done)))
    assert engines.settled[1] == engines.settled[0]
    if full <= FREE_PAGES // 2:
        assert len(done) == full


@given(st.lists(st.integers(8, 60), min_size=2, max_size=6))
def test_a_split_deals_requests_out_and_reserves_what_the_fuller_part_needs(tokens: list[int]) -> None:
    engines = Engines(TP, [{f"r{i}": number for i, number in enumerate(tokens)}, {}], PAGE_TOKENS)
    run(engines, DP, 1)
    written = [page for each in engines.copied for page in each[0]]
    needed = [len(engines.settled[engine]["places"]) for engine in (0, 1)]
    assert sum(needed) == sum(number // PAGE_TOKENS for number in tokens)
    assert engines.reserved == max(needed) and len(written) == needed[0]


def test_what_lost_its_pages_is_left_out() -> None:
    engines = Engines(DP, [{"a": 40, "b": 24, "c": 16}, {}], 2 * PAGE_TOKENS)
    engines.gone = {"b"}
    assert run(engines, TP, 1).requests == 2
    assert engines.settled[0] == {"virtual": [2000, 2001, 2002, 2003, 2004, 2008, 2009], "places": [0, 1, 2, 3, 4, 8, 9]}
    assert engines.expected == [(0, ["a", "c"])]


def test_a_worker_that_cannot_copy_ends_it() -> None:
    engines = Engines(DP, [{"a": 40}, {}], 2 * PAGE_TOKENS)
    engines.copy = lambda engine, moves: {"done": False, "seconds": 0.0}  # type: ignore[method-assign]
    try:
        run(engines, TP, 1)
    except PrecopyFailed as failure:
        assert "log" in str(failure)
    else:
        raise AssertionError("a failed copy counts")
    assert not engines.settled
