"""Plots are drawn of whatever was measured, also where a server lacks a figure."""

from __future__ import annotations

from pathlib import Path

from bench.plots import plot_bars


def test_bars_of_samples(tmp_path: Path) -> None:
    bars = {"idle": {"merge": [9.0, 11.0, 10.0], "split": [8.0]}, "drain": {"merge": [], "split": [12.0, 14.0]}}
    plot_bars(tmp_path / "bars.png", "POST to reply", "ms", bars, level=10.0)
    assert (tmp_path / "bars.png").stat().st_size > 5000
