"""A server in virtual time, for the controller: engines whose steps cost what a test says, and nothing else.

Pure. It knows how vLLM's steps are made up (prompts in chunks beside decodes), how requests are routed, and that a switch
waits for steps in flight; the controller's whole way from counters to a plan is the real one. It can't say how fast a
server is: `python -m bench.trace` does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from statistics import mean
from typing import Any

from vllm_flying.controller.controller import Controller
from vllm_flying.controller.cost_curve import CostCurve
from vllm_flying.controller.cost_model import PROBE_STEPS, StepCost
from vllm_flying.controller.lookout import Lookout
from vllm_flying.controller.observation import RateTracker
from vllm_flying.controller.pace import Pace
from vllm_flying.controller.schedule import Schedule
from vllm_flying.core.topology import Group, Layout
from vllm_flying.frontend.observe import observe
from vllm_flying.scheduler.meter import FIRST_STEPS

STEP_TOKENS = 2048
MAX_RUNNING = 256
KV_TOKENS = 100_000


@dataclass
class SimulatedRequest:
    """Times in seconds."""

    arrival: float
    prompt: int
    output: int
    computed: int = 0
    produced: int = 0
    first_token: float = math.nan
    finished: float = math.nan
    wanted_width: int = 1

    @property
    def ttft(self) -> float:
        return self.first_token - self.arrival

    @property
    def tpot(self) -> float:
        return (self.finished - self.first_token) / max(1, self.output - 1)

    @property
    def is_finished(self) -> bool:
        return self.produced == self.output


@dataclass
class _Group:
    engines: Group
    requests: list[SimulatedRequest] = field(default_factory=list)
    step_ends: float = math.inf
    chunks: list[tuple[SimulatedRequest, int]] = field(default_factory=list)


class SimulatedServer:
    """Takes requests until all are done. With a controller, its layouts change.

    `pace` is how slow it is at a time in groups of a width.
    """

    def __init__(
        self,
        costs: Mapping[int, CostCurve],
        layout: Layout,
        controller: Controller | None = None,
        switch_s: float = 0.03,
        interval_s: float = 0.25,
        noise: float = 0.05,
        seed: int = 0,
        probe_noise: float = 0.0,
        began: datetime | None = None,
        schedule: Schedule | None = None,
        pace: Callable[[float, int], float] = lambda now, width: 1.0,
        lookout: Lookout | None = None,
    ) -> None:
        self.layout = layout
        self.switches: list[tuple[float, Layout]] = []
        self._costs, self._controller = costs, controller
        self._switch_s, self._interval_s, self._noise = switch_s, interval_s, noise
        self._random = random.Random(seed)
        self._groups = [_Group(group) for group in layout.groups]
        self._target: Layout | None = None
        self._asked = 0.0
        self._at_rest_until = 0.0
        self._pace, self._paces = pace, [Pace() for _ in range(layout.num_engines)]
        self._steps = [0] * layout.num_engines
        self._learned = [{width: StepCost() for width in costs} for _ in range(layout.num_engines)]
        probes = random.Random(seed)
        for learned in self._learned:
            for width, cost in learned.items():
                # A probe sees no sampling; here none of what a decoding request takes beyond a prompt token.
                fixed, per_token = 0.9 * costs[width].step_s, costs[width].prompt_token_s
                cost.seed([
                    (prompt, decodes, (1 + probe_noise * probes.uniform(-1, 1)) * (fixed + per_token * (prompt + decodes)))
                    for prompt, decodes in PROBE_STEPS
                ])  # fmt: skip
        self._counters = dict.fromkeys(
            ("requests_added", "prompt_tokens_added", "requests_finished", "output_tokens_finished"), 0
        )
        self._rates, self._lookout = RateTracker(), lookout or Lookout()
        self._began, self._schedule = began, schedule

    def run(
        self, arrivals: Sequence[tuple[float, int, int]], wanted_widths: Mapping[float, int] | None = None
    ) -> list[SimulatedRequest]:
        """Arrivals are (seconds, prompt tokens, output tokens); some, by their time, ask for a width."""
        requests = [
            SimulatedRequest(*arrival, wanted_width=(wanted_widths or {}).get(arrival[0], 1)) for arrival in sorted(arrivals)
        ]
        coming = list(reversed(requests))
        look = 0.0
        while coming or any(group.requests for group in self._groups):
            step = min(self._groups, key=lambda group: group.step_ends)
            now = min(coming[-1].arrival if coming else math.inf, step.step_ends, look, self._end_of_rest())
            if now == look:
                look += self._interval_s
                self._look(now)
            elif now == step.step_ends:
                self._end_step(step, now)
            elif coming and now == coming[-1].arrival:
                self._add(coming.pop())
            self._go_on(now)
        return requests

    def _end_of_rest(self) -> float:
        return self._at_rest_until if self._at_rest_until > 0 else math.inf

    def _add(self, request: SimulatedRequest) -> None:
        self._counters["requests_added"] += 1
        self._counters["prompt_tokens_added"] += request.prompt
        min(self._groups, key=lambda group: len(group.requests) / len(group.engines)).requests.append(request)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _go_on(self, now: float) -> None:
        """Begin the steps that can begin; carry a switch out once nothing is in flight."""
        if self._target is not None and all(group.step_ends == math.inf for group in self._groups):
            self._regroup(now)
        if self._at_rest_until and now >= self._at_rest_until:
            self._at_rest_until = 0.0
        if self._target is None and not self._at_rest_until:
            for group in self._groups:
                if group.requests and group.step_ends == math.inf:
                    self._begin_step(group, now)

    def _begin_step(self, group: _Group, now: float) -> None:
        budget, group.chunks = STEP_TOKENS, []
        for request in group.requests[:MAX_RUNNING]:
            tokens = min(budget, request.prompt - request.computed) if request.computed < request.prompt else 1
            if tokens:
                group.chunks.append((request, tokens))
                budget -= tokens
        prompt_tokens, decodes = _made_up_of(group.chunks)
        seconds = self._costs[len(group.engines)].of(prompt_tokens, decodes)
        seconds *= self._pace(now, len(group.engines)) * (1 + self._noise * self._random.uniform(-1, 1))
        engine, width = group.engines[0], len(group.engines)
        self._steps[engine] += 1
        if self._steps[engine] > FIRST_STEPS:
            learned = self._learned[engine]
            learned[width].learn(prompt_tokens, decodes, seconds, self._paces[engine], learned.values())
        group.step_ends = now + seconds

    def _end_step(self, group: _Group, now: float) -> None:
        group.step_ends = math.inf
        for request, tokens in group.chunks:
            if request.computed < request.prompt:
                request.computed += tokens
            if request.computed < request.prompt:
                continue
            if not request.produced:
                request.first_token = now
            request.produced += 1
            if request.is_finished:
                request.finished = now
                group.requests.remove(request)
                self._counters["requests_finished"] += 1
                self._counters["output_tokens_finished"] += request.output

    # ---- the controller -------------------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        if self._controller is None or self._target is not None or self._at_rest_until:
            return
        if not self._lookout.is_due(now, sum(len(group.requests) for group in self._groups)):
            return
        observation = observe(
            now, self.layout, sorted(self._costs), self._statuses(), self._rates,
            wall_clock=None if self._began is None else self._began + timedelta(seconds=now), schedule=self._schedule,
        )  # fmt: skip
        decision = self._controller.decide(observation)
        self._lookout.saw(observation, better_layout=decision.plan is not None)
        if decision.act and decision.plan is not None:
            self._target, self._asked = decision.plan.layout, now
            self.switches.append((now, self._target))

    def _regroup(self, now: float) -> None:
        assert self._target is not None and self._controller is not None
        requests = sorted((r for group in self._groups for r in group.requests), key=lambda r: r.arrival)
        self.layout, self._target = self._target, None
        for pace in self._paces:
            pace.layout_changed()
        self._groups = [_Group(group) for group in self.layout.groups]
        for request in requests:
            min(self._groups, key=lambda group: len(group.requests) / len(group.engines)).requests.append(request)
        self._at_rest_until = now + self._switch_s
        self._controller.switched(now, now + self._switch_s - self._asked)

    def _statuses(self) -> list[dict[str, Any]]:
        statuses = []
        for engine in range(self.layout.num_engines):
            group = next(group for group in self._groups if engine in group.engines)
            own = group.requests if engine == group.engines[0] else []
            running = [request for request in own if request.computed]
            statuses.append({
                "pace": self._paces[engine].factor,
                "running": len(running), "waiting": len(own) - len(running), "paused": 0,
                "prompt_tokens_queued": sum(request.prompt - request.computed for request in own),
                "kv_tokens_capacity": KV_TOKENS * len(group.engines),
                "kv_tokens_used": sum(request.computed + request.produced for request in own),
                "kv_tokens_per_engine": KV_TOKENS, "largest_request": max((r.prompt + r.output for r in own), default=0),
                "wanted_width": max((r.wanted_width for r in own), default=1),
                "max_running": {str(width): MAX_RUNNING for width in self._costs},
                "requests_served": 0, "seconds_served": 0.0, "prompt_tokens_served": 0, "output_tokens_served": 0,
                **{name: count if engine == 0 else 0 for name, count in self._counters.items()},
                "costs": {str(width): cost.report() for width, cost in self._learned[engine].items() if cost.known},
            })  # fmt: skip
        return statuses


def _made_up_of(chunks: Sequence[tuple[SimulatedRequest, int]]) -> tuple[int, int]:
    prompts = [tokens for request, tokens in chunks if request.computed < request.prompt]
    return sum(prompts), len(chunks) - len(prompts)


@dataclass(frozen=True)
class Figures:
    """Means over requests, in seconds."""

    ttft: float
    tpot: float
    response: float

    @classmethod
    def of(cls, requests: Sequence[SimulatedRequest]) -> Figures:
        return cls(
            mean(r.ttft for r in requests), mean(r.tpot for r in requests), mean(r.finished - r.arrival for r in requests)
        )


def poisson(
    phases: Sequence[tuple[float, float, int, int]], seed: int
) -> list[tuple[float, int, int]]:
    """Arrivals of phases of (seconds, requests per second, prompt tokens, output tokens)."""
    source, begin, arrivals = random.Random(seed), 0.0, []
    for seconds, rate, prompt, output in phases:
        time = begin
        while rate:
            time += source.expovariate(rate)
            if time >= begin + seconds:
                break
            arrivals.append((time, prompt, output))
        begin += seconds
    return arrivals
