"""KV copied ahead of a switch is found by it, and what became of it meanwhile is not: agents and stock schedulers.

Whatever happens, every step finds the KV that it needs (`tests.support.shadow_kv`).
"""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from tests.support.shadow_kv import ShadowServer
from tests.support.stepping import FOUR_ENGINE_LAYOUTS, PAGE_TOKENS, make_request
from vllm_flying.core.topology import Layout
from vllm_flying.scheduler.errors import SwitchRefused

DP, TP = [(0,), (1,)], [(0, 1)]
PAGES = 80
SEEDS = (0, 8, 38, 78, 80, 116, 224)
"""Among hundreds those in which one guard or another is needed."""


@pytest.fixture
def server(config: VllmConfig) -> ShadowServer:
    return ShadowServer(config, 2, PAGES)


def begin(server: ShadowServer, engines: tuple[int, ...] = (0, 1), prompt: int = 100) -> None:
    for engine in engines:
        server.send(engine, make_request("ab"[engine], prompt + 30 * engine, 60))
    server.step(4)


def copied_blocks(server: ShadowServer, groups: Any) -> int:
    """Kernel blocks that a switch copies while engines rest."""
    moves = server.switch(groups).journey.moves
    return sum(move["last_block"] - move["first_block"] for move in moves)


def check_end(server: ShadowServer) -> None:
    server.switch(DP)
    server.step(100)
    assert not server.unfinished and server.checked_tokens
    assert [engine.facade.pools[1].num_owned for engine in server.engines] == [PAGES] * len(server.engines)


@pytest.mark.parametrize("first", [DP, TP])
def test_a_switch_copies_what_is_newer_only(server: ShadowServer, first: Any) -> None:
    server.switch(first)
    begin(server, engines=(0, 1) if first is DP else (0,))
    if first is TP:
        server.send(0, make_request("b", 130, 60))
        server.step(4)
    copied = server.precopy(TP if first is DP else DP)
    assert copied.requests == 2 and copied.bytes
    server.step(3)
    assert copied_blocks(server, TP if first is DP else DP) <= 2 * 2, "each request's last pages"
    assert server.scheduled_tokens < 2 * 130 + 30, "nothing is computed again"
    check_end(server)


def test_the_newest_token_has_no_kv_yet(server: ShadowServer) -> None:
    request = server.send(0, make_request("a", 100, 60))
    server.step(4)
    (surveyed,) = server.engines[0].agent.precopy.survey([0], 2)["requests"]
    assert request.num_tokens == 104 and len(surveyed["prefix"]["tokens"]) == 4 * 103


def test_without_it_all_is_copied(server: ShadowServer) -> None:
    begin(server)
    assert copied_blocks(server, TP) >= 14


def test_engines_go_on_between_rounds(server: ShadowServer) -> None:
    begin(server)
    copied = server.precopy(TP, between=lambda operation: server.step())
    assert copied.requests == 2
    server.step()
    assert copied_blocks(server, TP) <= 4 * 2
    check_end(server)


def test_what_is_in_place_is_not_copied_again(server: ShadowServer) -> None:
    begin(server)
    first = server.precopy(TP)
    again = server.precopy(TP)
    assert first.bytes and again.bytes == 0
    assert copied_blocks(server, TP) <= 4
    check_end(server)


@pytest.mark.parametrize("first", [DP, TP])
def test_what_was_in_place_and_is_overwritten_is_copied(server: ShadowServer, first: Any) -> None:
    """The request was in the other layout before, and others had all the pages since."""
    other = TP if first is DP else DP
    server.switch(other)
    for name, prompt, output in (("s", 90, 2), ("a", 200, 60)):
        server.send(0, make_request(name, prompt, output))
        server.step(4)
    server.switch(first)
    for name in ("y", "z"):
        for engine in range(len(first)):
            half = server.engines[engine].facade.pools[len(first[engine])].num_free // 2
            server.send(engine, make_request(f"{name}{engine}", half * PAGE_TOKENS * len(first[engine]), 2))
        server.step(4)
    assert server.precopy(other).requests == 1
    assert copied_blocks(server, other) <= 4
    check_end(server)


