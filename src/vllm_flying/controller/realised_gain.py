"""What a switch really gained, in the unit of its plan: seconds that a usual request takes less.

Pure. Measured is what requests took, from arrival to last token, that came after the switch and that one group served.
They are held against what the old layout would have needed for them, by its step costs when the switch was decided,
with the requests that were there then, and with the lengths and the rate of those that came. Only what clients do is
taken from the time after the switch: requests that pile up in a bad layout must not make the old one look slow too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_flying.controller.observation import Observation
from vllm_flying.controller.plan import Plan
from vllm_flying.controller.policies import predicted_seconds
from vllm_flying.controller.response import HORIZON_S

NOTHING_DONE = "no request came and was done"
MOSTLY_UNDONE = "most requests that came were not done"
NO_COSTS = "what steps cost in the old layout was not known"


@dataclass(frozen=True)
class RealisedGain:
    """Either both times or the reason why there are none."""

    requests: int
    """Measured ones."""
    window_s: float
    staying_s: float | None = None
    """What these requests would have taken in the old layout: an estimate."""
    measured_s: float | None = None
    unknown: str | None = None

    @property
    def gain_s(self) -> float | None:
        """Below zero if the old layout would have been better; None if unknown."""
        if self.staying_s is None or self.measured_s is None:
            return None
        return self.staying_s - self.measured_s


@dataclass
class GainMeasurement:
    """Follows one switch from look to look until the horizon of predictions, or until the layout changes again."""

    plan: Plan
    decided_on: Observation
    """What the plan was made from, in the old layout."""
    _first: Observation | None = None
    _last: Observation | None = None

    def look(self, seen: Observation) -> bool:
        """Take in what was seen after the switch; whether the measurement is over."""
        if seen.layout != self.plan.layout:
            return True
        self._first, self._last = self._first or seen, seen
        return seen.time - self._first.time >= HORIZON_S

    def result(self) -> RealisedGain:
        """By what was seen so far."""
        if self._first is None or self._last is None:
            return RealisedGain(0, 0.0, unknown=NOTHING_DONE)
        return realised_gain(self.decided_on, self._first, self._last)


def realised_gain(decided_on: Observation, first: Observation, last: Observation) -> RealisedGain:
    """The gain between two looks at the new layout, against staying in the layout that `decided_on` has."""
    done = last.totals.since(first.totals)
    requests, window_s = done.requests_served, last.time - first.time
    if requests == 0:
        return RealisedGain(0, window_s, unknown=NOTHING_DONE)
    # Else the quick ones would speak for those that are still under way.
    if 2 * requests < done.requests_added:
        return RealisedGain(requests, window_s, unknown=MOSTLY_UNDONE)
    as_they_came = replace(
        decided_on,
        arrival_rate=done.requests_added / window_s,
        mean_prompt_tokens=done.prompt_tokens_served / requests,
        mean_output_tokens=done.output_tokens_served / requests,
    )
    staying_s = predicted_seconds(as_they_came, decided_on.layout)
    if staying_s is None:
        return RealisedGain(requests, window_s, unknown=NO_COSTS)
    return RealisedGain(requests, window_s, staying_s, done.seconds_served / requests)
