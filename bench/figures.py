"""What users saw of a replay: latencies and throughput per phase, and the table over servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median, quantiles

from bench.replay import Replay
from bench.report import markdown

QUANTITIES = ("ttft", "tpot")
Row = dict[str, float]


def table(results: Mapping[str, Sequence[Replay]]) -> str:
    """Medians over turns; in brackets the ratio to the better static server, below 1 being better but for tokens/s."""
    first = next(iter(results.values()))[0]
    phases = dict.fromkeys([*(arrival.phase for arrival, _ in first.requests), "all"])
    rows = []
    for phase in phases:
        by_name = {name: [figures(turn, phase) for turn in turns] for name, turns in results.items()}
        for quantity in figures(first, phase):
            values = {name: median(row[quantity] for row in turns) for name, turns in by_name.items()}
            static = [value for name, value in values.items() if name != "auto"] or list(values.values())
            best = max(static) if quantity == "tokens/s" else min(static)
            rows.append([phase, quantity, *(f"{value:.3g} ({value / best:.2f})" for value in values.values())])
    return markdown(["phase", "quantity", *results], rows)


def line(replay: Replay) -> str:
    """The whole of a replay in short."""
    row = figures(replay, "all")
    return f"mean TTFT {row['mean ttft ms']:.0f} ms, mean TPOT {row['mean tpot ms']:.0f} ms, {row['tokens/s']:.1f} tokens/s"


def figures(replay: Replay, phase: str) -> Row:
    """What a user of this phase saw."""
    chosen = [served for arrival, served in replay.requests if phase in ("all", arrival.phase)]
    row: Row = {}
    for quantity in QUANTITIES:
        values = [1e3 * getattr(served, quantity) for served in chosen]
        cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
        row |= {
            f"mean {quantity} ms": mean(values),
            f"P50 {quantity} ms": cuts[49],
            f"P90 {quantity} ms": cuts[89],
            f"P99 {quantity} ms": cuts[98],
        }
    span = max(served.end for served in chosen) - min(served.start for served in chosen)
    row["tokens/s"] = sum(served.output_tokens for served in chosen) / span
    return row
