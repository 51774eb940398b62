"""Requests over time: bursts made to a recipe, or a window of a recording scaled to the machine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the start, and its lengths in tokens. Equal hash ids are equal chunks of prompts."""

    time: float
    prompt_tokens: int
    output_tokens: int
    phase: str = "all"
    hash_ids: tuple[int, ...] = ()
    priority: int = 0
    """vLLM's: below 0 is urgent."""


@dataclass(frozen=True)
class Phase:
    """A stretch of Poisson arrivals."""

    name: str
    seconds: float
    rate: float
    prompt_tokens: int
    output_tokens: int


def poisson(phases: Sequence[Phase], seed: int) -> list[Arrival]:
    """Arrivals of all phases, one after the other. Lengths vary by a quarter up and down."""
    source, arrivals, begin = random.Random(seed), [], 0.0
    for phase in phases:
        time = begin + source.expovariate(phase.rate)
        while time < begin + phase.seconds:
            scale = source.uniform(0.75, 1.25)
            lengths = max(1, int(phase.prompt_tokens * scale)), max(2, int(phase.output_tokens * scale))
            arrivals.append(Arrival(time, *lengths, phase.name))
            time += source.expovariate(phase.rate)
        begin += phase.seconds
    return arrivals


def window(
    recorded: Sequence[Arrival],
    start_s: float,
    seconds: float,
    time_scale: float,
    prompt_scale: float,
    output_scale: float,
) -> list[Arrival]:
    """The part of a recording from `start_s` on that takes `seconds` once scaled in time, its lengths scaled too."""
    arrivals = []
    for arrival in recorded:
        offset = arrival.time - start_s
        if 0 <= offset < seconds / time_scale:
            prompt_tokens = max(1, int(arrival.prompt_tokens * prompt_scale))
            output_tokens = max(2, int(arrival.output_tokens * output_scale))
            arrivals.append(Arrival(offset * time_scale, prompt_tokens, output_tokens, hash_ids=arrival.hash_ids))
    return arrivals


def mixed(
    arrivals: Sequence[Arrival], urgent_share: float, long_share: float, long: tuple[int, int], seed: int
) -> list[Arrival]:
    """Some of the arrivals, by chance, urgent, or with `long` prompts and outputs in tokens; tables have them apart."""
    source, result = random.Random(seed), []
    for arrival in arrivals:
        chance = source.random()
        if chance < urgent_share:
            arrival = replace(arrival, phase="urgent", priority=-1)
        elif chance < urgent_share + long_share:
            arrival = replace(arrival, phase="long", prompt_tokens=long[0], output_tokens=long[1], hash_ids=())
        result.append(arrival)
    return result
