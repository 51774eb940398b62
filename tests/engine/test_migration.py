"""Begun requests move with their layout: nothing computed twice, no feature disturbed, no page left behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import PAGES
from tests.engine.requests import CASES, GREEDY, StockTokens
from tests.engine.requests import MOVING_PROMPTS as PROMPTS
from tests.support.background import (
    Background,
    backed_pages,
    check_workers_back_nothing,
    wait_for,
    wait_for_free_pages,
)
from tests.support.load import random_prompts
from tests.support.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.alone]

DP, TP = [[0], [1]], [[0, 1]]
SWITCHES = 100
NONE = {"finished": 0, "moved": 0, "recomputed": 0, "paused": 0}


@pytest.fixture(scope="module")
def server(two_engines: Server) -> Iterator[Server]:
    """At the end no page is kept, by schedulers (see below) or by workers."""
    yield two_engines
    check_workers_back_nothing(two_engines)


@pytest.fixture
def stock_cases(request: pytest.FixtureRequest) -> dict[str, list[list[int]]]:
    """Stock vLLM's tokens. By name: no other test here needs them, and the modules' order comes from such needs."""
    tokens: StockTokens = request.getfixturevalue("stock_tokens")
    return tokens.cases


@pytest.fixture(autouse=True)
def nothing_left(server: Server) -> Iterator[None]:
    """Every test ends with all pages free on every engine, in every layout's pool."""
    yield
    server.switch(DP, method="migrate")
    wait_for_free_pages(server, PAGES, limit_s=20)


def reset_prefixes(server: Server) -> None:
    """A route of vLLM's development mode."""
    assert server.client.post("/reset_prefix_cache").status_code == 200


def answer(server: Server, case: dict[str, Any]) -> Any:
    """What a client sees of a request, log-probabilities rounded to what fp32 gives in any layout."""
    response = server.complete(**{**GREEDY, **case})
    assert response.status_code == 200, response.text
    body = response.json()
    return [
        {
            "token_ids": choice["token_ids"],
            "text": choice["text"],
            "finish_reason": choice["finish_reason"],
            "logprobs": choice["logprobs"] and [round(x, 3) for x in choice["logprobs"]["token_logprobs"]],
            "prompt_logprobs": len(choice["prompt_logprobs"] or ()),
            "usage": body["usage"]["completion_tokens"],
        }
        for choice in body["choices"]
    ]


def close(a: Any, b: Any) -> bool:
    """Equality, but for the last digit of log-probabilities."""
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 0.002
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    return bool(a == b)


def test_every_feature_survives_random_switches_and_aborts(
    server: Server, stock_cases: dict[str, list[list[int]]]
) -> None:
    # Tokens are stock vLLM's; texts, log-probabilities and usage are this server's at rest.
    expected = {name: answer(server, case) for name, case in CASES.items()}
    tokens = {name: [choice["token_ids"] for choice in choices] for name, choices in expected.items()}
    assert tokens == stock_cases
    stop, problems, finished = threading.Event(), [], []

    def client(seed: int) -> None:
        source = random.Random(seed)
        while not stop.is_set():
            name = source.choice(list(CASES))
            got = answer(server, CASES[name])
            finished.append(name)
            if not close(got, expected[name]):
                problems.append((name, got, expected[name]))

    def leaver() -> None:
        source = random.Random(9)
        while not stop.is_set():
            stream = Background(server, source.choice(PROMPTS), 400)
            stream.wait_for_tokens()
            time.sleep(source.uniform(0.0, 0.3))
            stream.abort()
            stream.join()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)] + [threading.Thread(target=leaver)]
    for thread in threads:
        thread.start()
    source, moved, copied_ahead, recomputed = random.Random(4), 0, 0, 0
    try:
        for index in range(SWITCHES):
            method = source.choice(["migrate", "migrate", "migrate", "auto", "pause"])
            record = server.switch((TP, DP)[index % 2], method=method)
            moved += record["requests"]["moved"]
            copied_ahead += record["precopied"]["requests"]
            recomputed += record["recomputed_tokens"]
            time.sleep(source.uniform(0.0, 0.15))
        server.switch(TP, method="migrate")  # what is still paused comes along
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not problems, problems[:2]
    assert moved >= SWITCHES and copied_ahead
    assert recomputed == 0
    assert set(finished) == set(CASES)


