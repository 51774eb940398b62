"""An urgent request gets a wide group at once and its steps to itself; the others lose nothing but time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.background import Background
from tests.support.checkpoints import make_checkpoint
from tests.support.load import random_prompts
from tests.support.server import Server

pytestmark = [pytest.mark.engine, pytest.mark.alone]

OUTPUT = 250
# Tokens that take longer than `deferred_limit_s` and the others' tokens on any machine; nobody waits for all of them.
ENDLESS = 4000


@pytest.fixture(scope="module")
def server(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_checkpoint("llama", checkpoints)
    log = tmp_path_factory.mktemp("server") / "log"
    settings = {"policy": "priority", "interval_s": 0.1, "cooldown_s": 0.2, "deferred_limit_s": 1.5}
    with Server(model, log, "--max-model-len", "4096", "--api-server-count", "1", settings=settings) as running:
        yield running


def test_others_stand_back_and_go_on(server: Server) -> None:
    prompts = random_prompts(95, (40, 60, 80, 100))
    (urgent,) = random_prompts(96, (50,))
    others = [Background(server, prompt, OUTPUT) for prompt in prompts]
    for other in others:
        other.wait_for_tokens()
    started = time.monotonic()
    response = server.complete(urgent, 40, priority=-1)
    ended = time.monotonic()
    assert response.headers["x-flying-layout"] == "tp2; engines=0,1"
    tokens = [other.tokens() for other in others]
    # From the switch on nobody else runs; what they got before it, in the step that was under way, may come late.
    quiet_since = started + 0.5 * (ended - started)
    assert not [moment for other in others for moment in other.times if quiet_since < moment < ended - 0.01]
    assert all(other.times[-1] > ended for other in others)
    deadline = time.monotonic() + 20
    while len(server.status()["groups"]) == 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert response.json()["choices"][0]["token_ids"] == server.tokens(urgent, 40)
    assert tokens == [server.tokens(prompt, OUTPUT) for prompt in prompts]


def test_nobody_stands_back_for_ever(server: Server) -> None:
    prompts = random_prompts(97, (40, 60))
    (urgent,) = random_prompts(98, (50,))
    other = Background(server, prompts[0], 30)
    other.wait_for_tokens()
    first = Background(server, urgent, ENDLESS, priority=-1)
    late = Background(server, prompts[1], 30)
    tokens = [other.tokens(), late.tokens()]
    assert first.is_alive, "the urgent one was done before the limit"
    first.abort()
    first.join()
    assert tokens == [server.tokens(prompt, 30) for prompt in prompts]
