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


def table(results: Mapping[str, Sequence[Replay]], objectives: Objectives) -> str:
    """Medians over turns; in brackets the ratio to the better static server: above 1 is better for rates, else below."""
    first = next(iter(results.values()))[0]
    phases = dict.fromkeys([*(arrival.phase for arrival, _ in first.requests), "all"])
    rows = []
    for phase in phases:
        by_name = {name: [figures(turn, phase, objectives) for turn in turns] for name, turns in results.items()}
        for quantity in figures(first, phase, objectives):
            values = {name: median(row[quantity] for row in turns) for name, turns in by_name.items()}
            static = [value for name, value in values.items() if name != "auto"] or list(values.values())
            known = [value for value in static if not math.isnan(value)] or [math.nan]
            best = max(known) if quantity in MORE_IS_BETTER else min(known)
            cells = (f"{value:.3g} ({value / best:.2f})" if best else f"{value:.3g}" for value in values.values())
            rows.append([phase, quantity, *cells])
    return markdown(["phase", "quantity", *results], rows)


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
