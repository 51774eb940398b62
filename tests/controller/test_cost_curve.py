"""A step with more in it takes longer, and a fuller batch never comes to fewer tokens per second."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_flying.controller.cost_curve import KNEES, CostCurve

number = st.floats(1e-6, 0.05)
curves = st.builds(CostCurve, number, number, st.lists(number, min_size=1, max_size=len(KNEES)).map(tuple))


@given(curves, st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_each_further_request_costs_as_much_as_the_one_before_or_more(curve: CostCurve, prompt: int, few: int, many: int) -> None:
    few, many = sorted((few, many))
    here, there = (curve.of(prompt, decodes + 1) - curve.of(prompt, decodes) for decodes in (few, many))
    assert 0 < here <= there + 1e-12


@given(curves, st.floats(0.1, 500), st.floats(0.1, 500))
def test_more_requests_never_come_to_fewer_tokens_per_second(curve: CostCurve, few: float, many: float) -> None:
    few, many = sorted((few, many))
    assert curve.most_per_s(few) <= curve.most_per_s(many) * (1 + 1e-9)
    assert curve.most_per_s(many) == pytest.approx(max(d / curve.of(0, d) for d in (many, *(k for k in KNEES if 0 < k < many))))


@given(curves, st.floats(0.2, 4.0), st.integers(0, 500))
def test_curves_travel_and_slow_down_as_a_whole(curve: CostCurve, factor: float, decodes: int) -> None:
    assert CostCurve.from_dict(curve.to_dict()) == curve
    assert curve.at_pace(factor).of(7, decodes) == pytest.approx(factor * curve.of(7, decodes))
    assert curve.plus(0.01, 0.001).of(7, decodes) == pytest.approx(curve.of(7, decodes) + 0.01 + 0.001 * decodes)
