"""Decides whether a policy's plan is carried out: evidence that it lasts, cooldown, and damping of flapping.

Pure: the caller brings the clock, the observations and the results.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field

from vllm_flying.controller.evidence import Evidence
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
    margin: float = 0.05
    """A plan must be this much better than staying, as a share of the time predicted for staying."""
    patience_s: float = 0.4
    """Seconds: what plans are better beyond the margin, added up over time, must come to this."""
    cooldown_s: float = 2.0
    switch_s: float = 0.05
    """What a switch costs, measured."""
    held_until: float = 0.0
    """An operator's own switch keeps the controller out until then."""
    failures: int = 0
    evidence: Evidence = field(init=False)
    _switches: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def __post_init__(self) -> None:
        self.evidence = Evidence(self.margin, self.patience_s)

    def decide(self, observation: Observation) -> Decision:
        """Whether to switch now, and where to. A policy that raises leaves everything as it is."""
        try:
            plan = self.policy(observation)
        except Exception:
            if not self.failures:
                logger.exception("The policy failed; the layout stays as it is.")
            self.failures += 1
            return Decision(observation.time, None, False, "the policy failed")
        convinced = self.evidence.look(observation.time, self._share_gained(plan, observation))
        if plan is None or plan.layout == observation.layout:
            return Decision(observation.time, None, False, "stay")
        verdict = self._objection(plan, observation.time, convinced)
        return Decision(observation.time, plan, verdict is None, verdict or "switch")

    def _share_gained(self, plan: Plan | None, observation: Observation) -> float:
        """Of the time predicted for staying, or of a target that is missed; nothing without a plan that predicts either."""
        if plan is None or not _has_prediction(plan):
            return 0.0
        staying = predicted_seconds(observation, observation.layout)
        # The pause of a switch is paid by requests that are under way; an idle server has none.
        price = self.switch_s if observation.unfinished else 0.0
        return max(plan.missed, (plan.gain_s - price) / staying if staying else 1.0)

    def _objection(self, plan: Plan, now: float, convinced: bool) -> str | None:
        if plan.urgent:
            return None
        if now < self.held_until:
            return f"an operator's switch holds for {self.held_until - now:.1f} s more"
        cooldown = self.cooldown(now)
        if self._switches and now - self._switches[-1] < cooldown:
            return f"within the cooldown of {cooldown:g} s"
        if _has_prediction(plan) and not convinced:
            return f"it isn't much better yet, or not for long: margin {self.margin:g}, patience {self.patience_s:g} s"
        return None

    def cooldown(self, now: float) -> float:
        """Seconds between two switches; longer after many."""
        recent = sum(1 for time in self._switches if now - time < FLAPPING_S)
        return min(LONGEST_COOLDOWN_S, self.cooldown_s * float(2 ** (recent // FLAPPING_SWITCHES)))

    def switched(self, now: float, seconds: float) -> None:
        """A switch was carried out: its cost is learned."""
        self._switches.append(now)
        self.evidence.forget()
        self.switch_s += 0.3 * (seconds - self.switch_s)

    def hold(self, until: float) -> None:
        """Keep out: an operator has switched by hand."""
        self.held_until = max(self.held_until, until)


def _has_prediction(plan: Plan) -> bool:
    """Else it is for something that a request or the operator asked for."""
    return bool(plan.gain_s or plan.missed)
