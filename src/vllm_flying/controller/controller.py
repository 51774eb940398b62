"""Decides whether a policy's plan is carried out: margin, cooldown, and damping of flapping.

Pure: the caller brings the clock, the observations and the results.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

from vllm_flying.controller.observation import Observation
from vllm_flying.controller.plan import Plan
from vllm_flying.controller.policies import Policy, predicted_seconds

logger = logging.getLogger("vllm.flying.controller")

# This many switches of its own within FLAPPING_S double the cooldown, up to the limit.
FLAPPING_SWITCHES = 6
FLAPPING_S = 30.0
LONGEST_COOLDOWN_S = 60.0


@dataclass(frozen=True)
class Decision:
    """What was decided on one observation. `plan` is None if the policy wanted nothing."""

    time: float
    plan: Plan | None
    act: bool
    verdict: str


@dataclass
class Controller:
    """State between observations."""

    policy: Policy
    margin: float = 0.2
    """A plan must be this much better than staying, as a share of the time predicted for staying."""
    cooldown_s: float = 2.0
    switch_s: float = 0.05
    """What a switch costs, measured."""
    held_until: float = 0.0
    """An operator's own switch keeps the controller out until then."""
    failures: int = 0
    _switches: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def decide(self, observation: Observation) -> Decision:
        """Whether to switch now, and where to. A policy that raises leaves everything as it is."""
        try:
            plan = self.policy(observation)
        except Exception:
            if not self.failures:
                logger.exception("The policy failed; the layout stays as it is.")
            self.failures += 1
            return Decision(observation.time, None, False, "the policy failed")
        if plan is None or plan.layout == observation.layout:
            return Decision(observation.time, None, False, "stay")
        verdict = self._objection(plan, observation)
        return Decision(observation.time, plan, verdict is None, verdict or "switch")

    def _objection(self, plan: Plan, observation: Observation) -> str | None:
        now = observation.time
        if plan.urgent:
            return None
        if now < self.held_until:
            return f"an operator's switch holds for {self.held_until - now:.1f} s more"
        cooldown = self.cooldown(now)
        if self._switches and now - self._switches[-1] < cooldown:
            return f"within the cooldown of {cooldown:g} s"
        staying = predicted_seconds(observation, observation.layout)
        least = self.margin * staying if staying is not None else 0.0
        # The pause of a switch is paid by requests that are under way; an idle server has none.
        price = self.switch_s if observation.unfinished else 0.0
        if plan.gain_s and plan.gain_s < least + price:
            return f"a gain of {plan.gain_s:.3f} s does not outweigh a margin of {least:.3f} s and a switch of {price:.3f} s"
        return None

    def cooldown(self, now: float) -> float:
        """Seconds between two switches; longer after many."""
        recent = sum(1 for time in self._switches if now - time < FLAPPING_S)
        return min(LONGEST_COOLDOWN_S, self.cooldown_s * float(2 ** (recent // FLAPPING_SWITCHES)))

    def switched(self, now: float, seconds: float) -> None:
        """A switch was carried out: its cost is learned."""
        self._switches.append(now)
        self.switch_s += 0.3 * (seconds - self.switch_s)

    def hold(self, until: float) -> None:
        """Keep out: an operator has switched by hand."""
        self.held_until = max(self.held_until, until)
