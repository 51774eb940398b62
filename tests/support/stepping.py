"""Engines without workers: real agents over stock schedulers, stepped by hand; every token is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_flying.core.precopy import Precopied, precopy
from vllm_flying.core.topology import Group, Layout
from vllm_flying.core.transaction import Phase, SwitchTransaction
from vllm_flying.scheduler.agent import EngineAgent
from vllm_flying.scheduler.facade import FlyingScheduler
from vllm_flying.settings import settings_from_vllm_config
from vllm_flying.worker.pages import PageMap

PAGE_TOKENS = 16
MAX_MODEL_LEN = 2048
FOUR_ENGINE_LAYOUTS = [
    [(0,), (1,), (2,), (3,)], [(0, 1), (2,), (3,)], [(0, 1), (2, 3)], [(0,), (1,), (2, 3)], [(0, 1, 2, 3)],
]  # fmt: skip


def make_config(model: Path, num_engines: int) -> VllmConfig:
    """The config of one engine of several."""
    init_none_hash(sha256)  # as the engine core does
    # Nothing is computed, so what steps take would say nothing of what they cost.
    settings = {"flying": {"num_engines": num_engines, "policy": "manual"}}
    limits = {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": MAX_MODEL_LEN, "block_size": PAGE_TOKENS}
    return EngineArgs(model=str(model), additional_config=settings, async_scheduling=False, **limits).create_engine_config()


def make_request(name: str, prompt_tokens: int, max_tokens: int | None = None) -> Request:
    """Without `max_tokens` it may fill the context, as vLLM's front end says of a chat."""
    limit = MAX_MODEL_LEN - prompt_tokens if max_tokens is None else max_tokens
    prompt = [5 + sum(map(ord, name)) % 400] * prompt_tokens
    return Request(name, prompt, SamplingParams(max_tokens=limit, ignore_eos=True), None)


def make_kv_cache_config(pages: int) -> KVCacheConfig:
    """Of so many pages beside vLLM's null page."""
    spec = FullAttentionSpec(block_size=PAGE_TOKENS, num_kv_heads=4, head_size=1, dtype=torch.float32)
    tensor = KVCacheTensor((pages + 1) * spec.page_size_bytes, ["layer"], 0, spec.page_size_bytes)
    return KVCacheConfig(pages + 1, [tensor], [KVCacheGroupSpec(["layer"], spec)])


class SteppedEngine:
    """One engine; `started` and `resumed` say what its workers were told of requests."""

    def __init__(self, config: VllmConfig, engine: int, pages: int, everyone: list[SteppedEngine]) -> None:
        self.config = copy.deepcopy(config)
        self.config.parallel_config.data_parallel_index = engine
        self.config.cache_config.num_gpu_blocks = pages + 1
        manager = StructuredOutputManager(self.config)
        self.facade = FlyingScheduler(self.config, make_kv_cache_config(pages), manager, PAGE_TOKENS)
        self.agent = EngineAgent(self.config, settings_from_vllm_config(self.config), self._call_workers)
        self.released: Any = None
        self.started: list[str] = []
        self.resumed: list[str] = []
        self.copies: list[dict[str, Any]] = []
        """What workers were last told to copy."""
        self.worker_pages: dict[int, PageMap] = {}
        """By width of a group: what workers were told of pages."""
        self.on_schedule: Callable[[Any], None] = lambda output: None
        """Told of every step before its results are in."""
        self._everyone = everyone

    def _call_workers(self, method: str, arguments: tuple[Any, ...] = (), non_block: bool = False) -> Any:
        group = self.agent.group
        self._tell_of_pages(method, arguments, group)
        alone = [{"engine": self.agent.engine, "tp_size": 1, "tp_rank": 0}]
        if method == "flying_release":
            for member in group:
                self._everyone[member].released = arguments
            return [alone]
        if method == "flying_follow":
            return SimpleNamespace(result=lambda: [(*self.released, alone)])
        if method == "flying_export":
            return [{}]
        if method == "flying_kernel_block_tokens":
            return [PAGE_TOKENS]
        if method == "flying_reads_others":
            return [True]
        proof = [{"engine": e, "tp_size": len(group), "tp_rank": rank} for rank, e in enumerate(group)]
        if (method, arguments[0]) in (("flying_together", "prove"), ("flying_lead", len(group))):
            return [proof]
        if arguments[0] == "transfer":
            self.copies = arguments[1]
        if arguments[0] == "precopy":
            return [{"done": True, "seconds": 0.0}]
        return [{"bytes": 0, "seconds": 0.0, "proof": proof}]

    def _tell_of_pages(self, method: str, arguments: tuple[Any, ...], group: Group) -> None:
        members = [
            self._everyone[member].worker_pages.setdefault(len(group), PageMap())
            for member in group
            if self._everyone[member].agent.group == group or method != "flying_release"
        ]
        if method in ("flying_lead", "flying_follow"):
            self.worker_pages[len(group)].back_only(*arguments[1:3])
        elif method == "flying_release":  # heard by who joined
            for pages in members:
                pages.remove(arguments[0])
        elif (method, arguments[:1]) == ("flying_together", ("extend",)):
            for pages, member in zip(members, group, strict=True):
                pages.add(*(np.frombuffer(each, dtype=np.int32) for each in (arguments[1], arguments[2][str(member)])))

    def step(self) -> list[Any]:
        """One step of the engine; returns what goes to the front end."""
        facade = self.facade
        if not facade.has_requests():
            return []
        output = facade.schedule()
        self.on_schedule(output)
        self.started += [new.req_id for new in output.scheduled_new_reqs]
        self.resumed += list(output.scheduled_cached_reqs.resumed_req_ids)
        names, requests = list(output.num_scheduled_tokens), facade.active.requests
        tokens = [[7] if requests[n].num_computed_tokens >= requests[n].num_tokens else [] for n in names]
        places = {name: place for place, name in enumerate(names)}
        result = ModelRunnerOutput(names, places, sampled_token_ids=tokens, prompt_logprobs_dict={}, pooler_output=[])
        return [each for outputs in facade.update_from_output(output, result).values() for each in outputs.outputs]


