"""How long a usual request will take in a layout under the present load.

Pure. A step of `d` decoding requests costs `step(d)`, and a prompt token `prompt_token_s` (see `cost_curve`). In a group
that gets `r` requests per second of `P` prompt and `O` output tokens, prompts take the share `r * P * prompt_token_s` of
its time, so that a step takes `step(d) / (1 - share)`; and with requests staying for `O` steps, `d` grows by what arrives
beyond what leaves. Narrow groups are slower for one request and have more time between two of them: which one wins depends
on the load.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_flying.controller.cost_curve import CostCurve

# Prompts take no more of a group's time than this, however many come: some is left for who decodes.
BUSIEST = 0.95
# As far as is looked ahead.
HORIZON_S = 10.0
HALVINGS = 24


@dataclass(frozen=True)
class Load:
    """What the server has to do, and what usual requests are like."""

    unfinished: float
    prompt_tokens_queued: float
    arrival_rate: float
    """Requests per second."""
    prompt_tokens: float
    output_tokens: float


@dataclass(frozen=True)
class Targets:
    """What the operator wants of a usual request at most, in seconds; None is no wish."""

    ttft_s: float | None = None
    tpot_s: float | None = None


NO_TARGETS = Targets()


@dataclass(frozen=True)
class Response:
    """A usual request's predicted times, in seconds."""

    ttft_s: float
    """From its arrival to its first token."""
    tpot_s: float
    """Between two tokens."""
    total_s: float
    """From its arrival to its last token."""

    def missed(self, targets: Targets) -> float:
        """By how much the target that is missed most is missed, as a share of it; 0 if all are met."""
        pairs = ((self.ttft_s, targets.ttft_s), (self.tpot_s, targets.tpot_s))
        return max([0.0, *(took / target - 1.0 for took, target in pairs if target is not None)])


def response_s(curve: CostCurve, num_groups: int, load: Load, max_running: int) -> float:
    """Seconds from a usual request's arrival to its last token, in one of `num_groups` equal groups."""
    return response(curve, num_groups, load, max_running).total_s


def response(curve: CostCurve, num_groups: int, load: Load, max_running: int) -> Response:
    """A usual request's times in one of `num_groups` equal groups."""
    rate = load.arrival_rate / num_groups
    left_of_prompts = 1.0 - min(BUSIEST, rate * load.prompt_tokens * curve.prompt_token_s)
    present = max(1.0, load.unfinished / num_groups)
    decoding = min(float(max_running), _decoding_soon(curve, rate, load, present, left_of_prompts))
    step_s = curve.of(0, decoding) / left_of_prompts
    queued = load.prompt_tokens_queued / num_groups + load.prompt_tokens
    # What is left of the step in flight, a half on average, and the request's own first step.
    first_token_s = 1.5 * step_s + queued * curve.prompt_token_s / left_of_prompts
    turns = max(1.0, present / max_running)
    turn_s = first_token_s + max(0.0, load.output_tokens - 1.0) * step_s
    return Response((turns - 1.0) * turn_s + first_token_s, step_s, turns * turn_s)


def _decoding_soon(curve: CostCurve, rate: float, load: Load, present: float, left_of_prompts: float) -> float:
    """Decoding requests of a group at the end of the horizon, those that are `present` at least.

    Of those who decode some leave, the more of them the more there are, until that balances arrivals (Little's law). A
    group that can't keep up has no such balance and fills by what is beyond. As many leave all the time as at the end,
    so that more to begin with, or more that arrive, never come to fewer.
    """

    def still_fills(decoding: float) -> bool:
        leaving = curve.most_per_s(decoding) * left_of_prompts / load.output_tokens
        return present + (rate - leaving) * HORIZON_S > decoding

    least, most = present, present + rate * HORIZON_S
    for _ in range(HALVINGS):
        between = (least + most) / 2
        least, most = (between, most) if still_fills(between) else (least, between)
    return most
