"""One place that decides which engine takes a request, in every API server.

May import vllm. Admission refuses what no group can hold and forms the width that a hint asks for; routing then picks
the engine. As long as no engine is merged and no hint given, vLLM's own load balancing decides, unless an engine has
served the beginning of the prompt before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.v1.engine.core_client import DPLBAsyncMPClient

from vllm_flying.core.affinity import Prefix, PrefixAffinity, prefix_keys
from vllm_flying.core.hints import HINT_KEY, Hint, HintError, hint_of, wanted_width
from vllm_flying.core.lengths import fills_context
from vllm_flying.core.routing import GroupState, Route, candidates, choose_group, groups_with_width
from vllm_flying.core.topology import Group, Layout
from vllm_flying.frontend.board import BoardGroup, BoardState, LayoutBoard, SwitchPendingError, switch_lock
from vllm_flying.frontend.control_loop import ControlLoop
from vllm_flying.frontend.engines import EngineCalls
from vllm_flying.frontend.metrics import metrics
from vllm_flying.frontend.runtime import runtime_directory
from vllm_flying.frontend.served import served_layouts
from vllm_flying.frontend.soft_start import SoftStart
from vllm_flying.frontend.switcher import PENDING_RETRY_S, URGENT, Switcher, SwitchFailed
from vllm_flying.settings import URGENT_POLICIES, Settings, settings_from_vllm_config

logger = init_logger("vllm.flying.router")


class Router:
    """Routing state of one API server."""

    def __init__(
        self, client: Any, settings: Settings, max_model_len: int, affinity: PrefixAffinity | None = None
    ) -> None:
        directory = runtime_directory()
        self._client = client
        self._affinity = affinity
        self.settings = settings
        self._max_model_len = max_model_len
        self.directory = directory
        self._board = LayoutBoard(directory)
        self.engines = EngineCalls(client)
        self.switcher = Switcher(self.engines, self._board, directory, settings)
        self._soft_start = SoftStart(self._form, self.switcher.serving_until_merged)
        self._control: asyncio.Task[None] | None = None

    # ---- the layout -----------------------------------------------------------------------------------------------

    async def ready(self) -> BoardState:
        """The announced layout; announces the one at start if nobody has."""
        while not self._board.exists:
            try:
                with switch_lock(self.directory):
                    if not self._board.exists:
                        statuses = await self.engines.call_all("status")
                        groups = tuple(BoardGroup((s["engine"],), s["kv_tokens_capacity"]) for s in statuses)
                        self._board.publish(BoardState(0, self.settings.engine_tp, groups, since=time.time()))
                        metrics().layout([list(group.engines) for group in groups])
            except SwitchPendingError:
                await asyncio.sleep(PENDING_RETRY_S)
        if self._control is None and self.settings.policy != "manual":
            loop = ControlLoop(self.engines, self.switcher, self.directory, self.settings)
            self._control = asyncio.ensure_future(loop.run())
        return self._board.read()

    @property
    def has_switched(self) -> bool:
        """Whether requests may be with another engine than the one they were sent to."""
        return self._board.exists and self._board.read().has_switched

    def _groups(self, state: BoardState) -> list[GroupState]:
        return [GroupState(group.engines, self._load(group.engines[0]), group.kv_tokens) for group in state.groups]

    def _load(self, leader: int) -> float:
        # As vLLM estimates it: what engines report every 100 ms, or what this server has sent, whichever is more.
        waiting, running, _ = self._client.lb_engines[leader]
        sent = self._client.engine_inflight[self._client.core_engines[leader]]
        return float(max(waiting + running, sent * self._client.client_count))

    # ---- admission ------------------------------------------------------------------------------------------------

    async def admit(self, request: Any) -> None:
        """Refuse a request that can't run, with the numbers; form the width that its hint or its urgency asks for."""
        if request.resumable:
            raise VLLMValidationError(
                "Streaming-input sessions are not supported by a server that changes its layout: at a switch, chunks of "
                "one session would reach different engines. Send the whole prompt in one request."
            )
        state = await self.ready()
        width = self._wanted_width(request)
        tokens = self._tokens(request, state)
        hint = self._hint(request).value
        if width is not None and (hint == "auto" or self.settings.on_hint == "form"):
            reason = URGENT if hint == "auto" else f"hint for width {width}"
            if await self._begins_before_merge(request, width, tokens, reason):
                return
            state = self._board.read()
        if hint != "auto":
            honoured = any(len(group.engines) == width for group in state.groups)
            metrics().hinted(hint, honoured)
        fitting = choose_group(self._groups(state), tokens, width, request.data_parallel_rank)
        if fitting is None and await self.switcher.end_pauses():  # their pages may be what is missing
            state = self._board.read()
            fitting = choose_group(self._groups(state), tokens, width, request.data_parallel_rank)
        if fitting is None:
            state = await self._widen_for(tokens, state)
        if choose_group(self._groups(state), tokens, width, request.data_parallel_rank) is None:
            capacities = {str(list(group.engines)): group.kv_tokens for group in state.groups}
            raise VLLMValidationError(
                f"This request may need {tokens} tokens of KV cache; the groups of engines hold {capacities}. Shorten "
                "the prompt, lower max_tokens, or merge engines: POST /plugins/flying/switch, or send "
                f"{HINT_KEY}=long_context.",
                parameter="prompt",
                value=tokens,
            )

    async def _begins_before_merge(self, request: Any, width: int, tokens: int, reason: str) -> bool:
        """Have a group of `width` formed for a request; whether it begins ahead of that, on an engine it is pinned to."""
        softly = self.settings.switch_method == "soft" and request.data_parallel_rank is None
        if not softly or any(len(group.engines) == width for group in self._board.read().groups):
            await self._form(width, reason)
            return False
        engine = await self._soft_start.begin(
            width, reason, lambda serving: self._free_leader(serving, tokens), lambda: self._note_merge(request, width)
        )
        if engine is not None:
            request.data_parallel_rank = engine
        return engine is not None

    def _free_leader(self, engines: Sequence[int], tokens: int) -> int | None:
        """The first of `engines` that leads a group with nothing to do, which can hold `tokens`."""
        able = (group for group in self._groups(self._board.read()) if tokens <= group.kv_tokens and not group.load)
        return next((group.leader for group in able if group.leader in engines), None)

    def _note_merge(self, request: Any, width: int) -> None:
        """The group for a request that began before it was there is formed, or given up."""
        (group,) = (g.engines for g in self._board.read().groups if request.data_parallel_rank in g.engines)
        moved = len(group) == width and request.request_id in self._client.reqs_in_flight
        if moved:
            self._note_served(group)
        hint = self._hint(request).value
        if hint != "auto":
            metrics().hinted(hint, moved)

    async def _widen_for(self, tokens: int, state: BoardState) -> BoardState:
        """With a controller, form the narrowest group that can hold a request which no present group can."""
        if self.settings.policy == "manual":
            return state
        smallest = min(state.groups, key=lambda group: len(group.engines))
        each = smallest.kv_tokens // len(smallest.engines)
        fitting = [width for width in self.settings.built_widths() if width * each >= tokens]
        if not fitting:
            return state
        await self._form(fitting[0], f"request of {tokens} tokens")
        return self._board.read()

    def _is_urgent(self, request: Any) -> bool:
        return bool(request.priority < 0) and self.settings.policy in URGENT_POLICIES

    def _hint(self, request: Any) -> Hint:
        return hint_of(getattr(request.sampling_params, "extra_args", None))

    def _wanted_width(self, request: Any) -> int | None:
        """By the request's hint, else by its urgency; None if any will do."""
        settings = self.settings
        widths, urgent = {1, *settings.built_widths()}, self._is_urgent(request)
        try:
            return wanted_width(self._hint(request), urgent, widths, settings.engine_tp, settings.num_engines)
        except HintError as error:
            raise VLLMValidationError(str(error), parameter=HINT_KEY) from None

    def _tokens(self, request: Any, state: BoardState) -> int:
        """KV tokens that the request may need; of one that only fills the context, as many as there are: `core.lengths`."""
        prompt = len(request.prompt_token_ids or ())
        params = request.sampling_params
        if params is None or params.max_tokens is None:
            return prompt
        most = max(group.kv_tokens for group in state.groups)
        if fills_context(prompt, params.max_tokens, self._max_model_len) and prompt < most:
            return min(most, prompt + int(params.max_tokens))
        return prompt + int(params.max_tokens)

    async def _form(self, width: int, reason: str) -> None:
        deadline = asyncio.get_running_loop().time() + self.settings.switch_timeout_s
        while asyncio.get_running_loop().time() < deadline:
            state = self._board.read()
            groups = tuple(group.engines for group in state.groups)
            if any(len(group) == width for group in groups):
                return
            target = Layout.of(groups_with_width(groups, width, self.engines.num_engines), self.engines.num_engines)
            try:
                await self.switcher.switch(
                    target, self.settings.switch_method, self.settings.switch_timeout_s, reason, precopy_from=None
                )
            except SwitchPendingError:
                await asyncio.sleep(PENDING_RETRY_S)
            except SwitchFailed as failure:
                logger.warning("No group of width %d could be formed, the request runs where it can: %s", width, failure)
                return

    # ---- routing --------------------------------------------------------------------------------------------------

    def route(self, request: Any) -> Prefix:
        """Pin the request to an engine that serves, unless vLLM's own balancing may decide. What to `record` of it."""
        if not self._board.exists:
            return ()
        state = self._board.read()
        groups, tokens = self._groups(state), self._tokens(request, state)
        pinned, width = request.data_parallel_rank, self._wanted_width(request)
        prefix = self._prefix(request)
        merged = any(len(group.engines) > 1 for group in state.groups)
        if merged or width not in (None, 1):
            route = choose_group(groups, tokens, width, pinned, lambda possible: self._preferred(possible, prefix))
            if route is None:  # the layout changed since admission: the widest group can hold most
                route = Route(max(groups, key=lambda group: group.kv_tokens), honoured=False)
            request.data_parallel_rank = route.group.leader
        elif pinned is None:
            group = self._preferred(candidates(groups, tokens, width), prefix)
            request.data_parallel_rank = None if group is None else group.leader
        return prefix

    def _prefix(self, request: Any) -> Prefix:
        if self._affinity is None:
            return ()
        return prefix_keys(request.prompt_token_ids or (), request.cache_salt)

    def _preferred(self, groups: Sequence[GroupState], prefix: Prefix) -> GroupState | None:
        return None if self._affinity is None else self._affinity.preferred(groups, prefix)

    def record(self, chosen: bytes, prefix: Prefix) -> None:
        """Note which engine took the request: for later ones with its prefix, and for the HTTP layer."""
        if not self._board.exists:
            return
        engine = self._client.core_engines.index(chosen)
        if self._affinity is not None:
            self._affinity.remember(prefix, engine)
        self._note_served(next(group.engines for group in self._board.read().groups if engine in group.engines))

    def _note_served(self, group: Group) -> None:
        record = served_layouts.get()
        if record is not None:
            record.add(group, len(group) * self.settings.engine_tp)


def router_of(client: Any, vllm_config: Any) -> Router | None:
    """The router of an engine client; None if the plugin isn't enabled for it."""
    if not isinstance(client, DPLBAsyncMPClient) or "flying" not in (vllm_config.additional_config or {}):
        return None
    router: Router | None = getattr(client, "_flying_router", None)
    if router is None:
        settings = settings_from_vllm_config(vllm_config)
        remembers = settings.prefix_affinity and vllm_config.cache_config.enable_prefix_caching
        affinity = PrefixAffinity() if remembers else None
        router = Router(client, settings, vllm_config.model_config.max_model_len, affinity)
        client._flying_router = router
    return router
