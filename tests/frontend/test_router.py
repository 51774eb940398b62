"""The router leaves requests to vLLM's balancing, unless a merged group, a hint or a served prefix says otherwise."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core_client import DPLBAsyncMPClient

from vllm_flying.core.affinity import PrefixAffinity
from vllm_flying.core.hints import HINT_KEY
from vllm_flying.core.topology import Layout
from vllm_flying.frontend.board import BoardGroup, BoardState, LayoutBoard
from vllm_flying.frontend.router import Router, router_of
from vllm_flying.frontend.runtime import VARIABLE
from vllm_flying.settings import Settings

ENGINES = [b"0", b"1", b"2", b"3"]
PROMPT = list(range(200))


class Server:
    """A router over engines that exist only as loads."""

    def __init__(
        self, directory: Path, affinity: PrefixAffinity | None, policy: str = "manual", on_hint: str = "form"
    ) -> None:
        self.client = SimpleNamespace(
            core_engines=ENGINES, client_count=1, engine_inflight=Counter(), lb_engines=[[0, 0, 0.0] for _ in ENGINES]
        )
        self.router = Router(self.client, Settings(num_engines=4, policy=policy, on_hint=on_hint), 4096, affinity)
        self._board = LayoutBoard(directory)
        self._epoch = 0
        self.announce([[0], [1], [2], [3]])

    def announce(self, groups: list[list[int]], kv_tokens: int = 1000) -> None:
        self._epoch += 1
        board_groups = tuple(BoardGroup(tuple(group), kv_tokens * len(group)) for group in groups)
        self._board.publish(BoardState(self._epoch, 1, board_groups))

    def send(self, prompt: list[int] | None = PROMPT, pinned: int | None = None, **fields: Any) -> int | None:
        """The engine that the router names for a request; where it names none, vLLM is made to choose engine 3."""
        params = SimpleNamespace(max_tokens=8, extra_args={HINT_KEY: fields["hint"]} if "hint" in fields else None)
        request = SimpleNamespace(
            prompt_token_ids=prompt, sampling_params=params, data_parallel_rank=pinned, cache_salt=fields.get("salt"),
            priority=fields.get("priority", 0),
        )
        prefix = self.router.route(request)
        engine: int | None = request.data_parallel_rank
        self.router.record(ENGINES[3 if engine is None else engine], prefix)
        return engine


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return Server(tmp_path, PrefixAffinity())


def test_only_a_known_beginning_is_pinned_while_engines_are_apart(server: Server) -> None:
    assert server.send() is None, "vLLM's own balancing"
    assert server.send() == 3, "which chose engine 3"
    assert server.send([*PROMPT[:128], 1, 2, 3]) == 3
    assert server.send(list(range(1, 200))) is None
    assert server.send(PROMPT[:60]) is None, "shorter than a chunk"
    assert server.send(None) is None, "a prompt of embeddings"
    assert server.send(salt="other") is None


def test_a_busy_engine_gets_no_more_for_the_sake_of_its_cache(server: Server) -> None:
    server.send()
    server.client.lb_engines[3] = [1, 1, 0.0]
    assert server.send() == 3
    server.client.lb_engines[3] = [1, 2, 0.0]
    assert server.send() is None


def test_a_request_that_names_its_engine_goes_there_and_is_remembered(server: Server) -> None:
    server.send()
    assert server.send(pinned=1) == 1
    server.client.lb_engines[3] = [0, 1, 0.0]
    assert server.send() == 1


def test_an_engine_without_room_is_not_pinned(server: Server) -> None:
    server.send()
    server.announce([[0], [1], [2], [3]], kv_tokens=100)
    assert server.send() is None


def test_merged_groups_take_what_they_and_their_members_served(server: Server) -> None:
    server.send()
    server.announce([[0, 1], [2, 3]])
    assert server.send() == 2, "engine 3 is parked, 2 leads it"
    assert server.send(list(range(1, 200))) == 0
    server.announce([[0], [1], [2, 3]])
    assert server.send(hint="dp") == 0, "the width that was asked for comes first"


def test_without_affinity_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    server = Server(tmp_path, None)
    assert [server.send(), server.send()] == [None, None]
    server.announce([[0, 1], [2, 3]])
    assert [server.send(), server.send()] == [0, 0]


@pytest.mark.parametrize(
    ("setting", "caching", "remembers"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_affinity_needs_the_setting_and_prefix_caching(
    setting: bool, caching: bool, remembers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    config = SimpleNamespace(
        additional_config={"flying": {"prefix_affinity": setting}},
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
        model_config=SimpleNamespace(max_model_len=4096),
    )
    router = router_of(DPLBAsyncMPClient.__new__(DPLBAsyncMPClient), config)
    assert router is not None and (router._affinity is not None) == remembers


@pytest.mark.parametrize(("policy", "leader"), [("priority", 2), ("auto", 2), ("manual", 0)])
def test_urgent_requests_go_to_the_group_that_was_formed_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, leader: int
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    server = Server(tmp_path, None, policy)
    server.announce([[0], [1], [2, 3]])
    server.client.lb_engines[2] = [9, 9, 0.0]
    assert server.send(priority=-1) == leader
    assert server.send(priority=-1, hint="dp") == 0, "the hint says more"
    assert server.send(priority=1) == 0


def test_streaming_input_sessions_are_refused(server: Server) -> None:
    chunk = SimpleNamespace(
        resumable=True, prompt_token_ids=PROMPT, sampling_params=SimpleNamespace(max_tokens=8, extra_args=None),
        data_parallel_rank=None, priority=0,
    )
    with pytest.raises(VLLMValidationError, match="Streaming-input sessions are not supported"):
        asyncio.run(server.router.admit(chunk))
    chunk.resumable = False
    asyncio.run(server.router.admit(chunk))


def hinted(hint: object) -> SimpleNamespace:
    """A request of the Python API: its hint is in SamplingParams.extra_args."""
    params = SamplingParams(max_tokens=8, extra_args={HINT_KEY: hint})
    return SimpleNamespace(
        resumable=False, prompt_token_ids=PROMPT, sampling_params=params, data_parallel_rank=None, priority=0, cache_salt=None
    )


@pytest.mark.parametrize(("hint", "text"), [("fast", "allowed: auto, dp, tp"), (2, "is 2"), ("tp8", r"\[1, 2, 4\], not 8")])
def test_a_bad_hint_in_extra_args_is_refused_with_the_values(server: Server, hint: object, text: str) -> None:
    with pytest.raises(VLLMValidationError, match=text):
        asyncio.run(server.router.admit(hinted(hint)))


@pytest.mark.parametrize(("on_hint", "formed"), [("form", [(0, 1), (2,), (3,)]), ("best_effort", [(0,), (1,), (2,), (3,)])])
def test_a_group_is_formed_for_a_hint_unless_it_is_to_run_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_hint: str, formed: list[tuple[int, ...]]
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    server = Server(tmp_path, None, on_hint=on_hint)

    async def switch(target: Layout, method: str, timeout_s: float, reason: str, precopy_from: int | None) -> None:
        assert reason == "hint for width 2" and precopy_from is None
        server.announce(target.to_lists())

    monkeypatch.setattr(server.router.switcher, "switch", switch)
    asyncio.run(server.router.admit(request := hinted("tp2")))
    assert [group.engines for group in LayoutBoard(tmp_path).read().groups] == formed
    server.router.route(request)
    assert request.data_parallel_rank == 0


def test_a_limit_that_only_fills_the_context_is_met_by_the_largest_group(server: Server) -> None:
    server.announce([[0], [1], [2, 3]])
    params = SimpleNamespace(max_tokens=4096 - len(PROMPT), extra_args=None)
    chat = SimpleNamespace(
        prompt_token_ids=PROMPT, sampling_params=params, data_parallel_rank=None, cache_salt=None, priority=0
    )
    server.router.route(chat)
    assert chat.data_parallel_rank == 2
    assert params.max_tokens == 4096 - len(PROMPT), "the engine grants what its group holds at the time"


@pytest.mark.parametrize("pauses_end", [True, False])
def test_nobody_is_refused_for_pages_of_requests_that_are_only_left_paused(
    server: Server, monkeypatch: pytest.MonkeyPatch, pauses_end: bool
) -> None:
    async def end_pauses() -> bool:
        server.announce([[0, 1], [2, 3]], kv_tokens=1000 if pauses_end else 100)
        return True

    server.announce([[0, 1], [2, 3]], kv_tokens=50)
    monkeypatch.setattr(server.router.switcher, "end_pauses", end_pauses)
    params = SimpleNamespace(max_tokens=8, extra_args=None)
    request = SimpleNamespace(
        resumable=False, prompt_token_ids=PROMPT, sampling_params=params, data_parallel_rank=None, priority=0
    )
    if pauses_end:
        asyncio.run(server.router.admit(request))
    else:
        with pytest.raises(VLLMValidationError, match="208 tokens"):
            asyncio.run(server.router.admit(request))
