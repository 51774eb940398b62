"""Two engines: every request feature in both layouts, pauses, aborts, hints, limits and the HTTP API."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.engine.conftest import PAGES
from tests.engine.requests import GREEDY, PROMPTS, SAMPLING, StockTokens
from tests.support.background import Background, check_workers_back_nothing, wait_for, wait_for_free_pages
from tests.support.load import random_prompts
from tests.support.reference import Reference
from tests.support.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.alone]

DP, TP = [[0], [1]], [[0, 1]]
LAYOUTS = {"dp": DP, "tp": TP}
ONE_ENGINE_TOKENS = PAGES * 32


@pytest.fixture(scope="module")
def expected(stock_tokens: StockTokens) -> list[list[int]]:
    return stock_tokens.sampling


@pytest.fixture(scope="module")
def server(stock: Reference, two_engines: Server) -> Iterator[Server]:
    """At the end no page is kept, by schedulers (see below) or by workers."""
    yield two_engines
    check_workers_back_nothing(two_engines)


@pytest.fixture(autouse=True)
def nothing_left(server: Server) -> Iterator[None]:
    """Every test ends with all pages free on every engine, in every layout's pool."""
    yield
    server.switch(DP, method="drain")
    wait_for_free_pages(server, PAGES, limit_s=10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampling_options_give_stock_tokens(server: Server, expected: list[list[int]], layout: str) -> None:
    server.switch(LAYOUTS[layout])
    for (prompt, options), tokens in zip(SAMPLING, expected, strict=True):
        assert server.tokens(prompt, **options) == tokens, options


def test_logprobs_agree_between_layouts(server: Server) -> None:
    seen = []
    for groups in LAYOUTS.values():
        server.switch(groups)
        choice = server.complete(PROMPTS[0], 10, logprobs=3).json()["choices"][0]
        seen.append(choice["logprobs"]["token_logprobs"])
    assert seen[0] == pytest.approx(seen[1], abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_features(server: Server, layout: str) -> None:
    server.switch(LAYOUTS[layout])
    choices = server.complete("hello", 8, n=3, temperature=0.9, seed=5).json()["choices"]
    assert len({tuple(choice["token_ids"]) for choice in choices}) > 1
    whole = server.complete("hello", 20).json()["choices"][0]["text"]
    stop = whole[6:9]
    stopped = server.complete("hello", 20, stop=[stop]).json()["choices"][0]
    assert stopped["finish_reason"] == "stop" and stopped["text"] == whole[: whole.index(stop)]
    chosen = server.complete("hello", 20, ignore_eos=False, structured_outputs={"choice": ["alpha", "beta"]})
    assert chosen.json()["choices"][0]["text"] in ("alpha", "beta"), chosen.text
    body = {"model": server.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "stream": True,
            "temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}  # fmt: skip
    with server.client.stream("POST", "/v1/chat/completions", json=body) as stream:
        layout_header = stream.headers["x-flying-layout"]
        lines = stream.read().split(b"\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert layout_header.startswith("tp1; engines=" if layout == "dp" else "tp2; engines=0,1")
    assert chunks[-1]["usage"]["completion_tokens"] == 12


def test_paused_requests_resume_without_recomputing(server: Server, expected: list[list[int]]) -> None:
    before = server.scheduled_tokens()
    # One for each engine, too long to be done before the switch.
    requests = [(PROMPTS[index], 700 + index) for index in range(2)]
    paused = [
        Background(server, prompt, tokens, extra_headers={"X-data-parallel-rank": str(engine)})
        for engine, (prompt, tokens) in enumerate(requests)
    ]
    for request in paused:
        request.wait_for_tokens()
    record = server.switch(TP, method="pause")
    assert record["requests"]["paused"] == 2, str(record)
    wait_for(server, "paused", 2)
    assert server.tokens(PROMPTS[0], 40) == expected[0][:40]
    server.switch(DP, method="pause")
    for request, (prompt, _) in zip(paused, requests, strict=True):
        assert request.tokens()[:40] == expected[PROMPTS.index(prompt)][:40]
    computed = server.scheduled_tokens() - before
    # Prompts that were cached before cost less.
    needed = sum(len(prompt) + tokens - 1 for prompt, tokens in [*requests, (PROMPTS[0], 40)])
    assert computed <= needed, "tokens were computed twice"


def test_an_aborted_paused_request_frees_its_pages(server: Server) -> None:
    body = {"model": server.model, "prompt": PROMPTS[2], "max_tokens": 600, "stream": True, **GREEDY}
    streams = [server.client.stream("POST", "/v1/completions", json=body) for _ in range(2)]
    lines = [stream.__enter__().iter_lines() for stream in streams]
    for line in lines:  # kept: an iterator that goes away closes its response
        next(line)
    server.switch(TP, method="pause")
    wait_for(server, "paused", 2)
    for stream in streams:
        stream.__exit__(None, None, None)
    wait_for(server, "paused", 0)


def test_a_prompt_larger_than_an_engine_runs_when_merged(server: Server) -> None:
    (prompt,) = random_prompts(5, (ONE_ENGINE_TOKENS + 100,))
    for options in ({}, {"n": 2, "temperature": 0.5}):
        refused = server.complete(prompt, 8, **options)
        assert refused.status_code == 400
        assert str(len(prompt) + 8) in refused.text and str(ONE_ENGINE_TOKENS) in refused.text, refused.text
    server.switch(TP)
    merged = server.status()["groups"][0]["kv_tokens_capacity"]
    assert merged >= 0.95 * 2 * ONE_ENGINE_TOKENS
    assert len(server.tokens(prompt, 8)) == 8


def test_hints_form_the_group_they_ask_for(server: Server, expected: list[list[int]]) -> None:
    prompt = PROMPTS[0]
    ways: list[tuple[str, dict[str, Any]]] = [
        ("tp2; engines=0,1", {"parallelism_hint": "tp"}),
        ("tp1; engines=", {"vllm_xargs": {"parallelism_hint": "dp"}}),
        ("tp2; engines=0,1", {"headers": {"X-Parallelism-Hint": "latency"}}),
        ("tp2; engines=0,1", {"parallelism_hint": "auto"}),
        ("tp1; engines=", {"parallelism_hint": "throughput"}),
        ("tp1; engines=", {"service_tier": "priority"}),
        ("tp1; engines=", {"service_tier": "flex"}),
    ]
    for layout, hint in ways:
        response = server.complete(prompt, 40, **hint)
        assert response.headers["x-flying-layout"].startswith(layout)
        assert response.json()["choices"][0]["token_ids"] == expected[0]
    for layout, value in (("tp2; engines=0,1", "tp"), ("tp1; engines=", "dp")):
        response = server.complete(prompt, 8, n=2, temperature=0.5, parallelism_hint=value)
        assert response.headers["x-flying-layout"].startswith(layout)
        assert len(response.json()["choices"]) == 2
    body = {"model": server.model, "input": "hello", "max_output_tokens": 8, "temperature": 0}
    for layout, value in (("tp2; engines=0,1", "tp"), ("tp1; engines=", "dp")):
        response = server.client.post("/v1/responses", json={**body, "parallelism_hint": value})
        assert response.status_code == 200, response.text
        assert response.headers["x-flying-layout"].startswith(layout)
        assert response.json()["usage"]["output_tokens"] > 0
    refused = server.client.post("/v1/responses", json={**body, "parallelism_hint": "fast"})
    assert refused.status_code == 400 and "auto, dp, tp, tp2" in refused.text
    for bad, text in (("fast", "auto, dp, tp, tp2"), ("tp4", "[1, 2]")):
        response = server.complete(prompt, 4, parallelism_hint=bad)
        assert response.status_code == 400 and text in response.text
    response = server.complete(prompt, 4, parallelism_hint="tp", headers={"X-Parallelism-Hint": "dp"})
    assert response.status_code == 400 and "different hints" in response.text


def test_members_of_a_group_sample_the_same_tokens_without_a_seed(server: Server) -> None:
    """Each samples by itself; if one took another token, its part of the KV would be that of another answer."""
    sampled = {"temperature": 0.9, "logprobs": 1}
    answers = []
    for history in range(3):
        for engine, requests in ((0, 1 + history), (1, 3)):
            for _ in range(requests):
                server.tokens(PROMPTS[0], 5, temperature=0.9, headers={"X-data-parallel-rank": str(engine)})
        server.switch(TP)
        for prompt in PROMPTS:
            choice = server.complete(prompt, 30, **sampled).json()["choices"][0]
            answers.append((prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"]))
        server.switch(DP)
    for prompt, tokens, logprobs in answers:
        forced = server.nll([*prompt, *tokens])[len(prompt) - 1 :]
        assert [-value for value in logprobs] == pytest.approx(forced, abs=1e-3)
    assert len({tuple(tokens) for _, tokens, _ in answers}) == len(answers), "nothing was drawn"


def test_one_switch_at_a_time_and_a_time_limit(server: Server) -> None:
    request = Background(server, PROMPTS[1], 800)
    request.wait_for_tokens()
    answers: list[httpx.Response] = []
    draining = threading.Thread(target=lambda: answers.append(server.try_switch(TP, method="drain", timeout_s=1.0)))
    draining.start()
    time.sleep(0.3)
    assert server.try_switch(TP).status_code == 409
    assert "switching" in {engine["state"] for engine in server.status()["engines"]}
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/metrics").status_code == 200
    draining.join()
    assert answers[0].status_code == 504
    record = answers[0].json()["record"]
    assert record["outcome"] == "rolled_back" and "time limit of 1 s" in record["error"]
    status = server.status()
    assert [engine["state"] for engine in status["engines"]] == ["serving", "serving"]
    assert status["last_switch"] == record
    assert len(request.tokens()) == 800


@pytest.mark.parametrize(
    ("groups", "text"), [([[0, 1], [1]], "overlap"), ([[0]], "no group"), ([[1, 0]], "ascending"), ([[0, 1, 2]], "3 engines")]
)
def test_layouts_that_can_not_be_are_refused(server: Server, groups: list[list[int]], text: str) -> None:
    response = server.try_switch(groups)
    assert response.status_code == 422 and text in response.text


def test_the_routes_are_guarded_by_the_api_key(server: Server) -> None:
    for method, path in (("GET", "status"), ("POST", "switch"), ("GET", "memory")):
        response = httpx.request(method, f"{server.url}/plugins/flying/{path}")
        assert response.status_code == 401
    assert server.try_switch(DP, method="nonsense").status_code == 422
