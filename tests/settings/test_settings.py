"""Settings are strict, and their reference is up to date."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from vllm_flying.controller.response import Targets
from vllm_flying.controller.schedule import Schedule, ScheduleEntry
from vllm_flying.settings import Settings, SettingsError
from vllm_flying.settings.reference import field_docstrings, reference


@pytest.mark.parametrize(
    ("mapping", "texts"),
    [
        ({"on_hnt": "form"}, ["'on_hnt'", "did you mean 'on_hint'", "Allowed:"]),
        ({"speed": 7}, ["unknown setting 'speed'. It has the value 7. Allowed: enabled, widths"]),
        ({"on_hint": "maybe"}, ["'on_hint'", "'maybe'", "form, best_effort"]),
        ({"enabled": "yes"}, ["'enabled'", "'yes'", "true or false"]),
        ({"widths": 2}, ["'widths'", "list of whole numbers"]),
        ({"widths": [2, "4"]}, ["'widths'", "list of whole numbers"]),
        ({"widths": [8], "num_engines": 4}, ["'widths'", "[8]", "[2, 4]"]),
        ({"switch_timeout_s": -1}, ["'switch_timeout_s'", "-1", "above 0"]),
        ({"switch_timeout_s": True}, ["'switch_timeout_s'", "a number"]),
        ({"weights": None}, ["'weights'"]),
        ({"ttft_target_ms": 0}, ["'ttft_target_ms'", "0", "milliseconds above 0"]),
        ({"tpot_target_ms": "50"}, ["'tpot_target_ms'", "'50'", "a number"]),
        ({"policy": "schedule"}, ["'policy'", "'schedule'", "missing"]),
        ({"schedule": "08:30"}, ["'schedule'", "'08:30'", "a list such as"]),
        ({"schedule": [{"at": "8:30", "width": 1}]}, ["'schedule'", "entry 1", "'at'", "'8:30'", "'00:00' to '23:59'"]),
        ({"schedule": [{"at": "08:30", "width": 4}], "num_engines": 2}, ["entry 1", "'width'", "4", "[1, 2]"]),
        (
            {"schedule": [{"at": "08:30", "width": 2}], "widths": [4], "num_engines": 4},
            ["entry 1", "'width'", "2", "[1, 4]"],
        ),
    ],
)
def test_what_is_wrong_is_named(mapping: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        Settings.from_mapping(mapping)
    assert all(text in str(error.value) for text in texts), str(error.value)


def test_values_are_kept_and_can_not_change() -> None:
    settings = Settings.from_mapping({"widths": [4, 2], "num_engines": 8, "switch_timeout_s": 5})
    assert settings.built_widths() == (2, 4)
    assert Settings.from_mapping({"num_engines": 8}).built_widths() == (2, 4, 8)
    scheduled = {"policy": "schedule", "num_engines": 2, "schedule": [{"at": "08:30", "days": "tue", "width": 2}]}
    assert Settings.from_mapping(scheduled).schedule == Schedule((ScheduleEntry(510, (1,), 2),))
    assert Settings.from_mapping({"ttft_target_ms": 500}).targets() == Targets(ttft_s=0.5)
    assert Settings.from_mapping({"tpot_target_ms": 40, "ttft_target_ms": None}).targets() == Targets(tpot_s=0.04)
    with pytest.raises(FrozenInstanceError):
        settings.widths = (2,)  # type: ignore[misc]


def test_the_reference_is_up_to_date() -> None:
    written = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    assert written == reference(), "run: python -m vllm_flying.settings.reference > docs/settings.md"
    assert all(field_docstrings().values())
