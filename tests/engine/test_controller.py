"""The controller on a real server: what a request needs is formed without an operator, and undone when it is over."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.background import Background
from tests.support.checkpoints import make_checkpoint
from tests.support.load import random_prompts
from tests.support.server import Server
from vllm_flying.cli.main import run as vllm_flying

pytestmark = [pytest.mark.engine, pytest.mark.alone]

ONE_ENGINE_TOKENS = 31 * 32


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "decisions.jsonl"


@pytest.fixture(scope="module")
def server(checkpoints: Path, audit: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_checkpoint("llama", checkpoints)
    log = tmp_path_factory.mktemp("server") / "log"
    settings = {
        "policy": "long_context", "interval_s": 0.1, "cooldown_s": 0.3, "manual_hold_s": 1.0, "audit_log": str(audit),
    }  # fmt: skip
    arguments = ("--max-model-len", "1536", "--max-num-batched-tokens", "512", "--api-server-count", "2")
    with Server(model, log, *arguments, kv_bytes=2 << 20, settings=settings) as running:
        yield running


def until(server: Server, widths: list[int], limit_s: float = 30.0) -> dict[str, Any]:
    """The status, once the layout has groups of these widths."""
    deadline = time.monotonic() + limit_s
    while True:
        status = server.status()
        if [len(group["engines"]) for group in status["groups"]] == widths:
            return status
        assert time.monotonic() < deadline, status
        time.sleep(0.05)


def test_a_long_request_under_load_is_served_and_the_group_splits_again(server: Server) -> None:
    prompts = random_prompts(91, (50, 60, 70, 80))
    others = [Background(server, prompt, 150) for prompt in prompts]
    for other in others:
        other.wait_for_tokens()
    (long,) = random_prompts(92, (ONE_ENGINE_TOKENS + 100,))
    response = server.complete(long, 30)
    assert response.status_code == 200, response.text
    assert response.headers["x-flying-layout"] == "tp2; engines=0,1"
    status = until(server, [1, 1])
    assert status["last_switch"]["reason"] == "controller: long_context"
    tokens = [other.tokens() for other in others]
    assert tokens == [server.tokens(prompt, 150) for prompt in prompts]


def test_a_request_that_no_layout_can_hold_is_refused_with_the_numbers(server: Server) -> None:
    (prompt,) = random_prompts(93, (1500,))
    response = server.complete(prompt, 30)
    assert response.status_code == 200, "it fits the merged group"
    response = server.complete(prompt, 5000)
    assert response.status_code == 400 and "1536" in response.text


def test_an_operator_goes_first(server: Server) -> None:
    until(server, [1, 1])
    server.switch([[0, 1]])
    time.sleep(0.5)
    assert len(server.status()["groups"]) == 1, "held by hand"
    until(server, [1, 1])


@pytest.mark.parametrize("service_tier", ["priority", "flex"])
def test_a_priority_orders_nothing_here_and_is_not_refused(server: Server, service_tier: str) -> None:
    """This server is fcfs, vLLM's default."""
    until(server, [1, 1])
    (prompt,) = random_prompts(94, (50,))
    response = server.complete(prompt, 20, service_tier=service_tier)
    assert response.status_code == 200, response.text
    assert response.headers["x-flying-layout"].startswith("tp1; engines=")
    assert response.json()["choices"][0]["token_ids"] == server.tokens(prompt, 20)


def test_decisions_are_written_told_and_counted(
    server: Server, audit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [json.loads(line) for line in audit.read_text().splitlines()]
    splits = [entry for entry in entries if entry["to"] == [[0], [1]] and entry["outcome"] == "committed"]
    assert splits and {entry["rule"] for entry in splits} == {"long_context"}
    assert vllm_flying(["explain", "--url", server.url]) == 0
    assert "long_context: from [[0, 1]] to [[0], [1]], because no request needs" in capsys.readouterr().out
    assert vllm_flying(["explain", "--file", str(audit)]) == 0
    text = server.client.get("/metrics").text
    for name in ("switches_total", "switch_phase_seconds_bucket", "decisions_total", "engine_width"):
        assert f"vllm_flying_{name}" in text, name
    page = server.client.get("/plugins/flying/")
    assert page.status_code == 200 and "<title>vllm-flying</title>" in page.text
