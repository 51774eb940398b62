"""Runs the controller in one of the API servers: observe the engines, decide, switch.

May import vllm indirectly. A lock file lets one API server do it; another takes over when that one dies.
"""

from __future__ import annotations

import asyncio
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from vllm_flying.controller.controller import Controller, Decision
from vllm_flying.controller.lookout import Lookout
from vllm_flying.controller.observation import Observation, RateTracker
from vllm_flying.controller.policies import policy_by_name
from vllm_flying.controller.realised_gain import GainMeasurement
from vllm_flying.frontend.audit import AuditLog
from vllm_flying.frontend.board import SwitchPendingError, file_lock
from vllm_flying.frontend.engines import EngineCalls
from vllm_flying.frontend.metrics import metrics
from vllm_flying.frontend.observe import observe
from vllm_flying.frontend.switcher import OPERATOR, Switcher, SwitchFailed
from vllm_flying.settings import Settings

logger = init_logger("vllm.flying.controller")

LOCK_FILE = "controller.lock"
DECISIONS_FILE = "decisions.jsonl"
RETRY_S = 5.0
STATUS_LIMIT_S = 30.0
CONTROLLER = "controller"
# A better layout some steps sooner is worth more than a short pause: KV is copied ahead of it from so many rounds on.
PRECOPY_FROM = 16


class ControlLoop:
    """The controller's body: its eyes are status calls, its hand is the switcher."""

    def __init__(self, engines: EngineCalls, switcher: Switcher, directory: Path, settings: Settings) -> None:
        self._engines = engines
        self._switcher = switcher
        self._directory = directory
        self._settings = settings
        self._rates = RateTracker()
        self._lookout = Lookout()
        self._seen_epoch = 0
        self._measurement: GainMeasurement | None = None
        self.controller = Controller(
            policy_by_name(settings.policy), settings.margin, settings.patience_s, settings.cooldown_s
        )
        self._audit = AuditLog(
            directory / DECISIONS_FILE, Path(settings.audit_log) if settings.audit_log is not None else None
        )

    async def run(self) -> None:
        """Until the server ends."""
        while True:
            try:
                with file_lock(self._directory / LOCK_FILE):
                    await self._govern()
            except BlockingIOError:  # another API server does it
                await asyncio.sleep(RETRY_S)
            except Exception:
                logger.exception("The controller failed; it looks again in %g s.", RETRY_S)
                await asyncio.sleep(RETRY_S)

    async def _govern(self) -> None:
        await self._engines.call_all("probe")
        logger.info("The controller runs here: policy %s.", self._settings.policy)
        while True:
            await asyncio.sleep(self._settings.interval_s)
            if not self._lookout.is_due(time.monotonic(), self._engines.unfinished):
                continue
            try:
                await self._look()
            except (SwitchPendingError, SwitchFailed, TimeoutError) as error:
                logger.debug("The controller's turn came to nothing: %s", error)

    async def _look(self) -> None:
        statuses = await asyncio.wait_for(self._engines.call_all("status"), STATUS_LIMIT_S)
        if any(status["state"] == "switching" for status in statuses):
            return
        layout = self._switcher.layout()
        now = time.monotonic()
        self._respect_operators(now)
        seen = observe(
            now,
            layout,
            self._settings.built_widths(),
            statuses,
            self._rates,
            wall_clock=datetime.now().astimezone(),
            schedule=self._settings.schedule,
            targets=self._settings.targets(),
        )
        metrics().observed(seen)
        if self._measurement is not None and self._measurement.look(seen):
            self._conclude_measurement()
        failures = self.controller.failures
        decision = self.controller.decide(seen)
        if self.controller.failures > failures:
            metrics().policy_failed()
        self._lookout.saw(seen, better_layout=decision.plan is not None)
        if decision.plan is None or not decision.act or self._settings.dry_run:
            if self._audit.note(decision, layout.to_lists()) and decision.plan is not None:
                metrics().decided(decision.plan.rule, False, decision.plan.gain_s)
            return
        await self._act(decision, seen)

    def _respect_operators(self, now: float) -> None:
        last = self._switcher.last_switch()
        if last is not None and last["epoch"] != self._seen_epoch:
            self._seen_epoch = last["epoch"]
            if last["reason"] == OPERATOR:
                self.controller.hold(now + self._settings.manual_hold_s)

    async def _act(self, decision: Decision, seen: Observation) -> None:
        plan = decision.plan
        assert plan is not None
        record: dict[str, Any] | None = None
        try:
            record = await self._switcher.switch(
                plan.layout,
                self._settings.switch_method,
                self._settings.switch_timeout_s,
                f"{CONTROLLER}: {plan.rule}",
                precopy_from=None if plan.urgent else PRECOPY_FROM,
            )
            seconds = record["seconds"]  # a soft switch delays nobody while it waits
            self.controller.switched(time.monotonic(), seconds["total"] - seconds["drain"])
            metrics().decided(plan.rule, True, plan.gain_s)
            self._conclude_measurement()
            self._measurement = GainMeasurement(plan, seen) if plan.gain_s > 0 else None
        except SwitchFailed as failed:
            record = failed.record
            self.controller.switched(time.monotonic(), self._settings.switch_timeout_s)
            raise
        finally:
            if record is not None:
                self._audit.note(decision, seen.layout.to_lists(), record)

    def _conclude_measurement(self) -> None:
        """Say what the last switch gained, as far as it was followed."""
        measurement, self._measurement = self._measurement, None
        if measurement is not None:
            gain = measurement.result()
            metrics().realised(measurement.plan.rule, gain.gain_s)
            self._audit.realised(measurement.plan, measurement.decided_on.layout.to_lists(), gain)
