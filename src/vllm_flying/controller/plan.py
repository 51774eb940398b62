"""What a policy decides, and which layouts it may choose from.

Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flying.controller.observation import Observation
from vllm_flying.core.routing import groups_with_width
from vllm_flying.core.topology import Layout, groups_of_width


@dataclass(frozen=True)
class Plan:
    """A layout to be in, and why."""

    layout: Layout
    rule: str
    reason: str
    gain_s: float = 0.0
    """Predicted seconds that a usual request takes less."""
    missed: float = 0.0
    """By how much, as a share, the present layout is predicted to miss a target that this one meets."""
    urgent: bool = False
    """Not to be held back by cooldown: a request can't run otherwise."""


def uniform(observation: Observation, width: int) -> Layout:
    """All engines in groups of one width."""
    return Layout(tuple(groups_of_width(width, observation.layout.num_engines)))


def with_group_of(observation: Observation, width: int) -> Layout:
    """The present layout with as little changed as gives it a group of `width`."""
    num_engines = observation.layout.num_engines
    return Layout.of(groups_with_width(observation.layout.groups, width, num_engines), num_engines)


def least_width(observation: Observation) -> int:
    """The narrowest widest-group that every unfinished request can live with: its KV fits, its hint is honoured."""
    needed = max((group.largest_request for group in observation.groups), default=0)
    wanted = max((group.wanted_width for group in observation.groups), default=1)
    for width in observation.widths:
        if width >= wanted and width * observation.kv_tokens_per_engine >= needed:
            return width
    return observation.widths[-1]


def allowed_layouts(observation: Observation) -> list[Layout]:
    """Uniform layouts, and where a request needs a wide group, layouts with one such group and the rest narrower."""
    least, num_engines = least_width(observation), observation.layout.num_engines
    layouts = [uniform(observation, width) for width in observation.widths if width >= least]
    if 1 < least < num_engines:
        holder = next(
            (g.engines for g in observation.groups if len(g.engines) == least and g.running + g.waiting), None
        )
        first = holder[0] if holder else 0
        wide = tuple(range(first, first + least))
        rest = [(engine,) for engine in range(num_engines) if engine not in wide]
        layouts.append(Layout.of([wide, *rest], num_engines))
    return layouts
