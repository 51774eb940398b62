"""Moving pages in and out of a stock BlockPool.

May import vllm. A page that a pool doesn't own is simply not in its queue of free blocks, so the stock allocator never
sees it. Whole pools change hands at a switch; the work per page is one link of vLLM's own queue.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.block_pool import BlockPool


class PagePool:
    """The pages of one scheduler: how many it owns, and taking free ones away or adding some."""

    def __init__(self, block_pool: BlockPool, owns_all: bool) -> None:
        self._pool = block_pool
        self.num_owned = block_pool.num_gpu_blocks - 1
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

    def withdraw(self, count: int) -> list[int]:
        """Take `count` free pages away, least recently used first. Their cached prefixes are forgotten."""
        blocks = self._pool.free_block_queue.popleft_n(count)
        self.num_owned -= count
        for block in blocks:
            if block.block_hash is not None:
                self._pool._maybe_evict_cached_block(block)
        return [block.block_id for block in blocks]

    def deposit(self, pages: Sequence[int]) -> None:
        """Add free pages that this pool doesn't own."""
        blocks = self._pool.blocks
        self._pool.free_block_queue.append_n([blocks[page] for page in pages])
        self.num_owned += len(pages)

    def forget_prefixes(self) -> bool:
        """Drop the cached prefixes of all free pages; False if requests hold others, whose prefixes stay."""
        self.deposit(self.withdraw(self.num_free))
        return self.num_used == 0
