"""Mixes of usual, urgent and long requests, and figures where some fail."""

from __future__ import annotations

import math

from bench.arrivals import Phase, mixed, poisson
from bench.figures import Objectives, compare, figures, table
from bench.replay import Replay
from bench.stock_client import ServedRequest

OBJECTIVES = Objectives(2000, 250)


def test_shares_are_about_as_asked_and_the_rest_is_left_alone() -> None:
    usual = poisson([Phase("quiet", 1000.0, 2.0, 64, 32)], seed=1)
    mix = mixed(usual, 0.2, 0.1, (1500, 16), seed=1)
    assert [arrival.time for arrival in mix] == [arrival.time for arrival in usual]
    urgent = [arrival for arrival in mix if arrival.phase == "urgent"]
    long = [arrival for arrival in mix if arrival.phase == "long"]
    assert abs(len(urgent) / len(mix) - 0.2) < 0.03 and {arrival.priority for arrival in urgent} == {-1}
    assert abs(len(long) / len(mix) - 0.1) < 0.03
    assert {(arrival.prompt_tokens, arrival.output_tokens, arrival.priority) for arrival in long} == {(1500, 16, 0)}
    assert [pair for pair in zip(usual, mix) if pair[0] != pair[1]] == [
        pair for pair in zip(usual, mix) if pair[1].phase in ("urgent", "long")
    ]
    assert mixed(usual, 0.0, 0.0, (0, 0), seed=1) == usual


def test_failed_requests_are_counted_and_are_in_no_other_figure() -> None:
    arrivals = mixed(poisson([Phase("quiet", 50.0, 2.0, 64, 32)], seed=1), 0.0, 0.2, (1500, 16), seed=1)
    good, refused = ServedRequest(1.0, 0.2, [0.1], 2), ServedRequest(1.0, 0.0, [], 0, error="Bad Request")
    static = Replay(0.0, [(a, refused if a.phase == "long" else good) for a in arrivals], [], 0.0, 0.0)
    flying = Replay(0.0, [(a, good) for a in arrivals], [], 0.0, 0.0)
    long = figures(static, "long", OBJECTIVES)
    assert long["failed"] > 0 and math.isnan(long["mean ttft ms"]) and long["tokens/s"] == long["goodput/s"] == 0
    whole = figures(static, "all", OBJECTIVES)
    assert whole["failed"] == long["failed"] and round(whole["mean ttft ms"]) == 200
    assert "| long | mean ttft ms | nan (nan) | 200 (1.00) | 200 (1.00) |" in table(
        compare({"DP": [static], "TP": [flying], "auto": [flying]}, OBJECTIVES)
    )
