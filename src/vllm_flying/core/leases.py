"""Who owns each page of an engine's KV pool, and which physical page stands behind a group's virtual page.

Pure: no torch, no vllm; numpy, since a switch lends every free page of a pool. Every engine has one pool of physical
pages. The engine's own scheduler owns all of them at start and lends free ones to the groups it joins. A group numbers
its pages *virtually*: all members back the same virtual pages, each with a physical page of its own choice, so members
need not have the same free pages, only enough. All members of a group make the same calls, so their sets of backed
virtual pages are equal.

Invariants: a physical page is in at most one map; the maps are injective; what is returned is exactly what was lent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Pages = np.ndarray
"""Page numbers, int32."""
PageNumbers = Pages | Sequence[int]


class LeaseError(RuntimeError):
    """A lease that breaks an invariant; the text names the pages."""


def as_pages(pages: PageNumbers) -> Pages:
    """Page numbers as an array."""
    return np.asarray(pages, dtype=np.int32)


class PageLeases:
    """One engine's leases. `num_pages` counts page 0, vLLM's null block, which is never lent."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._backing: dict[int, Pages] = {}
        """Per group width: virtual page -> physical page, 0 where there is none."""
        self._lent = np.zeros(num_pages, dtype=bool)

    def is_lent(self, physical: PageNumbers) -> np.ndarray:
        """Of each page whether it is lent to any group."""
        lent: np.ndarray = self._lent[as_pages(physical)]
        return lent

    def lent_pages(self) -> set[int]:
        """Physical pages lent to any group."""
        return set(np.flatnonzero(self._lent).tolist())

    def virtual_pages(self, width: int) -> set[int]:
        """Virtual pages of the group of `width` that this engine backs."""
        return set(np.flatnonzero(self._map(width)).tolist())

    def backing(self, width: int) -> tuple[Pages, Pages]:
        """All virtual pages of the group of `width` that this engine backs, and the physical pages behind them."""
        virtual = np.flatnonzero(self._map(width)).astype(np.int32)
        return virtual, self._map(width)[virtual]

    def physical(self, width: int, virtual: PageNumbers) -> Pages:
        """The physical pages behind `virtual` ones, 0 where there is none."""
        physical: Pages = self._map(width)[as_pages(virtual)]
        return physical

    def next_virtual_pages(self, width: int, count: int) -> Pages:
        """The `count` lowest virtual pages that aren't backed yet: the same on every member."""
        free = self.unbacked(width)
        if count > len(free):
            raise LeaseError(f"a group of width {width} asks for {count} more pages; {len(free)} numbers are left")
        return free[:count]

    def unbacked(self, width: int) -> Pages:
        """Virtual pages of the group of `width` that nothing stands behind, lowest first."""
        return np.flatnonzero(self._map(width) == 0)[1:].astype(np.int32)

    def lend(self, width: int, virtual: PageNumbers, physical: PageNumbers) -> None:
        """Back `virtual` pages of the group of `width` by `physical` ones."""
        virtual, physical = as_pages(virtual), as_pages(physical)
        if len(virtual) != len(physical):
            raise LeaseError(f"{len(virtual)} virtual pages can't be backed by {len(physical)} physical ones")
        for pages in (virtual, physical):
            if len(pages) and not (pages.min() > 0 and pages.max() < self.num_pages):
                raise LeaseError(f"a page of the lease is outside 1..{self.num_pages - 1}")
            if self._named(pages).sum() != len(pages):
                raise LeaseError("a page is named twice in one lease")
        mapping = self._map(width)
        if self._lent[physical].any():
            raise LeaseError(f"physical pages {physical[self._lent[physical]].tolist()} are lent already")
        if mapping[virtual].any():
            raise LeaseError(f"virtual pages {virtual[mapping[virtual] > 0].tolist()} of width {width} are backed already")
        mapping[virtual] = physical
        self._lent[physical] = True

    def take_back(self, width: int, virtual: PageNumbers) -> Pages:
        """End the lease of `virtual` pages; returns their physical pages, in the same order."""
        virtual = as_pages(virtual)
        mapping = self._map(width)
        if self._named(virtual).sum() != len(virtual):
            raise LeaseError(f"a virtual page of width {width} is named twice")
        physical = mapping[virtual]
        if not physical.all():
            raise LeaseError(f"virtual pages {virtual[physical == 0].tolist()} of width {width} are not backed")
        mapping[virtual] = 0
        self._lent[physical] = False
        return physical

    def _named(self, pages: Pages) -> np.ndarray:
        named = np.zeros(self.num_pages, dtype=bool)
        named[pages] = True
        return named

    def _map(self, width: int) -> Pages:
        if width not in self._backing:
            self._backing[width] = np.zeros(self.num_pages, dtype=np.int32)
        return self._backing[width]
