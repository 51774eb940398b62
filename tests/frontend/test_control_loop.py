"""The control loop follows its own switches and says what they gained."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_flying.controller.cost_curve import CostCurve
from vllm_flying.controller.policies import predicted_response
from vllm_flying.controller.response import HORIZON_S, Targets
from vllm_flying.core.topology import Layout
from vllm_flying.frontend import control_loop as module
from vllm_flying.frontend.audit import read_decisions, sentence
from vllm_flying.frontend.control_loop import DECISIONS_FILE, PRECOPY_FROM, ControlLoop
from vllm_flying.frontend.metrics import metrics
from vllm_flying.settings import Settings


def costs(step_s: float, prompt_token_s: float, decode_s: float) -> dict[str, Any]:
    """As an engine that has learned them reports it."""
    return {"curve": CostCurve.straight(step_s, prompt_token_s, decode_s).to_dict(), "steps": 100, "probe": None}


APART, MERGED = Layout.separate(2), Layout.of([[0, 1]], 2)


class Recorded:
    """Engines and a switcher from a record: a lone request is quicker in the merged layout."""

    def __init__(self) -> None:
        self.present = APART
        self.counted = {"requests_added": 0, "requests_served": 0, "seconds_served": 0.0,
                        "prompt_tokens_served": 0, "output_tokens_served": 0}  # fmt: skip

    def serve(self, requests: int, seconds_each: float) -> None:
        for name, more in zip(self.counted, (1, 1, seconds_each, 128, 64), strict=True):
            self.counted[name] += requests * more

    def _status(self, engine: int) -> dict[str, Any]:
        return {
            "engine": engine, "state": "serving", "running": 0, "waiting": 0, "paused": 0, "prompt_tokens_queued": 0,
            "kv_tokens_capacity": 1000, "kv_tokens_used": 0, "largest_request": 0, "wanted_width": 1,
            "kv_tokens_per_engine": 1000, "max_running": {"1": 64, "2": 64}, "prompt_tokens_added": 0, "requests_finished": 0,
            "output_tokens_finished": 0, **{name: value if engine == 0 else 0 for name, value in self.counted.items()},
            "pace": 1.0, "costs": {"1": costs(0.020, 0.0004, 0.0004), "2": costs(0.012, 0.0003, 0.0006)},
        }  # fmt: skip

    async def call_all(self, operation: str) -> list[dict[str, Any]]:
        assert operation == "status"
        return [self._status(engine) for engine in range(2)]

    def layout(self) -> Layout:
        return self.present

    def last_switch(self) -> None:
        return None

    async def switch(self, target: Layout, *_: Any, precopy_from: int | None) -> dict[str, Any]:
        assert precopy_from == PRECOPY_FROM, "no request waits for it"
        self.present = target
        return {"outcome": "committed", "seconds": {"total": 0.01, "drain": 0.0}}


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    times = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: times[0]))
    return times


def looks(loop: ControlLoop) -> None:
    asyncio.run(loop._look())


def test_a_switch_is_followed_by_what_it_gained(now: list[float], tmp_path: Path) -> None:
    server = Recorded()
    loop = ControlLoop(server, server, tmp_path, Settings(policy="load", num_engines=2, patience_s=0.0))  # type: ignore[arg-type]
    looks(loop)
    assert server.present == MERGED
    now[0] += 0.25
    looks(loop)
    server.serve(4, 0.9)
    now[0] += HORIZON_S
    looks(loop)
    looks(loop)
    decided, realised = read_decisions(tmp_path / DECISIONS_FILE)
    assert decided["outcome"] == "committed" and realised["predicted_gain_s"] == decided["predicted_gain_s"] > 0
    found = realised["realised"]
    assert found["measured_s"] == pytest.approx(0.9) and found["requests"] == 4
    assert found["gain_s"] == pytest.approx(found["staying_s"] - 0.9) and found["gain_s"] > 0
    assert "requests took 0.900 s (mean of 4)" in sentence(realised)


def test_an_operator_who_switches_back_ends_the_measurement(now: list[float], tmp_path: Path) -> None:
    server = Recorded()
    loop = ControlLoop(server, server, tmp_path, Settings(policy="load", num_engines=2, patience_s=0.0))  # type: ignore[arg-type]
    looks(loop)
    server.present = APART
    now[0] += 0.25
    looks(loop)
    entries = list(read_decisions(tmp_path / DECISIONS_FILE))
    assert entries[1]["realised"]["gain_s"] is None and "unknown" in sentence(entries[1])


def test_a_dry_run_says_what_it_would_do_and_does_nothing(now: list[float], tmp_path: Path) -> None:
    server = Recorded()
    settings = Settings(policy="load", num_engines=2, patience_s=0.0, dry_run=True)
    loop = ControlLoop(server, server, tmp_path, settings)  # type: ignore[arg-type]
    for _ in range(3):
        looks(loop)
        now[0] += 0.25
    assert server.present == APART
    (entry,) = read_decisions(tmp_path / DECISIONS_FILE)  # once, not at every look
    assert entry["to"] == MERGED.to_lists() and entry["outcome"] is None


def test_a_policy_that_raises_is_counted_and_changes_nothing(now: list[float], tmp_path: Path) -> None:
    from prometheus_client import REGISTRY

    def failing(seen: Any) -> None:
        raise ValueError("not today")

    metrics()
    before = REGISTRY.get_sample_value("vllm_flying_policy_failures_total")
    server = Recorded()
    loop = ControlLoop(server, server, tmp_path, Settings(policy="load", num_engines=2))  # type: ignore[arg-type]
    loop.controller.policy = failing
    looks(loop)
    looks(loop)
    assert server.present == APART and before is not None
    assert REGISTRY.get_sample_value("vllm_flying_policy_failures_total") == before + 2


def test_targets_reach_the_policy_and_what_it_sees_is_on_metrics(now: list[float], tmp_path: Path) -> None:
    from prometheus_client import REGISTRY

    seen: list[Any] = []

    def looking(observation: Any) -> None:
        seen.append(observation)

    server = Recorded()
    settings = Settings(policy="load", num_engines=2, ttft_target_ms=500, tpot_target_ms=40)
    loop = ControlLoop(server, server, tmp_path, settings)  # type: ignore[arg-type]
    loop.controller.policy = looking
    looks(loop)
    now[0] += 1.0
    server.serve(8, 0.5)
    looks(loop)
    assert seen[-1].targets == Targets(0.5, 0.04)
    assert REGISTRY.get_sample_value("vllm_flying_arrival_rate") == seen[-1].arrival_rate > 0
    assert REGISTRY.get_sample_value("vllm_flying_arrival_trend") == seen[-1].arrival_trend > 0
    predicted = predicted_response(seen[-1], APART)
    assert predicted is not None
    assert REGISTRY.get_sample_value("vllm_flying_predicted_ttft_seconds") == predicted.ttft_s
    assert REGISTRY.get_sample_value("vllm_flying_predicted_tpot_seconds") == predicted.tpot_s
