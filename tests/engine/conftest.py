"""A server that several modules share: what a start costs, 14 to 20 s of a core for each of 6 processes, is paid once.

Each of these modules leaves it as it was: engines apart, no request, all pages free.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.requests import StockTokens
from tests.support.checkpoints import make_checkpoint
from tests.support.reference import Reference
from tests.support.server import Server

HERE = Path(__file__).parent
PAGES = 127
"""Pages of 32 tokens in `KV_BYTES` of the two-layer model, without the one that vLLM keeps empty."""
KV_BYTES = 8 << 20
API_KEY = "test-key"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that share a server come last, so that it never runs beside another one.

    Of these first the ones that wait for a stock reference: it is made while the server starts.
    """
    elsewhere = [item.nodeid for item in items if item.get_closest_marker("alone") and item.path.parent != HERE]
    if elsewhere:
        raise pytest.UsageError(f"marked `alone`, but `make test` looks for these in {HERE} only: {elsewhere}")

    def place(item: pytest.Item) -> tuple[bool, bool]:
        names = getattr(item, "fixturenames", ())
        return "two_engines" in names, "stock" not in names and "two_engines" in names

    items.sort(key=place)


@pytest.fixture(scope="session")
def stock(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Stock vLLM, asked for what all modules want to know of it."""
    model = make_checkpoint("llama", checkpoints)
    return Reference(model, tmp_path_factory.mktemp("reference"), {1: {"requests": StockTokens.asked()}})


@pytest.fixture(scope="session")
def stock_tokens(stock: Reference) -> StockTokens:
    """Its answers."""
    return StockTokens(stock.result()["tokens"])


@pytest.fixture(scope="session")
def two_engines(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two engines that switch by hand and by hint only; the context is longer than what one of them can hold.

    What is more than a page is copied ahead of switches, a page at a time.
    """
    model = make_checkpoint("llama", checkpoints)
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = (
        "--max-model-len", "6144", "--max-num-batched-tokens", "512", "--api-server-count", "1",
        "--scheduling-policy", "priority",
    )  # fmt: skip
    with Server(
        model, log, *arguments, kv_bytes=KV_BYTES, api_key=API_KEY, settings={"paused_limit_s": 0.4, "precopy_bytes": KV_BYTES // (PAGES + 1)},
        environment={"VLLM_SERVER_DEV_MODE": "1"},
    ) as running:  # fmt: skip
        yield running
