"""Requests over time: bursts made to a recipe, or a recorded trace scaled to the machine."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the start, and its lengths in tokens."""

    time: float
    prompt_tokens: int
    output_tokens: int
    phase: str = "all"


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


def trace(path: Path, start_s: float, seconds: float, time_scale: float, length_scale: float) -> list[Arrival]:
    """A window of a file of timestamp, input length, output length (with a header), scaled in time and length."""
    with path.open() as file:
        rows = list(csv.reader(file))[1:]
    times = [_seconds(row[0]) for row in rows]
    arrivals = []
    for time, (_, prompt, output, *_) in zip(times, rows, strict=True):
        offset = time - times[0] - start_s
        if 0 <= offset < seconds / time_scale:
            lengths = max(1, int(int(prompt) * length_scale)), max(2, int(int(output) * length_scale))
            arrivals.append(Arrival(offset * time_scale, *lengths))
    return arrivals


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text[:26]).timestamp()
