"""A smaller run of the same over Model Runner V2, vLLM's default on GPU, here by Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.load import Load, random_prompts
from tests.support.reference import Reference
from tests.support.server import Server
from tests.support.transformers_reference import transformers_nll

pytestmark = pytest.mark.engine

PROMPTS = random_prompts(51, (9, 40))
REQUESTS = [(prompt, {"max_tokens": 12, "temperature": 0, "ignore_eos": True}) for prompt in PROMPTS]
DP, TP = [[0], [1]], [[0, 1]]


def test_switches_over_model_runner_v2(checkpoints: Path, tmp_path: Path) -> None:
    model = make_checkpoint("llama", checkpoints)
    stock = Reference(model, tmp_path, {1: {"requests": REQUESTS, "nll_prompts": [PROMPTS[1]]}})
    arguments = ("--max-model-len", "256", "--max-num-batched-tokens", "256", "--api-server-count", "1")
    with Server(model, tmp_path / "log", *arguments, model_runner_v2=True, kv_bytes=2 << 20) as server:
        assert "Using V2 Model Runner" in server.log.read_text()
        moved = 0
        with Load(server, REQUESTS, stock.result()["tokens"], clients=2) as load:
            for method in ("pause", "migrate", "migrate"):
                server.switch(TP, method=method, timeout_s=120)
                moved += server.switch(DP, method=method, timeout_s=120)["requests"]["moved"]
            assert moved > 0
            load.finish_sending()
            while not load.is_done:
                server.switch(TP, method="drain", timeout_s=120)
                server.switch(DP, method="drain", timeout_s=120)
        assert not load.problems, load.problems[:3]
        for layout in (DP, TP):
            server.switch(layout)
            nll = server.nll(PROMPTS[1])
            assert nll == pytest.approx(stock.result()["nll"][0], abs=1e-4)
            assert nll == pytest.approx(transformers_nll(model, PROMPTS[1]), abs=2e-3, rel=1e-3)
