"""What a step costs in a layout, learned from the steps that were run.

Pure; numpy for a fit of a few numbers. Steps of about the same make-up are averaged, each kind by itself, and a curve
(`controller.cost_curve`) is fitted to the kinds: a quiet hour doesn't make the server forget what a full batch costs. A
probe at start stands in for kinds that haven't run yet. How slow the machine is at a time is told apart
(`controller.pace`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vllm_flying.controller.cost_curve import KNEES, CostCurve
from vllm_flying.controller.pace import HELD_UP, Pace

# Below this a fitted number is noise: no step is free, and none gets cheaper with more work.
LEAST = 1e-9
ENOUGH_STEPS = 30
# A kind of steps follows its last ones, as many as this.
MEMORY_STEPS = 1024
# Of a kind that was seen so often enough is known.
KNOWN_STEPS = 16
# What a probe runs: (prompt tokens, decoding requests). Few, so that a start is hardly longer, of small and large steps.
PROBE_STEPS = ((0, 1), (31, 1), (0, 32), (127, 1), (0, 128))
# Up to so many decoding requests, and no prompts, a probe tells the pace; of fuller steps it knows too little.
PROBE_TELLS = 8
# A probe's kind counts as so many real steps, once there are any.
STAND_IN = 0.05
# So that all numbers come out of fewer kinds: what can't be told apart is a cost of every step, and every request the same.
UNITS = np.array([1.0, 64.0, 8.0, *(64.0 for _ in KNEES[1:])])
RIDGE = 1e-3


@dataclass
class _Kind:
    """Steps of about the same make-up: their means."""

    prompt_tokens: float
    decodes: float
    seconds: float
    steps: float = 1

    @property
    def is_known(self) -> bool:
        """Whether `seconds` is what such steps usually take."""
        return self.steps >= KNOWN_STEPS

    def add(self, prompt_tokens: int, decodes: int, seconds: float) -> None:
        if self.is_known:
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
    """Real steps learned from."""
    _seen: Kinds = field(default_factory=dict)
    _probed: Kinds = field(default_factory=dict)
    _probe_curve: CostCurve | None = None
    """The fit of the probe alone; None without one."""
    _curve: CostCurve | None = None
    """The fit, kept while nothing is learned: engines are asked for it between steps, and in every switch."""
    _last_fit: CostCurve | None = None

    @property
    def known(self) -> bool:
        """Whether there is anything to predict from."""
        return bool(self._seen or self._probed)

    @property
    def prompt_token_s(self) -> float | None:
        """Seconds per prompt token, if known."""
        return self.curve().prompt_token_s if self.known else None

    def decode_step_s(self, requests: int) -> float:
        """Seconds of a step in which so many requests decode."""
        return self.curve().of(0, requests)

    def learn(
        self, prompt_tokens: int, decodes: int, seconds: float, pace: Pace | None = None, widths: Iterable[StepCost] = ()
    ) -> None:
        """A step was run. With the engine's `pace`, what such a step usually takes is learned, whatever it took now.

        `widths` are the costs of all widths: where the pace alone would say what is new in this one, the others and the probe do.
        """
        if pace is not None:
            usual = self._usual_s(prompt_tokens, decodes) or self._probed_s(prompt_tokens, decodes, widths)
            seconds = pace.usual(seconds, usual, layout=self)
            self._scale(pace.misjudged())
        _add(self._seen, prompt_tokens, decodes, seconds)
        self.steps += 1
        self._curve = None

    def _scale(self, factor: float) -> None:
        for kind in self._seen.values():
            kind.seconds *= factor

    def _usual_s(self, prompt_tokens: int, decodes: int) -> float | None:
        """What is known of the step's kind, brought to its make-up by the last fit; None if it isn't a known kind.

        The fit alone won't do: what costs more than the curve says would be taken for a slow machine.
        """
        kind = self._seen.get(_key(prompt_tokens, decodes))
        if kind is None or not kind.is_known or self._last_fit is None:
            return None
        return kind.seconds * self._last_fit.of(prompt_tokens, decodes) / self._last_fit.of(kind.prompt_tokens, kind.decodes)

    def _probed_s(self, prompt_tokens: int, decodes: int, widths: Iterable[StepCost]) -> float | None:
        """By the probe, and by what another width's steps take beside its own; None without such a width, and for full steps."""
        if prompt_tokens or decodes > PROBE_TELLS:
            return None
        beside = [other._beside_probe() for other in widths if other is not self and other.steps >= ENOUGH_STEPS]
        known = [ratio for ratio in beside if ratio is not None]
        if self._probe_curve is None or not known:
            return None
        return self._probe_curve.of(prompt_tokens, decodes) * sum(known) / len(known)

    def _beside_probe(self) -> float | None:
        """How many times as long as in the probe a lone request's step takes."""
        if self._probe_curve is None:
            return None
        return self.decode_step_s(1) / self._probe_curve.of(0, 1)

    def seed(self, probes: Iterable[Sequence[float]]) -> None:
        """Learn from a probe: (prompt tokens, decoding requests, seconds) of steps."""
        for prompt_tokens, decodes, seconds in probes:
            _add(self._probed, int(prompt_tokens), int(decodes), seconds)
        if self._probed:
            self._probe_curve = _fit(self._probed.values())
        self._curve = None

    def report(self) -> dict[str, Any]:
        """As `estimates` takes it: the curve, real steps learned from, and the probe's own curve, None without a probe."""
        probe = None if self._probe_curve is None else self._probe_curve.to_dict()
        return {"curve": self.curve().to_dict(), "steps": self.steps, "probe": probe}

    def curve(self) -> CostCurve:
        """What is known of this width's steps, no number of it below zero."""
        if self._curve is None:
            self._curve = self._last_fit = _fit([*self._seen.values(), *self._stand_ins()])
        return self._curve

    def _stand_ins(self) -> list[_Kind]:
        """The probe's kinds that haven't run, with what real steps were found to cost beyond a probe."""
        per_step, per_decode = self._beyond_probe()
        return [
            replace(kind, seconds=kind.seconds + per_step + per_decode * kind.decodes, steps=STAND_IN)
            for key, kind in self._probed.items()
            if key not in self._seen
        ]

    def _beyond_probe(self) -> tuple[float, float]:
        """Seconds per step and per decoding request that a probe doesn't have: scheduling, sampling."""
        if self._probe_curve is None:
            return 0.0, 0.0
        probe = self._probe_curve
        # Next to a long prompt it is lost in the noise.
        telling = [kind for kind in self._seen.values() if probe.prompt_token_s * kind.prompt_tokens <= probe.step_s]
        if not telling:
            return 0.0, 0.0
        weights = _weights(telling)
        rows = np.array([[1.0, kind.decodes] for kind in telling]) / UNITS[[0, 2]] * weights[:, None]
        beyond = [kind.seconds - probe.of(kind.prompt_tokens, kind.decodes) for kind in telling]
        per_step, per_decode = _not_negative(rows, np.array(beyond) * weights) / UNITS[[0, 2]]
        return float(per_step), float(per_decode)


