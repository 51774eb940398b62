"""An engine's hot cached prefixes: seen when requests hit them, held while they are copied, cached where they arrive.

May import vllm. Cached prefixes live in free pages, which a switch hands about. One that is to follow is therefore held
as a request holds its blocks, from the moment the engine rests until the switch releases or cancels it. Where it arrives
it has blocks as a request has, and at the commit they become what a finished request leaves: free, with their hash.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from vllm_flying.core.prefixes import FREE_SHARE, HitPrefix, HitPrefixes, MoveBounds, worth_moving
from vllm_flying.core.pricing import MoveRates
from vllm_flying.scheduler.limits import page_tokens

if TYPE_CHECKING:
    from vllm_flying.scheduler.facade import FlyingScheduler

# Its hash is never asked for: stock vLLM looks up all tokens of a request but the last.
ANY_TOKEN = 0


class CachedPrefixes:
    """Both ends of the way: what this engine holds for others, and what it has pages for."""

    def __init__(self, facade: FlyingScheduler, staging_bytes: int) -> None:
        self._facade = facade
        self._most_bytes = staging_bytes * facade.engine_tp
        """So a switch gets longer by about one round of the transfer, in which every worker stages so much."""
        self._hit = {width: HitPrefixes() for width in facade.schedulers}
        self._held: list[tuple[HitPrefix, list[Any]]] = []
        self._held_width = 1
        self._arriving: dict[str, Request] = {}
        self._was_reset = False
        """The cache was reset since the switch began: no prefix from before counts."""

    # ---- source ---------------------------------------------------------------------------------------------------

    def saw(self, width: int, scheduler_output: Any, requests: Mapping[str, Request]) -> None:
        """A step was scheduled: note what its new requests found cached.

        Prefixes that hash by more than tokens and salt aren't noted, nor is what a resumed request brings along.
        """
        for new in scheduler_output.scheduled_new_reqs:
            request = requests[new.req_id]
            length, stats = new.num_computed_tokens, request.prefill_stats
            if not length or stats is None or stats.num_cached_tokens != length or request.num_preemptions:
                continue
            if request.mm_features or request.lora_request or request.prompt_token_ids is None:
                continue
            if request.prompt_embeds is None:
                hashes = request.block_hashes[: length // page_tokens(self._facade, width)]
                self._hit[width].hit(time.monotonic(), request.prompt_token_ids, length, request.cache_salt, hashes)

    def hold(self, target_width: int, rates: MoveRates, page_bytes: int) -> int:
        """Hold what is to follow into a layout of `target_width`, nothing for 0; returns how many free pages that took.

        `page_bytes`: of a page on one engine.
        """
        self.let_go()
        self._was_reset = False
        facade, width = self._facade, self._facade.active_width
        if not target_width or facade.parked:
            return 0
        hot = self._hit[width].hot(time.monotonic())
        found = [(prefix, self._blocks_of(prefix, width)) for prefix in hot]
        wide, free = max(width, target_width), facade.pools[width].num_free
        bounds = MoveBounds(
            most_pages=free // FREE_SHARE,
            most_bytes=self._most_bytes,
            page_tokens=page_tokens(self._facade, width),
            page_bytes=page_bytes * width,
            travelling=1 - min(width, target_width) / wide,
            rates=rates,
            prefill_s=facade.meter.costs[target_width].prompt_token_s,
        )
        chosen = worth_moving([[block.block_id for block in blocks] for _, blocks in found], bounds)
        self._held_width, self._held = width, [found[index] for index in chosen]
        for _, blocks in self._held:
            self._pool(width).touch(blocks)
        return free - facade.pools[width].num_free

    def _blocks_of(self, prefix: HitPrefix, width: int) -> list[Any]:
        """What is still cached of a prefix."""
        tokens = [*prefix.tokens[: prefix.length], ANY_TOKEN]
        request = as_request("lookup", tokens, prefix.salt)
        request.block_hashes = list(prefix.hashes)
        blocks, _, _ = self._facade.schedulers[width].kv_cache_manager.get_computed_blocks(request)
        return list(blocks.blocks[0])

    def offers(self, engine: int) -> list[dict[str, Any]]:
        """What is held, as plain values: see `core.prefixes.PrefixOffer`."""
        width = self._held_width
        if self._was_reset:
            return []
        offers = []
        for index, (prefix, blocks) in enumerate(self._held):
            tokens = np.asarray(prefix.tokens[: len(blocks) * page_tokens(self._facade, width)], dtype=np.int32)
            travelling = {"name": f"prefix {engine}.{index}", "tokens": tokens.tobytes(), "salt": prefix.salt}
            pages = [block.block_id for block in blocks]
            offers.append({"width": width, "pages": pages, "hits": prefix.hits, "prefix": travelling})
        return offers

    def let_go(self) -> None:
        """Nothing is held any more; what is cached stays so, in free pages."""
        for _, blocks in self._held:
            self._pool(self._held_width).free_blocks(reversed(blocks))
        self._held = []

    # ---- target ---------------------------------------------------------------------------------------------------

    def admit(self, prefixes: Sequence[dict[str, Any]], kernel_block_tokens: int) -> dict[str, dict[str, Any]]:
        """Find pages for prefixes, a share of what is free; those without room, or cached here, are left out.

        Returns for each its tokens, its pages, and the kernel blocks that must be copied into them.
        """
        facade, width = self._facade, self._facade.active_width
        page_size, manager = page_tokens(self._facade, width), facade.active.kv_cache_manager
        left = 0 if self._was_reset else facade.pools[width].num_free // FREE_SHARE
        admitted = {}
        for prefix in prefixes:
            tokens = np.frombuffer(prefix["tokens"], dtype=np.int32).tolist()
            length = len(tokens) // page_size * page_size
            request = as_request(prefix["name"], [*tokens[:length], ANY_TOKEN], prefix["salt"])
            facade.rehash(request, width)
            hit_blocks, hit, _ = manager.get_computed_blocks(request)
            pages = (length - hit) // page_size
            if not 0 < pages <= left:
                continue
            found = hit_blocks if hit else None
            room = manager.allocate_slots(
                request, length - hit, num_new_computed_tokens=hit, new_computed_blocks=found, has_scheduled_reqs=False
            )
            if room is None:
                continue
            left -= pages
            self._arriving[prefix["name"]] = request
            admitted[prefix["name"]] = {
                "tokens": length - hit,
                "target_pages": list(manager.get_block_ids(request.request_id)[0]),
                "first_block": hit // kernel_block_tokens,
                "last_block": length // kernel_block_tokens,
            }
        return admitted

    def commit(self) -> None:
        """What has arrived is cached, as if a request had left it; nothing is held."""
        self.let_go()
        self._end_arrivals(holds=not self._was_reset)

    def drop(self) -> None:
        """The switch is undone: nothing was copied, or for nothing."""
        self._end_arrivals(holds=False)

    def _end_arrivals(self, holds: bool) -> None:
        manager = self._facade.active.kv_cache_manager
        for request in self._arriving.values():
            blocks = manager.get_blocks(request.request_id).blocks[0]
            manager.free(request)
            if not holds:
                manager.evict_blocks({block.block_id for block in blocks if block.ref_cnt == 0})
        self._arriving = {}

    # ---- both -----------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """The cache was reset: what is on its way loses its hash too."""
        for prefixes in self._hit.values():
            prefixes.forget()
        self._was_reset = True
        for _, blocks in self._held:
            self._pool(self._held_width).evict_blocks({block.block_id for block in blocks})

    def _pool(self, width: int) -> Any:
        return self._facade.schedulers[width].kv_cache_manager.block_pool


def as_request(name: str, tokens: list[int], salt: str | None) -> Request:
    """As vLLM's KV cache manager takes it. No scheduler ever sees it."""
    return Request(name, tokens, SamplingParams(max_tokens=1), None, cache_salt=salt)
