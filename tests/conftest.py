"""Fixtures shared by all tests: where checkpoints go."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory in which tests make their checkpoints, once per session."""
    return tmp_path_factory.mktemp("checkpoints")