def test_every_kind_of_request_moves_once_it_has_a_token(server: Server) -> None:
    kinds = {name: case for name, case in CASES.items() if name != "prompt logprobs"}  # these don't stream
    longer = {"max_tokens": 400, "structured_outputs": {"regex": "(ab|cd){150}"}}
    for index, (name, case) in enumerate(kinds.items()):
        options = {**GREEDY, **case, **{key: value for key, value in longer.items() if key in case}}
        stream = Background(server, options.pop("prompt"), **options)
        stream.wait_for_tokens()
        record = server.switch((TP, DP)[index % 2], method="migrate")
        assert record["requests"] == {**NONE, "moved": case.get("n", 1)}, (name, str(record))
        stream.abort()
        stream.join()


def test_no_token_is_computed_twice(server: Server) -> None:
    prompts = random_prompts(77, [40 + 7 * index for index in range(16)])
    before = server.scheduled_tokens()
    streams = [Background(server, prompt, 150) for prompt in prompts]
    for index in range(20):
        server.switch((TP, DP)[index % 2], method="migrate")
        time.sleep(0.05)
    tokens = [stream.tokens() for stream in streams]
    assert server.scheduled_tokens() - before == sum(len(prompt) + 150 - 1 for prompt in prompts)
    server.switch(DP)
    assert tokens == [server.tokens(prompt, 150) for prompt in prompts]


def test_full_engines_migrate_in_waves(server: Server) -> None:
    prompts = random_prompts(78, [800] * 6)
    # Three each: five would fill an engine, whose requests then find no room in any layout.
    ranks = [{"X-data-parallel-rank": str(index % 2)} for index in range(6)]
    streams = [Background(server, prompt, 700, extra_headers=rank) for prompt, rank in zip(prompts, ranks, strict=True)]
    for stream in streams:
        stream.wait_for_tokens()
    record = server.switch(TP, method="migrate")
    assert record["requests"] == {**NONE, "moved": 6}, str(record)
    assert record["waves"] > 1, str(record)
    back = server.switch(DP, method="migrate")
    assert back["requests"]["moved"] + back["requests"]["paused"] == 6, str(back)
    for stream in streams:
        stream.abort()
    for stream, prompt in zip(streams, prompts, strict=True):
        tokens = stream.tokens()
        assert tokens == server.tokens(prompt, len(tokens))


def test_a_switch_that_would_strand_every_request_is_undone(server: Server) -> None:
    prompts = random_prompts(80, [1300] * 6)  # 21 pages of 64 tokens each, of 127 in the merged group
    server.switch(TP)
    streams = [Background(server, prompt, 40) for prompt in prompts]
    for stream in streams:
        stream.wait_for_tokens()
    response = server.try_switch(DP, method="migrate")
    if response.status_code == 200:  # some had finished: then all must have found room
        assert response.json()["requests"]["paused"] == 0, response.text
    else:
        assert response.status_code == 500 and "finds room" in response.text, response.text
        assert response.json()["record"]["outcome"] == "rolled_back"
    tokens = [stream.tokens() for stream in streams]
    server.switch(DP, method="migrate")
    assert tokens == [server.tokens(prompt, 40) for prompt in prompts]


def test_paused_requests_are_fetched_into_the_present_layout(server: Server) -> None:
    stream = Background(server, PROMPTS[1], 300)
    stream.wait_for_tokens()
    server.switch(TP, method="pause")
    wait_for(server, "paused", 1)
    record = server.switch(TP, method="migrate")
    assert record["requests"] == {**NONE, "moved": 1}
    assert len(stream.tokens()) == 300
    assert server.status()["groups"][0]["engines"] == [0, 1]


def test_workers_back_the_pages_of_paused_requests_until_these_are_done(server: Server) -> None:
    server.switch(TP)
    stream = Background(server, PROMPTS[3], 300)
    stream.wait_for_tokens()
    assert server.switch(DP, method="pause")["requests"]["paused"] == 1
    held = server.status()["engines"][0]["pages"]["2"]
    assert held["owned"] == held["used"] > len(PROMPTS[3]) // 64
    assert backed_pages(server) == [held["owned"]] * 2
    server.switch(TP, method="pause")
    assert len(stream.tokens()) == 300
    check_workers_back_nothing(server)


