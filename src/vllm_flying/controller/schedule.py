"""Layouts by the time of day: what the setting `schedule` says, and which of its entries holds at a moment.

Pure: the caller brings the clock. An entry names a time, the days it is for and a group width; it holds until the next
one, over midnight and over the end of the week.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from vllm_flying.core.topology import is_power_of_two

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
KEYS = ("at", "days", "width")
MINUTES_PER_DAY = 24 * 60
MINUTES_PER_WEEK = len(DAYS) * MINUTES_PER_DAY

DAYS_ALLOWED = f"days such as 'mon-fri' or 'sat,sun', of {', '.join(DAYS)}"


class ScheduleError(ValueError):
    """A schedule that can't be: names the entry, the key, the value and what is allowed."""


@dataclass(frozen=True)
class ScheduleEntry:
    """From `minute` of each of the `days` on, groups have `width` engines."""

    minute: int
    """Of the day, 0 to 1439."""
    days: tuple[int, ...]
    """0 is Monday; ascending."""
    width: int

    def starts(self) -> tuple[int, ...]:
        """Minutes of the week at which the entry begins to hold."""
        return tuple(day * MINUTES_PER_DAY + self.minute for day in self.days)


@dataclass(frozen=True)
class Schedule:
    """At least one entry, no two beginning at the same minute."""

    entries: tuple[ScheduleEntry, ...]

    def entry_at(self, moment: datetime) -> ScheduleEntry:
        """The entry that began last, in the hours that `moment` shows."""
        now = moment.weekday() * MINUTES_PER_DAY + moment.hour * 60 + moment.minute
        return min(self.entries, key=lambda entry: min((now - start) % MINUTES_PER_WEEK for start in entry.starts()))

    def check_widths(self, widths: tuple[int, ...]) -> None:
        """ScheduleError for an entry whose width isn't among those that a server has."""
        for number, entry in enumerate(self.entries, 1):
            if entry.width not in widths:
                raise _wrong(number, "width", entry.width, f"the widths of this server, {list(widths)}")


def parse_schedule(value: Any) -> Schedule:
    """The schedule in a list of JSON objects; ScheduleError for whatever isn't exactly one."""
    if not isinstance(value, list | tuple) or not value:
        raise ScheduleError(
            f"{value!r} is not a list of entries; allowed: a list such as "
            '[{"at": "08:30", "days": "mon-fri", "width": 1}, {"at": "19:00", "width": 2}]'
        )
    entries = tuple(_entry(number, raw) for number, raw in enumerate(value, 1))
    taken: dict[int, int] = {}
    for number, entry in enumerate(entries, 1):
        for start in entry.starts():
            if start in taken:
                day, at = DAYS[start // MINUTES_PER_DAY], value[number - 1]["at"]
                raise _wrong(number, "at", at, f"a time that entry {taken[start]} doesn't have on {day} already")
            taken[start] = number
    return Schedule(entries)


def _entry(number: int, raw: Any) -> ScheduleEntry:
    if not isinstance(raw, Mapping):
        raise ScheduleError(f'entry {number} is {raw!r}; allowed: an object such as {{"at": "08:30", "width": 1}}')
    for key in raw:
        if key not in KEYS:
            raise ScheduleError(f"entry {number} has the unknown key {key!r}; allowed: {', '.join(KEYS)}")
    at, days, width = raw.get("at"), raw.get("days", "mon-sun"), raw.get("width")
    if not isinstance(at, str) or not re.fullmatch("([01][0-9]|2[0-3]):[0-5][0-9]", at):
        raise _wrong(number, "at", at, "a time of day, '00:00' to '23:59'")
    if type(width) is not int or not is_power_of_two(width):
        raise _wrong(number, "width", width, "engines per group: 1, 2, 4, 8, ...")
    return ScheduleEntry(int(at[:2]) * 60 + int(at[3:]), _days(number, days), width)


def _days(number: int, value: Any) -> tuple[int, ...]:
    """Days in a text such as `mon-thu,sat`; a range may run over the end of the week."""
    named: set[int] = set()
    for part in value.split(",") if isinstance(value, str) else [""]:
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise _wrong(number, "days", value, DAYS_ALLOWED)
        begin, end = DAYS.index(first), DAYS.index(last if dash else first)
        named |= {(begin + offset) % len(DAYS) for offset in range((end - begin) % len(DAYS) + 1)}
    return tuple(sorted(named))


def _wrong(number: int, key: str, value: Any, allowed: str) -> ScheduleError:
    return ScheduleError(f"entry {number}: {key!r} is {value!r}; allowed: {allowed}")
