"""Four engines, every width and mixed ones, switched at random under load: nothing lost, nothing changed."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.load import Load, random_prompts
from tests.support.reference import Reference
from tests.support.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.alone]

LAYOUTS = [
    [[0], [1], [2], [3]],
    [[0, 1], [2], [3]],
    [[0], [1], [2, 3]],
    [[0, 1], [2, 3]],
    [[0, 1, 2, 3]],
]
SWITCHES = 36
PROMPTS = random_prompts(7, (5, 33, 64, 100, 150, 31, 210, 12))
REQUESTS: list[tuple[list[int], dict[str, Any]]] = [
    (prompt, {"max_tokens": 20 + 5 * index, "temperature": 0, "ignore_eos": True})
    for index, prompt in enumerate(PROMPTS)
]
NLL_PROMPTS = random_prompts(8, (40, 130))


@pytest.fixture(scope="module")
def model(checkpoints: Path) -> Path:
    return make_checkpoint("llama", checkpoints)


@pytest.fixture(scope="module")
def static(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Stock vLLM in each static layout."""
    specs: dict[int, dict[str, Any]] = {degree: {"nll_prompts": NLL_PROMPTS} for degree in (1, 2, 4)}
    specs[1]["requests"] = REQUESTS
    return Reference(model, tmp_path_factory.mktemp("reference"), specs)


@pytest.fixture(scope="module")
def stock(static: Reference) -> dict[int, dict[str, Any]]:
    return {degree: static.result(degree) for degree in (1, 2, 4)}


@pytest.fixture(scope="module")
def server(model: Path, static: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(model, log, "--max-model-len", "2048", "--api-server-count", "2", engines=4) as running:
        yield running


def test_random_switches_under_load(server: Server, stock: dict[int, dict[str, Any]]) -> None:
    source = random.Random(3)
    with Load(server, REQUESTS, stock[1]["tokens"], clients=6) as load:
        for _ in range(SWITCHES):
            method = source.choice(["pause", "migrate", "migrate", "drain", "soft", "auto"])
            record = server.switch(source.choice(LAYOUTS), method=method, timeout_s=120)
            assert record["outcome"] == "committed"
            time.sleep(source.uniform(0.0, 0.4))
        load.finish_sending()
        # Paused requests go on when their layout comes back.
        deadline = time.monotonic() + 240
        while not load.is_done and time.monotonic() < deadline:
            for layout in LAYOUTS:
                server.switch(layout, method="drain", timeout_s=120)
        assert load.is_done, server.status()
    assert not load.problems, load.problems[:5]
    assert load.finished >= len(REQUESTS)
    served = " ".join(load.layouts)
    assert all(f"tp{degree};" in served for degree in (1, 2, 4)), load.layouts
    status = server.status()
    assert all(group["paused"] == group["running"] == group["waiting"] == 0 for group in status["groups"]), status


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_nll_equals_the_static_layout(server: Server, stock: dict[int, dict[str, Any]], degree: int) -> None:
    server.switch([list(range(first, first + degree)) for first in range(0, 4, degree)], method="drain")
    for prompt, expected in zip(NLL_PROMPTS, stock[degree]["nll"], strict=True):
        assert server.nll(prompt) == pytest.approx(expected, abs=1e-4)


def rotary_cache_bytes(model: Path) -> int:
    """Sines and cosines of all positions, which every model makes for itself, once for all its layers. float32."""
    config = json.loads((model / "config.json").read_text())
    return 4 * int(config["max_position_embeddings"]) * int(config["head_dim"])


def test_memory_is_one_copy_and_one_pool(server: Server, model: Path) -> None:
    # float32 there too, and nothing in it is tied or padded: neither the vocabulary (512) nor a head.
    checkpoint = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    server.switch([[0], [1], [2], [3]], method="drain")
    for (worker,) in server.client.get("/plugins/flying/memory").json()["workers"]:
        assert worker["weight_bytes_all_layouts"] <= 1.01 * worker["weight_bytes_one_copy"]
        assert worker["weight_bytes_one_copy"] == pytest.approx(checkpoint + rotary_cache_bytes(model), rel=0.01)
        views = worker["kv"].values()
        for quantity in ("pool_address", "pool_bytes", "num_pages", "page_bytes"):
            assert len({view[quantity] for view in views}) == 1
        assert [view["page_tokens"] for view in views] == [32, 64, 128]


def test_a_merged_group_pools_the_kv_cache(server: Server) -> None:
    server.switch([[0], [1], [2], [3]], method="drain")
    alone = server.status()["groups"][0]["kv_tokens_capacity"]
    for width in (2, 4):
        server.switch([list(range(first, first + width)) for first in range(0, 4, width)], method="drain")
        merged = server.status()["groups"][0]["kv_tokens_capacity"]
        assert merged >= 0.95 * width * alone