def test_a_shared_prefix_is_copied_once(server: Server) -> None:
    (prefix,) = random_prompts(79, (640,))
    sizes = []
    for count in (1, 3):
        # The same engine, so that the pages are shared there too.
        headers = {"X-data-parallel-rank": "0"}
        streams = [
            Background(server, [*prefix, 5 + count, 6 + index], 800, extra_headers=headers) for index in range(count)
        ]
        for stream in streams:
            stream.wait_for_tokens()
        record = server.switch(TP, method="migrate")
        assert record["requests"]["moved"] == count, str(record)
        sizes.append(record["kv"]["bytes"] + record["precopied"]["bytes"])
        for stream in streams:
            stream.abort()
            stream.join()
        server.switch(DP, method="migrate")
        reset_prefixes(server)
    alone, three = sizes
    assert 0 < three < 2 * alone, sizes


def recomputed_tokens(server: Server) -> float:
    """The metric."""
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm_flying_recomputed_tokens_total"))


def test_requests_without_room_are_computed_again_after_a_while_and_counted(server: Server) -> None:
    prompts = random_prompts(81, [1400] * 5)
    last = 300  # so that it holds its room for longer than others wait for some
    expected = [server.tokens(prompt, 60) for prompt in prompts[:4]] + [server.tokens(prompts[4], last)]
    reset_prefixes(server)
    before, count = server.scheduled_tokens(), recomputed_tokens(server)
    ranks = [{"X-data-parallel-rank": str(index % 2)} for index in range(4)]
    streams = [Background(server, prompt, 60, extra_headers=rank) for prompt, rank in zip(prompts, ranks, strict=False)]
    for stream in streams:
        stream.wait_for_tokens()
    server.switch(TP, method="pause")
    streams.append(Background(server, prompts[4], last))
    streams[4].wait_for_tokens()
    record = server.switch(TP, method="migrate")
    assert record["requests"] == {**NONE, "paused": 4}, str(record)
    assert [stream.tokens() for stream in streams] == expected
    again = recomputed_tokens(server) - count
    assert again >= 4 * 1400
    assert server.scheduled_tokens() - before == 4 * (1400 + 60 - 1) + (1400 + last - 1) + again


def test_cached_prefixes_outlive_the_other_layout(server: Server) -> None:
    alone, wide, other = random_prompts(82, (640, 640, 320))
    headers = {"X-data-parallel-rank": "1"}
    expected = [server.tokens(prompt, 8) for prompt in (alone, wide)]
    reset_prefixes(server)

    def computed(prompt: list[int], tokens: list[int], **options: Any) -> int:
        before = server.scheduled_tokens()
        assert server.tokens(prompt, 8, **options) == tokens
        return server.scheduled_tokens() - before

    assert computed(alone, expected[0], headers=headers) == 647
    server.switch(TP)
    assert computed(wide, expected[1]) == 647
    server.switch(DP)
    assert computed(alone, expected[0], headers=headers) < 100
    server.tokens(other, 8)
    server.switch(TP)
    assert computed(wide, expected[1]) < 100
    for prompt in random_prompts(83, [1500] * 6):  # more than there are pages
        server.tokens(prompt, 8)
    server.switch(DP)
    assert computed(alone, expected[0], headers=headers) == 647


def test_a_hot_prefix_follows_although_no_request_holds_it(server: Server) -> None:
    (prefix,) = random_prompts(84, (640,))
    prompts = [[*prefix, *own] for own in random_prompts(85, [24] * 9)]
    expected = [server.tokens(prompt, 8) for prompt in prompts]
    reset_prefixes(server)

    def computed(index: int, **options: Any) -> int:
        before = server.scheduled_tokens()
        assert server.tokens(prompts[index], 8, **options) == expected[index]
        return server.scheduled_tokens() - before

    ranks = [{"headers": {"X-data-parallel-rank": str(rank)}} for rank in (0, 1)]
    assert [computed(index, **ranks[1]) for index in range(3)] == [671, 31, 31]
    merge = server.switch(TP, method="migrate")
    assert merge["requests"] == NONE and merge["kv"]["bytes"] > 0
    assert merge["prefixes"] == {"moved": 1, "tokens": 640}
    assert [computed(index) for index in (3, 4)] == [31, 31], "found, and it gives the same tokens"
    split = server.switch(DP, method="auto")
    assert split["requests"] == NONE and split["prefixes"]["moved"] == 1
    assert [computed(5, **ranks[0]), computed(6, **ranks[1])] == [31, 31]
    again = server.switch(TP, method="migrate")
    assert again["prefixes"] == {"moved": 0, "tokens": 0}, "each engine's requests hit it once since"
    assert computed(7) == 31, "it stayed in place"
