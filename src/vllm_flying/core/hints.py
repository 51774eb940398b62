"""What a request may ask of the layout that serves it.

Pure: no torch, no vllm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

HINT_KEY = "parallelism_hint"
"""Field of a request, key in `vllm_xargs` and in `SamplingParams.extra_args`."""

ANYWHERE = ("auto",)
SINGLE = ("dp", "throughput")
WIDEST = ("tp", "latency", "long_context")
DEGREES = {"tp2": 2, "tp4": 4, "tp8": 8}
VALUES = (*ANYWHERE, "dp", "tp", *DEGREES, "latency", "throughput", "long_context")

TIER_KEY = "service_tier"
"""Field of OpenAI's API: how soon a request should be served."""

PRIORITY_OF_TIER = {"priority": -1, "flex": 1}
"""vLLM's `priority`, lower is sooner, for the tiers that differ from the usual 0."""


class HintError(ValueError):
    """A hint that can't be honoured by any layout of this server; the text lists what can."""


@dataclass(frozen=True)
class Hint:
    """A request's wish."""

    value: str = "auto"

    def width(self, widths: Collection[int], engine_tp: int) -> int | None:
        """Group width, in engines, that serves this hint best; None if any will do.

        `widths` are the group widths that were built, 1 included.
        """
        if self.value in ANYWHERE:
            return None
        if self.value in SINGLE:
            return 1
        if self.value in WIDEST:
            return max(widths)
        degree = DEGREES[self.value]
        by_degree = {width * engine_tp: width for width in widths}
        if degree not in by_degree:
            raise HintError(
                f"{HINT_KEY} {self.value!r}: this server has tensor-parallel degrees {sorted(by_degree)}, not {degree}"
            )
        return by_degree[degree]


def urgent_width(widths: Collection[int], num_engines: int) -> int:
    """Width of the group for a request that can't wait: as wide as leaves half of the engines to the others.

    All engines if there is no such group, as with two engines.
    """
    leaving = [width for width in widths if 1 < width <= num_engines // 2]
    return max(leaving or widths)


def hint_of(extra_args: Mapping[str, Any] | None) -> Hint:
    """The hint among a request's extra arguments."""
    return parse_hint((extra_args or {}).get(HINT_KEY))


def wanted_width(
    hint: Hint, is_urgent: bool, widths: Collection[int], engine_tp: int, num_engines: int
) -> int | None:
    """Group width that a request asks for, by its hint, else by its urgency; None if any will do."""
    width = hint.width(widths, engine_tp)
    return urgent_width(widths, num_engines) if width is None and is_urgent else width


def parse_hint(value: Any) -> Hint:
    """The hint that `value` names; HintError, listing the values, if it names none."""
    if value is None:
        return Hint()
    if not isinstance(value, str) or value.strip().lower() not in VALUES:
        raise HintError(f"{HINT_KEY} is {value!r}; allowed: {', '.join(VALUES)}")
    return Hint(value.strip().lower())
