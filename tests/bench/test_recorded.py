"""Recorded requests: both formats read alike, and `vllm bench serve` makes of a written file what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench.arrivals import Arrival, window
from bench.recorded import read, write_timed_trace

ROWS = [(5000, 40, 8, [1, 2, 3]), (7000, 33, 4, [1, 2, 9]), (6000, 16, 2, [7])]


class Words:
    """As much of a tokenizer as the client asks for."""

    all_special_ids = (0,)

    def get_vocab(self) -> dict[str, int]:
        return {f"w{token}": token for token in range(1000)}


def stock_samples(file: Path, chunk_tokens: int) -> list[Any]:
    from vllm.benchmarks.datasets.datasets import TimedTrace

    labels = {f"timed_trace_label_{name}": name for name in ("timestamp", "input_length", "output_length", "hash_ids")}
    dataset = TimedTrace(dataset_path=str(file), timed_trace_chunk_hash_size=chunk_tokens, **labels)
    return dataset.sample(Words(), 1000)  # type: ignore[arg-type]


@pytest.mark.parametrize("header", ["", "timestamp,input_length,output_length\n"])
def test_csv_and_timed_trace_say_the_same(tmp_path: Path, header: str) -> None:
    (tmp_path / "csv").write_text(header + "".join(f"{time},{i},{o}\n" for time, i, o, _ in ROWS))
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    (tmp_path / "jsonl").write_text("".join(json.dumps(dict(zip(keys, row))) + "\n" for row in ROWS))
    csv, timed = (read(tmp_path / name, 0.001) for name in ("csv", "jsonl"))
    assert [(a.time, a.prompt_tokens, a.output_tokens) for a in csv] == [(0, 40, 8), (1, 16, 2), (2, 33, 4)]
    assert [Arrival(a.time, a.prompt_tokens, a.output_tokens) for a in timed] == csv
    assert [a.hash_ids for a in timed] == [(1, 2, 3), (7,), (1, 2, 9)]


def test_dates_are_seconds(tmp_path: Path) -> None:
    (tmp_path / "csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.0099300,2162,5\n2024-05-10 00:00:01.5099301,7,6\n"
    )
    assert [a.time for a in read(tmp_path / "csv")] == pytest.approx([0, 1.5])


def test_window_scales_times_and_lengths() -> None:
    recorded = [Arrival(float(second), 100, 10, hash_ids=(second,)) for second in range(10)]
    assert window(recorded, 4.0, 6.0, 3.0, 0.5, 0.5) == [
        Arrival(0.0, 50, 5, hash_ids=(4,)),
        Arrival(3.0, 50, 5, hash_ids=(5,)),
    ]


@pytest.mark.parametrize("scale", [1.0, 0.35])
def test_client_sends_prompts_as_long_as_they_should_be(tmp_path: Path, scale: float) -> None:
    chunk = math.ceil(16 * scale)
    arrivals = [
        Arrival(0.0, int(40 * scale), 8, hash_ids=(1, 2, 3)),
        Arrival(1.5, int(33 * scale), 4, hash_ids=(1, 2, 9)),
    ]
    arrivals += [Arrival(2.0, 40, 2), Arrival(2.0, 40, 2)]
    write_timed_trace(tmp_path / "trace", arrivals, chunk, seed=1)
    samples = stock_samples(tmp_path / "trace", chunk)
    assert [(s.timestamp, len(s.prompt), s.expected_output_len) for s in samples] == [
        (a.time, a.prompt_tokens, a.output_tokens) for a in arrivals
    ]
    first, second, third, fourth = (sample.prompt for sample in samples)
    assert first[:chunk] == second[:chunk]
    assert len({tuple(prompt[:chunk]) for prompt in (first, third, fourth)}) == 3
    write_timed_trace(tmp_path / "other", arrivals, chunk, seed=2)
    assert stock_samples(tmp_path / "other", chunk)[2].prompt != third