@pytest.mark.parametrize("ends", ["abort", "preempt"])
def test_a_request_that_loses_its_pages_meanwhile_does_not_count(server: ShadowServer, ends: str) -> None:
    begin(server)

    def between(operation: str) -> None:
        if operation != "precopy_check":
            return
        if ends == "abort":
            server.abort("b")
        else:
            server.engines[1].facade.reset_prefix_cache(reset_running_requests=True)

    copied = server.precopy(TP, between=between)
    assert copied.requests == 1
    server.step(2)
    server.switch(TP)
    check_end(server)


def test_pages_that_others_need_before_the_switch_are_copied_to_again(server: ShadowServer) -> None:
    begin(server)
    assert server.precopy(TP).requests == 2
    server.send(1, make_request("z", PAGE_TOKENS * (PAGES - 11) - 4, 2))
    server.step(4)
    assert copied_blocks(server, TP) >= 14, "one member's pages were all handed out"
    check_end(server)


def test_a_reset_of_the_prefix_cache_counts_for_what_was_copied(server: ShadowServer) -> None:
    for moment in ("precopy_copy", "precopy_settle", "after"):
        begin(server)

        def reset(operation: str, moment: str = moment) -> None:
            if operation == moment:
                for engine in server.engines:
                    engine.facade.reset_prefix_cache()

        server.precopy(TP, between=reset)
        reset("after")
        assert copied_blocks(server, TP) >= 14, moment
        check_end(server)


def test_nothing_is_left_of_an_attempt_that_was_given_up(server: ShadowServer) -> None:
    begin(server)

    def fail(operation: str) -> None:
        if operation == "precopy_check":
            raise TimeoutError

    with pytest.raises(TimeoutError):
        server.precopy(TP, between=fail)
    owned = [engine.facade.pools[1].num_owned for engine in server.engines]
    assert max(owned) < PAGES, "pages are reserved"
    assert copied_blocks(server, TP) >= 14
    check_end(server)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_layouts_and_moments(four_engines: VllmConfig, seed: int) -> None:
    assert sum(copied_by_chance(four_engines, each) for each in (seed, seed + 1))


def copied_by_chance(config: VllmConfig, seed: int) -> int:
    """A server's life; returns how many requests were copied ahead of switches, if they came."""
    choose = random.Random(seed)
    server = ShadowServer(config, 4, 24)
    copied = 0
    for number in range(12):
        for name in choose.sample("abc", choose.randint(0, 3)):
            prompt = [ord(name)] * choose.randint(1, 120)  # of which others have cached something somewhere
            limits = SamplingParams(max_tokens=choose.randint(2, 60), ignore_eos=True)
            salt = choose.choice([None, None, "salt"])
            request = Request(f"{name}{number}", prompt, limits, None, cache_salt=salt)
            server.send(choose.choice(server.layout.groups)[0], request)
        server.step(choose.randint(0, 3))
        layout = choose.choice(FOUR_ENGINE_LAYOUTS)

        def between(operation: str, number: int = number) -> None:
            server.step(choose.randint(0, 2))
            if choose.random() < 0.1:
                server.abort(f"a{number}")
            if choose.random() < 0.1:  # it reaches one engine after the other
                some = choose.choice(server.engines)
                some.facade.reset_prefix_cache(reset_running_requests=choose.random() < 0.3)

        if Layout.of(layout, 4) != server.layout and choose.random() < 0.7:
            with suppress(SwitchRefused):  # others took the pages that were to be reserved
                copied += server.precopy(layout, between).requests
        if choose.random() < 0.8:
            server.switch(layout)
    for _ in range(12):  # as long as some wait for others' pages
        server.switch(FOUR_ENGINE_LAYOUTS[0], last_resort=True)
        server.step(80)
    assert not server.unfinished
    assert [engine.facade.pools[1].num_owned for engine in server.engines] == [24] * 4
    return copied