class SteppedServer:
    """Engines, the layout they are in, and what clients were told of finished requests."""

    def __init__(self, config: VllmConfig, num_engines: int, pages: int) -> None:
        self.engines: list[SteppedEngine] = []
        for engine in range(num_engines):
            self.engines.append(SteppedEngine(config, engine, pages, self.engines))
        self.layout = Layout.separate(num_engines)
        self.epoch = 0
        self.finished: dict[str, str] = {}

    def step(self, count: int = 1) -> None:
        """As many steps of every engine."""
        for _ in range(count):
            for engine in self.engines:
                for output in engine.step():
                    if output.finish_reason is not None:
                        self.finished[output.request_id] = str(output.finish_reason)

    def send(self, engine: int, request: Request) -> Request:
        """A request reaches an engine from the front end."""
        self.engines[engine].facade.add_request(request)
        return request

    def abort(self, *names: str, engines: Sequence[int] = ()) -> None:
        """What the front end sends once a switch has begun: to every engine, unless `engines` says to which."""
        for engine in engines or range(len(self.engines)):
            self.engines[engine].facade.finish_requests(list(names), RequestStatus.FINISHED_ABORTED)

    @property
    def scheduled_tokens(self) -> int:
        """Tokens that all engines computed since start."""
        return sum(engine.facade.scheduled_tokens for engine in self.engines)

    @property
    def unfinished(self) -> int:
        """Requests that are somewhere, and pages that are held for some."""
        facades = [engine.facade for engine in self.engines]
        pools = [pool for facade in facades for pool in facade.pools.values()]
        return sum(f.get_num_unfinished_requests() for f in facades) + sum(pool.num_used for pool in pools)

    def switch(
        self,
        groups: Sequence[Group],
        method: str = "migrate",
        before: Any = None,
        meanwhile: Callable[[], str | None] = lambda: None,
        **prices: Any,
    ) -> SwitchTransaction:
        """Change the layout; `before(operation, engine)` is called ahead of every call, "adopt" included.

        Where an engine lets wait for its reply, everyone steps, after `meanwhile()`, which may give a reason to stop.
        """
        self.epoch += 1
        target = Layout.of(groups, len(self.engines))
        transaction = SwitchTransaction(self.epoch, self.layout, target, method, **prices)
        calls, waiting = transaction.start(), []
        while not transaction.is_over:
            if calls:
                call, *calls = calls
                reply = self._call(call.engine, call.operation, call.arguments, before)
                waiting.append((call, transaction.phase, reply))
            elif reason := meanwhile():
                calls += transaction.failed(None, reason)
            else:
                self.step()
            for each in [each for each in waiting if not isinstance(each[2], Future) or each[2].done()]:
                waiting.remove(each)
                call, phase, reply = each
                if phase is transaction.phase:
                    calls += transaction.replied(call.engine, reply.result() if isinstance(reply, Future) else reply)
        if transaction.phase is Phase.COMMITTED:
            self.layout = target
            for reply in transaction.committed.values():
                for recipient, packed in reply["handover"].items():
                    self._call(int(recipient), "adopt", {"packed": packed}, before)
        return transaction

    def precopy(self, groups: Sequence[Group], between: Callable[[str], None] = lambda operation: None) -> Precopied:
        """Copy KV ahead of a switch, a page at a time; `between(operation)` is called ahead of every round."""
        rounds = precopy(self.layout, Layout.of(groups, len(self.engines)), round_bytes=1, least_bytes=1)
        calls = next(rounds)
        while True:
            between(calls[0].operation)
            replies = {call.engine: self._call(call.engine, call.operation, call.arguments, None) for call in calls}
            try:
                calls = rounds.send(replies)
            except StopIteration as end:
                copied: Precopied = end.value
                return copied

    def attempt(
        self, groups: Sequence[Group], phase: Phase, engine: int, acts: bool, before: Any = None
    ) -> SwitchTransaction:
        """A migration in which an engine fails in one phase, before it acts or after it; `before` as in `switch`."""
        self.epoch += 1
        transaction = SwitchTransaction(self.epoch, self.layout, Layout.of(groups, len(self.engines)), "migrate")
        pending = [(call, transaction.phase) for call in transaction.start()]
        while pending:
            (call, sent_in), *pending = pending
            fails = sent_in is phase and call.engine == engine
            reply = None if fails and not acts else self._call(call.engine, call.operation, call.arguments, before)
            if sent_in is transaction.phase:  # else nobody waits for it any more
                calls = transaction.failed(call.engine, "fails") if fails else transaction.replied(call.engine, reply)
                pending += [(call, transaction.phase) for call in calls]
        return transaction

    def _call(self, engine: int, operation: str, arguments: dict[str, Any], before: Any) -> Any:
        if before is not None:
            before(operation, engine)
        return self.engines[engine].agent.handle(operation, arguments)
