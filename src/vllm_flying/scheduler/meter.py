"""What an engine counts for the controller: requests, tokens, and what its steps cost in each layout.

Pure but for the duck-typed requests and step outputs of vLLM's scheduler. The work per step is a count over the
scheduled requests and a running mean.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_flying.controller.cost_model import StepCost
from vllm_flying.controller.pace import Pace

# So many first steps of an engine tell nothing of the later ones: memory is touched for the first time.
FIRST_STEPS = 16


@dataclass(frozen=True)
class _Step:
    started: float
    prompt_tokens: int
    decodes: int
    requests: Sequence[Any]


class EngineMeter:
    """Counters since start, one cost fit per width, and how slow the machine is now."""

    def __init__(self, widths: Iterable[int]) -> None:
        self.costs = {width: StepCost() for width in widths}
        self.pace = Pace()
        self.requests_added = 0
        self.prompt_tokens_added = 0
        self.requests_finished = 0
        self.output_tokens_finished = 0
        self.requests_served = 0
        self.seconds_served = 0.0
        self.prompt_tokens_served = 0
        self.output_tokens_served = 0
        self._group_since = 0.0
        self._begun: dict[int, _Step] = {}
        self._last_end = 0.0
        self._first_steps = FIRST_STEPS

    def added(self, request: Any) -> None:
        """A request came to this engine from a client."""
        self.requests_added += 1
        self.prompt_tokens_added += request.num_prompt_tokens

    def group_changed(self) -> None:
        """The engine is in another group from now on: what came before isn't served by one group."""
        self._group_since = time.time()
        self.pace.layout_changed()

    def step_begins(self, scheduler_output: Any, requests: Mapping[str, Any]) -> None:
        """A step was scheduled; `requests` are the scheduler's."""
        scheduled = scheduler_output.num_scheduled_tokens
        if scheduled:
            decodes = list(scheduled.values()).count(1)
            prompt_tokens = scheduler_output.total_num_scheduled_tokens - decodes
            taking_part = [requests[request_id] for request_id in scheduled]
            self._begun[id(scheduler_output)] = _Step(time.perf_counter(), prompt_tokens, decodes, taking_part)

    def step_ends(self, scheduler_output: Any, width: int) -> None:
        """Its results are in. With several steps in flight, a step takes what passes between two results."""
        step = self._begun.pop(id(scheduler_output), None)
        if step is None:
            return
        now = time.perf_counter()
        took = now - max(step.started, self._last_end)
        if self._first_steps:
            self._first_steps -= 1
        else:
            self.costs[width].learn(step.prompt_tokens, step.decodes, took, self.pace, self.costs.values())
        self._last_end = now
        for request in step.requests:
            if request.is_finished():
                self.requests_finished += 1
                self.output_tokens_finished += request.num_output_tokens
                if request.arrival_time >= self._group_since:
                    self._served(request)

    def _served(self, request: Any) -> None:
        self.requests_served += 1
        self.seconds_served += time.time() - request.arrival_time
        self.prompt_tokens_served += request.num_prompt_tokens
        self.output_tokens_served += request.num_output_tokens

    def report(self) -> dict[str, Any]:
        """For the engine's status."""
        return {
            "requests_added": self.requests_added,
            "prompt_tokens_added": self.prompt_tokens_added,
            "requests_finished": self.requests_finished,
            "output_tokens_finished": self.output_tokens_finished,
            "requests_served": self.requests_served,
            "seconds_served": self.seconds_served,
            "prompt_tokens_served": self.prompt_tokens_served,
            "output_tokens_served": self.output_tokens_served,
            "pace": self.pace.factor,
            "costs": {str(width): cost.report() for width, cost in self.costs.items() if cost.known},
        }
