"""The target side of a migration: pages for requests that come from another layout, and their place in the schedule.

May import vllm. A request enters as stock vLLM resumes one whose KV came from a connector: preempted, with its blocks
allocated and its computed tokens set. Blocks that this layout has cached already are used, so a shared prefix is
copied once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import Request, RequestStatus

from vllm_flying.scheduler.facade import FlyingScheduler
from vllm_flying.scheduler.handover import unpack_begun
from vllm_flying.scheduler.limits import grant

logger = init_logger("vllm.flying.engine")


class Arrivals:
    """Requests admitted in a switch that isn't committed yet."""

    def __init__(self, facade: FlyingScheduler) -> None:
        self._facade = facade
        self._requests: dict[str, Request] = {}
        self._aborted: set[str] = set()

    def admit(
        self, packed: Sequence[bytes], kernel_block_tokens: int, capacity: int, recomputed: Collection[str] = ()
    ) -> dict[str, Any]:
        """Allocate pages in the active layout; what finds no room is left out. `recomputed` requests need none yet.

        `capacity`: KV tokens that the layout will hold, which limits what requests grow to.
        Returns for each admitted request its pages and the kernel blocks that must be copied into them.
        """
        admitted = {}
        for raw in packed:
            request = unpack_begun(raw, self._facade.structured_output_manager)
            if request is None:
                continue
            grant(request, capacity)
            if request.request_id in recomputed:
                request.num_computed_tokens = 0
                request.num_preemptions += 1  # or it would look like one that no worker has seen
            computed = request.num_computed_tokens
            cached = self._allocate(request)
            if cached is None:
                continue
            self._requests[request.request_id] = request
            first, last = cached // kernel_block_tokens, -(-computed // kernel_block_tokens)
            (pages,) = self._manager.get_block_ids(request.request_id) if computed else ([],)
            admitted[request.request_id] = {"target_pages": list(pages), "first_block": first, "last_block": last}
        return admitted

    @property
    def _manager(self) -> Any:
        return self._facade.active.kv_cache_manager

    def _allocate(self, request: Request) -> int | None:
        """Blocks for the computed tokens; returns how many of these are cached here, None if there is no room."""
        self._facade.rehash(request, self._facade.active_width)
        computed, request.num_computed_tokens = request.num_computed_tokens, 0
        if not computed:
            return 0
        hit_blocks, hit, _ = self._manager.get_computed_blocks(request)
        if hit >= computed:  # keep a token to copy, so that the request's own count stays what it was
            hit_blocks, hit = self._manager.empty_kv_cache_blocks, 0
        allocated = self._manager.allocate_slots(
            request,
            computed - hit,
            num_new_computed_tokens=hit,
            new_computed_blocks=hit_blocks if hit else None,
            has_scheduled_reqs=False,
        )
        request.num_computed_tokens = computed
        return None if allocated is None else hit

    def abort(self, request_ids: Iterable[str] | None) -> list[Request]:
        """Requests aborted between admission and commit, all of them for None: they are finished at the commit.

        They are returned, so that after an abort of everything vLLM tells clients of them even if their source has let
        go of them. If it hasn't, clients are told twice; vLLM's front end takes no notice of the second time.
        """
        aborted = self._requests.keys() if request_ids is None else self._requests.keys() & set(request_ids)
        self._aborted.update(aborted)
        return [self._requests[request_id] for request_id in aborted]

    def commit(self, gone: Iterable[str]) -> list[str]:
        """Schedule what has arrived, except for requests that were aborted on the way, which are returned."""
        dropped = [request_id for request_id in gone if request_id in self._requests]
        for request_id in dropped:
            self._manager.free(self._requests.pop(request_id))
        scheduler = self._facade.active
        self._aborted.update(self._facade.unknown_aborts.of(self._requests.values()))
        for request in self._requests.values():
            scheduler.add_request(request)
            self._facade.note_urgent(request)
            if request.events and request.events[-1].type == EngineCoreEventType.QUEUED:
                request.events.pop()  # it was queued when it came to the server
        if self._aborted:
            scheduler.finish_requests(self._aborted, RequestStatus.FINISHED_ABORTED)
        self._requests, self._aborted = {}, set()
        return dropped

    def drop(self) -> list[str]:
        """The switch is undone: free the pages and forget that they were ever filled."""
        dropped = list(self._requests)
        pool = self._manager.block_pool
        for request in self._requests.values():
            blocks = self._manager.get_blocks(request.request_id).blocks
            self._manager.free(request)
            for block in (block for group in blocks for block in group):
                if block.block_hash is not None and block.ref_cnt == 0:
                    pool._maybe_evict_cached_block(block)
        self._requests, self._aborted = {}, set()
        return dropped
