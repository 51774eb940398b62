"""Engines' status reports made into the controller's observation.

Pure: no torch, no vllm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from vllm_flying.controller.cost_curve import CostCurve
from vllm_flying.controller.cost_model import ENOUGH_STEPS, estimates
from vllm_flying.controller.observation import GroupObservation, Observation, RateTracker, Totals
from vllm_flying.controller.response import NO_TARGETS, Targets
from vllm_flying.controller.schedule import Schedule
from vllm_flying.core.topology import Layout


def observe(
    now: float,
    layout: Layout,
    widths: Sequence[int],
    statuses: Sequence[Mapping[str, Any]],
    rates: RateTracker,
    *,
    wall_clock: datetime | None = None,
    schedule: Schedule | None = None,
    targets: Targets = NO_TARGETS,
) -> Observation:
    """One observation from the status of every engine, in order."""
    totals = Totals.of(statuses)
    rates.update(now, totals)
    groups = []
    for group in layout.groups:
        members = [statuses[engine] for engine in group]
        leader = members[0]
        groups.append(
            GroupObservation(
                engines=group,
                running=leader["running"],
                waiting=sum(member["waiting"] for member in members),
                paused=sum(member["paused"] for member in members),
                prompt_tokens_queued=sum(member["prompt_tokens_queued"] for member in members),
                kv_tokens_capacity=leader["kv_tokens_capacity"],
                kv_tokens_used=leader["kv_tokens_used"],
                largest_request=max(member["largest_request"] for member in members),
                wanted_width=max(member["wanted_width"] for member in members),
            )
        )
    return Observation(
        time=now,
        layout=layout,
        groups=tuple(groups),
        costs=step_costs(statuses),
        widths=tuple(sorted({1, *widths})),
        kv_tokens_per_engine=statuses[0]["kv_tokens_per_engine"],
        max_running={int(width): most for width, most in statuses[0]["max_running"].items()},
        arrival_rate=rates.arrival_rate,
        arrival_trend=rates.arrival_trend,
        rate_since_onset=rates.rate_since_onset,
        mean_prompt_tokens=rates.mean_prompt_tokens,
        mean_output_tokens=rates.mean_output_tokens,
        targets=targets,
        wall_clock=wall_clock,
        schedule=schedule,
        totals=totals,
    )


def step_costs(statuses: Sequence[Mapping[str, Any]]) -> dict[int, CostCurve]:
    """For each width the fit of an engine that knows it, at that engine's pace: see `controller.cost_model` and `.pace`.

    The first engine that has seen enough steps, or the one that has seen most. The first of all leads whatever group it
    is in, so its pace is always that of now, and what is slow for one is slow for all that it knows.
    """
    best: dict[int, tuple[int, float, Mapping[str, Any]]] = {}
    for status in statuses:
        for width, report in status["costs"].items():
            steps = min(report["steps"], ENOUGH_STEPS)
            if int(width) not in best or steps > best[int(width)][0]:
                best[int(width)] = (steps, status["pace"], report)
    usual = estimates({width: report for width, (_, _, report) in best.items()})
    return {width: curve.at_pace(best[width][1]) for width, curve in usual.items()}
