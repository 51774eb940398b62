"""What becomes of requests at switches: agents and stock schedulers of two engines, without workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.config import VllmConfig

from tests.support.checkpoints import make_checkpoint
from tests.support.stepping import SteppedServer, make_config, make_request

DP, TP = [(0,), (1,)], [(0, 1)]
PAGES = 10
"""Of 16 tokens, per engine."""


@pytest.fixture(scope="module")
def config(checkpoints: Path) -> VllmConfig:
    return make_config(make_checkpoint("llama", checkpoints), num_engines=2)


@pytest.fixture
def server(config: VllmConfig) -> SteppedServer:
    return SteppedServer(config, 2, PAGES)


def test_a_half_computed_prompt_that_begins_again_has_begun(server: SteppedServer) -> None:
    server.switch(TP)
    wide = server.engines[0].facade.schedulers[2]
    wide.max_num_scheduled_tokens, wide.use_v2_model_runner = 40, True
    request = make_request("r", 100, 8)
    request.sampling_params.prompt_logprobs = 1  # half collected, they don't travel
    server.send(0, request)
    server.step()
    assert request.num_computed_tokens == 40
    assert server.switch(DP).journey.recomputed == {"r"}
    second = server.switch(TP)
    assert second.journey.arrived == {"r": 0}, "workers know it: it isn't handed over as a new one"
    assert "r" not in server.engines[0].started[1:]
    server.step(20)
    assert server.finished == {"r": "length"}
