"""Two stepped engines, or a config for four; a module that wants others makes its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.config import VllmConfig

from tests.support.checkpoints import make_checkpoint
from tests.support.stepping import SteppedServer, make_config


@pytest.fixture(scope="module")
def config(checkpoints: Path) -> VllmConfig:
    return make_config(make_checkpoint("llama", checkpoints), num_engines=2)


@pytest.fixture(scope="module")
def four_engines(checkpoints: Path) -> VllmConfig:
    return make_config(make_checkpoint("llama", checkpoints), num_engines=4)


@pytest.fixture
def server(config: VllmConfig, request: pytest.FixtureRequest) -> SteppedServer:
    """Its engines have as many pages as the module's `PAGES` says."""
    return SteppedServer(config, 2, request.module.PAGES)
