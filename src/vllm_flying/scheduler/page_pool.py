"""Moving pages in and out of a stock BlockPool.

May import vllm. A page that a pool doesn't own is simply not in its queue of free blocks, so the stock allocator never
sees it. Whole pools change hands at a switch; the work per page is one link of vLLM's own queue. Cached prefixes of
pages that leave stay in the pool's index, out of reach, since a pool that gives pages away isn't scheduled meanwhile;
they count again if their pages come back unwritten. vLLM's reuse watchers tell which pages were handed out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_flying.core.leases import PageNumbers, Pages, as_pages


class PagePool:
    """The pages of one scheduler: how many it owns, and taking free ones away or adding some."""

    def __init__(self, block_pool: BlockPool, owns_all: bool) -> None:
        self._pool = block_pool
        self.num_owned = block_pool.num_gpu_blocks - 1
        self._away: set[int] = set()
        self._doubtful: set[int] = set()
        """Pages that came back with one; whether it still holds isn't known yet."""
        self._written: list[int] = []
        self._latest: list[int] = []
        """Pages of the last deposit."""
        if not owns_all:
            self.withdraw(self.num_owned)

    @property
    def num_free(self) -> int:
        """Pages that no request holds; cached prefixes count as free."""
        return int(self._pool.get_num_free_blocks())

    @property
    def num_used(self) -> int:
        """Owned pages that requests hold."""
        return int(self.num_owned) - self.num_free

    def withdraw(self, count: int, first: PageNumbers = ()) -> Pages:
        """Take `count` free pages away: those of `first` that are free, then the least recently used."""
        chosen = [block for page in as_pages(first).tolist() if (block := self._pool.blocks[page]).ref_cnt == 0][:count]
        for block in chosen:
            self._pool.free_block_queue.remove(block)
        return self._gone([*chosen, *self._pool.free_block_queue.popleft_n(count - len(chosen))])

    def withdraw_latest(self) -> Pages:
        """Take the last deposit away again, but for what is held. Nothing may have been withdrawn since."""
        latest, self._latest = self._latest, []
        free = [block for page in latest if (block := self._pool.blocks[page]).ref_cnt == 0]
        for block in free:
            self._pool.free_block_queue.remove(block)
        return self._gone(free)

    def _gone(self, blocks: list[KVCacheBlock]) -> Pages:
        self.num_owned -= len(blocks)
        self._away.update([block.block_id for block in blocks if block.block_hash is not None])
        return as_pages([block.block_id for block in blocks])

    def deposit(self, pages: PageNumbers) -> None:
        """Add free pages that this pool doesn't own. What they have cached must be `confirm`ed before it is used."""
        blocks = self._pool.blocks
        numbers = as_pages(pages).tolist()
        self._doubtful |= self._away.intersection(numbers)
        cached = self._doubtful
        if cached:  # pages that hold nothing are to be used first
            numbers = [page for page in numbers if page not in cached] + [page for page in numbers if page in cached]
        self._pool.free_block_queue.append_n([blocks[page] for page in numbers])
        self._pool._reuse_watchers.update(dict.fromkeys(numbers, self._handed_out))
        self._latest = numbers
        self.num_owned += len(numbers)

    def confirm(self, intact: PageNumbers) -> None:
        """Cached prefixes of pages that came back hold in `intact` ones; all others that left are forgotten."""
        kept = self._doubtful.intersection(as_pages(intact).tolist()) if self._doubtful else set()
        self._evict((self._away | self._doubtful) - kept)
        self._away, self._doubtful = set(), set()

    # ---- pages that are filled before a switch (see `scheduler.precopy`) --------------------------------------------

    def reserve(self, count: int) -> Pages:
        """Take `count` free pages away to be overwritten, least recently used first, until they are deposited again."""
        blocks = self._pool.free_block_queue.popleft_n(count)
        pages = [block.block_id for block in blocks]
        self._evict(pages)
        self._written = list(set(self._written).difference(pages))
        self.num_owned -= count
        return as_pages(pages)

    @property
    def written(self) -> Pages:
        """What `take_written` would take."""
        return as_pages(self._written)

    @property
    def away(self) -> set[int]:
        """Pages that left with a cached prefix."""
        return self._away

    def forget(self, pages: PageNumbers) -> None:
        """Pages that are away hold no cached prefix any more."""
        gone = self._away.intersection(as_pages(pages).tolist())
        self._evict(gone)
        self._away -= gone

    def keep_only(self, pages: PageNumbers) -> None:
        """Of pages that are away these alone may hold their cached prefixes."""
        self.forget(list(self._away.difference(as_pages(pages).tolist())))

    def expect(self, request: Request, first: int, pages: PageNumbers, page_tokens: int) -> None:
        """Pages that are away hold a prefix's blocks from the `first` on, if they come back unwritten."""
        self.forget(pages)
        numbers = as_pages(pages).tolist()
        blocks = [self._pool.null_block] * first + [self._pool.blocks[page] for page in numbers]
        self._pool.cache_full_blocks(request, blocks, first, len(blocks), page_tokens, kv_cache_group_id=0)
        self._away.update(numbers)

    def take_written(self) -> Pages:
        """Pages that were handed out to requests since they were deposited, each named once."""
        written, self._written = self._written, []
        return as_pages(written)

    def forget_prefixes(self) -> bool:
        """Drop the cached prefixes of all free pages; False if requests hold others, whose prefixes stay."""
        self.confirm([])
        self._evict([block.block_id for block in self._pool.free_block_queue.get_all_free_blocks()])
        return self.num_used == 0

    def _handed_out(self, block: Any) -> None:
        self._written.append(block.block_id)

    def _evict(self, pages: Iterable[int]) -> None:
        for page in pages:
            block = self._pool.blocks[page]
            if block.block_hash is not None:
                self._pool._maybe_evict_cached_block(block)
