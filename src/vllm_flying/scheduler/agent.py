"""One engine's part in a switch: stop at a step boundary, change sides, go on.

May import vllm's types. Called by the executor on the engine's main thread between steps, so nothing here runs beside
a step. The switcher in an API server sends the calls; see docs/architecture.md for their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
from vllm.logger import init_logger

from vllm_flying.core.contents import ALONE, PageContents, from_bitmap, to_bitmap
from vllm_flying.core.leases import PageLeases, Pages, as_pages
from vllm_flying.core.pricing import MoveRates
from vllm_flying.core.routing import deal
from vllm_flying.core.topology import Group
from vllm_flying.scheduler import departures, registry
from vllm_flying.scheduler.arrivals import Arrivals
from vllm_flying.scheduler.drain import Drain, Finished
from vllm_flying.scheduler.errors import SwitchRefused
from vllm_flying.scheduler.facade import FlyingScheduler
from vllm_flying.scheduler.handover import pack_requests, unpack_requests
from vllm_flying.scheduler.limits import kv_tokens_needed, page_tokens
from vllm_flying.scheduler.precopy import Precopy
from vllm_flying.scheduler.reports import EngineReports, WorkerCall
from vllm_flying.settings import Settings

logger = init_logger("vllm.flying.engine")

# What a front end takes to send a request to the group that was formed for it; a few milliseconds do.
AWAIT_URGENT_S = 0.025
Proof = list[dict[str, Any]]
"""What the workers of a group say they are."""


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
        self._drain: Drain | None = None
        self._parked_call: Any = None
        self._resting: Future[dict[str, Any]] | None = None
        self._draining = False
        self._finishing = 0
        self._hold_prefixes: Callable[[], int] = lambda: 0
        self._arrivals: Arrivals | None = None
        self._reports = EngineReports(self, call_workers)
        self.precopy = Precopy(self, call_workers)
        registry.register_agent(vllm_config, self)

    @property
    def facade(self) -> FlyingScheduler:
        """The scheduler of this engine."""
        facade: FlyingScheduler = registry.facade_of(self._vllm_config)
        return facade

    @cached_property
    def leases(self) -> PageLeases:
        """The leases of this engine's pages."""
        return PageLeases(self._num_pages)

    @cached_property
    def contents(self) -> PageContents:
        """What this engine's pages hold."""
        return PageContents(self._num_pages)

    @property
    def _num_pages(self) -> int:
        return int(self.facade.kv_cache_config.num_blocks)

    @property
    def arrivals(self) -> Arrivals:
        """Requests on their way into this engine."""
        if self._arrivals is None:
            self._arrivals = Arrivals(self.facade)
            self.facade.on_abort = self._arrivals.abort
        return self._arrivals

    @property
    def workers_follow(self) -> bool:
        """Whether this engine's workers run another engine's steps."""
        return self._parked_call is not None

    def let_followers_go(self) -> None:
        """Before a shutdown: end the group that this engine leads, without any bookkeeping."""
        if len(self.group) > 1 and self.group[0] == self.engine:
            self._call_workers("flying_release", (as_pages([]), as_pages([])))
            self.group = (self.engine,)

    def handle(self, operation: str, arguments: dict[str, Any]) -> Any:
        """Run one operation by name; its result is made of plain values, or is a Future of that."""
        operations: dict[str, Callable[..., Any]] = {
            "status": self._reports.status,
            "drain": self.drain,
            "prepare": self.prepare,
            "move": self.move,
            "admit": self.admit,
            "transfer": self.transfer,
            "prove": self.prove,
            "release": self.release,
            "commit": self.commit,
            "extend": self.extend,
            "cancel": self.cancel,
            **self.precopy.operations,
            "adopt": self.adopt,
            "collect": self.collect,
            "probe": self._reports.probe,
            "memory": self._reports.memory,
        }
        if operation not in operations:
            raise SwitchRefused(f"unknown operation {operation!r}; known: {sorted(operations)}")
        return operations[operation](**arguments)

    @property
    def switching(self) -> int | None:
        """The epoch for which this engine is at rest, comes to rest or drains."""
        return self._drain.under_way if self._preparing is None and self._drain is not None else self._preparing

    # ---- a switch, step by step -----------------------------------------------------------------------------------

    def drain(self, epoch: int) -> Finished | Future[Finished]:
        """Let what has begun finish, ahead of `prepare`; until then this engine goes on, or serves again."""
        self._check_unprepared(epoch)
        self._drain = Drain(self.facade, epoch)
        return self._drain.begin()

    def _check_unprepared(self, epoch: int) -> None:
        if self.switching is not None:
            raise SwitchRefused(f"engine {self.engine} is being switched already (epoch {self.switching})")
        if epoch <= self.epoch:
            raise SwitchRefused(f"engine {self.engine} is at epoch {self.epoch}; epoch {epoch} is over")

    def prepare(
        self, epoch: int, method: str, rates: Sequence[float | None] = (None, None), prefixes_to: int = 0
    ) -> dict[str, Any] | Future[dict[str, Any]]:
        """Come to rest: keep new and fresh requests aside, let steps in flight end.

        With `drain`, and with `auto` where that is sooner than moving them at `rates` (see MoveRates), begun requests
        finish first. Hot cached prefixes are to follow into a layout of the width `prefixes_to`; 0: they stay.
        """
        self._check_unprepared(epoch)
        self._preparing = epoch
        self.precopy.drop()
        facade = self.facade
        facade.holding = True
        if not facade.parked:
            facade.deferral.put_back(facade.active)
            facade.set_aside_fresh()
        page_bytes = departures.page_bytes(facade)
        self._hold_prefixes = partial(facade.prefixes.hold, prefixes_to, MoveRates(*rates), page_bytes)
        drains = method == "drain" or (method == "auto" and departures.finishing_pays(facade, MoveRates(*rates)))
        self._draining = drains and not facade.parked and facade.active.has_requests()
        self._finishing = sum(facade.active.get_request_counts()) if self._draining else 0
        facade.stopped = not self._draining
        if self._draining or facade.steps_in_flight:
            self._resting = Future()
            return self._resting
        return self._at_rest()

    def after_step(self) -> None:
        """An engine that comes to rest says so once its last step, or its last request, is done."""
        if self._drain is not None:
            self._drain.after_step()
        if self._resting is None or self.facade.steps_in_flight:
            return
        if not self._draining or not self.facade.active.has_unfinished_requests():
            resting, self._resting = self._resting, None
            resting.set_result(self._at_rest())

    def _at_rest(self) -> dict[str, Any]:
        facade = self.facade
        facade.stopped = True
        running, waiting = (0, 0) if facade.parked else facade.active.get_request_counts()
        leading = not facade.parked and facade.active_width > 1
        prefix_pages = self._hold_prefixes()
        return {
            "free_pages": facade.pools[1].num_free,
            "returnable_pages": facade.pools[facade.active_width].num_free if leading else 0,
            "begun": running + waiting,
            "finished": self._finishing,
            "largest_aside": max((kv_tokens_needed(each, facade.max_model_len) for each in facade.held), default=0),
            "paused_widths": departures.paused_widths(facade),
            "prefix_pages": prefix_pages,
            "kept": departures.kept(facade),
            "page_tokens": page_tokens(self.facade, ALONE),
        }

    def move(
        self, epoch: int, group: list[int], lease: int, offering: bool, proving: bool, carrying: bool, undoing: bool
    ) -> dict[str, Any]:
        """Leave the present group and join `group`, backing `lease` more of its pages.

        With `offering` the reply lists the begun requests that the new layout doesn't run, with `proving` it has what
        `prove` says, for which a leader waits until all members have joined. Unless `carrying`, prefixes stay. When
        `undoing`, the group that is left keeps what it had before: who didn't join it hears of no page given back.
        """
        self._check_prepared(epoch)
        if not carrying:
            self.facade.prefixes.let_go()
        self._drop_arrivals()
        proof = self._leave(undoing)
        offers, staying = self._offers(tuple(group)) if offering else ([], 0)
        intact = as_pages([])
        if len(group) > 1:
            intact, proof = self._join(tuple(group), lease, epoch, proving)
        elif proving and not proof:
            proof = self.prove()
        pool = self.facade.pools[self.facade.active_width]
        return {
            "free_tokens": pool.num_free * page_tokens(self.facade, self.facade.active_width),
            "capacity_tokens": (self._num_pages - 1) * page_tokens(self.facade, self.facade.active_width),
            "page_tokens": page_tokens(self.facade, self.facade.active_width),
            "prefill_s": self.facade.meter.costs[self.facade.active_width].prompt_token_s,
            "offers": offers,
            "prefixes": self.facade.prefixes.offers(self.engine) if offering else [],
            "staying": staying,
            "proof": proof if proving else [],
            "intact": to_bitmap(intact, self._num_pages),
        }

    def _check_prepared(self, epoch: int) -> None:
        if self._preparing != epoch:
            raise SwitchRefused(f"engine {self.engine} was not prepared for epoch {epoch}")

    def kv_tokens(self) -> int:
        """What the present group's pages hold."""
        width = self.facade.active_width
        return int(self.facade.pools[width].num_owned * page_tokens(self.facade, width))

    def _offers(self, group: Group) -> tuple[list[dict[str, Any]], int]:
        """The begun requests that the new layout doesn't run, and how many more of them can't move."""
        begun = departures.begun_requests(self.facade, len(group) if group[0] == self.engine else None)
        movable = {width: [r for r in requests if departures.can_move(r)] for width, requests in begun.items()}
        staying = sum(len(requests) - len(movable[width]) for width, requests in begun.items())
        ids = {width: [request.request_id for request in requests] for width, requests in movable.items() if requests}
        states: dict[str, bytes] = self._call_workers("flying_export", (ids,))[0] if ids else {}
        offers = [
            departures.make_offer(self.facade, width, request, states.get(request.request_id))
            for width, requests in movable.items()
            for request in requests
        ]
        return offers, staying

    def _leave(self, undoing: bool) -> Proof:
        """Returns what the workers say once they are alone again; nothing if they were before."""
        facade, width = self.facade, len(self.group)
        if width == 1:
            return []
        if facade.parked:
            returned, written, proof = cast("tuple[Pages, Pages, Proof]", self._parked_call.result()[0])
            self._parked_call = None
            facade.parked = False
        else:
            pool = facade.pools[width]
            returned = pool.withdraw_latest() if undoing else pool.withdraw(pool.num_free)
            written = pool.take_written()
            proof = cast(Proof, self._call_workers("flying_release", (returned, written))[0])
            facade.active_width = 1
        self.contents.written(width, self.leases.physical(width, written))
        physical = self.leases.take_back(width, returned)
        facade.pools[1].deposit(physical)
        facade.pools[1].confirm(physical[~np.isin(returned, written)])
        self.group = (self.engine,)
        return proof

    def _join(self, group: Group, lease: int, epoch: int, proving: bool) -> tuple[Pages, Proof]:
        """Returns the group's pages that still hold what the group wrote last, as far as this engine knows."""
        self.group = group
        facade, width, proof = self.facade, len(group), []
        virtual, physical = self._lend(lease)
        arguments = (width, *self.leases.backing(width), self._vllm_config.model_config.seed + epoch)
        if group[0] == self.engine:
            proof = self._call_workers("flying_lead", (*arguments, proving))[0]
            facade.pools[width].deposit(virtual)
            facade.active_width = width
        else:
            self._parked_call = self._call_workers("flying_follow", arguments, non_block=True)
            facade.parked = True
        return self.contents.intact(width, virtual, physical), proof

    def _lend(self, count: int) -> tuple[Pages, Pages]:
        """Lend `count` more free pages to the present group: its own numbers for them, and this engine's."""
        width, pool = len(self.group), self.facade.pools[1]
        self.contents.written(ALONE, pool.take_written())
        virtual = self.leases.next_virtual_pages(width, count)
        of_group, holding = self.contents.in_place(width)
        wanted = holding[np.isin(of_group, virtual) & ~self.leases.is_lent(holding)]
        physical = self.contents.choose(width, virtual, pool.withdraw(count, first=wanted))
        self.leases.lend(width, virtual, physical)
        return virtual, physical

    def admit(
        self, epoch: int, packed: list[bytes], recomputed: list[str], intact: bytes, capacity: int, prefixes: list[Any]
    ) -> dict[str, Any]:
        """Leaders: find pages for begun requests, `recomputed` ones aside, then for `prefixes`. `intact` as in `commit`."""
        self._check_prepared(epoch)
        self._confirm_prefixes(intact)
        admitted = self.arrivals.admit(packed, self._kernel_block_tokens, capacity, recomputed)
        return {"admitted": admitted, "prefixes": self.facade.prefixes.admit(prefixes, self._kernel_block_tokens)}

    @cached_property
    def _kernel_block_tokens(self) -> int:
        return int(self._call_workers("flying_kernel_block_tokens")[0])

    def transfer(self, epoch: int, moves: list[dict[str, Any]], states: dict[str, bytes]) -> dict[str, Any]:
        """Leaders: have the group's workers copy KV and prove; all groups concerned must be told at once."""
        self._check_prepared(epoch)
        replies: list[dict[str, Any]] = self._call_workers("flying_together", ("transfer", moves, states))
        sent, seconds = sum(r["bytes"] for r in replies), max(r["seconds"] for r in replies)
        return {"bytes": sent, "seconds": seconds, "proof": replies[0]["proof"]}

    def prove(self) -> Proof:
        """From leaders and engines by themselves."""
        proofs: list[Proof] = self._call_workers("flying_together", ("prove",))
        return proofs[0]

    def release(self, epoch: int, departed: dict[int, list[str]], forget: dict[int, list[str]]) -> dict[str, Any]:
        """Let go of requests that have arrived elsewhere, by the width they were in; leaders: in all workers."""
        self._check_prepared(epoch)
        gone: list[str] = []
        for width, ids in departed.items():
            gone += departures.release(self.facade, int(width), ids)
        self.facade.prefixes.let_go()
        if not self.facade.parked:
            self._call_workers("flying_together", ("forget", forget))
        reclaimed = departures.reclaim(self.facade)
        return {"gone": gone, "reclaimed": reclaimed, "free_pages": self.facade.pools[1].num_free}

    def commit(
        self,
        epoch: int,
        recipients: list[int],
        gone: list[str] | None = None,
        returned: dict[int, list[int]] | None = None,
        extend: int = 0,
        intact: bytes = b"",
        capacity: dict[int, int] | None = None,
        urgent_follows: bool = False,
    ) -> dict[str, Any]:
        """The switch holds: step again, and deal the fresh requests kept aside out to `recipients` in turn.

        `gone`: requests that were aborted on their way; `returned`: pages of former groups that nobody holds any
        more; `extend`: how many free pages every member of the present group lends it now; `intact`: bitmap of the
        group's pages that hold, on every member, what the group wrote into them before; `capacity`: KV tokens that
        the groups of recipients will hold; `urgent_follows`: the switch was for an urgent request, which comes now.
        """
        self._check_prepared(epoch)
        self.epoch = epoch
        self.facade.meter.group_changed()
        self._confirm_prefixes(intact)
        self._take_reclaimed(returned or {})
        lent = self._lend(extend) if extend else None
        self.facade.resize(self.kv_tokens() + extend * page_tokens(self.facade, self.facade.active_width))
        dropped = self.arrivals.commit(gone or [])
        self.facade.prefixes.commit()
        if dropped:
            self._call_workers("flying_together", ("forget", {self.facade.active_width: dropped}))
        self._go_on()
        if urgent_follows and len(self.group) > 1 and not self.facade.parked:
            self.facade.await_urgent(AWAIT_URGENT_S)
        handover = self._deal(recipients, {int(leader): tokens for leader, tokens in (capacity or {}).items()})
        lent_bytes = [pages.tobytes() for pages in lent] if lent else None
        return {"handover": handover, "lent": lent_bytes, "kv_tokens": self.kv_tokens()}

    def _deal(self, recipients: list[int], capacity: dict[int, int]) -> dict[str, bytes]:
        """What was kept aside, this engine's share placed; returns the others' shares."""
        held, handover = self.facade.take_held(), {}
        needed = [kv_tokens_needed(request, self.facade.max_model_len) for request in held]
        for recipient, places in deal(needed, recipients, capacity).items():
            share = [held[place] for place in places]
            if recipient == self.engine:
                for request in share:
                    self.facade.place(request)
            elif share:
                handover[str(recipient)] = pack_requests(share)
        return handover

    def _confirm_prefixes(self, intact: bytes) -> None:
        if len(self.group) > 1 and not self.facade.parked:
            self.facade.pools[len(self.group)].confirm(from_bitmap(intact))

    def _take_reclaimed(self, returned: dict[int, list[int]]) -> None:
        pool = self.facade.pools[1]
        for width, pages in returned.items():
            physical = self.leases.take_back(int(width), pages)
            # What this engine had cached in them was forgotten when it left the group; what the group had is still there.
            pool.deposit(physical)

    def extend(self, epoch: int, virtual: bytes, physical: dict[str, bytes]) -> dict[str, Any]:
        """Leaders: use more pages, which every member has lent; `physical` has each member's own. int32 each."""
        if self.epoch != epoch or len(self.group) == 1:
            raise SwitchRefused(f"engine {self.engine} leads no group at epoch {epoch} any more")
        self._call_workers("flying_together", ("extend", virtual, physical))
        pool = self.facade.pools[len(self.group)]
        pool.deposit(np.frombuffer(virtual, dtype=np.int32))
        pool.confirm([])
        return {"kv_tokens": self.kv_tokens()}

    def _drop_arrivals(self) -> None:
        self.facade.prefixes.drop()
        dropped = self.arrivals.drop()
        if dropped:
            self._call_workers("flying_together", ("forget", {self.facade.active_width: dropped}))

    def cancel(self, epoch: int) -> None:
        """The switch is off and this engine has not moved (or has moved back): step again as before."""
        if self._drain is not None:
            self._drain.cancel(epoch)
        if self._preparing != epoch:
            return
        if self._resting is not None:
            self._resting.set_result({})  # nobody waits for it any more
            self._resting = None
        self.facade.prefixes.let_go()
        self._confirm_prefixes(b"")
        self._go_on()
        if not self.facade.parked:
            self.facade.release_held()

    def _go_on(self) -> None:
        self._preparing = None
        self.facade.holding = False
        self.facade.stopped = False
        self.facade.has_resumed = True

    # ---- requests from other engines ------------------------------------------------------------------------------

    def adopt(self, packed: bytes) -> int:
        """Take over fresh requests of another engine."""
        requests = unpack_requests(packed, self.facade.structured_output_manager)
        self.facade.adopt(requests)
        return len(requests)

    def collect(self) -> bytes | None:
        """Give away what reached this parked engine after the switch."""
        if not self.facade.parked or self._preparing is not None or not self.facade.held:
            return None
        return pack_requests(self.facade.take_held())
