"""The schedule is read strictly, its last past entry holds, and requests' needs come before it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.controller.test_controller import observation
from tests.core.test_topology import layouts
from vllm_flying.controller.controller import Controller
from vllm_flying.controller.observation import Observation, RateTracker
from vllm_flying.controller.plan import least_width, uniform
from vllm_flying.controller.policies import policy_by_name, schedule
from vllm_flying.controller.schedule import DAYS, MINUTES_PER_WEEK, Schedule, ScheduleError, parse_schedule
from vllm_flying.core.topology import Layout
from vllm_flying.frontend.observe import observe

MONDAY = datetime(2026, 3, 2)
WORK = parse_schedule([
    {"at": "08:30", "days": "mon-fri", "width": 1},
    {"at": "19:00", "width": 2},
    {"at": "23:00", "days": "sat,sun", "width": 4},
])  # fmt: skip


@pytest.mark.parametrize(
    ("day", "at", "width"),
    [("mon", "08:29", 4), ("mon", "08:30", 1), ("mon", "18:59", 1), ("mon", "19:00", 2), ("tue", "00:00", 2),
     ("sat", "08:30", 2), ("sat", "22:59", 2), ("sat", "23:00", 4), ("sun", "12:00", 4), ("sun", "23:59", 4)],
)  # fmt: skip
def test_the_last_past_entry_holds_over_midnight_and_the_end_of_the_week(day: str, at: str, width: int) -> None:
    hour, minute = map(int, at.split(":"))
    moment = MONDAY + timedelta(days=DAYS.index(day), hours=hour, minutes=minute, seconds=59)
    assert WORK.entry_at(moment).width == width


@pytest.mark.parametrize(
    ("days", "meant"),
    [("mon", [0]), ("mon-fri", [0, 1, 2, 3, 4]), ("sat-mon", [0, 5, 6]), ("sun,tue-wed", [1, 2, 6]), ("thu-thu", [3])],
)
def test_days(days: str, meant: list[int]) -> None:
    (entry,) = parse_schedule([{"at": "00:00", "days": days, "width": 1}]).entries
    assert list(entry.days) == meant


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ({"at": "08:30", "width": 1}, ["not a list", "a list such as"]),
        ([], ["[]", "a list such as"]),
        (["08:30"], ["entry 1", "'08:30'", "an object"]),
        ([{"at": "08:30", "with": 1}], ["entry 1", "'with'", "at, days, width"]),
        ([{"width": 1}], ["entry 1", "'at'", "None"]),
        ([{"at": "24:00", "width": 1}], ["'at'", "'24:00'", "'23:59'"]),
        ([{"at": "08:30\n", "width": 1}], ["'at'"]),
        ([{"at": "08:30"}], ["entry 1", "'width'", "None", "1, 2, 4"]),
        ([{"at": "08:30", "width": 3}], ["'width'", "3"]),
        ([{"at": "08:30", "width": True}], ["'width'", "True"]),
        ([{"at": "08:30", "days": "monday", "width": 1}], ["'days'", "'monday'", "mon, tue"]),
        ([{"at": "08:30", "days": "mon-", "width": 1}], ["'days'", "'mon-'"]),
        ([{"at": "08:30", "days": "", "width": 1}], ["'days'"]),
        ([{"at": "08:30", "days": None, "width": 1}], ["'days'", "None"]),
        (
            [{"at": "08:30", "width": 1}, {"at": "08:30", "days": "sat", "width": 2}],
            ["entry 2", "'at'", "'08:30'", "entry 1", "sat"],
        ),
    ],
)
def test_what_is_wrong_is_named(value: Any, texts: list[str]) -> None:
    with pytest.raises(ScheduleError) as error:
        parse_schedule(value)
    assert all(text in str(error.value) for text in texts), str(error.value)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    minutes = draw(st.lists(st.integers(0, 1439), min_size=1, max_size=4, unique=True))
    days = st.sets(st.sampled_from(DAYS), min_size=1).map(",".join) | st.just("mon-sun")
    return parse_schedule([
        {"at": f"{m // 60:02}:{m % 60:02}", "days": draw(days), "width": draw(st.sampled_from([1, 2, 4]))} for m in minutes
    ])  # fmt: skip


@given(schedules(), st.integers(0, MINUTES_PER_WEEK - 1))
def test_one_entry_holds_at_every_minute_and_changes_only_where_one_begins(plan: Schedule, minute: int) -> None:
    moment = MONDAY + timedelta(minutes=minute)
    entry, before = plan.entry_at(moment), plan.entry_at(moment - timedelta(minutes=1))
    begins = [other for other in plan.entries if minute in other.starts()]
    assert [entry] == begins if begins else entry == before
    assert plan.entry_at(moment + timedelta(weeks=1)) == entry


def at_six(layout: Layout, hours: Schedule | None = WORK, hour: int = 18, **of_first: Any) -> Observation:
    return replace(observation(layout, **of_first), wall_clock=MONDAY + timedelta(hours=hour), schedule=hours)


def test_the_scheduled_width_is_taken_and_kept() -> None:
    split, pairs = Layout.separate(4), Layout.of([[0, 1], [2, 3]], 4)
    assert schedule(at_six(split)) is None
    plan = schedule(at_six(pairs))
    assert plan is not None and plan.layout == split and "width 1 since 08:30" in plan.reason and not plan.urgent
    later = schedule(at_six(split, hour=20))
    assert later is not None and later.layout == pairs
    assert Controller(schedule).decide(at_six(pairs, running=50)).act, "no margin: a schedule predicts no gain"


def test_nothing_is_planned_without_a_schedule_or_a_clock() -> None:
    pairs = Layout.of([[0, 1], [2, 3]], 4)
    assert schedule(at_six(pairs, hours=None)) is None
    assert schedule(replace(at_six(pairs), wall_clock=None)) is None
    assert policy_by_name("schedule") is schedule


def test_a_request_that_needs_width_gets_it_beside_the_scheduled_ones() -> None:
    plan = schedule(at_six(Layout.separate(4), running=3, largest_request=1500))
    assert plan is not None and plan.layout == Layout.of([[0, 1], [2], [3]], 4) and plan.urgent
    assert "a request needs a group of 2" in plan.reason
    assert schedule(at_six(Layout.of([[0, 1], [2], [3]], 4), running=3, largest_request=1500)) is None
    assert schedule(at_six(Layout.of([[0, 1]], 2), running=3, wanted_width=2)) is None


@settings(max_examples=100, deadline=None)
@given(layouts(4), schedules(), st.integers(0, MINUTES_PER_WEEK - 1), st.integers(0, 5000), st.sampled_from([1, 2, 4]))
def test_plans_hold_what_is_needed_and_settle(
    layout: Layout, hours: Schedule, minute: int, largest: int, wanted: int
) -> None:
    moment = MONDAY + timedelta(minutes=minute)
    needs = {"running": 1, "largest_request": largest, "wanted_width": wanted}
    seen = replace(observation(layout, **needs), wall_clock=moment, schedule=hours)
    plan = schedule(seen)
    target = plan.layout if plan else layout
    scheduled, least = hours.entry_at(moment).width, least_width(seen)
    assert max(len(group) for group in target.groups) >= least
    assert scheduled < least or target == uniform(seen, scheduled)
    assert schedule(replace(observation(target, **needs), wall_clock=moment, schedule=hours)) is None


def test_the_clock_and_the_schedule_reach_the_policy() -> None:
    status = {
        "running": 0, "waiting": 0, "paused": 0, "prompt_tokens_queued": 0, "kv_tokens_capacity": 100,
        "kv_tokens_used": 0, "largest_request": 0, "wanted_width": 1, "kv_tokens_per_engine": 100, "max_running": {"1": 8, "2": 8},
        "pace": 1.0, "costs": {}, "requests_added": 0, "prompt_tokens_added": 0, "requests_finished": 0, "output_tokens_finished": 0,
        "requests_served": 0, "seconds_served": 0.0, "prompt_tokens_served": 0, "output_tokens_served": 0,
    }  # fmt: skip
    evening = MONDAY + timedelta(hours=20)
    seen = observe(
        1.0, Layout.separate(2), (2,), [status, status], RateTracker(), wall_clock=evening, schedule=WORK
    )  # fmt: skip
    plan = schedule(seen)
    assert plan is not None and plan.layout.to_lists() == [[0, 1]]
