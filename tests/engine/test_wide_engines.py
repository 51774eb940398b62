"""Engines that are tensor parallel themselves: two engines of two workers, alone (TP 2) and merged (TP 4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.background import Background, wait_for_free_pages
from tests.support.checkpoints import make_checkpoint
from tests.support.load import random_prompts
from tests.support.server import Server
from tests.support.transformers_reference import transformers_nll

pytestmark = pytest.mark.engine

DP, TP = [[0], [1]], [[0, 1]]
PROMPTS = random_prompts(41, (30, 75))
STREAMED = random_prompts(42, (40, 66, 90))
STREAMED_TOKENS = 300


def test_two_engines_of_two_workers(checkpoints: Path, tmp_path: Path) -> None:
    model = make_checkpoint("mistral", checkpoints)
    arguments = ("--max-model-len", "1024", "--api-server-count", "1", "--tensor-parallel-size", "2")
    with Server(model, tmp_path / "log", *arguments, workers_per_engine=2) as server:
        alone = [server.nll(prompt) for prompt in PROMPTS]
        tokens = [server.tokens(prompt, 15) for prompt in PROMPTS]
        for prompt, nll in zip(PROMPTS, alone, strict=True):
            assert nll == pytest.approx(transformers_nll(model, prompt), abs=2e-3, rel=1e-3)
        record = server.switch(TP)
        assert sorted((proof["tp_size"], proof["tp_rank"]) for proof in record["proof"]) == [(4, r) for r in range(4)]
        assert server.status()["groups"][0]["layout"]["tp"] == 4
        for prompt, nll, expected in zip(PROMPTS, alone, tokens, strict=True):
            assert server.nll(prompt) == pytest.approx(nll, abs=1e-4, rel=1e-5)
            response = server.complete(prompt, 15)
            assert response.headers["x-flying-layout"] == "tp4; engines=0,1"
            assert response.json()["choices"][0]["token_ids"] == expected
        server.switch(DP)
        assert [server.tokens(prompt, 15) for prompt in PROMPTS] == tokens
        check_switches_under_streams(server)


def check_switches_under_streams(server: Server) -> None:
    """Begun requests are moved and paused between engines of several workers each; nothing is computed twice."""
    owned = server.status()["engines"][0]["pages"]["1"]["owned"]
    before = server.scheduled_tokens()
    streams = [Background(server, prompt, STREAMED_TOKENS) for prompt in STREAMED]
    for stream in streams:
        stream.wait_for_tokens()
    for groups, method, what in ((TP, "migrate", "moved"), (DP, "migrate", "moved"), (TP, "pause", "paused")):
        record = server.switch(groups, method=method)
        assert record["requests"][what] == len(streams), str(record)
    assert server.switch(DP, method="pause")["outcome"] == "committed"  # which lets them go on
    record = server.switch(TP, method="migrate")
    assert record["requests"]["moved"] == len(streams), str(record)
    tokens = [stream.tokens() for stream in streams]
    assert server.scheduled_tokens() - before == sum(len(prompt) + STREAMED_TOKENS - 1 for prompt in STREAMED)
    server.switch(DP)
    assert tokens == [server.tokens(prompt, STREAMED_TOKENS) for prompt in STREAMED]
    wait_for_free_pages(server, owned, limit_s=10)
