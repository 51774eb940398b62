"""What steps cost on a running server, engine by engine and width by width, as lines for `vllm-flying doctor`.

Pure: works on the answer of the status route.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_flying.controller.cost_curve import KNEES, CostCurve


def describe_step_costs(status: Mapping[str, Any]) -> Iterator[str]:
    """A line per engine and width; nothing if no engine knows any costs."""
    for engine in status["engines"]:
        for width, cost in sorted(engine["step_costs"].items(), key=lambda item: int(item[0])):
            yield f"engine {engine['engine']}, width {width}: {_cost(cost)}"
            if cost["probe"]:
                steps = ", ".join(f"{_probed(*numbers)} {_ms(seconds)}" for *numbers, seconds in cost["probe"])
                yield f"engine {engine['engine']}, width {width}: the probe at start ran steps of {steps}"


def why_no_step_costs(status: Mapping[str, Any]) -> str:
    """What keeps the engines from knowing any, and what to do."""
    if status["policy"] == "manual":
        return (
            "no step costs: with the policy `manual` the server neither probes nor measures; start it with "
            """--additional-config '{"flying": {"policy": "auto"}}' (and "dry_run": true to switch nothing)"""
        )
    return (
        f"no step costs yet: the controller (policy `{status['policy']}`) collects the probes once it runs; ask again in "
        "some seconds"
    )


def _cost(cost: Mapping[str, Any]) -> str:
    curve = CostCurve.from_dict(cost)
    steps = ", ".join(f"{_ms(curve.of(0, requests))} with {_count(requests, 'request')}" for requests in (1, *KNEES[1:]))
    source = f"learned from {_count(cost['steps'], 'step')}" if cost["steps"] else "probed only, no step was learned from yet"
    return f"a step takes {steps}, a prompt token {_ms(curve.prompt_token_s)} ({source})"


def _probed(prompt_tokens: float, decodes: float) -> str:
    prompt = f"{_count(prompt_tokens, 'prompt token')} and " if prompt_tokens else ""
    return prompt + _count(decodes, "request")


def _count(number: float, name: str) -> str:
    return f"{int(number)} {name}{'' if number == 1 else 's'}"


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    if value < 0.001:  # lost in the noise of the fit
        return "under 0.001 ms"
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"
