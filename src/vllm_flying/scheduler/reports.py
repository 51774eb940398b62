"""What an engine says of itself between steps: what it does, what steps cost it, what its workers hold.

May import vllm's types. Changes nothing but the meter, which takes the workers' probes once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_flying.scheduler.errors import SwitchRefused
from vllm_flying.scheduler.limits import page_tokens
from vllm_flying.scheduler.needs import unfinished_needs

if TYPE_CHECKING:
    from vllm_flying.scheduler.agent import EngineAgent

WorkerCall = Callable[..., Any]


class EngineReports:
    """Of one engine, for the front end and whoever asks it."""

    def __init__(self, agent: EngineAgent, call_workers: WorkerCall) -> None:
        self._agent = agent
        self._call_workers = call_workers
        self._probes: dict[int, list[tuple[int, int, float]]] | None = None

    def status(self) -> dict[str, Any]:
        """What this engine does now."""
        agent, facade = self._agent, self._agent.facade
        width = facade.active_width
        running, waiting = (0, 0) if facade.parked else facade.active.get_request_counts()
        pool = facade.pools[width]
        return {
            "engine": agent.engine,
            "epoch": agent.epoch,
            "group": list(agent.group),
            "state": self._state(),
            "running": running,
            "waiting": waiting + len(facade.held) + len(facade.deferral),
            "paused": facade.num_paused,
            "kv_tokens_capacity": agent.kv_tokens(),
            "kv_tokens_used": pool.num_used * page_tokens(facade, width),
            "pages": {str(w): {"owned": p.num_owned, "used": p.num_used} for w, p in facade.pools.items()},
            "scheduled_tokens": facade.scheduled_tokens,
            "max_running": {str(w): scheduler.max_num_running_reqs for w, scheduler in facade.schedulers.items()},
            "kv_tokens_per_engine": (facade.kv_cache_config.num_blocks - 1) * page_tokens(facade, 1),
            **unfinished_needs(facade),
            **facade.meter.report(),
            "probes": self._probes_by_name(),
        }

    def _state(self) -> str:
        if self._agent.switching is not None:
            return "switching"
        if self._agent.facade.parked:
            return "parked"
        return "leading" if len(self._agent.group) > 1 else "serving"

    def probe(self) -> dict[str, list[list[float]]]:
        """What forward passes cost in each layout, as the workers measured at start; seeds the cost model once."""
        if self._probes is None:
            self._probes = self._call_workers("flying_probes")[0]
            for width, probes in self._probes.items():
                self._agent.facade.meter.costs[width].seed(probes)
        return self._probes_by_name()

    def _probes_by_name(self) -> dict[str, list[list[float]]]:
        return {str(width): [list(probe) for probe in probes] for width, probes in (self._probes or {}).items()}

    def memory(self) -> list[dict[str, Any]]:
        """What each worker holds; not from a parked engine, whose workers are busy following."""
        agent = self._agent
        if agent.facade.parked:
            raise SwitchRefused(f"engine {agent.engine} is parked in group {list(agent.group)}; ask after a split")
        report: list[dict[str, Any]] = self._call_workers("flying_memory")
        for worker in report:
            worker["kv"] = {str(width): value for width, value in worker["kv"].items()}
        return report
