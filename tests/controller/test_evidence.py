"""Evidence for leaving a layout: great gains convince soon, small ones later, noise and what is below the margin never."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from vllm_flying.controller.evidence import LONGEST_LOOK_S, Evidence


def seconds_until_convinced(evidence: Evidence, share: float, interval_s: float = 0.25, limit_s: float = 120.0) -> float:
    time = 0.0
    while not evidence.look(time, share):
        time += interval_s
        if time > limit_s:
            return float("inf")
    return time


@given(st.floats(0.0, 0.5), st.floats(0.01, 2.0), st.floats(0.0, 1.0))
def test_a_constant_gain_convinces_after_what_it_is_beyond_the_margin(margin: float, patience: float, share: float) -> None:
    beyond = share - margin
    taken = seconds_until_convinced(Evidence(margin, patience), share)
    if beyond <= 0:
        assert taken == float("inf")
    elif patience / beyond < 100:
        assert patience / beyond - 1e-6 <= taken <= patience / beyond + 0.5


def test_noise_around_nothing_does_not_convince() -> None:
    source, evidence = random.Random(3), Evidence(margin=0.1, patience_s=0.3)
    assert not any(evidence.look(0.25 * look, source.uniform(-0.25, 0.25)) for look in range(4000))


def test_it_is_no_longer_convinced_once_the_gain_is_gone() -> None:
    evidence = Evidence(margin=0.1, patience_s=0.3)
    seconds_until_convinced(evidence, 0.5)
    assert not evidence.look(10.0, 0.05)
    assert evidence.look(10.25, 0.5), "one look is no reason to begin again"
    for second in range(11, 30):
        evidence.look(float(second), 0.0)
    assert not evidence.look(30.0, 0.2)
    assert seconds_until_convinced(Evidence(0.1, 0.3), 0.5) > 0.0


def test_a_long_look_away_is_no_evidence() -> None:
    evidence = Evidence(margin=0.1, patience_s=0.3 + 0.9 * LONGEST_LOOK_S)
    evidence.look(0.0, 0.0)
    assert not evidence.look(1000.0, 1.0)


def test_without_patience_every_gain_beyond_the_margin_will_do() -> None:
    assert Evidence(margin=0.1, patience_s=0.0).look(0.0, 0.11)
    assert not Evidence(margin=0.1, patience_s=0.0).look(0.0, 0.09)


def test_another_layout_begins_with_nothing() -> None:
    evidence = Evidence(margin=0.1, patience_s=0.3)
    seconds_until_convinced(evidence, 0.5)
    evidence.forget()
    assert not evidence.look(1.0, 0.3)
