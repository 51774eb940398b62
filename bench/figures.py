"""What users saw of a replay: latencies and throughput per phase, and the table over servers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from bench.replay import Replay
from bench.report import markdown, percentile
from bench.stock_client import ServedRequest

QUANTITIES = ("ttft", "tpot")
MORE_IS_BETTER = ("tokens/s", "goodput/s")
Row = dict[str, float]


@dataclass(frozen=True)
class Objectives:
    """What a request has to keep to count as goodput, in milliseconds."""

    ttft_ms: float
    tpot_ms: float

    def kept(self, served: ServedRequest) -> bool:
        return 1e3 * served.ttft <= self.ttft_ms and 1e3 * served.tpot <= self.tpot_ms


Comparison = dict[tuple[str, str], dict[str, list[float]]]
"""(phase, quantity) -> server -> the figure of every turn."""


def compare(results: Mapping[str, Sequence[Replay]], objectives: Objectives) -> Comparison:
    """Every figure of every phase and of the whole."""
    first = next(iter(results.values()))[0]
    comparison: Comparison = {}
    for phase in dict.fromkeys([*(arrival.phase for arrival, _ in first.requests), "all"]):
        by_name = {name: [figures(turn, phase, objectives) for turn in turns] for name, turns in results.items()}
        for quantity in figures(first, phase, objectives):
            comparison[phase, quantity] = {name: [row[quantity] for row in turns] for name, turns in by_name.items()}
    return comparison


def better_static(values: Mapping[str, Sequence[float]], quantity: str) -> str:
    """The static server with the better median over turns."""
    medians = {name: median(own) for name, own in values.items() if name != "auto" or len(values) == 1}
    known = {name: value for name, value in medians.items() if not math.isnan(value)} or medians
    return (max if quantity in MORE_IS_BETTER else min)(known, key=lambda name: known[name])


def ratios(own: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Turn by turn: in a turn both servers had about the same machine, over a run they needn't have had."""
    return [a / b for a, b in zip(own, reference, strict=True) if b]


def table(comparison: Comparison) -> str:
    """Medians over turns; in brackets the median ratio to the better static server, with its range for `auto`."""
    names = list(next(iter(comparison.values())))
    rows = []
    for (phase, quantity), values in comparison.items():
        best = values[better_static(values, quantity)]
        rows.append([phase, quantity, *(_cell(values[name], best, name == "auto") for name in names)])
    return markdown(["phase", "quantity", *names], rows)


def _cell(own: Sequence[float], best: Sequence[float], with_range: bool) -> str:
    cell, of_turns = f"{median(own):.3g}", ratios(own, best)
    if not of_turns:
        return cell
    spread = f", {min(of_turns):.2f} to {max(of_turns):.2f}" if with_range and len(of_turns) > 1 else ""
    return f"{cell} ({median(of_turns):.2f}{spread})"


def line(replay: Replay) -> str:
    """The whole of a replay in short."""
    served = [request for _, request in replay.requests if not request.error]
    ttft, tpot = (1e3 * mean(getattr(request, quantity) for request in served) for quantity in QUANTITIES)
    return f"mean TTFT {ttft:.0f} ms, mean TPOT {tpot:.0f} ms, {_per_second(served, _output_tokens):.1f} tokens/s"


def figures(replay: Replay, phase: str, objectives: Objectives) -> Row:
    """What a user of this phase saw; the time in the queue is known of the whole run only.

    Requests that failed count as such and nowhere else; without any other, figures are not a number.
    """
    of_phase = [served for arrival, served in replay.requests if phase in ("all", arrival.phase)]
    chosen = [served for served in of_phase if not served.error]
    row: Row = {"failed": len(of_phase) - len(chosen)}
    for quantity in QUANTITIES:
        values = [1e3 * getattr(served, quantity) for served in chosen] or [math.nan]
        row |= {f"mean {quantity} ms": mean(values)}
        row |= {f"P{percent} {quantity} ms": percentile(values, percent) for percent in (50, 90, 99)}
    row["tokens/s"] = _per_second(chosen, _output_tokens)
    row["goodput/s"] = _per_second(chosen, objectives.kept)
    if phase == "all":
        row["mean queue ms"] = 1e3 * replay.queue_time
    return row


def _output_tokens(served: ServedRequest) -> float:
    return served.output_tokens


def _per_second(served: Sequence[ServedRequest], quantity: Callable[[ServedRequest], float]) -> float:
    """From the first request's start to the last one's end."""
    if not served:
        return 0.0
    span = max(request.end for request in served) - min(request.start for request in served)
    return sum(quantity(request) for request in served) / span
