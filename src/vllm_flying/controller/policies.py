"""How a layout is chosen. A policy is a function of an observation; others can be named by entry point.

Pure. `load` asks in which layout a request takes least under the present load: idle servers merge, since a lone
request is quicker in a wide group, and bursts split them, if and when the learned step costs say so. A request
that needs a wide group (its KV, its hint, its priority) limits the choice of every policy.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from vllm_flying.controller.observation import Observation
from vllm_flying.controller.plan import Plan, allowed_layouts, least_width, uniform, with_group_of
from vllm_flying.controller.response import Response, Targets, response
from vllm_flying.core.topology import Layout

ENTRY_POINTS = "vllm_flying.policies"

Policy = Callable[[Observation], Plan | None]
"""A plan, or None to leave everything as it is."""


def manual(observation: Observation) -> Plan | None:
    """Never acts: layouts change by request and by hint only."""
    return None


def predicted_seconds(observation: Observation, layout: Layout) -> float | None:
    """Seconds that a usual request will take in a layout; None for a width whose cost isn't known."""
    predicted = predicted_response(observation, layout)
    return None if predicted is None else predicted.total_s


def predicted_response(observation: Observation, layout: Layout) -> Response | None:
    """A usual request's times in a layout; None for a width whose cost isn't known."""
    widest = max(len(group) for group in layout.groups)
    narrowest = min(len(group) for group in layout.groups)
    curve = observation.costs.get(narrowest)
    if curve is None or widest not in observation.costs:
        return None
    # In a mixed layout usual requests go to the narrow groups; the wide one is there for its own request.
    num_groups = sum(1 for group in layout.groups if len(group) == narrowest)
    return response(curve, num_groups, observation.load, observation.max_running[narrowest])


def load(observation: Observation) -> Plan | None:
    """The allowed layout in which a usual request is done first; of those that meet the targets, if any does."""
    timed = [(predicted_response(observation, layout), layout) for layout in allowed_layouts(observation)]
    known = [(predicted, layout) for predicted, layout in timed if predicted is not None]
    now = predicted_response(observation, observation.layout)
    if not known or now is None:
        return None
    targets = observation.targets
    meeting = [(predicted, layout) for predicted, layout in known if not predicted.missed(targets)]
    best, layout = min(meeting or known, key=lambda pair: (pair[0].total_s, -len(pair[1].groups)))
    if layout == observation.layout:
        return None
    reason = f"with {observation.unfinished} requests and {_arrivals(observation)} "
    missed = now.missed(targets) if meeting else 0.0
    if missed:
        reason += f"{_times_beside_targets(now, best, targets)} as it is and in {layout.to_lists()}"
    else:
        reason += f"one takes {best.total_s:.2f} s in {layout.to_lists()}, {now.total_s:.2f} s as it is"
    return Plan(layout, "load", reason, gain_s=now.total_s - best.total_s, missed=missed)


def _arrivals(observation: Observation) -> str:
    expected = f", {observation.expected_rate:.1f} expected" if observation.expects_rise else ""
    return f"{observation.arrival_rate:.1f}/s arriving{expected}"


def _times_beside_targets(now: Response, best: Response, targets: Targets) -> str:
    """What is missed now, and what it will be."""
    times = (("TTFT", now.ttft_s, best.ttft_s, targets.ttft_s), ("TPOT", now.tpot_s, best.tpot_s, targets.tpot_s))
    return " and ".join(
        f"the {name} target of {1e3 * target:g} ms is missed: {1e3 * took:.0f} ms and {1e3 * will:.0f} ms"
        for name, took, will, target in times
        if target is not None and took > target
    )


def long_context(observation: Observation) -> Plan | None:
    """Widens when an unfinished request may need more KV than any group has; splits again when none does."""
    least = least_width(observation)
    widest = max(len(group) for group in observation.layout.groups)
    if widest < least:
        return Plan(
            uniform(observation, least), "long_context", f"a request needs a group of {least}", urgent=True
        )
    used = sum(group.kv_tokens_used for group in observation.groups)
    capacity = sum(group.kv_tokens_capacity for group in observation.groups)
    if widest > least and least == 1 and used <= capacity / 2:
        return Plan(uniform(observation, 1), "long_context", "no request needs a wide group and half of the KV is free")
    return None


def auto(observation: Observation) -> Plan | None:
    """What a request needs first, then what serves the load first."""
    least = least_width(observation)
    if max(len(group) for group in observation.layout.groups) < least:
        return long_context(observation)
    return load(observation)


def priority(observation: Observation) -> Plan | None:
    """One group wide enough for what an urgent or large request needs, the others as they are; apart without any."""
    least = least_width(observation)
    widest = max(len(group) for group in observation.layout.groups)
    if widest < least:
        return Plan(with_group_of(observation, least), "priority", f"a request needs a group of {least}", urgent=True)
    if least == 1 < widest:
        return Plan(uniform(observation, 1), "priority", "no request needs a wide group")
    return None


def schedule(observation: Observation) -> Plan | None:
    """The width that the operator's schedule has for this time, for as many engines as a request's needs allow."""
    if observation.schedule is None or observation.wall_clock is None:
        return None
    entry, least = observation.schedule.entry_at(observation.wall_clock), least_width(observation)

    def engines_as_scheduled(layout: Layout) -> int:
        return sum(len(group) for group in layout.groups if len(group) == entry.width)

    best = max(allowed_layouts(observation), key=engines_as_scheduled)
    if best == observation.layout:
        return None
    reason = f"the schedule has width {entry.width} since {entry.minute // 60:02}:{entry.minute % 60:02}"
    if least > entry.width:
        reason += f", and a request needs a group of {least}"
    return Plan(best, "schedule", reason, urgent=max(len(group) for group in observation.layout.groups) < least)


BUILT_IN: dict[str, Policy] = {
    "manual": manual, "load": load, "long_context": long_context, "priority": priority, "auto": auto, "schedule": schedule,
}  # fmt: skip


def policy_by_name(name: str) -> Policy:
    """A built-in policy, or one that an installed package offers; ValueError that lists what there is."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    others = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in others:
        policy: Policy = others[name].load()
        return policy
    raise ValueError(f"policy {name!r} is unknown; there are: {', '.join([*BUILT_IN, *sorted(others)])}")
