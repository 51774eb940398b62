"""How long a usual request will take in a layout under the present load.

Pure. A step costs `fixed + per_prompt_token * p + per_decode * d` (see `cost_model`). In a group that gets `r` requests
per second of `P` prompt and `O` output tokens, prompts take the share `r * P * per_prompt_token` of its time, so that a
step of `d` decoding requests takes `(fixed + per_decode * d) / (1 - share)`; and with requests staying for `O` steps,
Little's law gives the `d` at which arrivals and departures balance. Narrow groups are slower for one request and have
more time between two of them: which one wins depends on the load.
"""

from __future__ import annotations

from dataclasses import dataclass

# A group busier than this has no balance to speak of: what arrives within the horizon piles up.
BUSIEST = 0.95
HORIZON_S = 10.0


@dataclass(frozen=True)
class Load:
    """What the server has to do, and what usual requests are like."""

    unfinished: float
    prompt_tokens_queued: float
    arrival_rate: float
    """Requests per second."""
    prompt_tokens: float
    output_tokens: float


def response_s(numbers: tuple[float, float, float], num_groups: int, load: Load, max_running: int) -> float:
    """Seconds from a usual request's arrival to its last token, in one of `num_groups` equal groups."""
    fixed, per_prompt_token, per_decode = numbers
    rate = load.arrival_rate / num_groups
    share_of_prompts = min(BUSIEST, rate * load.prompt_tokens * per_prompt_token)
    present = max(1.0, load.unfinished / num_groups)
    decoding = min(float(max_running), max(present, _balance(numbers, rate, load, present)))
    step_s = (fixed + per_decode * decoding) / (1.0 - share_of_prompts)
    queued = load.prompt_tokens_queued / num_groups + load.prompt_tokens
    first_token_s = step_s / 2 + queued * per_prompt_token / (1.0 - share_of_prompts)
    turns = max(1.0, present / max_running)
    return turns * (first_token_s + load.output_tokens * step_s)


def _balance(numbers: tuple[float, float, float], rate: float, load: Load, present: float) -> float:
    """Decoding requests of a group once arrivals and departures balance, or after the horizon."""
    fixed, per_prompt_token, per_decode = numbers
    busy = rate * (load.prompt_tokens * per_prompt_token + load.output_tokens * per_decode)
    piled_up = present + rate * HORIZON_S
    if busy >= BUSIEST:
        return piled_up
    return min(piled_up, rate * load.output_tokens * fixed / (1.0 - busy))
