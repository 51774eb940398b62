"""An engine's part in copying KV ahead of a switch: see `core.precopy` for the whole and its order.

May import vllm. Each call runs between steps, and the engine goes on in between. Reserved pages are in no pool until they
are settled; requests that are copied are not held: whether their pages stayed theirs is checked afterwards. What holds
then is made known as a cached prefix of the other layout that stayed in place, and the switch treats it as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.request import Request, RequestStatus

from vllm_flying.core.contents import ALONE, NOBODY, from_bitmap, to_bitmap
from vllm_flying.core.leases import PageNumbers, Pages, as_pages
from vllm_flying.scheduler import departures
from vllm_flying.scheduler.errors import SwitchRefused
from vllm_flying.scheduler.limits import page_tokens
from vllm_flying.scheduler.prefixes import ANY_TOKEN, as_request
from vllm_flying.scheduler.reports import WorkerCall

if TYPE_CHECKING:
    from vllm_flying.scheduler.agent import EngineAgent


@dataclass(frozen=True)
class _Source:
    """A request whose pages are copied, as it was before."""

    request: Request
    pages: list[int]
    preemptions: int


class Precopy:
    """State of one engine from the survey to the settlement."""

    def __init__(self, agent: EngineAgent, call_workers: WorkerCall) -> None:
        self._agent = agent
        self._call_workers = call_workers
        self._sources: dict[str, _Source] = {}
        self._reserved: Pages = as_pages([])
        """Pages of the pool that this engine's group schedules, if it leads."""
        self._own: Pages = as_pages([])
        """This engine's own pages behind what its group reserved."""
        self._width = ALONE
        """Of the layout that is to come."""
        self._arriving: dict[str, tuple[Request, int, list[int]]] = {}
        """Per request what its cache entry is made of, its first page that isn't in place, and the pages from there on."""
        self._hashes: set[bytes] = set()
        """Of the blocks in these pages: what requests share is copied once."""
        self._was_reset = False

    @property
    def operations(self) -> dict[str, Callable[..., Any]]:
        """By the names under which a front end calls them."""
        steps = (self.survey, self.reserve, self.plan, self.copy, self.check, self.settle, self.expect)
        return {f"precopy_{step.__name__}": step for step in steps}

    @cached_property
    def _can_copy(self) -> bool:
        caches = self._agent.facade.vllm_config.cache_config.enable_prefix_caching
        return bool(caches and self._call_workers("flying_reads_others")[0])

    def survey(self, group: list[int], width: int) -> dict[str, Any]:
        """What there is to copy into a layout of `width`, the room for it, and a bitmap of what is in place there.

        SwitchRefused if this engine isn't in `group`, or is in a switch.
        """
        agent, facade = self._agent, self._agent.facade
        if agent.switching is not None or list(agent.group) != group:
            raise SwitchRefused(f"engine {agent.engine} is in group {list(agent.group)}, or in a switch")
        self.drop()
        self._width, facade.on_reset = width, self.reset
        agent.contents.written(ALONE, facade.pools[ALONE].take_written())
        leading = not facade.parked and facade.active_width > 1
        requests = [] if facade.parked or not self._can_copy else [r for r in facade.active.running if _may_be_copied(r)]
        return {
            "free_pages": facade.pools[1].num_free,
            "returnable_pages": facade.pools[facade.active_width].num_free if leading else 0,
            "page_tokens": page_tokens(facade, ALONE),
            "page_bytes": departures.page_bytes(facade) // facade.engine_tp,
            "num_pages": int(facade.kv_cache_config.num_blocks) - 1,
            "intact": to_bitmap(agent.contents.in_place(width)[0], int(facade.kv_cache_config.num_blocks)),
            "requests": [self._surveyed(request) for request in requests],
        }

    def _surveyed(self, request: Request) -> dict[str, Any]:
        """As `departures.placing`, and the tokens whose KV is there for good: those before the last that is known."""
        facade = self._agent.facade
        (pages,) = facade.active.kv_cache_manager.get_block_ids(request.request_id)
        self._sources[request.request_id] = _Source(request, list(pages), request.num_preemptions)
        done = min(request.num_computed_tokens - request.num_in_flight_tokens, request.num_tokens - 1)
        tokens = np.asarray(request.all_token_ids[:done], dtype=np.int32)
        prefix = {"name": request.request_id, "tokens": tokens.tobytes(), "salt": request.cache_salt}
        return {**departures.placing(facade, request, pages), "prefix": prefix}

    def reserve(self, count: int) -> dict[str, Any]:
        """Leaders: free pages to copy into, and the pages that the group has handed out since it was formed."""
        facade = self._agent.facade
        pool = facade.pools[facade.active_width]
        if count > pool.num_free:
            raise SwitchRefused(f"engine {self._agent.engine} has no {count} free pages to copy KV into")
        written = pool.written
        self._reserved = pool.reserve(count)
        return {"reserved": self._reserved.tolist(), "written": written.tolist()}

    def plan(
        self,
        reserved: list[int],
        written: list[int],
        sources: dict[str, list[int]],
        prefixes: list[dict[str, Any]],
        intact: bytes,
    ) -> dict[str, Any]:
        """This engine's own pages behind what its group reserved and wants copied.

        The future leader also says which pages of each of `prefixes` aren't in place; `intact`: bitmap of those that hold,
        on every member of its group, what the group wrote.
        """
        agent, facade, width = self._agent, self._agent.facade, self._width
        self._own = self._physical(reserved)
        if len(agent.group) > ALONE:
            agent.contents.written(len(agent.group), self._physical(written))
            facade.pools[ALONE].forget(self._physical([*written, *reserved]))
        agent.contents.written(NOBODY, self._own)
        if width > ALONE:
            facade.pools[width].keep_only(from_bitmap(intact))
        numbers = iter(self._own.tolist() if width == ALONE else self._numbers(width))
        for prefix in prefixes:
            self._arriving[prefix["name"]] = self._missing(prefix, width, numbers)
        return {
            "reserved": self._own.tolist(),
            "sources": {name: self._physical(pages).tolist() for name, pages in sources.items()},
            "places": {name: {"first": first, "pages": pages} for name, (_, first, pages) in self._arriving.items()},
        }

    def _physical(self, pages: PageNumbers) -> Pages:
        group = len(self._agent.group)
        return as_pages(pages) if group == ALONE else self._agent.leases.physical(group, pages)

    def _numbers(self, width: int) -> list[int]:
        """Pages of a group to come that may be backed as it likes: what holds a prefix in place comes last."""
        free, cached = self._agent.leases.unbacked(width).tolist(), self._agent.facade.pools[width].away
        return [page for page in free if page not in cached] + [page for page in free if page in cached]

    def _missing(self, prefix: dict[str, Any], width: int, numbers: Iterator[int]) -> tuple[Request, int, list[int]]:
        facade = self._agent.facade
        tokens = np.frombuffer(prefix["tokens"], dtype=np.int32).tolist()
        request = as_request(prefix["name"], [*tokens, ANY_TOKEN], prefix["salt"])
        facade.rehash(request, width)
        _, hit, _ = facade.schedulers[width].kv_cache_manager.get_computed_blocks(request)
        first, count = hit // page_tokens(facade, width), len(tokens) // page_tokens(facade, width)
        while first < count and request.block_hashes[first] in self._hashes:
            first += 1
        self._hashes.update(request.block_hashes[first:count])
        return request, first, [next(numbers) for _ in range(first, count)]

    def copy(self, moves: list[dict[str, Any]]) -> dict[str, Any]:
        """Leaders: have the group's workers copy, each for itself."""
        replies: list[dict[str, Any]] = self._call_workers("flying_together", ("precopy", moves))
        return {"done": all(r["done"] for r in replies), "seconds": max(r["seconds"] for r in replies)}

    def check(self) -> dict[str, Any]:
        """Leaders: requests whose pages were theirs all the time."""
        return {"valid": [request_id for request_id, source in self._sources.items() if self._is_as_before(source)]}

    def _is_as_before(self, source: _Source) -> bool:
        scheduler, request = self._agent.facade.active, source.request
        if scheduler.requests.get(request.request_id) is not request or request.num_preemptions != source.preemptions:
            return False
        (pages,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        return list(pages[: len(source.pages)]) == source.pages

    def settle(self, virtual: list[int], places: list[int]) -> None:
        """The reserved pages are free again; those in `places` hold the KV of `virtual` ones of the group to come."""
        own = self._own[as_pages(places)]
        if self._width > ALONE:
            self._agent.contents.stand_in(self._width, as_pages(virtual), own)
        else:
            self._agent.contents.written(ALONE, own)
        self._give_back()

    def expect(self, valid: list[str]) -> None:
        """Future leaders, once all members have settled: what was copied of `valid` requests is cached there."""
        facade, width = self._agent.facade, self._width
        for name in valid:
            if name in self._arriving and not self._was_reset:
                request, first, pages = self._arriving[name]
                facade.pools[width].expect(request, first, pages, page_tokens(facade, width))
        self.drop()

    def reset(self) -> None:
        """The prefix cache was reset: what was copied before doesn't count."""
        self._was_reset = True

    def drop(self) -> None:
        """Nothing is copied any more, and no page is kept for it."""
        self._give_back()
        self._sources, self._arriving, self._hashes = {}, {}, set()
        self._was_reset = False

    def _give_back(self) -> None:
        if len(self._reserved):
            self._agent.facade.pools[len(self._agent.group)].deposit(self._reserved)
        self._reserved = self._own = as_pages([])


def _may_be_copied(request: Request) -> bool:
    """It has begun to decode, tokens and salt say all of what its cached blocks are, and cached blocks will do for it."""
    if request.status is not RequestStatus.RUNNING or not request.num_output_tokens:
        return False
    hashed_by_more = request.mm_features or request.lora_request or request.prompt_embeds is not None
    return not (hashed_by_more or request.skip_reading_prefix_cache)
