"""Who owns each page of an engine's KV pool, and which physical page stands behind a group's virtual page.

Pure: no torch, no vllm. Every engine has one pool of physical pages. The engine's own scheduler owns all of them at
start and lends free ones to the groups it joins. A group numbers its pages *virtually*: all members back the same
virtual pages, each with a physical page of its own choice, so members need not have the same free pages, only
enough. All members of a group make the same calls, so their sets of backed virtual pages are equal.

Invariants: a physical page is in at most one map; the maps are injective; what is returned is exactly what was lent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


class LeaseError(RuntimeError):
    """A lease that breaks an invariant; the text names the pages."""


@dataclass
class PageLeases:
    """One engine's leases. `num_pages` counts page 0, vLLM's null block, which is never lent and maps to itself."""

    num_pages: int
    backing: dict[int, dict[int, int]] = field(default_factory=dict)
    """Per group width: virtual page -> physical page."""

    def lent_pages(self) -> set[int]:
        """Physical pages lent to any group."""
        return {physical for mapping in self.backing.values() for physical in mapping.values()}

    def virtual_pages(self, width: int) -> set[int]:
        """Virtual pages of the group of `width` that this engine backs."""
        return set(self.backing.get(width, {}))

    def next_virtual_pages(self, width: int, count: int) -> list[int]:
        """The `count` lowest virtual pages that aren't backed yet: the same on every member."""
        taken = self.backing.get(width)
        free = list(range(1, self.num_pages)) if not taken else [p for p in range(1, self.num_pages) if p not in taken]
        if count > len(free):
            raise LeaseError(f"a group of width {width} asks for {count} more pages; {len(free)} numbers are left")
        return free[:count]

    def lend(self, width: int, virtual: Sequence[int], physical: Sequence[int]) -> dict[int, int]:
        """Back `virtual` pages of the group of `width` by `physical` ones; returns the new part of the map."""
        if len(virtual) != len(physical):
            raise LeaseError(f"{len(virtual)} virtual pages can't be backed by {len(physical)} physical ones")
        new = dict(zip(virtual, physical, strict=True))
        behind = set(physical)
        if len(new) != len(virtual) or len(behind) != len(physical):
            raise LeaseError("a page is named twice in one lease")
        twice = self.lent_pages() & behind
        if twice:
            raise LeaseError(f"physical pages {sorted(twice)} are lent already")
        mapping = self.backing.setdefault(width, {})
        again = mapping.keys() & new.keys()
        if again:
            raise LeaseError(f"virtual pages {sorted(again)} of width {width} are backed already")
        if new and not (min(min(new), min(behind)) > 0 and max(max(new), max(behind)) < self.num_pages):
            raise LeaseError(f"a page of the lease is outside 1..{self.num_pages - 1}")
        mapping.update(new)
        return new

    def take_back(self, width: int, virtual: Iterable[int]) -> list[int]:
        """End the lease of `virtual` pages; returns their physical pages, in the same order."""
        mapping = self.backing.get(width, {})
        wanted = list(virtual)
        unknown = set(wanted) - mapping.keys()
        if unknown or len(set(wanted)) != len(wanted):
            raise LeaseError(f"virtual pages {sorted(unknown) or 'named twice'} of width {width} are not backed")
        return [mapping.pop(page) for page in wanted]
