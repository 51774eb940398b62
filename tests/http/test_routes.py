"""The routes over the real switcher; engines do as they are told. Real engines: tests/engine/test_two_engines.py."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.frontend.test_switcher import Engines, make
from tests.support.application import serving
from vllm_flying.cli.main import run
from vllm_flying.frontend.board import switch_lock
from vllm_flying.http.routes import build_router
from vllm_flying.settings import Settings


class Flying:
    """What the routes are given for two engines."""

    def __init__(self, directory: Path) -> None:
        self.switcher, commanded, self._board = make(directory)
        self.commanded: Engines = commanded
        self.settings, self.engines, self.directory = Settings(num_engines=2), self, directory

    async def ready(self) -> Any:
        return self._board.read()

    async def call_all(self, operation: str) -> list[Any]:
        if operation == "memory":
            return [[{"weight_bytes_one_copy": 1}]] * 2
        load = {"running": 0, "waiting": 0, "paused": 0, "kv_tokens_capacity": 100, "kv_tokens_used": 7, "scheduled_tokens": 0}
        return [
            {"engine": engine, "state": "serving", "group": [engine], "pages": {}, "pace": 1.0, "costs": {}, "probes": {}, **load}
            for engine in range(2)
        ]


def application(flying: Any) -> FastAPI:
    app = FastAPI()
    app.state.args, app.state.flying_router = Namespace(api_key=[]), flying
    app.include_router(build_router(app))
    return app


@pytest.fixture
def flying(tmp_path: Path) -> Flying:
    return Flying(tmp_path)


@pytest.fixture
def client(flying: Flying) -> Iterator[TestClient]:
    with TestClient(application(flying)) as running:
        yield running


def switch(client: TestClient, groups: Any = ([0, 1],), **options: Any) -> Any:
    return client.post("/plugins/flying/switch", json={"groups": list(groups), **options})


def test_the_layout_is_told_without_asking_an_engine(flying: Flying, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Flying, "call_all")
    switch(client, method="pause")
    layout = client.get("/plugins/flying/layout").json()
    assert layout == {"epoch": 1, "groups": [[0, 1]], "since": pytest.approx(time.time(), abs=30)}
    switch(client, method="migrate")  # what is paused, into the same layout
    assert client.get("/plugins/flying/layout").json() == {**layout, "epoch": 2}


def test_a_switch_answers_with_its_record(client: TestClient) -> None:
    record = switch(client, method="pause").json()
    assert (record["epoch"], record["from"], record["to"]) == (1, [[0], [1]], [[0, 1]])
    assert (record["reason"], record["method"], record["outcome"]) == ("operator", "pause", "committed")
    assert {"prepare", "move", "commit", "total"} <= set(record["seconds"])
    assert [set(entry) >= {"worker", "tp_size", "tp_rank", "group"} for entry in record["proof"]] == [True, True]
    status = client.get("/plugins/flying/status").json()
    assert (status["epoch"], status["last_switch"]) == (1, record)
    (group,) = status["groups"]
    assert (group["engines"], group["layout"], group["leader"]) == ([0, 1], {"tp": 2, "sp": 1, "pp": 1}, 0)
    keys = {"running", "waiting", "paused", "kv_tokens_capacity", "kv_tokens_used"}
    assert keys <= set(group) and {"engine", "state", "group"} <= set(status["engines"][0])


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"groups": [[0, 1], [1]]}, "overlap"),
        ({"groups": [[0]]}, "engines [1] are in no group"),
        ({"groups": [[1, 2]]}, "outside 0..1"),
        ({"groups": [[0, 1, 2]]}, "1, 2, 4, 8"),
        ({"groups": [[]]}, "empty"),
        ({"groups": [[0, 1]], "method": "fast"}, "auto, drain, soft, pause, migrate"),
        ({"groups": [[0, 1]], "timeout_s": 0}, "timeout_s"),
        ({"groups": [[0, 1]], "speed": 1}, "speed"),
        ({}, "groups"),
    ],
)
def test_what_can_not_be_is_a_422(client: TestClient, flying: Flying, body: dict[str, Any], text: str) -> None:
    response = client.post("/plugins/flying/switch", json=body)
    assert response.status_code == 422 and text in response.text, response.text
    assert flying.commanded.done == []


def test_another_switch_under_way_is_a_409(client: TestClient, flying: Flying) -> None:
    with switch_lock(flying.directory):
        response = switch(client)
    assert response.status_code == 409 and "another switch is under way" in response.text
    assert switch(client).status_code == 200


def test_the_time_limit_is_a_504_and_everything_is_as_before(client: TestClient, flying: Flying) -> None:
    flying.commanded.slow["prepare"] = 0.5
    response = switch(client, timeout_s=0.1)
    assert response.status_code == 504 and "time limit of 0.1 s" in response.text
    assert response.json()["record"]["outcome"] == "rolled_back"
    status = client.get("/plugins/flying/status").json()
    assert [group["engines"] for group in status["groups"]] == [[0], [1]]
    assert status["last_switch"] == response.json()["record"]


def test_an_engine_that_refuses_is_a_500_with_its_words(client: TestClient, flying: Flying) -> None:
    def refuse(engine: int, **_: Any) -> None:
        raise RuntimeError("no pages to lend")

    flying.commanded.prepare = refuse  # type: ignore[assignment, method-assign]
    response = switch(client)
    assert response.status_code == 500 and "no pages to lend" in response.text


def test_memory_is_told_while_engines_are_apart(client: TestClient) -> None:
    assert len(client.get("/plugins/flying/memory").json()["workers"]) == 2
    switch(client)
    response = client.get("/plugins/flying/memory")
    assert response.status_code == 409 and "parked" in response.text


@pytest.mark.parametrize("path", ["status", "memory", "decisions"])
def test_not_enabled_is_a_404_that_says_how_to_enable(path: str) -> None:
    with TestClient(application(None)) as client:
        response = client.get(f"/plugins/flying/{path}")
    assert response.status_code == 404 and "--worker-extension-cls vllm_flying.WorkerExtension" in response.text


def test_the_same_from_a_terminal(flying: Flying, capsys: pytest.CaptureFixture[str]) -> None:
    def terminal(*arguments: str) -> tuple[int, str, str]:
        status = run([*arguments, "--url", url])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    with serving(application(flying)) as url:
        assert terminal("switch", "--width", "3") == (2, "", "--width 3: 2 engines can't be groups of 3\n")
        status, _, error = terminal("switch", "--groups", "0,1", "--timeout", "0")
        assert status == 1 and error.startswith("HTTP 422") and "timeout_s" in error
        status, out, _ = terminal("switch", "--width", "2", "--method", "pause")
        assert status == 0 and out.startswith("switch 1: [[0], [1]] -> [[0, 1]] committed by pause in ")
        assert out.splitlines()[1:] == [
            "  worker 0: rank 0 of 2 in [0, 1]", "  worker 1: rank 1 of 2 in [0, 1]",
        ]  # fmt: skip
        status, out, _ = terminal("status")
        assert status == 0 and out.startswith("epoch 1\n")
        assert out.splitlines()[2].split() == ["0,1", "tp2", "0", "0", "0", "7", "of", "100", "serving"]


def test_a_guarded_server_wants_the_key(flying: Flying) -> None:
    app = application(flying)
    app.state.args = SimpleNamespace(api_key=["secret"])
    with TestClient(app) as client:
        assert client.get("/plugins/flying/status").status_code == 401
        allowed = client.get("/plugins/flying/status", headers={"Authorization": "Bearer secret"})
        assert allowed.status_code == 200