def _key(prompt_tokens: int, decodes: int) -> tuple[int, int]:
    return prompt_tokens.bit_length(), decodes.bit_length()


def _add(kinds: Kinds, prompt_tokens: int, decodes: int, seconds: float) -> None:
    key = _key(prompt_tokens, decodes)
    if key in kinds:
        kinds[key].add(prompt_tokens, decodes, seconds)
    else:
        kinds[key] = _Kind(float(prompt_tokens), float(decodes), seconds)


def _fit(kinds: Iterable[_Kind]) -> CostCurve:
    """The curve of the kinds."""
    kinds = list(kinds)
    if not kinds:
        return CostCurve.straight(LEAST, LEAST, LEAST)
    weights = _weights(kinds)
    decodes = np.array([[max(0.0, kind.decodes - knee) for knee in KNEES] for kind in kinds])
    others = np.array([[1.0, kind.prompt_tokens] for kind in kinds])
    rows = np.hstack([others, decodes]) / UNITS * weights[:, None]
    fitted = _not_negative(rows, np.array([kind.seconds for kind in kinds]) * weights) / UNITS
    step, prompt, first, *more = (float(number) for number in fitted)
    return CostCurve(max(step, LEAST), max(prompt, LEAST), (max(first, LEAST), *more))


def _weights(kinds: Iterable[_Kind]) -> np.ndarray:
    """So that relative errors count, and kinds that were seen more often count more."""
    return np.array([np.sqrt(min(kind.steps, KNOWN_STEPS)) / max(kind.seconds, LEAST) for kind in kinds])


def _not_negative(rows: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """Least squares with no number below zero; one number at least is left free."""
    scale = RIDGE * float(np.abs(rows).max())
    free = list(range(rows.shape[1]))
    while True:
        system = np.vstack([rows[:, free], scale * np.eye(len(free))])
        fitted = np.linalg.lstsq(system, np.concatenate([goals, np.zeros(len(free))]), rcond=None)[0]
        if fitted.min() >= 0.0 or len(free) == 1:
            break
        free.pop(int(fitted.argmin()))
    numbers = np.zeros(rows.shape[1])
    numbers[free] = np.maximum(fitted, 0.0)
    return numbers


def estimates(reports: Mapping[int, Mapping[str, Any]]) -> dict[int, CostCurve]:
    """The curve per width. Where one has hardly run yet: its probe's, and what the others cost beyond their probes.

    Else an unknown layout would look cheaper than a known one, by all that a probe doesn't see; and a few first steps
    don't tell what is a step's and what is its requests'. A decoding request may cost as much beyond the probe as in the
    others, or as many times the probe. The smaller guess is taken: a layout that is too cheap by it runs and is known, one that
    is too dear would never run.
    """
    curves = {width: CostCurve.from_dict(report["curve"]) for width, report in reports.items()}
    probed = {width: CostCurve.from_dict(report["probe"]) for width, report in reports.items() if report["probe"]}
    known = [width for width in probed if reports[width]["steps"] >= ENOUGH_STEPS]
    if not known:
        return curves
    per_step = sum(max(0.0, curves[width].step_s - probed[width].step_s) for width in known) / len(known)
    per_decode = sum(max(0.0, curves[width].decode_s[0] - probed[width].decode_s[0]) for width in known) / len(known)
    times_decode = sum(curves[width].decode_s[0] / probed[width].decode_s[0] for width in known) / len(known)
    unknown = {}
    for width in probed.keys() - known:
        probe = probed[width]
        unknown[width] = probe.plus(per_step, max(0.0, min(per_decode, (times_decode - 1.0) * probe.decode_s[0])))
    return curves | unknown
