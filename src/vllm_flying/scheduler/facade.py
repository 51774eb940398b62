"""The scheduler that vLLM's engine core talks to: one stock scheduler per group width behind vLLM's own interface.

May import vllm. Only the active width is scheduled; requests of the others keep their pages and their state and go on
when their width comes back. Every step is tagged with the scheduler that made it, so results of steps in flight at a
switch reach the right one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState, SchedulerInterface
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_flying.core.topology import available_widths
from vllm_flying.scheduler import registry
from vllm_flying.scheduler.aborts import UnknownAborts
from vllm_flying.scheduler.deferral import Deferral
from vllm_flying.scheduler.handover import has_begun
from vllm_flying.scheduler.limits import grant, grant_more, kv_tokens_needed
from vllm_flying.scheduler.meter import EngineMeter
from vllm_flying.scheduler.page_pool import PagePool
from vllm_flying.scheduler.preemption import preempt_all
from vllm_flying.scheduler.prefixes import CachedPrefixes
from vllm_flying.scheduler.structured import note_beginning
from vllm_flying.settings import URGENT_POLICIES, settings_from_vllm_config
from vllm_flying.worker.kv_views import wide_kv_cache_config
from vllm_flying.worker.layout_table import wide_vllm_config

logger = init_logger("vllm.flying.scheduler")

# What vLLM's output thread needs for a switch's reply. Else it gets the interpreter (in turns of 5 ms) and a processor
# only once the first step is under way, and whoever asked for the switch waits for that.
REPLY_S = 0.0005


class FlyingScheduler(SchedulerInterface):
    """Stock schedulers by width; width 1 is the engine by itself."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        structured_output_manager: StructuredOutputManager,
        block_size: int,
        hash_block_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vllm_config = vllm_config
        self.kv_cache_config = kv_cache_config
        self.structured_output_manager = structured_output_manager
        scheduler_cls = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
        settings = settings_from_vllm_config(vllm_config)
        self.schedulers: dict[int, Scheduler] = {}
        self.pools: dict[int, PagePool] = {}
        self._hashers: dict[int, Any] = {}
        for width in (1, *available_widths(settings.num_engines, settings.widths)):
            config, kv_config, sizes = vllm_config, kv_cache_config, (block_size, hash_block_size or block_size)
            if width > 1:
                config = wide_vllm_config(vllm_config, width)
                config.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
                kv_config = wide_kv_cache_config(kv_cache_config, width)
                sizes = resolve_kv_cache_block_sizes(kv_config, config)
            with set_current_vllm_config(config):
                scheduler = scheduler_cls(
                    config, kv_config, structured_output_manager, block_size=sizes[0], hash_block_size=sizes[1], **kwargs
                )
            self.schedulers[width] = scheduler
            self.pools[width] = PagePool(scheduler.kv_cache_manager.block_pool, owns_all=width == 1)
            self._hashers[width] = self._hasher(sizes[1])
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.kv_tokens = self.pools[1].num_owned * int(block_size)
        """What this engine's group can hold, pages included that are just being lent to it."""
        self.engine_tp = settings.engine_tp
        self.prefixes = CachedPrefixes(self, settings.staging_bytes)
        self.num_engines = settings.num_engines
        self.active_width = 1
        self.parked = False
        """A member that doesn't lead: schedules nothing, keeps what arrives for the leader."""
        self.holding = False
        """A switch is being prepared: new requests are kept aside."""
        self.stopped = False
        """A switch is being prepared: no steps."""
        self.has_resumed = False
        """A switch has just ended: vLLM's output thread is to send the reply."""
        self.held: list[Request] = []
        """Kept aside: for the next layout, for the leader, or for a group that can hold them."""
        self.meter = EngineMeter(self.schedulers)
        self.deferral = Deferral(settings.deferred_limit_s)
        self._defers = settings.policy in URGENT_POLICIES
        self._measures = settings.policy != "manual"  # nobody else asks what steps cost
        self.scheduled_tokens = 0
        """Tokens computed since start, in all widths."""
        self.on_abort: Callable[[list[str] | None], list[Request]] = lambda request_ids: []
        """Told of every abort, None being all; returns those of them that are on their way into this engine."""
        self.on_reset: Callable[[], None] = lambda: None
        """Told when the prefix cache is reset."""
        self.unknown_aborts = UnknownAborts()
        self._width_of_step: dict[int, int] = {}
        registry.register(vllm_config, self)

    def _hasher(self, hash_block_size: int) -> Any:
        if not self.vllm_config.cache_config.enable_prefix_caching:
            return None
        hash_function = get_hash_fn_by_name(self.vllm_config.cache_config.prefix_caching_hash_algo)
        return get_request_block_hasher(hash_block_size, hash_function)

    @property
    def active(self) -> Scheduler:
        """The scheduler of the active width."""
        return self.schedulers[self.active_width]

    # What the engine core reads from its scheduler besides the interface.
    @property
    def connector(self) -> Any:
        """KV connectors are refused at start."""
        return None

    @property
    def ec_connector(self) -> Any:
        """Encoder cache connectors are refused at start."""
        return None

    @property
    def kv_cache_manager(self) -> Any:
        """That of the active width."""
        return self.active.kv_cache_manager

    # ---- requests -------------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        """Give a request to the active scheduler, or keep it aside for whoever will run it."""
        note_beginning(request)
        self.meter.added(request)
        self.place(request)

    def place(self, request: Request) -> None:
        """Give a fresh request of this or another engine to the active scheduler, or keep it aside.

        What this group can't hold is kept aside until the next switch: in a scheduler, all others would wait behind it.
        """
        if self.holding or self.parked:
            self.held.append(request)
        elif (needed := kv_tokens_needed(request, self.max_model_len)) > self.kv_tokens:
            logger.warning(
                "Request %s may need %d tokens of KV cache, of which there are %d here: it waits for a wider group.",
                request.request_id, needed, self.kv_tokens,
            )  # fmt: skip
            self.held.append(request)
        else:
            self.admit(request, self.active_width)

    def admit(self, request: Request, width: int) -> None:
        """Add a request to the scheduler of `width`, whose blocks hash another number of tokens than other widths'."""
        hashed_alone = request._block_hasher is not None and request._block_hasher not in self._hashers.values()
        if width > 1 or not hashed_alone:  # the engine core has hashed every request for width 1
            self.rehash(request, width)
        grant(request, self.kv_tokens)
        self.schedulers[width].add_request(request)
        self.note_urgent(request)

    def resize(self, kv_tokens: int) -> None:
        """This engine's group can hold `kv_tokens` from now on."""
        self.kv_tokens = kv_tokens
        for request in self.active.requests.values():
            grant_more(request, kv_tokens)

    def note_urgent(self, request: Request) -> None:
        """A request has entered a scheduler: others may have to stand back."""
        if self._defers:
            self.deferral.saw(request)

    def await_urgent(self, seconds: float) -> None:
        """An urgent request is on its way to this engine."""
        if self._defers:
            self.deferral.await_urgent(seconds)

    def adopt(self, requests: list[Request]) -> None:
        """Take over fresh requests of another engine; those that were aborted on the way end here."""
        for request in requests:
            self.place(request)
        self.finish_requests(self.unknown_aborts.of(requests), RequestStatus.FINISHED_ABORTED)

    def rehash(self, request: Request, width: int) -> None:
        """Hash a request's blocks as the layout of `width` needs them."""
        request._block_hasher = self._hashers[width]
        request.block_hashes = []
        request.update_block_hashes()

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """Finish requests wherever they are: running, paused in another width, kept aside, or about to come."""
        ids = [request_ids] if isinstance(request_ids, str) else None if request_ids is None else list(request_ids)
        for request in [r for r in self.held if ids is None or r.request_id in ids]:
            # Through a scheduler, so that the front end hears of it as of any other request.
            self.held.remove(request)
            self.admit(request, self.active_width)
        finished = self.on_abort(ids)
        for scheduler in self.schedulers.values():
            finished += scheduler.finish_requests(ids, finished_status)
        if ids is not None:
            self.unknown_aborts.note(set(ids).difference(request.request_id for request in finished))
        self._update_deferral()
        return finished

    def release_held(self) -> None:
        """Admit what was kept aside."""
        held, self.held = self.held, []
        for request in held:
            self.place(request)

    def take_held(self) -> list[Request]:
        """Take what was kept aside, to be run elsewhere."""
        held, self.held = self.held, []
        return held

    def set_aside_fresh(self) -> None:
        """Take requests that have computed nothing yet out of the active scheduler, in their order."""
        scheduler = self.active
        fresh = [request for request in scheduler.waiting if not has_begun(request)]
        if not fresh:
            return
        scheduler.waiting.remove_requests(fresh)
        scheduler.deferred_waiting.difference_update(fresh)
        for request in fresh:
            del scheduler.requests[request.request_id]
        self.held[:0] = fresh

    @property
    def num_paused(self) -> int:
        """Unfinished requests of widths that aren't active, or of a parked engine."""
        return sum(
            sum(scheduler.get_request_counts())
            for width, scheduler in self.schedulers.items()
            if self.parked or width != self.active_width
        )

    # ---- steps ----------------------------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> Any:
        """The active scheduler's next step, tagged."""
        if self.has_resumed:
            self.has_resumed = False
            time.sleep(REPLY_S)
        self._update_deferral()
        output = self.active.schedule(throttle_prefills)
        if not output.total_num_scheduled_tokens:
            self.deferral.make_room(self.active)
        self._width_of_step[id(output)] = self.active_width
        self.scheduled_tokens += output.total_num_scheduled_tokens
        self.prefixes.saw(self.active_width, output, self.active.requests)
        if self._measures:
            self.meter.step_begins(output, self.active.requests)
        return output

    def _update_deferral(self) -> None:
        if self.stopped:  # those whose tokens were in flight when the switch began
            self.deferral.put_back(self.active)
        elif not self.parked:
            self.deferral.update(self.active)

    @property
    def steps_in_flight(self) -> int:
        """Steps handed out whose results aren't in: more than none only with asynchronous scheduling."""
        return len(self._width_of_step)

    def _scheduler_of(self, scheduler_output: Any) -> Scheduler:
        return self.schedulers[self._width_of_step.get(id(scheduler_output), self.active_width)]

    def get_grammar_bitmask(self, scheduler_output: Any) -> Any:
        """Bitmask for the step, from the scheduler that made it."""
        return self._scheduler_of(scheduler_output).get_grammar_bitmask(scheduler_output)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Hand the step's results to the scheduler that made it, in whatever layout the engine is by now."""
        width = self._width_of_step.pop(id(scheduler_output), self.active_width)
        outputs = self.schedulers[width].update_from_output(scheduler_output, model_runner_output)
        self.meter.step_ends(scheduler_output, width)
        self._update_deferral()  # or the engine would rest with nobody but those who stand back
        registry.after_step(self.vllm_config)
        return outputs

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        """As vLLM's."""
        self.active.update_draft_token_ids(draft_token_ids)

    def update_draft_token_ids_in_output(self, draft_token_ids: Any, scheduler_output: Any) -> None:
        """As vLLM's."""
        self._scheduler_of(scheduler_output).update_draft_token_ids_in_output(draft_token_ids, scheduler_output)

    # ---- state ----------------------------------------------------------------------------------------------------

    def get_num_unfinished_requests(self) -> int:
        """All requests this engine answers for, in every width."""
        unfinished = [int(scheduler.get_num_unfinished_requests()) for scheduler in self.schedulers.values()]
        return sum(unfinished) + len(self.held) + len(self.deferral)

    def has_unfinished_requests(self) -> bool:
        """Whether a step could get a request further. vLLM waits a moment after a step with nobody in it if so."""
        may_step = not self.parked and not self.stopped
        return may_step and (self.deferral.awaits or self.active.has_unfinished_requests())

    def has_finished_requests(self) -> bool:
        """Whether a step is needed to tell workers and front ends of finished requests."""
        return not self.parked and not self.stopped and self.active.has_finished_requests()

    def has_requests(self) -> bool:
        """Whether the engine should step."""
        return not self.parked and not self.stopped and (self.deferral.awaits or self.active.has_requests())

    def get_request_counts(self) -> tuple[int, int]:
        """(running, waiting) as the load balancer counts them."""
        running, waiting = self.active.get_request_counts()
        return (0 if self.parked else running), waiting + len(self.held) + len(self.deferral)

    def get_kv_cache_usage(self) -> float:
        """Used share of the pages that the active width owns."""
        pool = self.pools[self.active_width]
        return pool.num_used / pool.num_owned if pool.num_owned else 0.0

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """The active scheduler's statistics."""
        return self.active.make_stats(*args, **kwargs)

    @property
    def pause_state(self) -> PauseState:
        """As vLLM's."""
        return self.schedulers[1].pause_state

    def set_pause_state(self, pause_state: PauseState) -> None:
        """As vLLM's, for every width."""
        for scheduler in self.schedulers.values():
            scheduler.set_pause_state(pause_state)
        self._update_deferral()  # who stands back has begun, and ends before a pause that waits for it

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget cached prefixes in every width; False if requests still hold pages somewhere."""
        if reset_running_requests:
            self.deferral.give_up_kv(self.active)
            for scheduler in self.schedulers.values():
                preempt_all(scheduler)
        self.prefixes.forget()
        self.on_reset()
        return all([pool.forget_prefixes() for pool in self.pools.values()])

    def reset_encoder_cache(self) -> None:
        """As vLLM's, for every width."""
        for scheduler in self.schedulers.values():
            scheduler.reset_encoder_cache()

    def get_kv_event_publisher_config(self) -> Any:
        """As vLLM's."""
        return self.schedulers[1].get_kv_event_publisher_config()

    def shutdown(self) -> None:
        """As vLLM's, for every width."""
        for scheduler in self.schedulers.values():
            scheduler.shutdown()
