"""Plots of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.replay import Replay


def plot_timeline(file: Path, results: Mapping[str, Replay]) -> None:
    """TTFT of every request by its arrival, one colour per server; merged times shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5))
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
    print(f"Plot: {file}")
