"""Plots of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.replay import Replay

Bars = Mapping[str, Mapping[str, Sequence[float]]]
"""What stands together -> colour -> samples."""


def plot_bars(file: Path, title: str, unit: str, bars: Bars, level: float | None = None) -> None:
    """Medians as bars, least to most as whiskers; a line at `level`."""
    pyplot = _pyplot()
    colours = list(dict.fromkeys(name for group in bars.values() for name in group))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.6 * len(bars)), 5))
    for index, colour in enumerate(colours):
        here = [(place, group[colour]) for place, group in enumerate(bars.values()) if group.get(colour)]
        places = [place + (index - (len(colours) - 1) / 2) * 0.8 / len(colours) for place, _ in here]
        heights = [median(samples) for _, samples in here]
        whiskers = [[h - min(samples) for h, (_, samples) in zip(heights, here)],
                    [max(samples) - h for h, (_, samples) in zip(heights, here)]]  # fmt: skip
        axes.bar(places, heights, 0.8 / len(colours), yerr=whiskers, capsize=3, label=colour)
    if level is not None:
        axes.axhline(level, color="black", linewidth=0.8)
    axes.set_xticks(range(len(bars)), list(bars), rotation=20, ha="right")
    axes.set(ylabel=unit, title=title)
    if len(colours) > 1:
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    print(f"Plot: {file}", flush=True)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_timeline(file: Path, results: Mapping[str, Replay]) -> None:
    """TTFT of every request by its arrival, one colour per server; merged times shaded."""
    figure, axes = _pyplot().subplots(figsize=(11, 5))
    for name, replay in results.items():
        points = [(arrival.time, served.ttft) for arrival, served in replay.requests if not served.error]
        axes.plot(*zip(*points), ".", label=name, alpha=0.7)
    layouts = [layout for replay in results.values() for layout in replay.layouts]
    last = max(arrival.time for replay in results.values() for arrival, _ in replay.requests)
    for (begin, groups), end in zip(layouts, [*(moment for moment, _ in layouts[1:]), last], strict=False):
        if any(len(group) > 1 for group in groups):
            axes.axvspan(begin, end, alpha=0.12, color="tab:blue")
    axes.set(xlabel="arrival, s", ylabel="time to first token, s", title="Shaded: the flying server is merged")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(file, dpi=120)
    print(f"Plot: {file}", flush=True)
