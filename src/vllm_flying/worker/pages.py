"""Virtual pages become this worker's own pages when a step arrives.

Touches only vLLM's SchedulerOutput, by its field names; imports neither torch nor vllm. A group's scheduler numbers
pages virtually (see `core.leases`); each member's runner must see its own physical pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NULL_PAGE = 0


class PageMap:
    """Virtual to physical pages of one worker in the group of one width. The null page maps to itself."""

    def __init__(self) -> None:
        self._physical: dict[int, int] = {NULL_PAGE: NULL_PAGE}

    def add(self, backing: dict[int, int]) -> None:
        """Learn the physical pages behind newly backed virtual pages."""
        self._physical.update(backing)

    def remove(self, virtual: list[int]) -> None:
        """Forget virtual pages that are no longer backed."""
        for page in virtual:
            self._physical.pop(page, None)

    def __len__(self) -> int:
        return len(self._physical) - 1

    def physical(self, pages: Sequence[int]) -> list[int]:
        """This worker's pages behind virtual ones; KeyError as in `translate`."""
        return self._translate(list(pages))

    def _translate(self, pages: list[int]) -> list[int]:
        return [self._physical[page] for page in pages]

    def _translate_groups(self, groups: Any) -> Any:
        return None if groups is None else tuple(self._translate(pages) for pages in groups)

    def translate(self, scheduler_output: Any) -> Any:
        """Rewrite every page number in a SchedulerOutput, in place; returns it.

        A KeyError names a page that this worker doesn't back: a broken lease, never to be papered over.
        """
        for new_request in scheduler_output.scheduled_new_reqs:
            new_request.block_ids = self._translate_groups(new_request.block_ids)
        cached = scheduler_output.scheduled_cached_reqs
        cached.new_block_ids = [self._translate_groups(groups) for groups in cached.new_block_ids]
        if scheduler_output.new_block_ids_to_zero:
            scheduler_output.new_block_ids_to_zero = self._translate(scheduler_output.new_block_ids_to_zero)
        if scheduler_output.kv_cache_block_copies:
            raise NotImplementedError("copy-on-write blocks (hybrid models) can't be used in a merged group yet")
        return scheduler_output
