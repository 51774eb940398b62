"""Plots of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.arrivals import Arrival
from bench.client import Timing


def plot_timeline(
    file: Path,
    results: Mapping[str, Sequence[tuple[Arrival, Timing]]],
    layouts: Sequence[tuple[float, list[list[int]]]],
) -> None:
    """TTFT of every request by its arrival, one colour per server; merged times shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5))
    for name, pairs in results.items():
        axes.plot([a.time for a, _ in pairs], [t.ttft for _, t in pairs], ".", label=name, alpha=0.7)
    ends = [*(time for time, _ in layouts[1:]), max((a.time for pairs in results.values() for a, _ in pairs), default=0)]
    for (begin, groups), end in zip(layouts, ends, strict=False):
        if any(len(group) > 1 for group in groups):
            axes.axvspan(begin, end, alpha=0.12, color="tab:blue")
    axes.set(xlabel="arrival, s", ylabel="time to first token, s", title="Shaded: the flying server is merged")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(file, dpi=120)
    print(f"Plot: {file}")
