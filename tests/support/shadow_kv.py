"""What every page of every engine would hold: stepped engines over numbers that stand for tokens' KV.

Each step writes the tokens it computes, in the layout that runs it, and reads all that were computed before: a page that
was lost, overwritten, copied to a wrong place or taken for another is found by the next step that needs it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.request import Request

from tests.support.stepping import PAGE_TOKENS, SteppedEngine, SteppedServer
from vllm_flying.core.migration import KVMove, units_of, units_per_page
from vllm_flying.core.topology import Group
from vllm_flying.worker.precopy import kv_move

HEAD_RANGES = 4
"""As many as the widest group has members. A page of one engine by itself has one kernel block."""


class ShadowServer(SteppedServer):
    """Engines with [page, kernel block and head range, token] of KV each."""

    def __init__(self, config: VllmConfig, num_engines: int, pages: int) -> None:
        super().__init__(config, num_engines, pages)
        self.kv = [np.zeros((pages + 1, HEAD_RANGES, PAGE_TOKENS), dtype=np.int64) for _ in self.engines]
        self.checked_tokens = 0
        for engine in self.engines:
            engine.on_schedule = lambda output, engine=engine: self._run(engine, output)  # type: ignore[misc]

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _run(self, engine: SteppedEngine, output: Any) -> None:
        for name, count in output.num_scheduled_tokens.items():
            request = engine.facade.active.requests[name]
            (pages,) = engine.facade.active.kv_cache_manager.get_block_ids(name)
            before = request.num_computed_tokens - count
            tokens = content_of(request)
            for rank, member in enumerate(engine.agent.group):
                places, heads = self._places(member, engine.agent.group, pages, rank, before + count)
                holds, wanted = self.kv[member][places], tokens[: before + count, heads]
                wrong = np.flatnonzero((holds[:before] != wanted[:before]).any(axis=1))
                assert not len(wrong), f"{name}: engine {member} lacks the KV of tokens {wrong[:4]} of {before}"
                self.checked_tokens += before
                self.kv[member][places] = wanted

    def _places(self, member: int, group: Group, pages: list[int], rank: int, tokens: int) -> tuple[Any, slice]:
        """Where one member of a group has the KV of each token, [token, head range], and which head ranges it has."""
        width, each = len(group), HEAD_RANGES // len(group)
        own = np.asarray(self._own(member, group, tuple(pages)))
        block, token = np.divmod(np.arange(tokens), PAGE_TOKENS)
        ranges = (block % width * each)[:, None] + np.arange(each)
        return (own[block // width][:, None], ranges, token[:, None]), slice(rank * each, (rank + 1) * each)

    # ---- copies ---------------------------------------------------------------------------------------------------

    def _call(self, engine: int, operation: str, arguments: dict[str, Any], before: Any) -> Any:
        group = self.engines[engine].agent.group
        if operation == "transfer":
            for move in arguments["moves"]:
                self._copy(KVMove.from_dict(move), group)
        if operation == "precopy_copy":
            for move in arguments["moves"]:
                self._copy_ahead(move, group)
        return super()._call(engine, operation, arguments, before)

    def _copy(self, move: KVMove, group: Group) -> None:
        for target in set(move.target) & set(group):
            for source in move.source:
                ends = [self._own(source, move.source, move.source_pages), self._own(target, move.target, move.target_pages)]
                self._copy_units(KVMove(move.source, ends[0], move.target, ends[1], move.first_block, move.last_block), source, target)

    def _own(self, engine: int, group: Group, pages: tuple[int, ...]) -> tuple[int, ...]:
        leases = self.engines[engine].agent.leases
        return pages if len(group) == 1 else tuple(leases.physical(len(group), pages).tolist())

    def _copy_ahead(self, move: dict[str, Any], group: Group) -> None:
        for target in set(move["target"]) & set(group):
            for source in move["source"]:
                self._copy_units(kv_move(move, source, target, kernel_blocks=1), source, target)

    def _copy_units(self, move: KVMove, source: int, target: int) -> None:
        units = units_of([move], 1, source, target)
        parts = units_per_page(move.span, 1)
        there, here = (self.kv[engine].reshape(-1, HEAD_RANGES // parts, PAGE_TOKENS) for engine in (source, target))
        here[units.target_pages * parts + units.target_places] = there[units.source_pages * parts + units.source_places]


def content_of(request: Request) -> np.ndarray:
    """[token, head range]: a number for what all tokens up to here make of it."""
    numbers, so_far = [], hash(request.cache_salt)
    for token in request.all_token_ids:
        so_far = hash((so_far, token))
        numbers.append([hash((so_far, head)) for head in range(HEAD_RANGES)])
    return np.array(numbers, dtype=np.int64)
