"""Engines, groups and layouts: which merges exist and which rank a worker has in each.

Pure: no torch, no vllm. An *engine* is one vLLM EngineCore with `engine_tp` workers of its own. A *group* is an
aligned power-of-two range of engines that act as one; its lowest engine leads it. A *layout* is a partition of all
engines into groups. The *degree* of a group is its total tensor-parallel size, `width * engine_tp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Group = tuple[int, ...]


class LayoutError(ValueError):
    """A layout that can't be: the text says which group is wrong, and why."""


def is_power_of_two(number: int) -> bool:
    """True for 1, 2, 4, 8, ..."""
    return number > 0 and number & (number - 1) == 0


def check_group(group: Sequence[int], num_engines: int) -> Group:
    """`group` as a tuple, or a LayoutError if it isn't an aligned power-of-two range of the engines."""
    width = len(group)
    if not is_power_of_two(width):
        raise LayoutError(f"group {list(group)} has {width} engines; a group has 1, 2, 4, 8, ... engines")
    first = group[0]
    if list(group) != list(range(first, first + width)):
        raise LayoutError(f"group {list(group)} is not an ascending range of engines, such as [0, 1]")
    if first < 0 or first + width > num_engines:
        raise LayoutError(f"group {list(group)} names an engine outside 0..{num_engines - 1}")
    if first % width:
        raise LayoutError(
            f"group {list(group)} is not aligned: a group of {width} starts at a multiple of {width}, not at {first}"
        )
    return tuple(group)


@dataclass(frozen=True)
class Layout:
    """A partition of `num_engines` engines into groups, in ascending order. Checked on construction."""

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, groups: Iterable[Sequence[int]], num_engines: int) -> Layout:
        """The layout made of `groups`; a LayoutError for overlaps, gaps and groups that can't be."""
        listed = [list(group) for group in groups]
        if any(not group for group in listed):
            raise LayoutError("a group is empty; every group names at least one engine")
        checked = sorted(check_group(group, num_engines) for group in listed)
        named = [engine for group in checked for engine in group]
        twice = sorted({engine for engine in named if named.count(engine) > 1})
        if twice:
            raise LayoutError(f"groups overlap: engines {twice} are in more than one group")
        missing = sorted(set(range(num_engines)) - set(named))
        if missing:
            raise LayoutError(f"engines {missing} are in no group; every one of the {num_engines} engines must be")
        return cls(tuple(checked))

    @classmethod
    def separate(cls, num_engines: int) -> Layout:
        """Data parallel: every engine by itself."""
        return cls(tuple((engine,) for engine in range(num_engines)))

    @property
    def num_engines(self) -> int:
        """Engines in all groups together."""
        return sum(len(group) for group in self.groups)

    def group_of(self, engine: int) -> Group:
        """The group that `engine` belongs to."""
        for group in self.groups:
            if engine in group:
                return group
        raise LayoutError(f"engine {engine} is not one of the {self.num_engines} engines")

    def changed_engines(self, target: Layout) -> tuple[int, ...]:
        """Engines whose group differs in `target`; the others need not notice a switch."""
        return tuple(e for g in self.groups for e in g if target.group_of(e) != g)

    def to_lists(self) -> list[list[int]]:
        """For JSON."""
        return [list(group) for group in self.groups]


def available_widths(num_engines: int, wanted: Sequence[int] | None = None) -> tuple[int, ...]:
    """Group widths above 1 that `num_engines` allow, ascending; all of them, or the `wanted` ones."""
    possible = tuple(w for w in _powers_of_two(2, num_engines) if num_engines % w == 0)
    if wanted is None:
        return possible
    refused = sorted(set(wanted) - set(possible) - {1})
    if refused:
        raise LayoutError(f"widths {refused} can't be built from {num_engines} engines; possible: {list(possible)}")
    return tuple(sorted(set(wanted) - {1}))


def world_rank(engine: int, local_rank: int, num_engines: int) -> int:
    """Rank of a worker among all workers of all engines.

    Workers are numbered shard by shard (`local_rank` major): then in every group the members in ascending world
    rank hold ascending ranges of tiles, so that each worker's resident shard contains the narrower shards of every
    wider group it joins.
    """
    return local_rank * num_engines + engine


def tensor_parallel_rank(group: Group, engine: int, local_rank: int) -> int:
    """Rank of a worker inside `group`'s communicator of size `len(group) * engine_tp`."""
    return local_rank * len(group) + group.index(engine)


def group_world_ranks(group: Group, engine_tp: int, num_engines: int) -> list[int]:
    """World ranks of a group's workers, ascending, which is the order of their tensor-parallel ranks."""
    return [world_rank(engine, local, num_engines) for local in range(engine_tp) for engine in group]


def aligned_group(engine: int, width: int) -> Group:
    """The group of `width` engines that `engine` can belong to."""
    first = engine - engine % width
    return tuple(range(first, first + width))


def groups_of_width(width: int, num_engines: int) -> list[Group]:
    """Every aligned group of `width` engines."""
    return [tuple(range(first, first + width)) for first in range(0, num_engines, width)]


def _powers_of_two(start: int, limit: int) -> Iterator[int]:
    while start <= limit:
        yield start
        start *= 2
