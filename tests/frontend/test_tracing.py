"""A switch leaves one span where vLLM's tracing goes, and none where it is off."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once
from vllm import tracing as vllm_tracing
from vllm.tracing import otel

from vllm_flying.core.topology import Layout
from vllm_flying.frontend import tracing
from vllm_flying.frontend.board import BoardGroup, BoardState, LayoutBoard
from vllm_flying.frontend.record import PHASES
from vllm_flying.frontend.switcher import Switcher, SwitchFailed
from vllm_flying.settings import Settings

WORK_S = 0.02


class Engines:
    """Two engines that do as they are told; engine 1 may refuse to prepare."""

    num_engines = 2
    seem_idle = True

    def __init__(self, refuse: bool = False) -> None:
        self._refuse = refuse

    async def call(self, engine: int, operation: str, arguments: dict[str, Any] | None = None) -> Any:
        await asyncio.sleep(WORK_S)
        if operation == "prepare" and engine == 1 and self._refuse:
            raise RuntimeError("this engine is out of sorts")
        replies: dict[str, Any] = {
            "prepare": {"free_pages": 8, "returnable_pages": 0, "begun": 3, "paused_widths": []},
            "move": {"free_tokens": 64, "capacity_tokens": 64, "page_tokens": 16, "prefill_s": None, "offers": [],
                     "staying": 0, "proof": [], "intact": b""},
            "prove": [{"engine": e, "tp_rank": e, "tp_size": 2} for e in range(2)],
            "commit": {"handover": {}, "kv_tokens": 128},
            "collect": None,
        }
        return replies.get(operation, {})


def switch(directory: Path, refuse: bool = False) -> dict[str, Any]:
    board = LayoutBoard(directory)
    board.publish(BoardState(4, 1, (BoardGroup((0,), 64), BoardGroup((1,), 64))))
    switcher = Switcher(Engines(refuse), board, directory, Settings())  # type: ignore[arg-type]
    return asyncio.run(switcher.switch(Layout.of([[0, 1]], 2), "pause", reason="operator"))


def without_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Tracing as vLLM sets it up in an API server, but into memory; gives a function that lists finished spans."""
    exporter = InMemorySpanExporter()
    without_provider(monkeypatch)
    monkeypatch.setattr(otel, "get_span_exporter", lambda endpoint: exporter)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "set by vLLM, put back after the test")
    vllm_tracing.init_tracer("vllm.llm_engine", "http://127.0.0.1:4317")
    provider: Any = trace.get_tracer_provider()

    def finished() -> tuple[ReadableSpan, ...]:
        provider.force_flush()
        return exporter.get_finished_spans()

    yield finished
    provider.shutdown()


def test_a_switch_is_one_span(spans: Any, tmp_path: Path) -> None:
    before = time.time_ns()
    record = switch(tmp_path)
    after = time.time_ns()
    (span,) = spans()
    assert span.name == "flying.switch" and span.status.status_code is trace.StatusCode.UNSET
    assert before <= span.start_time < span.end_time <= after
    assert span.end_time - span.start_time >= 1e9 * record["seconds"]["total"] >= 1e9 * 4 * WORK_S
    attributes = dict(span.attributes)
    seconds = {name: attributes.pop(f"flying.seconds.{name}") for name in (*PHASES, "total")}
    assert seconds == record["seconds"] and seconds["prove"] >= WORK_S
    assert attributes == {
        "flying.epoch": 5, "flying.from": "[[0], [1]]", "flying.to": "[[0, 1]]", "flying.method": "pause",
        "flying.reason": "operator", "flying.outcome": "committed", "flying.waves": 1, "flying.requests.moved": 0,
        "flying.requests.paused": 6, "flying.requests.finished": 0, "flying.requests.recomputed": 0,
        "flying.prefixes.moved": 0, "flying.prefixes.tokens": 0, "flying.kv.bytes": 0,
        "flying.precopied.bytes": 0,
    }  # fmt: skip


def test_a_switch_that_fails_is_a_span_with_an_error(spans: Any, tmp_path: Path) -> None:
    with pytest.raises(SwitchFailed):
        switch(tmp_path, refuse=True)
    (span,) = spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert "engine 1: this engine is out of sorts" in span.status.description
    assert span.attributes["flying.outcome"] == "rolled_back" and span.attributes["flying.epoch"] == 5


def test_without_tracing_nothing_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_provider(monkeypatch)
    monkeypatch.setattr(tracing, "_attributes", lambda record: pytest.fail("there is no span to describe"))
    assert switch(tmp_path)["outcome"] == "committed"


def test_opentelemetry_need_not_be_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(otel, "_IS_OTEL_AVAILABLE", False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert switch(tmp_path)["outcome"] == "committed"
