"""The settings dataclass and its strict parser.

Pure: no torch, no vllm. Every field's docstring is the text of docs/settings.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_flying.controller.policies import policy_by_name
from vllm_flying.controller.response import Targets
from vllm_flying.controller.schedule import Schedule, ScheduleError, parse_schedule
from vllm_flying.core.topology import LayoutError, available_widths

WEIGHTS = ("auto", "tiles", "views")
PACKING = ("stock", "blocks")
ON_HINT = ("form", "best_effort")
URGENT_POLICIES = ("auto", "priority")
"""Policies that give an urgent request a wide group at once, and its steps to itself."""
MAY_BE_ZERO = frozenset({"precopy_bytes"})
SWITCH_METHODS = ("auto", "drain", "soft", "pause", "migrate")


class SettingsError(ValueError):
    """A setting that can't be: names the key, the value and what is allowed."""


@dataclass(frozen=True)
class Settings:
    """What an operator can choose. Immutable; equal in every process of a server."""

    enabled: bool = True
    """Whether the plugin takes part at all; false runs plain vLLM although the extension is named."""

    widths: tuple[int, ...] | None = None
    """Group widths, in engines, whose layouts are built at start; by default every power of two that divides the
    number of engines. Fewer widths start faster and need less memory for communicators."""

    weights: str = "auto"
    """How a worker holds its one copy of the weights: `tiles` (each layer cut at the widest degree and packed tile by
    tile), `views` (plain weights, wider layouts use slices of them), `auto`: tiles on CPU, views on GPU."""

    packing: str = "stock"
    """How tiles are packed on CPU: `stock` (as vLLM packs whole weights there), `blocks` (so too, but bfloat16 on CPUs with
    AVX512-BF16 and without AMX for vLLM's own kernels: on some of these CPUs few requests decode faster; measure it)."""

    on_hint: str = "form"
    """What a request's `parallelism_hint` does when no group has that width: `form` one, or `best_effort`: run where
    it can."""

    prefix_affinity: bool = True
    """Whether requests go to the group that has lately served the beginning of their prompt, as long as it has at most
    two requests per engine more than the least loaded one. No effect without vLLM's prefix caching."""

    switch_method: str = "auto"
    """What happens to running requests at a switch that names no method: `drain` (they finish first), `soft` (likewise,
    but an engine that is done with its own serves until the others are, and what begins there moves), `pause` (they
    wait until their layout returns), `migrate` (their KV moves into the new layout) or `auto` (as `migrate`, but what
    finishes, or is computed again, sooner than it moves does so)."""

    paused_limit_s: float = 10.0
    """Seconds that a begun request waits for room in a new layout before its KV is given up and computed again there,
    if it fits there at all."""

    flex_delay_weight: float = 0.01
    """With the method `auto`: what a second for which a request with a priority above 0 (`service_tier` `flex`) stays
    paused counts beside a second of everybody's delay; 1 is as for all others. A request stays paused, its KV in place,
    where that costs less than to move it, once it is known how long its layout is likely to be away."""

    deferred_limit_s: float = 10.0
    """Seconds for which requests stand back while urgent ones (priority below 0) run, with the policies `auto` and
    `priority`; then they share the steps again until there is a while without urgent ones."""

    switch_timeout_s: float = 30.0
    """Seconds after which a switch that names no limit is rolled back."""

    policy: str = "auto"
    """What decides on layouts: `auto` (the layout that serves the present load first, and whatever a request needs),
    `manual` (the switch route and hints only), `load` and `long_context` (its two parts), `schedule` (the width that the
    setting of this name has for the time of day), or the name of a policy that another package offers. See
    docs/policies.md."""

    schedule: Schedule | None = None
    """Group widths by the server's local time, for the policy `schedule`: a list of entries such as
    `{"at": "08:30", "days": "mon-fri", "width": 1}`; without `days` an entry is for every day. An entry holds until
    the next one."""

    interval_s: float = 0.25
    """Seconds between two looks of the controller while something changes. While nothing does it looks once a second."""

    cooldown_s: float = 2.0
    """Seconds that the controller leaves between two switches; doubled while it flaps."""

    margin: float = 0.05
    """How much sooner, as a share, requests must be done in another layout for the controller to think of it."""

    patience_s: float = 0.4
    """What another layout is better beyond the margin, added up over time, must come to this for a switch: a layout in
    which requests take 40 % less is formed after a second, one in which they take 15 % less after six."""

    ttft_target_ms: float | None = None
    """Milliseconds to the first token that a usual request should take at most. With the policies `auto` and `load`, the
    layout in which requests are done first is chosen among those that are predicted to meet the targets, if any does."""

    tpot_target_ms: float | None = None
    """Likewise between two tokens."""

    manual_hold_s: float = 30.0
    """Seconds that the controller keeps out after a switch asked for by hand."""

    dry_run: bool = False
    """The controller logs what it would do and does nothing."""

    audit_log: str | None = None
    """File to which decisions, and what they gained, are appended, one JSON object per line; `vllm-flying explain` reads it."""

    staging_bytes: int = 64 * 2**20
    """Bytes that a worker may use to stage KV on its way to others, per direction; two such rounds can be under way. KV
    that workers read in each other's memory, as on CPU, is not staged. Cached prefixes that follow a switch come to no more
    than this per worker of an engine."""

    precopy_bytes: int = 16 * 2**20
    """Bytes of KV that a worker copies at a time, between steps, ahead of a migration, so that engines rest only for what is
    newer (or a 32nd of all, if that is more). The switch comes some tens of steps later, 10 s at most, and so does one that
    is asked for meanwhile. What is no more than this in all is copied while they rest, and so is what is no
    more than 16 times this if the controller decided the switch, and everything if a request waits for it. For KV that
    workers read in each other's memory, as on CPU. 0: nothing is copied ahead."""

    startup_timeout_s: float = 300.0
    """Seconds that a worker waits at start for the workers of all engines."""

    load_format: str | None = None
    """What reads the checkpoint: the value of vLLM's `--load-format`. Set by the plugin; leave it out."""

    num_engines: int = 1
    """Engines of the server: the value of vLLM's `--data-parallel-size`. Set by the plugin; leave it out."""

    engine_tp: int = 1
    """Workers per engine: the value of vLLM's `--tensor-parallel-size`. Set by the plugin; leave it out."""

    max_num_batched_tokens_given: bool = False
    """Whether vLLM's `--max-num-batched-tokens` was given. Set by the plugin; leave it out."""

    max_num_seqs_given: bool = False
    """Whether vLLM's `--max-num-seqs` was given. Set by the plugin; leave it out."""

    def __post_init__(self) -> None:
        _check_choice("weights", self.weights, WEIGHTS)
        _check_choice("packing", self.packing, PACKING)
        _check_choice("on_hint", self.on_hint, ON_HINT)
        _check_choice("switch_method", self.switch_method, SWITCH_METHODS)
        for name in ("switch_timeout_s", "startup_timeout_s", "interval_s", "paused_limit_s", "deferred_limit_s"):
            value = getattr(self, name)
            if not 0 < value <= 86400:
                raise SettingsError(f"setting {name!r} is {value!r}; allowed: seconds above 0, at most 86400")
        for name in ("cooldown_s", "margin", "patience_s", "manual_hold_s"):
            if not 0 <= getattr(self, name) <= 86400:
                raise SettingsError(f"setting {name!r} is {getattr(self, name)!r}; allowed: 0 or more, at most 86400")
        for name in ("ttft_target_ms", "tpot_target_ms"):
            target = getattr(self, name)
            if target is not None and not 0 < target <= 86400e3:
                raise SettingsError(f"setting {name!r} is {target!r}; allowed: milliseconds above 0, at most 86400000")
        if not 0 <= self.flex_delay_weight <= 1:
            raise SettingsError(f"setting 'flex_delay_weight' is {self.flex_delay_weight!r}; allowed: 0 to 1")
        try:
            policy_by_name(self.policy)
        except ValueError as error:
            raise SettingsError(f"setting 'policy': {error}") from None
        if self.policy == "schedule" and self.schedule is None:
            raise SettingsError("setting 'policy' is 'schedule'; allowed only with the setting 'schedule', which is missing")
        if self.num_engines > 1:
            self._check_widths()

    def _check_widths(self) -> None:
        try:
            widths = self.built_widths()
        except LayoutError as error:
            raise SettingsError(f"setting 'widths' is {list(self.widths or ())!r}: {error}") from None
        try:
            if self.schedule is not None:
                self.schedule.check_widths((1, *widths))
        except ScheduleError as error:
            raise SettingsError(f"setting 'schedule': {error}") from None

    def built_widths(self) -> tuple[int, ...]:
        """Widths above 1 whose layouts are built at start."""
        return available_widths(self.num_engines, self.widths)

    def targets(self) -> Targets:
        """What the operator wants of a usual request, in seconds."""
        return Targets(
            None if self.ttft_target_ms is None else self.ttft_target_ms / 1e3,
            None if self.tpot_target_ms is None else self.tpot_target_ms / 1e3,
        )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Settings:
        """Settings from JSON-like values; SettingsError for an unknown key or a value of another kind."""
        if not isinstance(mapping, Mapping):
            raise SettingsError(f"the settings are {mapping!r}; allowed: an object such as {{\"on_hint\": \"form\"}}")
        known = {field.name: field for field in fields(cls)}
        values = {}
        for key, value in mapping.items():
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                guess = f"; did you mean {close[0]!r}?" if close else "."
                raise SettingsError(f"unknown setting {key!r}{guess} It has the value {value!r}. Allowed: {', '.join(known)}")
            values[key] = _convert(key, value, str(known[key].type))
        return cls(**values)


