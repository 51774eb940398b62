"""Which engine takes a request, and which groups to form for one that wants a width nobody has.

Pure: no torch, no vllm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vllm_flying.core.topology import Group


@dataclass(frozen=True)
class GroupState:
    """A group as the router sees it. `load` counts requests; `kv_tokens` is what its KV cache can hold."""

    engines: Group
    load: float
    kv_tokens: int

    @property
    def leader(self) -> int:
        """The engine that takes the group's requests."""
        return self.engines[0]

    @property
    def load_per_engine(self) -> float:
        """What groups of different widths are compared by."""
        return self.load / len(self.engines)


@dataclass(frozen=True)
class Route:
    """The group that takes a request, and whether it has the width that was asked for."""

    group: GroupState
    honoured: bool


Preference = Callable[[Sequence[GroupState]], GroupState | None]
"""Which of several groups that can take a request should; None if it doesn't matter."""


def candidates(groups: Sequence[GroupState], tokens: int, width: int | None) -> list[GroupState]:
    """Groups that can hold `tokens` of KV; only those of the wanted `width`, if there are any."""
    fitting = [group for group in groups if tokens <= group.kv_tokens]
    return [group for group in fitting if width is None or len(group.engines) == width] or fitting


def choose_group(
    groups: Sequence[GroupState],
    tokens: int = 0,
    width: int | None = None,
    pinned_engine: int | None = None,
    prefer: Preference | None = None,
) -> Route | None:
    """The group for a request that may need `tokens` of KV; None if it fits none.

    A pinned engine wins; then groups of the wanted `width`; among those that are left, what `prefer` says, else the
    least load per engine, and the earlier group where loads are equal. A parked engine is never chosen: its leader is.
    """
    if pinned_engine is not None:
        group = next(group for group in groups if pinned_engine in group.engines)
        return Route(group, width is None or width == len(group.engines)) if tokens <= group.kv_tokens else None
    possible = candidates(groups, tokens, width)
    if not possible:
        return None
    best = prefer(possible) if prefer is not None else None
    if best is None:
        best = min(possible, key=lambda group: (group.load_per_engine, group.leader))
    return Route(best, width is None or len(best.engines) == width)


def deal(
    needed: Sequence[int], recipients: Sequence[int], capacity: Mapping[int, int]
) -> dict[int, list[int]]:
    """Places, in `needed`, of the requests that each recipient gets: in turn among those that can hold a request.

    `needed` is each request's KV tokens, `capacity` what the recipients' groups hold. What none can hold goes to the one
    that holds most, to be kept aside there.
    """
    dealt: dict[int, list[int]] = {recipient: [] for recipient in recipients}
    for place, tokens in enumerate(needed):
        most = max(capacity[recipient] for recipient in recipients)
        able = [recipient for recipient in recipients if capacity[recipient] >= min(tokens, most)]
        dealt[min(able, key=lambda recipient: len(dealt[recipient]))].append(place)
    return dealt


def groups_with_width(groups: Sequence[Group], width: int, num_engines: int) -> tuple[Group, ...]:
    """`groups` changed so that one has `width`: the aligned range that touches the fewest groups, the first of these.

    Groups outside the range stay; a wider group that contains the range is split, the rest of it as wide as can be.
    """
    if any(len(group) == width for group in groups):
        return tuple(groups)
    ranges = [tuple(range(first, first + width)) for first in range(0, num_engines, width)]
    chosen = min(ranges, key=lambda r: (sum(1 for group in groups if set(group) & set(r)), r[0]))
    result = []
    for group in groups:
        if not set(group) & set(chosen):
            result.append(group)
        elif len(group) > width:
            result += [part for part in _parts_without(group, chosen)]
    return tuple(sorted([*result, chosen]))


def _parts_without(group: Group, chosen: Group) -> list[Group]:
    """The widest aligned ranges that make up `group` without `chosen`."""
    if not set(group) & set(chosen):
        return [group]
    if len(group) <= len(chosen):
        return []
    half = len(group) // 2
    return _parts_without(group[:half], chosen) + _parts_without(group[half:], chosen)
