"""What is asked of the server that modules share and, once for all of them, of stock vLLM."""

from __future__ import annotations

from typing import Any

from tests.support.load import random_prompts

Request = tuple[list[int] | str, dict[str, Any]]

GREEDY = {"temperature": 0, "ignore_eos": True}

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {**GREEDY, "max_tokens": 40},
    "penalties": {
        **GREEDY, "max_tokens": 30, "repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.3,
    },
    "seeded": {"temperature": 0.8, "top_p": 0.9, "seed": 11, "ignore_eos": True, "max_tokens": 30},
    "bias": {**GREEDY, "max_tokens": 12, "logit_bias": {"17": 100.0}},
    "limits": {"temperature": 0, "min_tokens": 9, "max_tokens": 14},
    "grammar": {"temperature": 0, "max_tokens": 40, "structured_outputs": {"regex": "(ab|cd){12}[0-9]{20}"}},
}  # fmt: skip
PROMPTS = random_prompts(21, (24, 70, 130))
SAMPLING: list[tuple[list[int], dict[str, Any]]] = [
    (prompt, options) for options in OPTIONS.values() for prompt in PROMPTS
]
"""Every option with every prompt, in both layouts."""

MOVING_PROMPTS = random_prompts(61, (24, 70, 130, 200))
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": MOVING_PROMPTS[0], "max_tokens": 90},
    "penalties": {"prompt": MOVING_PROMPTS[1], "max_tokens": 80, "repetition_penalty": 1.3, "presence_penalty": 0.7,
                  "frequency_penalty": 0.3},
    "seeded": {"prompt": MOVING_PROMPTS[2], "max_tokens": 80, "temperature": 0.8, "top_p": 0.9, "seed": 11},
    "bias": {"prompt": MOVING_PROMPTS[0], "max_tokens": 60, "logit_bias": {"17": 4.0, "99": -100}},
    "limits": {"prompt": MOVING_PROMPTS[3], "min_tokens": 40, "max_tokens": 90, "ignore_eos": False},
    "logprobs": {"prompt": MOVING_PROMPTS[1], "max_tokens": 50, "logprobs": 2},
    "prompt logprobs": {"prompt": MOVING_PROMPTS[3], "max_tokens": 40, "prompt_logprobs": 1},
    "several": {"prompt": MOVING_PROMPTS[0], "max_tokens": 50, "n": 2, "temperature": 0.9, "seed": 5},
    "urgent": {"prompt": MOVING_PROMPTS[2], "max_tokens": 70, "priority": -3},
    "bad words": {"prompt": "hello", "max_tokens": 60, "bad_words": ["a", "e"]},
    "grammar": {"prompt": "hello", "max_tokens": 60, "ignore_eos": False,
                "structured_outputs": {"regex": "(ab|cd){12}[0-9]{20}"}},
}  # fmt: skip
"""Every feature of requests that move while they run."""

NOT_OF_SAMPLING = ("prompt", "n", "priority")


def stock_requests(case: dict[str, Any]) -> list[Request]:
    """One for each answer of a case: vLLM gives the i-th of several answers the case's seed plus i."""
    options = {key: value for key, value in {**GREEDY, **case}.items() if key not in NOT_OF_SAMPLING}
    several = [{**options, "seed": case["seed"] + index} for index in range(case["n"])] if "n" in case else [options]
    return [(case["prompt"], each) for each in several]


class StockTokens:
    """Of all these requests, from the tokens of one reference that was asked for `asked()`."""

    def __init__(self, tokens: list[list[int]]) -> None:
        rest = iter(tokens)
        self.sampling = [next(rest) for _ in SAMPLING]
        self.cases = {name: [next(rest) for _ in stock_requests(case)] for name, case in CASES.items()}
        assert next(rest, None) is None

    @staticmethod
    def asked() -> list[Request]:
        """Everything, in the order of the answers."""
        return [*SAMPLING, *(request for case in CASES.values() for request in stock_requests(case))]
