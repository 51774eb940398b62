"""Hints and service tiers in, layouts out; everything else untouched."""

from __future__ import annotations

import asyncio
import json
from importlib import import_module
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from vllm_flying.frontend.served import served_layouts
from vllm_flying.http.middleware import ParallelismHintMiddleware

PATH = "/v1/completions"
ECHOING = (PATH, "/v1/responses")


def app(enabled: bool = True) -> TestClient:
    def route_request() -> None:
        record = served_layouts.get()
        if record is not None:
            record.add((0, 1), 2)

    async def echo(request: Request) -> JSONResponse:
        route_request()
        body = await request.body()
        return JSONResponse({"body": body.decode(), "length": request.headers["content-length"]})

    async def stream(request: Request) -> StreamingResponse:
        async def parts() -> Any:
            route_request()
            yield b"data: {}\n\n"
            yield b"data: [DONE]\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def other(request: Request) -> JSONResponse:
        return JSONResponse({"body": (await request.body()).decode()})

    routes = [
        *(Route(path, echo, methods=["POST"]) for path in ECHOING),
        Route("/v1/chat/completions", stream, methods=["POST"]),
        Route("/v1/embeddings", other, methods=["POST"]),
    ]
    return TestClient(ParallelismHintMiddleware(Starlette(routes=routes), is_enabled=lambda: enabled))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ECHOING)
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"prompt": "x", "parallelism_hint": "TP2"}, {}),
        ({"prompt": "x", "vllm_xargs": {"parallelism_hint": "tp2"}}, {}),
        ({"prompt": "x"}, {"X-Parallelism-Hint": "tp2"}),
        ({"prompt": "x", "parallelism_hint": "tp2"}, {"X-Parallelism-Hint": "tp2"}),
    ],
)
def test_a_hint_is_handed_on_from_every_place(path: str, body: dict[str, Any], headers: dict[str, str]) -> None:
    response = app().post(path, json=body, headers=headers).json()
    assert json.loads(response["body"]) == {"prompt": "x", "vllm_xargs": {"parallelism_hint": "tp2"}}
    assert int(response["length"]) == len(response["body"])


def test_other_extra_arguments_stay() -> None:
    body = {"vllm_xargs": {"top": 1}, "parallelism_hint": "dp"}
    response = app().post(PATH, json=body).json()
    assert json.loads(response["body"]) == {"vllm_xargs": {"top": 1, "parallelism_hint": "dp"}}


@pytest.mark.parametrize(("tier", "priority"), [("priority", -1), ("flex", 1)])
def test_a_service_tier_becomes_a_priority(tier: str, priority: int) -> None:
    response = app().post(PATH, json={"prompt": "x", "service_tier": tier}).json()
    assert json.loads(response["body"]) == {"prompt": "x", "service_tier": tier, "priority": priority}
    assert int(response["length"]) == len(response["body"])


def test_a_tier_and_a_hint_are_both_handed_on() -> None:
    body = {"service_tier": "priority", "parallelism_hint": "dp"}
    response = app().post(PATH, json=body).json()
    assert json.loads(response["body"]) == {
        "service_tier": "priority", "priority": -1, "vllm_xargs": {"parallelism_hint": "dp"}
    }  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        b'{ "prompt" :"x" }',
        b"not json parallelism_hint",
        b'["parallelism_hint"]',
        b"",
        b'{ "prompt" :"what is a parallelism_hint?" }',
        b"not json service_tier",
        b'["service_tier"]',
        b'{ "prompt" :"service_tier" }',
        b'{ "service_tier" :"auto" }',
        b'{ "service_tier" :"default" }',
        b'{ "service_tier" :"soon" }',
        b'{ "service_tier" :null }',
        b'{ "service_tier" :["priority"] }',
        b'{ "service_tier" :"priority", "priority": 0 }',
        b'{ "service_tier" :"flex", "priority": -7 }',
    ],
)
def test_bodies_with_neither_hint_nor_tier_pass_byte_for_byte(body: bytes) -> None:
    assert app().post(PATH, content=body).json()["body"].encode() == body


def test_bad_and_contradictory_hints_are_refused() -> None:
    response = app().post(PATH, json={"parallelism_hint": "fast"})
    assert response.status_code == 400
    assert "allowed: auto, dp, tp" in response.json()["error"]["message"]
    response = app().post(PATH, json={"parallelism_hint": "dp"}, headers={"X-Parallelism-Hint": "tp"})
    assert response.status_code == 400 and "different hints" in response.text


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("completion", "CompletionRequest"),
        ("chat_completion", "ChatCompletionRequest"),
        ("responses", "ResponsesRequest"),
    ],
)
def test_every_route_of_vllm_takes_what_is_handed_on(module: str, name: str) -> None:
    fields = getattr(import_module(f"vllm.entrypoints.openai.{module}.protocol"), name).model_fields
    assert {"vllm_xargs", "priority"} <= set(fields)


def test_the_layout_is_named_streamed_or_not() -> None:
    for path in (*ECHOING, "/v1/chat/completions"):
        assert app().post(path, json={}).headers["x-flying-layout"] == "tp2; engines=0,1"
    assert "x-flying-layout" not in app().post("/v1/embeddings", json={"parallelism_hint": "fast"}).headers


@pytest.mark.parametrize("engines", [[(0, 1)], [(0,), (1,)]])
def test_a_streams_head_goes_ahead_of_its_first_token(engines: list[tuple[int, ...]]) -> None:
    """And names all engines that its answers were sent to by then."""
    sent: list[Any] = []

    async def main() -> None:
        head_is_out = asyncio.Event()

        async def stream(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            record = served_layouts.get()
            for group in engines:
                assert record is not None and not sent
                record.add(group, len(group))
                await asyncio.sleep(0)
            await head_is_out.wait()
            await send({"type": "http.response.body", "body": b"data: {}"})

        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}"}

        async def send(message: Any) -> None:
            sent.append(message)
            head_is_out.set()

        scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
        await asyncio.wait_for(ParallelismHintMiddleware(stream)(scope, receive, send), timeout=10)

    asyncio.run(main())
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    named = dict(sent[0]["headers"])[b"x-flying-layout"].decode()
    assert named == " | ".join(f"tp{len(group)}; engines={','.join(map(str, group))}" for group in engines)


def test_nothing_happens_while_the_plugin_is_off() -> None:
    response = app(enabled=False).post(PATH, json={"parallelism_hint": "fast"})
    assert response.status_code == 200 and "x-flying-layout" not in response.headers
