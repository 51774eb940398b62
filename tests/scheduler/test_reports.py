"""An engine's status has its probes, once it was told to take them from its workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm_flying.scheduler import registry
from vllm_flying.scheduler.agent import EngineAgent
from vllm_flying.scheduler.meter import EngineMeter
from vllm_flying.settings import Settings


def test_probes_are_in_the_status_and_seed_the_costs_once() -> None:
    asked: list[str] = []

    def workers(method: str, *_: Any) -> list[Any]:
        asked.append(method)
        return [{1: [(0, 1, 0.02), (0, 32, 0.03)]}]

    scheduler = SimpleNamespace(block_size=16, requests={}, max_num_running_reqs=8, get_request_counts=lambda: (0, 0))
    facade = SimpleNamespace(
        meter=EngineMeter([1]), pools={1: SimpleNamespace(num_owned=4, num_used=0)}, schedulers={1: scheduler},
        active=scheduler, parked=False, active_width=1, held=[], deferral=[], num_paused=0, scheduled_tokens=0,
        kv_cache_config=SimpleNamespace(num_blocks=5), engine_tp=1, num_engines=2,
    )  # fmt: skip
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=0))
    agent = EngineAgent(config, Settings(num_engines=2), workers)
    registry.register(config, facade)
    assert agent.handle("status", {})["probes"] == {} and agent.handle("status", {})["costs"] == {}
    probes = {"1": [[0, 1, 0.02], [0, 32, 0.03]]}
    assert agent.handle("probe", {}) == agent.handle("probe", {}) == probes and asked == ["flying_probes"]
    assert agent.handle("status", {})["probes"] == probes and agent.handle("status", {})["costs"]["1"]["steps"] == 0
