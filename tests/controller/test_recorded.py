"""Each policy on a recorded sequence of states: what is decided, and when."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest

from tests.support.recording import FIXTURES, Recorded, Run, observations, record, runs
from vllm_flying.controller.controller import Controller
from vllm_flying.controller.observation import Observation
from vllm_flying.controller.policies import BUILT_IN, manual


def sequence(policy: str) -> list[Observation]:
    return list(observations(FIXTURES / f"{policy}.jsonl"))


def decided(policy: str, seen: list[Observation]) -> list[tuple[float, list[list[int]], str]]:
    """Times, layouts and rules of the switches that a controller asks for while it is shown what was seen."""
    controller, switches = Controller(BUILT_IN[policy]), []
    for before, look in pairwise([seen[0], *seen]):
        if look.layout != before.layout:
            controller.switched(look.time, 0.05)
        decision = controller.decide(look)
        under_way = bool(switches) and switches[-1][1] != look.layout.to_lists()
        if decision.act and decision.plan is not None and not under_way:
            switches.append((look.time, decision.plan.layout.to_lists(), decision.plan.rule))
    return switches


APART, MERGED = [[0], [1]], [[0, 1]]
FOUR_APART = [[0], [1], [2], [3]]
EXPECTED = {
    # Quiet, a burst from 8 s to 20 s, quiet.
    "load": [(2.0, MERGED, "load"), (10.5, APART, "load"), (26.0, MERGED, "load")],
    # The same; in the burst, at 14 s, a request asks for a group of two.
    "auto": [(2.0, MERGED, "load"), (10.5, APART, "load"), (14.5, MERGED, "long_context")],
    # At 6 s a request comes that one engine can't hold.
    "long_context": [(6.5, [[0, 1], [2, 3]], "long_context"), (10.0, FOUR_APART, "long_context")],
    # At 5 s an urgent one.
    "priority": [(5.5, [[0, 1], [2], [3]], "priority"), (8.0, FOUR_APART, "priority")],
    # It begins 8 s before the hour at which the schedule has width 2.
    "schedule": [(8.0, MERGED, "schedule")],
}


def test_each_policy_that_acts_has_a_sequence() -> None:
    assert {file.stem for file in FIXTURES.glob("*.jsonl")} == set(EXPECTED) == set(BUILT_IN) - {"manual"}


@pytest.mark.parametrize("policy", sorted(EXPECTED))
def test_the_same_is_decided_as_when_it_was_recorded(policy: str) -> None:
    seen = sequence(policy)
    assert decided(policy, seen) == EXPECTED[policy]
    assert len(seen) >= 40 and not any(manual(look) for look in seen)
    happened = [look.layout.to_lists() for before, look in pairwise(seen) if look.layout != before.layout]
    assert happened == [layout for _, layout, _ in EXPECTED[policy]], "each was carried out in the record"


@pytest.mark.parametrize("policy", sorted(EXPECTED))
def test_what_is_recorded_again_is_the_same(policy: str) -> None:
    file = io.StringIO()
    recorded = Recorded(manual, file)
    for look in sequence(policy):
        recorded(look)
    assert file.getvalue() == (FIXTURES / f"{policy}.jsonl").read_text()


@pytest.mark.parametrize("run", runs(), ids=lambda run: run.policy)
def test_the_records_are_what_the_recorder_makes(run: Run) -> None:
    text, _ = record(run)
    assert text == (FIXTURES / f"{run.policy}.jsonl").read_text(), "`python -m tests.support.recording` makes them anew"
