"""What the controller sees: engines and groups as they report, and rates made of their counters.

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from vllm_flying.controller.cost_curve import CostCurve
from vllm_flying.controller.onset import Onset
from vllm_flying.controller.response import NO_TARGETS, Load, Targets
from vllm_flying.controller.schedule import Schedule
from vllm_flying.core.topology import Group, Layout

# Seconds over which the rate is taken: a burst shows soon, since its unfinished requests count as well.
MEMORY_S = 2.0
# And over which it is taken beside that, to tell where it is going.
LONG_MEMORY_S = 16.0
# Requests over which their lengths are averaged: few look alike, and by fewer of them one long answer is what is usual.
LENGTHS_MEMORY = 32
# What is assumed at first counts as so many.
ASSUMED = 3
# Standard deviations of the rate, if arrivals came by chance as often as before, beyond which they are a burst's begin.
BEYOND_CHANCE = 3.0
# A trend is followed up to so many times what comes since the burst began. It costs more to be in a layout that can't keep up
# than in one that could do with less, and what is expected too much makes any layout look overloaded.
MOST_EXPECTED = 1.35
# Requests per second: a rate that is below counts as this, so that one request after a long while is no burst.
RAREST = 0.05


@dataclass(frozen=True)
class Totals:
    """What all engines have counted since start. `served` are requests that one group had from arrival to last token."""

    requests_added: int = 0
    prompt_tokens_added: int = 0
    requests_finished: int = 0
    output_tokens_finished: int = 0
    requests_served: int = 0
    seconds_served: float = 0.0
    """Summed up: what each of them took."""
    prompt_tokens_served: int = 0
    output_tokens_served: int = 0

    @classmethod
    def of(cls, statuses: Sequence[Mapping[str, Any]]) -> Totals:
        """Of the engines with these reports."""
        return cls(**{counter.name: sum(status[counter.name] for status in statuses) for counter in fields(cls)})

    def since(self, earlier: Totals) -> Totals:
        """What was counted after `earlier`."""
        return Totals(**{c.name: getattr(self, c.name) - getattr(earlier, c.name) for c in fields(self)})


@dataclass(frozen=True)
class GroupObservation:
    """One group, as its leader reports it."""

    engines: Group
    running: int
    waiting: int
    paused: int
    prompt_tokens_queued: int
    kv_tokens_capacity: int
    kv_tokens_used: int
    largest_request: int
    """KV tokens that the largest unfinished request may need."""
    wanted_width: int
    """The widest group that an unfinished request asked for by hint or priority."""


@dataclass(frozen=True)
class Observation:
    """The server at one moment. `time` is monotonic seconds."""

    time: float
    layout: Layout
    groups: tuple[GroupObservation, ...]
    costs: Mapping[int, CostCurve]
    """Per width."""
    widths: tuple[int, ...]
    """Widths that were built, 1 included."""
    kv_tokens_per_engine: int
    max_running: Mapping[int, int]
    """Requests that a group of each width runs at once at most."""
    arrival_rate: float = 0.0
    """Requests per second."""
    arrival_trend: float = 0.0
    """How much more that is than over a longer time; below zero where fewer come than before."""
    rate_since_onset: float = 0.0
    """Requests per second since a burst, if this is one, most likely began; 0 once fewer come: see `controller.onset`."""
    mean_prompt_tokens: float = 128.0
    mean_output_tokens: float = 64.0
    targets: Targets = NO_TARGETS
    """The operator's, from the settings."""
    wall_clock: datetime | None = None
    """Local time of the server; None if the caller has none to give."""
    schedule: Schedule | None = None
    """The operator's, from the settings."""
    totals: Totals = Totals()

    @property
    def unfinished(self) -> int:
        """Requests that run, wait, or are paused."""
        return sum(group.running + group.waiting + group.paused for group in self.groups)

    @property
    def expects_rise(self) -> bool:
        """Whether arrivals rise by more than chance explains."""
        before = max(0.0, self.arrival_rate - self.arrival_trend)
        return self.arrival_trend > BEYOND_CHANCE * math.sqrt(max(before, RAREST) / (2 * MEMORY_S))

    @property
    def expected_rate(self) -> float:
        """Requests per second to reckon with: where arrivals rise beyond chance, they go on rising, up to some more than now."""
        if not self.expects_rise:
            return self.arrival_rate
        return max(self.arrival_rate, min(self.arrival_rate + self.arrival_trend, MOST_EXPECTED * self.rate_since_onset))

    @property
    def load(self) -> Load:
        """What there is to do and what comes."""
        return Load(
            unfinished=self.unfinished,
            prompt_tokens_queued=sum(group.prompt_tokens_queued for group in self.groups),
            arrival_rate=self.expected_rate,
            prompt_tokens=self.mean_prompt_tokens,
            output_tokens=self.mean_output_tokens,
        )


@dataclass
class RateTracker:
    """Turns engines' cumulative counters into an arrival rate and mean lengths."""

    _last: Totals = Totals()
    _time: float | None = None
    arrival_rate: float = 0.0
    mean_prompt_tokens: float = 128.0
    mean_output_tokens: float = 64.0
    _long_rate: float = 0.0
    _added: int = 0
    _finished: int = 0
    _onset: Onset = field(default_factory=Onset)

    @property
    def rate_since_onset(self) -> float:
        """Requests per second since a burst, if there is one, most likely began; 0 once fewer come."""
        return self._onset.rate(self.arrival_rate)

    @property
    def arrival_trend(self) -> float:
        """Arrivals per second, lately, less those over a longer time."""
        return self.arrival_rate - self._long_rate

    def update(self, now: float, totals: Totals) -> None:
        """Take in what all engines have counted."""
        if self._time is not None and now > self._time:
            elapsed = now - self._time
            new = totals.since(self._last)
            added, finished = max(0, new.requests_added), max(0, new.requests_finished)
            self.arrival_rate += _fresh(elapsed, MEMORY_S) * (added / elapsed - self.arrival_rate)
            self._long_rate += _fresh(elapsed, LONG_MEMORY_S) * (added / elapsed - self._long_rate)
            if added:
                mean = max(0, new.prompt_tokens_added) / added
                self._added += added
                self.mean_prompt_tokens += _share(added, self._added) * (mean - self.mean_prompt_tokens)
            if finished:
                mean = max(0, new.output_tokens_finished) / finished
                self._finished += finished
                self.mean_output_tokens += _share(finished, self._finished) * (mean - self.mean_output_tokens)
        self._onset.update(now, totals.requests_added, self._long_rate)
        self._last, self._time = totals, now


def _fresh(elapsed: float, memory_s: float) -> float:
    """The share of an average over `memory_s` that is from the last `elapsed` seconds."""
    return 1.0 - math.exp(-elapsed / memory_s)


def _share(new: int, seen: int) -> float:
    """The share of an average over the last `LENGTHS_MEMORY` requests that the `new` ones of all `seen` have."""
    return min(1.0, new / min(seen + ASSUMED, LENGTHS_MEMORY))