def settings_from_vllm_config(vllm_config: Any) -> Settings:
    """The settings in a vLLM config."""
    return Settings.from_mapping((vllm_config.additional_config or {}).get("flying", {}))


def _convert(key: str, value: Any, kind: str) -> Any:
    def wrong(allowed: str) -> SettingsError:
        return SettingsError(f"setting {key!r} is {value!r}; allowed: {allowed}")

    if value is None and kind.endswith("None"):
        return None
    if kind == "bool":
        if not isinstance(value, bool):
            raise wrong("true or false")
    elif kind.startswith("tuple[int"):
        if not isinstance(value, list | tuple) or not all(type(item) is int and item > 0 for item in value):
            raise wrong("a list of whole numbers above 0, such as [2, 4]")
        return tuple(value)
    elif kind.startswith("Schedule"):
        try:
            return parse_schedule(value)
        except ScheduleError as error:
            raise SettingsError(f"setting {key!r}: {error}") from None
    elif kind.startswith("str"):
        if not isinstance(value, str):
            raise wrong("a text")
    elif kind == "int":
        least = 0 if key in MAY_BE_ZERO else 1
        if type(value) is not int or value < least:
            raise wrong(f"a whole number, {least} or more")
    elif kind.startswith("float"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong("a number")
        return float(value)
    return value


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"setting {name!r} is {value!r}; allowed: {', '.join(allowed)}")
