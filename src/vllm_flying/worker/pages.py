"""Virtual pages become this worker's own pages when a step arrives.

Touches only vLLM's SchedulerOutput, by its field names; imports neither torch nor vllm. A group's scheduler numbers
pages virtually (see `core.leases`); each member's runner must see its own physical pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

UNBACKED = -1


class PageMap:
    """Virtual to physical pages of one worker in the group of one width. The null page, 0, maps to itself.

    Changed as a whole at a switch, looked up page by page at steps: an array for the one, a list for the other.
    """

    def __init__(self) -> None:
        self._array = np.zeros(1, dtype=np.int32)
        self._list = [0]

    def add(self, virtual: np.ndarray, physical: np.ndarray) -> None:
        """Learn the physical pages behind newly backed virtual pages."""
        if len(virtual) and virtual.max() >= len(self._array):
            more = np.full(virtual.max() + 1 - len(self._array), UNBACKED, dtype=np.int32)
            self._array = np.concatenate([self._array, more])
        self._array[virtual] = physical
        self._list = self._array.tolist()

    def back_only(self, virtual: np.ndarray, physical: np.ndarray) -> None:
        """Know these and no others: pages that a former group's requests held went back without a word to workers."""
        self._array = np.zeros(1, dtype=np.int32)
        self.add(virtual, physical)

    def remove(self, virtual: np.ndarray) -> None:
        """Forget virtual pages that are no longer backed."""
        self._array[virtual] = UNBACKED
        self._list = self._array.tolist()

    def __len__(self) -> int:
        return int((self._array[1:] != UNBACKED).sum())

    def physical(self, pages: Sequence[int]) -> list[int]:
        """This worker's pages behind virtual ones; KeyError as in `translate`."""
        known = self._list
        physical = [known[page] if page < len(known) else UNBACKED for page in pages]
        if UNBACKED in physical:
            unbacked = [page for page, own in zip(pages, physical, strict=True) if own == UNBACKED]
            raise KeyError(f"virtual pages {unbacked} have no page of this worker behind them")
        return physical

    def _translate_groups(self, groups: Any) -> Any:
        return None if groups is None else tuple(self.physical(pages) for pages in groups)

    def translate(self, scheduler_output: Any) -> Any:
        """Rewrite every page number in a SchedulerOutput, in place; returns it.

        A KeyError names a page that this worker doesn't back: a broken lease, never to be papered over.
        """
        for new_request in scheduler_output.scheduled_new_reqs:
            new_request.block_ids = self._translate_groups(new_request.block_ids)
        cached = scheduler_output.scheduled_cached_reqs
        cached.new_block_ids = [self._translate_groups(groups) for groups in cached.new_block_ids]
        if scheduler_output.new_block_ids_to_zero:
            scheduler_output.new_block_ids_to_zero = self.physical(scheduler_output.new_block_ids_to_zero)
        if scheduler_output.kv_cache_block_copies:
            raise NotImplementedError("copy-on-write blocks (hybrid models) can't be used in a merged group yet")
        return scheduler_output
