"""What a step costs in a layout, learned from the steps that were run.

Pure; numpy for a fit of three numbers. A step of `p` prompt tokens and `d` decoding requests takes about `fixed +
per_prompt_token * p + per_decode * d` seconds. Steps of about the same make-up are averaged, each kind by itself, and
the numbers are fitted to the kinds: a quiet hour doesn't make the server forget what a full batch costs. A probe at
start stands in for kinds that haven't run yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

# Below this a fitted number is noise: no step is free, and none gets cheaper with more work.
LEAST = 1e-9
ENOUGH_STEPS = 30
# A kind of steps follows its last ones, as many as this.
MEMORY_STEPS = 16
# A step that takes so many times what its kind takes was held up by something else.
HELD_UP = 4.0
# A probe's kind counts as so many real steps, once there are any.
STAND_IN = 0.05
# So that three numbers come out of fewer kinds: what can't be told apart is a cost of every step.
UNITS = np.array([1.0, 64.0, 8.0])
RIDGE = 1e-3


@dataclass
class _Kind:
    """Steps of about the same make-up: their means."""

    prompt_tokens: float
    decodes: float
    seconds: float
    steps: float = 1

    def add(self, prompt_tokens: int, decodes: int, seconds: float) -> None:
        if self.steps >= MEMORY_STEPS:
            seconds = min(seconds, HELD_UP * self.seconds)
        self.steps += 1
        share = 1.0 / min(self.steps, MEMORY_STEPS)
        self.prompt_tokens += share * (prompt_tokens - self.prompt_tokens)
        self.decodes += share * (decodes - self.decodes)
        self.seconds += share * (seconds - self.seconds)


Kinds = dict[tuple[int, int], _Kind]


@dataclass
class StepCost:
    """The fit for one width."""

    steps: int = 0
    """Real steps seen."""
    probed_step_s: float = 0.0
    """What a step cost by the probe alone: a forward pass, without scheduling and sampling."""
    _seen: Kinds = field(default_factory=dict)
    _probed: Kinds = field(default_factory=dict)
    _numbers: tuple[float, float, float] | None = None
    """The fit, kept while nothing is learned: engines are asked for it between steps, and in every switch."""

    @property
    def known(self) -> bool:
        """Whether there is anything to predict from."""
        return bool(self._seen or self._probed)

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
        _add(self._seen, prompt_tokens, decodes, seconds)
        self.steps += 1
        self._numbers = None

    def seed(self, probes: Iterable[Sequence[float]]) -> None:
        """Learn from a probe: (tokens, seconds) of forward passes. A token costs the same whatever it is."""
        for tokens, seconds in probes:
            _add(self._probed, 0, int(tokens), seconds)
            if tokens > 1:
                _add(self._probed, int(tokens) - 1, 1, seconds)
        self.probed_step_s = _fit(self._probed.values())[0]
        self._numbers = None

    def report(self) -> list[float]:
        """As `estimates` takes it: the numbers, real steps seen, and what a step cost by the probe."""
        return [*self.numbers(), self.steps, self.probed_step_s]

    def numbers(self) -> tuple[float, float, float]:
        """(fixed, per prompt token, per decoding request), in seconds, none below zero."""
        if self._numbers is None:
            self._numbers = _fit([*self._seen.values(), *self._stand_ins()])
        return self._numbers

    def _stand_ins(self) -> list[_Kind]:
        """The probe's kinds that haven't run, with what real steps were found to cost beyond a probe."""
        unseen = [kind for key, kind in self._probed.items() if key not in self._seen]
        if not self._seen or not unseen:
            return unseen
        fixed, prompt, decode = _fit(self._probed.values())
        beyond = [
            (kind.steps, kind.seconds - fixed - prompt * kind.prompt_tokens - decode * kind.decodes)
            for kind in self._seen.values()
        ]
        overhead = max(0.0, sum(steps * seconds for steps, seconds in beyond) / sum(steps for steps, _ in beyond))
        return [_Kind(kind.prompt_tokens, kind.decodes, kind.seconds + overhead, STAND_IN) for kind in unseen]


def _add(kinds: Kinds, prompt_tokens: int, decodes: int, seconds: float) -> None:
    key = (prompt_tokens.bit_length(), decodes.bit_length())
    if key in kinds:
        kinds[key].add(prompt_tokens, decodes, seconds)
    else:
        kinds[key] = _Kind(float(prompt_tokens), float(decodes), seconds)


def _fit(kinds: Iterable[_Kind]) -> tuple[float, float, float]:
    """Least squares of the relative errors, with no number below zero."""
    kinds = list(kinds)
    if not kinds:
        return LEAST, LEAST, LEAST
    seconds = np.array([max(kind.seconds, LEAST) for kind in kinds])
    weights = np.sqrt([min(kind.steps, MEMORY_STEPS) for kind in kinds]) / seconds
    rows = np.array([[1.0, kind.prompt_tokens, kind.decodes] for kind in kinds]) / UNITS * weights[:, None]
    goals = seconds * weights
    scale = RIDGE * float(np.abs(rows).max())
    free = [0, 1, 2]
    while True:
        system = np.vstack([rows[:, free], scale * np.eye(len(free))])
        fitted = np.linalg.lstsq(system, np.concatenate([goals, np.zeros(len(free))]), rcond=None)[0]
        if fitted.min() >= 0.0 or len(free) == 1:
            break
        free.pop(int(fitted.argmin()))
    numbers = np.full(3, LEAST)
    numbers[free] = np.maximum(fitted / UNITS[free], LEAST)
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


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
