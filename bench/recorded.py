"""Files of recorded requests: CSV, and the timed traces of `vllm bench serve`. Reads and writes the files named only."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

from bench.arrivals import Arrival


def read(file: Path, seconds_per_unit: float = 1.0) -> list[Arrival]:
    """All requests by time, the first at 0. Lines of JSON are a timed trace, all else is CSV; times may be dates."""
    with file.open() as lines:
        begin = lines.read(1)
        lines.seek(0)
        rows = _timed_trace(lines) if begin == "{" else _csv(lines)
        arrivals = sorted(rows, key=lambda arrival: arrival.time)
    if not arrivals:
        raise ValueError(f"{file} has no requests")
    first = arrivals[0].time
    return [
        Arrival((a.time - first) * seconds_per_unit, a.prompt_tokens, a.output_tokens, hash_ids=a.hash_ids)
        for a in arrivals
    ]


def _csv(lines: Iterable[str]) -> list[Arrival]:
    """Timestamp, input length, output length; the first line may name them."""
    rows = [row for row in csv.reader(lines) if row]
    if rows and not rows[0][1].strip().isdigit():
        del rows[0]
    return [Arrival(_number(time), int(prompt), int(output)) for time, prompt, output, *_ in rows]


def _timed_trace(lines: Iterable[str]) -> list[Arrival]:
    entries = [json.loads(line) for line in lines if line.strip()]
    return [
        Arrival(_number(e["timestamp"]), e["input_length"], e["output_length"], hash_ids=tuple(e.get("hash_ids", ())))
        for e in entries
    ]


def write_timed_trace(file: Path, arrivals: Sequence[Arrival], chunk_tokens: int, seed: int) -> None:
    """For `vllm bench serve`, which makes prompts of a chunk per hash id and sends none where ids lack.

    Arrivals without ids get ids of their own, other ones with every `seed`.
    """
    own = itertools.count(seed << 32)
    with file.open("w") as lines:
        for arrival in arrivals:
            chunks = math.ceil(arrival.prompt_tokens / chunk_tokens)
            entry = {
                "timestamp": arrival.time,
                "input_length": arrival.prompt_tokens,
                "output_length": arrival.output_tokens,
                "hash_ids": arrival.hash_ids or [-1 - next(own) for _ in range(chunks)],
            }
            lines.write(json.dumps(entry) + "\n")


def _number(time: str | float) -> float:
    try:
        return float(time)
    except ValueError:
        return datetime.fromisoformat(str(time)[:26]).timestamp()
