"""What the controller has to show in a trace, and whether a run showed it. Figures come from `bench.figures`."""

from __future__ import annotations

import math
from statistics import median

from bench.figures import MORE_IS_BETTER, QUANTITIES, Comparison, better_static, ratios
from bench.report import markdown

WITHIN = 1.08
"""Of the better static server, in each figure of the whole run."""
LOSS = 1.2
"""Each static server loses so much to the other one somewhere, or the trace doesn't tell layouts apart."""
QUIET = 1.08
"""Of static TP."""
BURST = 0.95
"""Of static DP's throughput."""
WHOLE = [*(f"{kind} {quantity} ms" for quantity in QUANTITIES for kind in ("mean", "P50", "P90")), "tokens/s"]

Row = tuple[str, str, float, bool]


def targets(comparison: Comparison) -> str:
    """A Markdown table; empty if a server is lacking to compare to."""
    if set(next(iter(comparison.values()))) != {"DP", "TP", "auto"}:
        return ""
    rows = [*_quiet_and_burst(comparison), *_whole(comparison), *_losses(comparison)]
    cells = [[what, target, f"{ratio:.2f}", "yes" if met else "**no**"] for what, target, ratio, met in rows]
    return markdown(["ratio", "target", "measured", "met"], cells)


def _quiet_and_burst(comparison: Comparison) -> list[Row]:
    rows: list[Row] = []
    for quantity in QUANTITIES if ("quiet", "tokens/s") in comparison else ():
        ratio = _ratio(comparison, "quiet", f"mean {quantity} ms", "auto", "TP")
        rows.append((f"quiet, mean {quantity}, to static TP", f"at most {QUIET}", ratio, ratio <= QUIET))
    if ("burst", "tokens/s") in comparison:
        ratio = _ratio(comparison, "burst", "tokens/s", "auto", "DP")
        rows.append(("burst, tokens/s, to static DP", f"at least {BURST}", ratio, ratio >= BURST))
    return rows


def _whole(comparison: Comparison) -> list[Row]:
    rows: list[Row] = []
    for quantity in WHOLE:
        worse, best = _worse_by(comparison, quantity, "auto")
        rows.append((f"whole run, {quantity.removesuffix(' ms')}, worse than static {best} by", f"at most {WITHIN}", worse, worse <= WITHIN))
    return rows


def _losses(comparison: Comparison) -> list[Row]:
    rows: list[Row] = []
    for name in ("DP", "TP"):
        worst, quantity = max((_worse_by(comparison, quantity, name)[0], quantity) for quantity in WHOLE)
        what = f"whole run, static {name}, its worst ({quantity.removesuffix(' ms')})"
        rows.append((what, f"at least {LOSS}", worst, worst >= LOSS))
    return rows


def _worse_by(comparison: Comparison, quantity: str, name: str) -> tuple[float, str]:
    """How many times worse than the better static server in the whole run, and which that is."""
    best = better_static(comparison["all", quantity], quantity)
    ratio = _ratio(comparison, "all", quantity, name, best)
    return (1 / ratio if quantity in MORE_IS_BETTER else ratio), best


def _ratio(comparison: Comparison, phase: str, quantity: str, name: str, reference: str) -> float:
    values = comparison[phase, quantity]
    of_turns = ratios(values[name], values[reference])
    return median(of_turns) if of_turns else math.nan
