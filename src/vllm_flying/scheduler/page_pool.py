"""Moving pages in and out of a stock BlockPool.

May import vllm. A page that a pool doesn't own is held as allocated in it, so the stock allocator never sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.block_pool import BlockPool


class PagePool:
    """The pages of one scheduler: how many it owns, and taking free ones away or adding some."""

    def __init__(self, block_pool: BlockPool, owns_all: bool) -> None:
        self._pool = block_pool
        self.num_owned = block_pool.num_gpu_blocks - 1 if owns_all else 0
        if not owns_all:
            self._pool.get_new_blocks(self._pool.get_num_free_blocks())

    @property
    def num_free(self) -> int:
        """Pages that no request holds; cached prefixes count as free."""
        return self._pool.get_num_free_blocks()

    @property
    def num_used(self) -> int:
        """Owned pages that requests hold."""
        return self.num_owned - self.num_free

    def withdraw(self, count: int) -> list[int]:
        """Take `count` free pages away, least recently used first. Their cached prefixes are forgotten."""
        blocks = self._pool.get_new_blocks(count)
        self.num_owned -= count
        return [block.block_id for block in blocks]

    def deposit(self, pages: Sequence[int]) -> None:
        """Add pages that this pool holds as allocated."""
        self._pool.free_blocks([self._pool.blocks[page] for page in pages])
        self.num_owned += len(pages)

    def forget_prefixes(self) -> bool:
        """Drop all cached prefixes; False, and nothing done, while requests hold pages."""
        if self.num_used:
            return False
        self.deposit(self.withdraw(self.num_free))
        return True
