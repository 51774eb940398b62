"""Shared by all tests: where checkpoints go, no time limits on examples, which slow machines would miss, and quick imports."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from vllm_flying.cli.imports import put_full_collections_off

put_full_collections_off()
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory in which tests make their checkpoints, once per session."""
    return tmp_path_factory.mktemp("checkpoints")
