"""What a step costs in a layout, learned from the steps that were run.

Pure. A step of `p` prompt tokens and `d` decoding requests takes about `fixed + per_prompt_token * p + per_decode * d`
seconds. The three numbers are fitted by recursive least squares with forgetting, so they follow the server; a probe
at start seeds them for layouts that haven't served yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

FORGETTING = 0.99
# Below this a fitted number is noise: no step is free, and none gets cheaper with more work.
LEAST = 1e-9
ENOUGH_STEPS = 30


@dataclass
class StepCost:
    """The fit for one width."""

    weights: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Seconds: per step, per prompt token, per decoding request."""
    steps: int = 0
    """Steps seen, the probe's included."""
    probed: int = 0
    """Of these, the probe's."""
    probed_step_s: float = 0.0
    """What a step cost by the probe alone: a forward pass, without scheduling and sampling."""
    _spread: list[list[float]] = field(
        default_factory=lambda: [[1e3, 0.0, 0.0], [0.0, 1e1, 0.0], [0.0, 0.0, 1e1]], repr=False
    )

    @property
    def known(self) -> bool:
        """Whether there is anything to predict from."""
        return self.steps > 0

    @property
    def prompt_token_s(self) -> float | None:
        """Seconds per prompt token, if known."""
        return self.numbers()[1] if self.known else None

    def decode_step_s(self, requests: int) -> float:
        """Seconds of a step in which so many requests decode."""
        fixed, _, per_decode = self.numbers()
        return fixed + per_decode * requests

    def learn(self, prompt_tokens: int, decodes: int, seconds: float) -> None:
        """A step was run."""
        x = (1.0, prompt_tokens / 64.0, decodes / 8.0)
        spread_x = [sum(row[j] * x[j] for j in range(3)) for row in self._spread]
        scale = FORGETTING + sum(x[i] * spread_x[i] for i in range(3))
        gain = [value / scale for value in spread_x]
        error = seconds - sum(self.weights[i] * x[i] for i in range(3))
        for i in range(3):
            self.weights[i] += gain[i] * error
            for j in range(3):
                self._spread[i][j] = min(1e6, (self._spread[i][j] - gain[i] * spread_x[j]) / FORGETTING)
        self.steps += 1

    def seed(self, probes: Iterable[Sequence[float]]) -> None:
        """Learn from a probe: (tokens, seconds) of forward passes. A token costs the same whatever it is."""
        for tokens, seconds in probes:
            self.learn(0, int(tokens), seconds)
            if tokens > 1:
                self.learn(int(tokens) - 1, 1, seconds)
        self.probed, self.probed_step_s = self.steps, self.numbers()[0]

    def report(self) -> list[float]:
        """As `estimates` takes it: the numbers, real steps seen, and what a step cost by the probe."""
        return [*self.numbers(), self.steps - self.probed, self.probed_step_s]

    def numbers(self) -> tuple[float, float, float]:
        """(fixed, per prompt token, per decoding request), in seconds, none below zero."""
        fixed, prompt, decode = self.weights
        return max(fixed, LEAST), max(prompt / 64.0, LEAST), max(decode / 8.0, LEAST)


def estimates(reports: Mapping[int, Sequence[float]]) -> dict[int, tuple[float, float, float]]:
    """The numbers per width. Where a width has hardly run yet, what steps of the others cost beyond their probes is added.

    Else an unknown layout would look cheaper than a known one, by all that a probe doesn't see.
    """
    known = {width: report for width, report in reports.items() if report[3] >= ENOUGH_STEPS and report[4] > 0}
    beyond = [max(0.0, report[0] - report[4]) for report in known.values()]
    overhead = sum(beyond) / len(beyond) if beyond else 0.0
    return {
        width: (report[0] + (overhead if report[3] < ENOUGH_STEPS else 0.0), report[1], report[2])
        for width, report in reports.items()
    }
