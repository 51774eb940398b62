"""Whether a run shows what it has to is read off the ratios within its turns."""

from __future__ import annotations

import pytest

from bench.arrivals import Phase, poisson
from bench.figures import Objectives, compare
from bench.replay import Replay
from bench.stock_client import ServedRequest
from bench.targets import targets

ARRIVALS = poisson([Phase("quiet", 20.0, 4.0, 64, 32), Phase("burst", 10.0, 8.0, 64, 32)], seed=1)
PACES = (1.0, 1.6, 0.7)
"""How slow the machine is in each turn: no figure is to show it."""


def replayed(quiet: float, burst: float, pace: float) -> Replay:
    """Every request of a phase takes as long: seconds to the first token, and a tenth of that for each of two others."""

    def served(time: float, phase: str) -> ServedRequest:
        seconds = pace * (quiet if phase == "quiet" else burst)
        return ServedRequest(time, seconds, [seconds / 10] * 2, 3)

    return Replay(0.0, [(arrival, served(arrival.time, arrival.phase)) for arrival in ARRIVALS], [], 0.0, 0.0)


def rows(auto_quiet: float, auto_burst: float) -> dict[str, list[str]]:
    shapes = {"DP": (0.15, 0.3), "TP": (0.1, 0.6), "auto": (auto_quiet, auto_burst)}
    results = {name: [replayed(*shape, pace) for pace in PACES] for name, shape in shapes.items()}
    lines = targets(compare(results, Objectives(2000, 250))).splitlines()[2:]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_a_run_that_shows_everything() -> None:
    found = rows(auto_quiet=0.1, auto_burst=0.3)
    assert {cells[-1] for cells in found.values()} == {"yes"} and len(found) == 12


@pytest.mark.parametrize(
    ("auto_quiet", "auto_burst", "missed"),
    [(0.12, 0.3, "quiet, mean ttft, to static TP"), (0.1, 0.4, "whole run, P90 ttft, worse than static DP by")],
)
def test_what_is_missed_is_said(auto_quiet: float, auto_burst: float, missed: str) -> None:
    assert rows(auto_quiet, auto_burst)[missed][-1] == "**no**"


def test_a_ratio_is_that_of_a_turn() -> None:
    """Turns of one server at another pace of the machine than the other's would say otherwise."""
    assert rows(auto_quiet=0.11, auto_burst=0.3)["quiet, mean ttft, to static TP"][1] == "1.10"
