"""Shared by all tests: where checkpoints go, no time limits on examples, which slow machines would miss, imports that
no garbage collection slows down, and an order that keeps two workers of pytest-xdist busy.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from vllm_flying.cli.imports import put_full_collections_off

put_full_collections_off()
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

LONG = (
    {"test_families", "test_python_api"},
    {"test_wide_engines", "test_smollm2", "test_model_runner_v2", "test_enabling", "test_transfer"},
)
"""Modules with the tests that take longest: two sets that take about the same."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each half of the tests begin with half of what takes long.

    `--dist worksteal` gives each of two workers half of the list, and who is done with it takes tests from the end of the
    other's half: these must be short.
    """
    first, second = ([item for item in items if item.path.stem in modules] for modules in LONG)
    long = {*first, *second}
    others = [item for item in items if item not in long]
    cut = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *others[:cut], *second, *others[cut:]]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory in which tests make their checkpoints, once per session."""
    return tmp_path_factory.mktemp("checkpoints")
