"""Which layout's KV each page of an engine still holds, so that cached prefixes survive switches in place.

Pure: no torch, no vllm. A page that is lent and comes back unwritten holds what it held before. So a prefix that an
engine cached by itself is found again after a split, and one that a group cached is found again after the next merge,
as long as nobody needed their pages meanwhile and every member backs the group's page by the same page as before.
"""

from __future__ import annotations

import numpy as np

from vllm_flying.core.leases import PageNumbers, Pages, as_pages

ALONE = 1
NOBODY = 0
"""In place of a width: nobody knows what a page holds."""


class PageContents:
    """One engine's pages: the width of the layout that wrote each last, and what stood behind each group's pages."""

    def __init__(self, num_pages: int) -> None:
        self._writer = np.zeros(num_pages, dtype=np.int32)
        """Width of the layout whose KV a page holds."""
        self._former: dict[int, Pages] = {}
        """Per width: virtual page -> the physical page that stood behind it last."""

    def written(self, width: int, physical: PageNumbers) -> None:
        """The layout of `width` has handed these pages out to requests, or their KV was copied there for it."""
        self._writer[as_pages(physical)] = width

    def choose(self, width: int, virtual: Pages, free: Pages) -> Pages:
        """Which of the `free` pages stand behind `virtual` ones, as many.

        Pages that hold what the group wrote stand where they stood. The others follow in the order of `free`, least
        recently used first: groups use low numbers first, so an engine's own cached prefixes are needed last.
        """
        former = self._former_of(width)
        wanted = former[virtual]
        again = self._among(wanted, free) & (wanted > 0) & (self._writer[wanted] == width)
        physical = np.zeros_like(virtual)
        physical[again] = wanted[again]
        physical[~again] = free[~self._among(free, wanted[again])]
        strange = physical[~again]
        self._writer[strange[self._writer[strange] == width]] = NOBODY  # the KV of another virtual page of this group
        self._stand(former, virtual, physical)
        return physical

    def stand_in(self, width: int, virtual: Pages, physical: Pages) -> None:
        """The group of `width` wants these pages behind `virtual` ones when it forms: they hold its KV already."""
        self._stand(self._former_of(width), virtual, physical)
        self._writer[physical] = width

    def in_place(self, width: int) -> tuple[Pages, Pages]:
        """Pages of the group of `width` that hold what it wrote last, if it forms now: its numbers and this engine's."""
        former = self._former_of(width)
        virtual = np.flatnonzero((former > 0) & (self._writer[former] == width)).astype(np.int32)
        return virtual, former[virtual]

    def intact(self, width: int, virtual: Pages, physical: Pages) -> Pages:
        """Those of `virtual` that hold what the group of `width` wrote into them last."""
        holding: Pages = virtual[self._writer[physical] == width]
        return holding

    def _stand(self, former: Pages, virtual: Pages, physical: Pages) -> None:
        """Behind these pages of a group and no others."""
        former[self._among(former, physical)] = 0
        former[virtual] = physical

    def _among(self, pages: Pages, others: Pages) -> np.ndarray:
        """Which of `pages` are among `others`, in linear time."""
        mask = np.zeros(len(self._writer), dtype=bool)
        mask[others] = True
        found: np.ndarray = mask[pages]
        return found

    def _former_of(self, width: int) -> Pages:
        if width not in self._former:
            self._former[width] = np.zeros(len(self._writer), dtype=np.int32)
        return self._former[width]


def to_bitmap(pages: Pages, num_pages: int) -> bytes:
    """A set of pages as it travels between processes."""
    mask = np.zeros(num_pages, dtype=bool)
    mask[pages] = True
    return np.packbits(mask).tobytes()


def from_bitmap(bitmap: bytes) -> Pages:
    """The pages of a bitmap; none for no bitmap."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8))).astype(np.int32)


def common(bitmaps: list[bytes]) -> bytes:
    """Pages that are in all bitmaps."""
    arrays = [np.frombuffer(bitmap, dtype=np.uint8) for bitmap in bitmaps]
    return bytes(np.bitwise_and.reduce(arrays).tobytes()) if arrays else b""
