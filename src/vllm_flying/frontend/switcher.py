"""Runs a switch from an API server: takes the lock, sends the transaction's calls, announces the result.

May import vllm indirectly (the engine calls). Any API server can switch; the lock file lets one at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

from vllm.logger import init_logger

from vllm_flying.core.pauses import Pauses, Pausing
from vllm_flying.core.precopy import NOTHING_COPIED, Precopied, precopy
from vllm_flying.core.pricing import MoveRates
from vllm_flying.core.topology import Layout, LayoutError
from vllm_flying.core.transaction import Call, Phase, SwitchTransaction
from vllm_flying.frontend.board import BoardGroup, BoardState, LayoutBoard, SwitchPendingError, switch_lock
from vllm_flying.frontend.engines import EngineCalls
from vllm_flying.frontend.metrics import metrics
from vllm_flying.frontend.precopy import copy_ahead
from vllm_flying.frontend.record import PHASES, add_wave, switch_record
from vllm_flying.frontend.tracing import trace_switch
from vllm_flying.settings import SWITCH_METHODS, Settings

logger = init_logger("vllm.flying.switch")

T = TypeVar("T")

# When to look for requests that were on their way to an engine while it was being parked.
COLLECT_AFTER_S = (0.02, 0.1, 0.5, 2.0)
# When to look again for room for requests that a migration left behind; the last for as long as it takes.
FETCH_AFTER_S = (0.5, 0.5, 1.0, 1.0, 2.0, 5.0, 5.0, 5.0, 20.0)
FETCH_LIMIT_S = 30.0
# When to try again while another switch is under way.
PENDING_RETRY_S = 0.01
# Reasons of switches: asked for by hand; for requests left behind; for an urgent one. Hints and the controller name their own.
OPERATOR = "operator"
FETCHING = "paused requests"
URGENT = "urgent request"
# For each phase that undoes a switch or carries it through; the caller's limit doesn't apply to these.
FINISH_LIMIT_S = 60.0
# Waves of a migration that hasn't room for all requests at once: each frees pages for the next.
MAX_WAVES = 32


class SwitchFailed(RuntimeError):
    """The switch did not happen. `record` says what was tried; `timed_out` whether the time limit was the reason."""

    def __init__(self, record: dict[str, Any], timed_out: bool) -> None:
        super().__init__(record["error"])
        self.record = record
        self.timed_out = timed_out


class Switcher:
    """Changes the layout of this server."""

    def __init__(self, engines: EngineCalls, board: LayoutBoard, directory: Path, settings: Settings) -> None:
        self._engines = engines
        self._board = board
        self._directory = directory
        self._settings = settings
        self._rates = MoveRates()
        self._pauses = Pauses(settings.paused_limit_s)
        self._running: SwitchTransaction | None = None
        self._background: set[asyncio.Task[Any]] = set()
        self._fetching: asyncio.Task[None] | None = None
        self._ending_pauses: asyncio.Task[None] | None = None

    def layout(self) -> Layout:
        """The present layout, as announced."""
        return Layout.of([group.engines for group in self._board.read().groups], self._engines.num_engines)

    def last_switch(self) -> dict[str, Any] | None:
        """The record of the last switch, whoever asked for it."""
        return self._board.read().last_switch

    def serving_until_merged(self, width: int) -> tuple[int, ...]:
        """Engines that take requests while a switch with `soft`, if one runs here, waits to merge them into `width`."""
        return () if self._running is None else self._running.serving_until_merged(width)

    def check(self, groups: Iterable[Sequence[int]], method: str) -> Layout:
        """The layout that `groups` name; LayoutError if it can't be, ValueError for an unknown method."""
        if method not in SWITCH_METHODS:
            raise ValueError(f"method {method!r} is unknown; allowed: {', '.join(SWITCH_METHODS)}")
        target = Layout.of(groups, self._engines.num_engines)
        built = {1, *self._settings.built_widths()}
        for group in target.groups:
            if len(group) not in built:
                raise LayoutError(f"group {list(group)}: layouts of width {sorted(built)} were built at start")
        return target

    async def switch(
        self,
        target: Layout,
        method: str = "auto",
        timeout_s: float = 30.0,
        reason: str = OPERATOR,
        last_resort: bool = False,
        precopy_from: int | None = 1,
    ) -> dict[str, Any]:
        """Change to `target`; returns the switch record. SwitchPendingError if one is under way, SwitchFailed else.

        With `last_resort`, begun requests that find no room are computed again. KV is copied ahead if it is more than so
        many times `precopy_bytes`, never for None: that delays the switch. A caller that goes away (a client whose request
        asked for the switch) doesn't end it.
        """
        switching = self._switch(target, method, timeout_s, reason, last_resort, precopy_from)
        _, record = await asyncio.shield(self._later(switching))
        return record

    async def _switch(
        self,
        target: Layout,
        method: str,
        timeout_s: float,
        reason: str,
        last_resort: bool,
        precopy_from: int | None = None,
    ) -> tuple[SwitchTransaction, dict[str, Any]]:
        started_ns, deadline = time.time_ns(), time.perf_counter() + timeout_s
        with switch_lock(self._directory):
            copied = await self._copy_ahead(target, method, timeout_s, precopy_from)
            timeout_s -= copied.took_s
            transaction, record = await self._switch_once(target, method, timeout_s, reason, copied=copied)
            anew = False
            for _ in range(MAX_WAVES):
                left = deadline - time.perf_counter()
                if not transaction.journey.unplaced or left <= 0:
                    break
                if not transaction.journey.arrived:  # the last wave made no room
                    if anew or not last_resort:
                        break
                    anew = True
                try:
                    transaction, wave = await self._switch_once(target, method, left, reason, anew)
                except SwitchFailed as failed:
                    logger.warning("A further wave of the migration failed: %s", failed)
                    break
                record = add_wave(record, wave)
        self._rates = self._rates.learn(record)
        _tell(record, started_ns)
        self._collect_later(transaction)
        if transaction.journey.unplaced and (self._fetching is None or self._fetching.done()):
            self._fetching = self._later(self._fetch_paused())
        if self._pauses.next_due() is not None and (self._ending_pauses is None or self._ending_pauses.done()):
            self._ending_pauses = self._later(self._end_pauses())
        logger.info(
            "Switch %d: %s -> %s (%s, %s) in %.1f ms.",
            record["epoch"], record["from"], record["to"], reason, method, 1e3 * record["seconds"]["total"],
        )  # fmt: skip
        return transaction, record

    async def _copy_ahead(self, target: Layout, method: str, limit_s: float, precopy_from: int | None) -> Precopied:
        most, layout = self._settings.precopy_bytes, self.layout()
        moves = method in ("migrate", "auto") and target != layout
        if precopy_from is None or not most or not moves or self._engines.seem_idle:  # asking them would take a round
            return NOTHING_COPIED
        return await copy_ahead(self._engines, precopy(layout, target, most, precopy_from * most), limit_s / 2)

    async def _switch_once(
        self,
        target: Layout,
        method: str,
        timeout_s: float,
        reason: str,
        last_resort: bool = False,
        copied: Precopied = NOTHING_COPIED,
    ) -> tuple[SwitchTransaction, dict[str, Any]]:
        state, started_ns = self._board.read(), time.time_ns()
        if not state.has_switched:  # from now on aborts must reach every engine
            self._board.publish(replace(state, has_switched=True))
            state = self._board.read()
        transaction = SwitchTransaction(
            state.epoch + 1,
            self.layout(),
            target,
            method,
            rates=self._rates.without_copies() if copied.bytes else self._rates,
            last_resort=last_resort,
            pausing=self._pausing(target, reason),
            urgent_follows=reason == URGENT,
        )
        self._running = transaction
        try:
            seconds = await self._run(transaction, timeout_s)
        finally:
            self._running = None
        record = switch_record(transaction, seconds, reason, copied)
        if transaction.holds:
            self._announce(state, transaction, record)
            self._note_pauses(transaction)
            await self._hand_over(transaction)
        else:  # the epoch is used up: an engine may have seen it
            self._board.publish(replace(state, epoch=transaction.epoch, last_switch=record))
        if transaction.phase is not Phase.COMMITTED:
            _tell(record, started_ns)
            logger.warning("Switch %d %s: %s", transaction.epoch, record["outcome"], record["error"])
            raise SwitchFailed(record, timed_out=transaction.failure == _time_limit(timeout_s))
        return transaction, record

    def _pausing(self, target: Layout, reason: str) -> Pausing:
        now = time.monotonic()
        expected_s = self._pauses.expected(now, self.layout(), target)
        kept = self._pauses.kept(now) if reason == FETCHING else frozenset()
        return Pausing(expected_s, self._settings.flex_delay_weight, kept)

    def _note_pauses(self, transaction: SwitchTransaction) -> None:
        now, journey = time.monotonic(), transaction.journey
        self._pauses.switched(now, transaction.source, transaction.target)
        left = {request_id: journey.offers[request_id].source for request_id in journey.left}
        self._pauses.leave(now, journey.offers.keys(), left, transaction.pausing.expected_s)

    async def _run(self, transaction: SwitchTransaction, timeout_s: float) -> dict[str, float]:
        started = time.perf_counter()
        deadline = started + timeout_s
        seconds = dict.fromkeys(PHASES, 0.0)
        calls = transaction.start()
        pending = self._send(calls, transaction.phase)
        entered, phase = started, transaction.phase
        while not transaction.is_over:
            limit = deadline if transaction.is_bounded else entered + FINISH_LIMIT_S
            done, _ = await asyncio.wait(
                pending, timeout=max(0.0, limit - time.perf_counter()), return_when=asyncio.FIRST_COMPLETED
            )
            calls = []
            if not done:
                calls = transaction.failed(None, _time_limit(timeout_s if limit == deadline else FINISH_LIMIT_S))
            for task in done:
                sent = pending.pop(task)
                if sent[1] is not transaction.phase:
                    continue  # an answer to a phase that was given up
                error = task.exception()
                if error is None:
                    calls += transaction.replied(sent[0].engine, task.result())
                else:
                    calls += transaction.failed(sent[0].engine, f"engine {sent[0].engine}: {error}")
            if transaction.phase is not phase:
                now = time.perf_counter()
                if phase.value in seconds:
                    seconds[phase.value] += now - entered
                entered, phase = now, transaction.phase
            pending.update(self._send(calls, transaction.phase))
        seconds["total"] = time.perf_counter() - started
        return seconds

    def _send(self, calls: list[Call], phase: Phase) -> dict[asyncio.Task[Any], tuple[Call, Phase]]:
        return {
            asyncio.ensure_future(self._engines.call(call.engine, call.operation, call.arguments)): (call, phase)
            for call in calls
        }

    def _announce(self, state: BoardState, transaction: SwitchTransaction, record: dict[str, Any]) -> None:
        kv_tokens = {group.engines: group.kv_tokens for group in state.groups} | transaction.journey.capacity
        for group in transaction.target.groups:
            if group[0] in transaction.committed:
                kv_tokens[group] = transaction.committed[group[0]]["kv_tokens"]
        groups = tuple(BoardGroup(group, kv_tokens[group]) for group in transaction.target.groups)
        since = state.since if transaction.target == transaction.source else time.time()
        self._board.publish(replace(state, epoch=transaction.epoch, groups=groups, last_switch=record, since=since))

    async def _hand_over(self, transaction: SwitchTransaction) -> None:
        for reply in transaction.committed.values():
            for recipient, packed in reply["handover"].items():
                await self._engines.call(int(recipient), "adopt", {"packed": packed})

    def _collect_later(self, transaction: SwitchTransaction) -> None:
        parked = [engine for engine in transaction.engines if transaction.target.group_of(engine)[0] != engine]
        if parked:
            self._later(self._collect(parked, transaction.target))

    def _later(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled():
            task.exception()  # is told to whoever waits; nobody may do so any more

    async def _fetch_paused(self) -> None:
        """Requests that found no room move as soon as there is some, or are computed again after long enough.

        A pause must not become for ever, whatever the layout is by then.
        """
        waited = 0.0
        for wait_s in chain(FETCH_AFTER_S, repeat(FETCH_AFTER_S[-1])):
            await asyncio.sleep(wait_s)
            waited += wait_s
            try:
                last_resort = waited >= self._settings.paused_limit_s
                transaction, _ = await self._switch(self.layout(), "migrate", FETCH_LIMIT_S, FETCHING, last_resort)
            except (SwitchPendingError, SwitchFailed) as error:
                logger.debug("Paused requests could not be fetched now: %s", error)
                continue
            if not transaction.journey.unplaced:
                return

    async def _end_pauses(self) -> None:
        """Requests that were left paused for its price move once their pause is longer than was expected."""
        while (due := self._pauses.next_due()) is not None:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            try:
                await self._fetch_overdue()
            except (SwitchPendingError, SwitchFailed) as error:
                logger.debug("Requests could not be fetched from a pause now: %s", error)
                await asyncio.sleep(FETCH_AFTER_S[0])

    async def _fetch_overdue(self) -> None:
        overdue = self._pauses.overdue(time.monotonic())
        if overdue:  # their layout hasn't returned meanwhile
            await self._switch(self.layout(), "migrate", FETCH_LIMIT_S, FETCHING, False)
            self._pauses.forget(overdue)

    async def end_pauses(self) -> bool:
        """Fetch all that was left paused for its price, for somebody who needs the pages; False if there is nothing."""
        if self._pauses.next_due() is None:
            return False
        self._pauses.end(time.monotonic())
        deadline = time.monotonic() + self._settings.switch_timeout_s
        while time.monotonic() < deadline:
            try:
                await asyncio.shield(self._later(self._fetch_overdue()))
            except SwitchPendingError:
                await asyncio.sleep(PENDING_RETRY_S)
            except SwitchFailed as failed:
                logger.warning("Requests could not be fetched from a pause: %s", failed)
                return False
            else:
                return True
        return False

    async def _collect(self, parked: list[int], layout: Layout) -> None:
        """Hand on requests that reached an engine after it was parked, before every router knew."""
        waited = 0.0
        for moment in COLLECT_AFTER_S:
            await asyncio.sleep(moment - waited)
            waited = moment
            for engine in parked:
                try:
                    packed = await self._engines.call(engine, "collect")
                    if packed:
                        await self._engines.call(layout.group_of(engine)[0], "adopt", {"packed": packed})
                except Exception as error:  # the server is going down, or an engine failed: vLLM reports it
                    logger.debug("Collecting from engine %d ended: %s", engine, error)
                    return


def _tell(record: dict[str, Any], started_ns: int) -> None:
    metrics().switched(record)
    trace_switch(record, started_ns)


def _time_limit(timeout_s: float) -> str:
    return f"the time limit of {timeout_s:.3g} s passed"
