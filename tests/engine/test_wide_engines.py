"""Engines that are tensor parallel themselves: two engines of two workers, alone (TP 2) and merged (TP 4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.load import random_prompts
from tests.support.server import Server
from tests.support.transformers_reference import transformers_nll

pytestmark = pytest.mark.engine

PROMPTS = random_prompts(41, (30, 75))


def test_two_engines_of_two_workers(checkpoints: Path, tmp_path: Path) -> None:
    model = make_checkpoint("mistral", checkpoints)
    arguments = ("--max-model-len", "1024", "--api-server-count", "1", "--tensor-parallel-size", "2")
    with Server(model, tmp_path / "log", *arguments, workers_per_engine=2) as server:
        alone = [server.nll(prompt) for prompt in PROMPTS]
        tokens = [server.tokens(prompt, 15) for prompt in PROMPTS]
        for prompt, nll in zip(PROMPTS, alone, strict=True):
            assert nll == pytest.approx(transformers_nll(model, prompt), abs=2e-3, rel=1e-3)
        record = server.switch([[0, 1]])
        assert sorted((proof["tp_size"], proof["tp_rank"]) for proof in record["proof"]) == [(4, r) for r in range(4)]
        assert server.status()["groups"][0]["layout"]["tp"] == 4
        for prompt, nll, expected in zip(PROMPTS, alone, tokens, strict=True):
            assert server.nll(prompt) == pytest.approx(nll, abs=1e-4, rel=1e-5)
            response = server.complete(prompt, 15)
            assert response.headers["x-flying-layout"] == "tp4; engines=0,1"
            assert response.json()["choices"][0]["token_ids"] == expected
        server.switch([[0], [1]])
        assert [server.tokens(prompt, 15) for prompt in PROMPTS] == tokens
