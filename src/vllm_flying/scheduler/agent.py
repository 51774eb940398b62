"""One engine's part in a switch: stop at a step boundary, change sides, go on.

May import vllm's types. Called by the executor on the engine's main thread between steps, so nothing here runs beside
a step. The switcher in an API server sends the calls; see docs/architecture.md for their order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.logger import init_logger

from vllm_flying.core.leases import PageLeases
from vllm_flying.core.topology import Group
from vllm_flying.scheduler import registry
from vllm_flying.scheduler.facade import FlyingScheduler
from vllm_flying.scheduler.handover import pack_requests, unpack_requests
from vllm_flying.settings import Settings

logger = init_logger("vllm.flying.engine")

WorkerCall = Callable[..., Any]


class SwitchRefused(RuntimeError):
    """This engine can't do its part; nothing was changed here."""


class EngineAgent:
    """State of one engine between and during switches."""

    def __init__(self, vllm_config: Any, settings: Settings, call_workers: WorkerCall) -> None:
        self._vllm_config = vllm_config
        self._settings = settings
        self._call_workers = call_workers
        self.engine: int = vllm_config.parallel_config.data_parallel_index
        self.group: Group = (self.engine,)
        self.epoch = 0
        self._preparing: int | None = None
        self._previous_group: Group = self.group
        self._parked_call: Any = None
        self._drained: Future[dict[str, Any]] | None = None
        self._leases: PageLeases | None = None
        registry.register_agent(vllm_config, self)

    @property
    def facade(self) -> FlyingScheduler:
        """The scheduler of this engine."""
        facade: FlyingScheduler = registry.facade_of(self._vllm_config)
        return facade

    @property
    def leases(self) -> PageLeases:
        """The leases of this engine's pages."""
        if self._leases is None:
            self._leases = PageLeases(self.facade.kv_cache_config.num_blocks)
        return self._leases

    @property
    def workers_follow(self) -> bool:
        """Whether this engine's workers run another engine's steps."""
        return self._parked_call is not None

    def let_followers_go(self) -> None:
        """Before a shutdown: end the group that this engine leads, without any bookkeeping."""
        if len(self.group) > 1 and self.group[0] == self.engine:
            self._call_workers("flying_release", ([],))
            self.group = (self.engine,)

    def handle(self, operation: str, arguments: dict[str, Any]) -> Any:
        """Run one operation by name; its result is made of plain values, or is a Future of that."""
        operations: dict[str, Callable[..., Any]] = {
            "status": self.status,
            "prepare": self.prepare,
            "move": self.move,
            "prove": self.prove,
            "commit": self.commit,
            "cancel": self.cancel,
            "adopt": self.adopt,
            "collect": self.collect,
            "memory": self.memory,
        }
        if operation not in operations:
            raise SwitchRefused(f"unknown operation {operation!r}; known: {sorted(operations)}")
        return operations[operation](**arguments)

    # ---- looking --------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What this engine does now."""
        facade = self.facade
        width = facade.active_width
        running, waiting = facade.active.get_request_counts()
        pool = facade.pools[width]
        return {
            "engine": self.engine,
            "epoch": self.epoch,
            "group": list(self.group),
            "state": self._state(),
            "running": 0 if facade.parked else running,
            "waiting": (0 if facade.parked else waiting) + len(facade.held),
            "paused": facade.num_paused,
            "kv_tokens_capacity": pool.num_owned * self._page_tokens(width),
            "kv_tokens_used": pool.num_used * self._page_tokens(width),
            "pages": {str(w): {"owned": p.num_owned, "used": p.num_used} for w, p in facade.pools.items()},
            "scheduled_tokens": facade.scheduled_tokens,
        }

    def _state(self) -> str:
        if self._preparing is not None:
            return "switching"
        if self.facade.parked:
            return "parked"
        return "leading" if len(self.group) > 1 else "serving"

    def _page_tokens(self, width: int) -> int:
        return int(self.facade.schedulers[width].block_size)

    def memory(self) -> list[dict[str, Any]]:
        """What each worker holds; not from a parked engine, whose workers are busy following."""
        if self.facade.parked:
            raise SwitchRefused(f"engine {self.engine} is parked in group {list(self.group)}; ask after a split")
        report: list[dict[str, Any]] = self._call_workers("flying_memory")
        for worker in report:
            worker["kv"] = {str(width): value for width, value in worker["kv"].items()}
        return report

    # ---- a switch, step by step -----------------------------------------------------------------------------------

    def prepare(self, epoch: int, method: str) -> dict[str, Any] | Future[dict[str, Any]]:
        """Come to rest: keep new and fresh requests aside; `pause` stops at once, `drain` when what has begun is done."""
        if self._preparing is not None:
            raise SwitchRefused(f"engine {self.engine} is being switched already (epoch {self._preparing})")
        if epoch <= self.epoch:
            raise SwitchRefused(f"engine {self.engine} is at epoch {self.epoch}; epoch {epoch} is over")
        self._preparing = epoch
        self._previous_group = self.group
        facade = self.facade
        facade.holding = True
        if not facade.parked:
            facade.set_aside_fresh()
        if method == "drain" and not facade.parked and facade.active.has_requests():
            self._drained = Future()
            return self._drained
        return self._at_rest()

    def after_step(self) -> None:
        """A draining engine whose last request is done reports that it is at rest."""
        if self._drained is not None and not self.facade.active.has_unfinished_requests():
            drained, self._drained = self._drained, None
            drained.set_result(self._at_rest())

    def _at_rest(self) -> dict[str, Any]:
        facade = self.facade
        facade.stopped = True
        running, waiting = (0, 0) if facade.parked else facade.active.get_request_counts()
        leading = not facade.parked and facade.active_width > 1
        return {
            "free_pages": facade.pools[1].num_free,
            "returnable_pages": facade.pools[facade.active_width].num_free if leading else 0,
            "begun": running + waiting,
        }

    def move(self, epoch: int, group: list[int], lease: int) -> dict[str, Any]:
        """Leave the present group and join `group`, backing `lease` more of its pages."""
        if self._preparing != epoch:
            raise SwitchRefused(f"engine {self.engine} was not prepared for epoch {epoch}")
        started = time.perf_counter()
        self._leave()
        left = time.perf_counter()
        self._join(tuple(group), lease, epoch)
        width = self.facade.active_width
        return {
            "leave_s": left - started,
            "join_s": time.perf_counter() - left,
            "kv_tokens": self.facade.pools[width].num_owned * self._page_tokens(width),
        }

    def _leave(self) -> None:
        facade, width = self.facade, len(self.group)
        if width == 1:
            return
        if facade.parked:
            returned = self._parked_call.result()[0]
            self._parked_call = None
            facade.parked = False
        else:
            pool = facade.pools[width]
            returned = pool.withdraw(pool.num_free)
            self._call_workers("flying_release", (returned,))
            facade.active_width = 1
        facade.pools[1].deposit(self.leases.take_back(width, returned))
        self.group = (self.engine,)

    def _join(self, group: Group, lease: int, epoch: int) -> None:
        self.group = group
        width = len(group)
        if width == 1:
            return
        facade = self.facade
        virtual = self.leases.next_virtual_pages(width, lease)
        backing = self.leases.lend(width, virtual, facade.pools[1].withdraw(lease))
        arguments = (width, backing, self._vllm_config.model_config.seed + epoch)
        if group[0] == self.engine:
            self._call_workers("flying_lead", arguments)
            facade.pools[width].deposit(virtual)
            facade.active_width = width
        else:
            self._parked_call = self._call_workers("flying_follow", arguments, non_block=True)
            facade.parked = True

    def prove(self) -> list[dict[str, Any]]:
        """What the workers of this engine's group say they are; from leaders and engines by themselves."""
        proofs: list[list[dict[str, Any]]] = self._call_workers("flying_prove")
        return proofs[0]

    def commit(self, epoch: int, recipients: list[int]) -> dict[str, Any]:
        """The switch holds: step again, and deal the fresh requests kept aside out to `recipients` in turn."""
        if self._preparing != epoch:
            raise SwitchRefused(f"engine {self.engine} was not prepared for epoch {epoch}")
        self.epoch = epoch
        self._go_on()
        held = self.facade.take_held()
        handover: dict[str, bytes] = {}
        for index, recipient in enumerate(recipients):
            share = held[index :: len(recipients)]
            if recipient == self.engine:
                for request in share:
                    self.facade.add_request(request)
            elif share:
                handover[str(recipient)] = pack_requests(share)
        return {"handover": handover}

    def cancel(self, epoch: int) -> None:
        """The switch is off and this engine has not moved (or has moved back): step again as before."""
        if self._preparing != epoch:
            return
        if self._drained is not None:
            self._drained.cancel()
            self._drained = None
        self._go_on()
        if not self.facade.parked:
            self.facade.release_held()

    def _go_on(self) -> None:
        self._preparing = None
        self.facade.holding = False
        self.facade.stopped = False

    # ---- requests from other engines ------------------------------------------------------------------------------

    def adopt(self, packed: bytes) -> int:
        """Take over fresh requests of another engine."""
        requests = unpack_requests(packed, self.facade.structured_output_manager)
        for request in requests:
            self.facade.add_request(request)
        return len(requests)

    def collect(self) -> bytes | None:
        """Give away what reached this parked engine after the switch."""
        if not self.facade.parked or self._preparing is not None or not self.facade.held:
            return None
        return pack_requests(self.facade.take_held())
