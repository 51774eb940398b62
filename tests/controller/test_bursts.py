"""The controller against static layouts, in virtual time: bursts, constant loads, two engines and eight."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from tests.support.simulation import Figures, SimulatedServer, poisson
from vllm_flying.controller.controller import Controller
from vllm_flying.controller.cost_curve import CostCurve
from vllm_flying.controller.policies import auto
from vllm_flying.core.topology import Layout, groups_of_width

Phase = tuple[float, float, int, int]

straight = CostCurve.straight

# About what `bench.trace` finds on two cores; a faster machine with two engines; the ratios of eight large GPUs.
TWO_CORES: dict[int, CostCurve] = {1: straight(0.085, 0.0045, 0.004), 2: straight(0.055, 0.0026, 0.0045)}
TWO_ENGINES: dict[int, CostCurve] = {1: straight(0.020, 0.0005, 0.0008), 2: straight(0.0125, 0.0003, 0.0008)}
EIGHT_ENGINES: dict[int, CostCurve] = {
    1: straight(0.0080, 40e-6, 50e-6), 2: straight(0.0056, 22e-6, 45e-6),
    4: straight(0.0042, 13e-6, 40e-6), 8: straight(0.0034, 9e-6, 38e-6),
}  # fmt: skip
QUIET: Phase = (30.0, 0.4, 256, 32)


def layouts(costs: Mapping[int, CostCurve]) -> dict[int, Layout]:
    engines = max(costs)
    return {width: Layout(tuple(groups_of_width(width, engines))) for width in costs}


def run(costs: Mapping[int, CostCurve], phases: Sequence[Phase], seed: int) -> tuple[Figures, dict[int, Figures], SimulatedServer]:
    """Figures with the controller, those of each static layout, and the server that the controller had."""
    arrivals = poisson(phases, seed)
    static = {w: Figures.of(SimulatedServer(costs, layout).run(arrivals)) for w, layout in layouts(costs).items()}
    server = SimulatedServer(costs, layouts(costs)[1], Controller(auto), seed=seed)
    return Figures.of(server.run(arrivals)), static, server


def of_the_better(name: str, auto_figures: Figures, static: Mapping[int, Figures]) -> float:
    return float(getattr(auto_figures, name) / min(getattr(figures, name) for figures in static.values()))


@pytest.mark.parametrize("seed", [1, 2])
def test_bursts_in_which_one_layout_is_better_and_quiet_times_in_which_the_other_is(seed: int) -> None:
    phases = [QUIET, (30.0, 4.0, 64, 24), QUIET, (30.0, 4.0, 64, 24), QUIET]
    figures, static, server = run(TWO_CORES, phases, seed)
    for name in ("ttft", "tpot", "response"):
        assert of_the_better(name, figures, static) <= 1.08, name
    assert max(static[1].ttft, static[2].ttft) > 1.2 * figures.ttft, "each static layout loses somewhere"
    assert len(server.switches) <= len(phases) + 2, server.switches
    for burst in (30.0, 90.0):
        first = next(time for time, layout in server.switches if time > burst - 2 and len(layout.groups) == 2)
        assert first < burst + 6.0, "the split comes once arrivals show"


def test_a_burst_in_which_the_wide_group_is_better_leaves_it() -> None:
    costs = {1: straight(0.085, 0.0045, 0.004), 2: straight(0.030, 0.0020, 0.0015)}
    figures, static, server = run(costs, [QUIET, (30.0, 4.0, 64, 24), QUIET], seed=0)
    assert [len(layout.groups) for _, layout in server.switches] == [1]
    assert of_the_better("response", figures, static) <= 1.05


@pytest.mark.parametrize(("rate", "most"), [(0.3, 4), (2.0, 8), (4.0, 3)])
def test_a_constant_load_is_no_reason_to_flap(rate: float, most: int) -> None:
    prompt, output = (256, 32) if rate < 1 else (64, 24)
    figures, static, server = run(TWO_CORES, [(120.0, rate, prompt, output)], seed=1)
    assert len(server.switches) <= most, "two a second come where both layouts are about as good"
    assert of_the_better("response", figures, static) <= 1.08


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_small_lasting_gain_is_taken_too(seed: int) -> None:
    """A burst in which the better layout is better by an eighth."""
    costs: dict[int, CostCurve] = {1: straight(0.0817, 0.00303, 0.00426), 2: straight(0.0656, 0.0014, 0.00286)}
    figures, static, server = run(costs, [(40.0, 0.3, 128, 16), (40.0, 5.0, 16, 48), (40.0, 0.3, 128, 16)], seed)
    for name in ("ttft", "tpot", "response"):
        assert of_the_better(name, figures, static) <= 1.08, name
    assert [len(layout.groups) for _, layout in server.switches] == [1, 2, 1]


def test_the_first_steps_of_a_layout_do_not_mislead() -> None:
    """A second of lone requests in one layout says nothing of its full batches; it used to keep the other for ever."""
    phases = [(30.0, 1.0, 512, 64), (30.0, 15.0, 128, 48)]
    for seed in range(3):
        figures, static, _ = run(TWO_ENGINES, phases, seed)
        assert of_the_better("response", figures, static) <= 1.08


LONG_PROMPTS: dict[int, CostCurve] = {
    1: CostCurve(0.01445, 0.000614, (0.00296,)), 2: CostCurve(0.01056, 0.000283, (0.00098, 0.00015, 0.00008)),
}  # fmt: skip


@pytest.mark.parametrize("rate", [5.0, 5.8])
def test_a_burst_of_long_prompts_leaves_the_pair_that_serves_it_better(rate: float) -> None:
    """A trend added to the rate came to an overload of both layouts, by which the pair was left."""
    for seed in range(8):
        phases = [(10.0, 0.5, 64, 32), (30.0, 1.0, 64, 32), (20.0, rate, 512, 8), (20.0, 1.0, 64, 32)]
        _, static, server = run(LONG_PROMPTS, phases, seed)
        assert static[1].response > 1.2 * static[2].response
        assert [len(layout.groups) for _, layout in server.switches] == [1], (seed, server.switches)


@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_starts_under_load_finds_the_layout_too(seed: int) -> None:
    """What requests cost in the pair nobody knew, and by the guess that it is as much as apart it never ran."""
    costs = {1: CostCurve(0.0113, 0.000143, (0.000675,)), 2: CostCurve(0.0087, 0.000076, (0.0003, 0.00033))}
    figures, static, server = run(costs, [(60.0, 10.0, 64, 32)], seed)
    assert static[1].response > 1.2 * static[2].response
    assert of_the_better("response", figures, static) <= 1.08 and len(server.switches) <= 3, server.switches


@pytest.mark.parametrize("seed", range(3))
def test_a_machine_that_is_slow_at_times_keeps_nobody_in_the_wrong_layout(seed: int) -> None:
    """The pair last ran when everything was slow, and would be quicker again once everything is."""
    costs: dict[int, CostCurve] = {1: straight(0.0235, 0.0003, 0.0009), 2: straight(0.0118, 0.0002, 0.0016)}
    arrivals = poisson([(60.0, 4.0, 64, 32), (25.0, 12.0, 64, 48), (60.0, 4.0, 64, 32)], seed)
    server = SimulatedServer(
        costs, Layout.of([[0, 1]], 2), Controller(auto), seed=seed, pace=lambda now, width: 1.0 + 0.35 * math.cos((now - 60.0) / 10.0)
    )
    server.run(arrivals)
    splits = [time for time, layout in server.switches if len(layout.groups) == 2]
    assert len(server.switches) <= 4 and 60.0 < splits[-1] < 68.0, server.switches
    merge, layout = server.switches[-1]
    assert len(layout.groups) == 1 and 84.0 < merge < 100.0, server.switches


def jitter(seed: int) -> Callable[[float, int], float]:
    """A pace that wanders about by an eighth, from one second to the next."""
    source, values = random.Random(seed + 77), [0.0]
    for _ in range(3000):
        values.append(0.8 * values[-1] + source.gauss(0, 0.08))
    return lambda now, width: math.exp(values[int(4 * now)])


@pytest.mark.parametrize("seed", [1, 6])
def test_a_machine_whose_pace_wanders_keeps_nobody_in_the_wrong_layout(seed: int) -> None:
    """The pair is left when it looks slow; the engines' first full batches must not look quick for that."""
    costs = {1: CostCurve(0.0205, 0.00032, (0.0006, 0.0006)), 2: CostCurve(0.0125, 0.00018, (0.0007, 0.0006))}
    arrivals = poisson([(60.0, 4.0, 64, 32), (25.0, 12.0, 64, 48), (60.0, 4.0, 64, 32)], seed)
    server = SimulatedServer(costs, Layout.of([[0, 1]], 2), Controller(auto), seed=seed, noise=0.3, pace=jitter(seed))
    server.run(arrivals)
    (split, _), (merge, layout) = server.switches
    assert 60.0 < split < 75.0 and 80.0 < merge < 97.0 and len(layout.groups) == 1, server.switches


def seconds_apart_after_bursts(seed: int, probe_noise: float) -> list[float]:
    """After each of three bursts; 40 is all the time until the next one."""
    costs = {1: CostCurve(0.0205, 0.00032, (0.0006, 0.0006)), 2: CostCurve(0.0125, 0.00018, (0.0007, 0.0006))}
    arrivals = poisson([(40.0, 4.0, 64, 32), (20.0, 14.0, 64, 48)] * 3 + [(40.0, 4.0, 64, 32)], seed)
    wandering = jitter(seed)
    server = SimulatedServer(
        costs, Layout.of([[0, 1]], 2), Controller(auto), seed=seed, noise=0.3, probe_noise=probe_noise,
        pace=lambda now, width: wandering(now, width) * (1.2 if now < 1.0 else 1.0),
    )  # fmt: skip
    server.run(arrivals)
    apart = []
    for end in (60.0, 120.0, 180.0):
        merges = [time for time, layout in server.switches if end - 5.0 < time < end + 40.0 and len(layout.groups) == 1]
        apart.append(max(0.0, merges[0] - end) if merges else 40.0)
    return apart


@pytest.mark.parametrize("probe_noise", [0.0, 0.08])
def test_engines_whose_first_steps_are_a_bursts_are_left_after_it(probe_noise: float) -> None:
    """At what pace they ran nobody knows: by the pace alone they looked too quick to be left, for good."""
    apart = [seconds for seed in (6, 10, 12, 14, 23) for seconds in seconds_apart_after_bursts(seed, probe_noise)]
    assert max(apart) < 30.0 and sum(seconds > 12.0 for seconds in apart) <= 2, apart


@pytest.mark.parametrize("seed", [4, 7])
def test_what_is_known_of_a_layout_does_not_wander_with_the_machine(seed: int) -> None:
    """After every switch the new layout's steps are held against the old one's; half believed, that made a random walk."""
    costs = {1: CostCurve(0.0126, 0.000169, (0.000675, 0.00006)), 2: CostCurve(0.0087, 0.000089, (0.00047, 0.00026))}
    quiet, burst = (50.0, 6.0, 64, 32), (20.0, 22.0, 64, 48)
    arrivals = poisson([(10.0, 0.5, 64, 32), *[quiet, burst] * 4, quiet], seed)
    server = SimulatedServer(
        costs, Layout.of([[0, 1]], 2), Controller(auto), seed=seed, noise=0.3, probe_noise=0.05, pace=jitter(seed)
    )
    server.run(arrivals)
    assert [len(layout.groups) for _, layout in server.switches] == [2, 1] * 4, server.switches
    merges = [time for time, layout in server.switches if len(layout.groups) == 1]
    assert max(merge - end for merge, end in zip(merges, (80.0, 150.0, 220.0, 290.0), strict=True)) < 15.0, server.switches


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_slow_first_steps_are_not_held_against_a_layout(seed: int) -> None:
    """The pair runs first, when all memory is touched for the first time; it is quicker ever after."""
    costs: dict[int, CostCurve] = {1: straight(0.0205, 0.0003, 0.0008), 2: straight(0.0125, 0.0002, 0.0011)}
    arrivals = poisson([(60.0, 4.0, 64, 32), (25.0, 12.0, 64, 48), (60.0, 4.0, 64, 32)], seed)
    server = SimulatedServer(
        costs, Layout.of([[0, 1]], 2), Controller(auto), seed=seed, noise=0.3,
        pace=lambda now, width: 1.6 if width == 2 and now < 2.0 else 1.0,
    )  # fmt: skip
    server.run(arrivals)
    tried = [time for time, _ in server.switches if time < 15.0]
    assert len(tried) in (0, 2), "it may try the other one while it has seen next to nothing"
    (split, _), (merge, layout) = server.switches[len(tried) :]
    assert 60.0 < split < 68.0 and 84.0 < merge < 97.0 and len(layout.groups) == 1, server.switches


def test_eight_engines_follow_a_steep_burst() -> None:
    """Sixty times the requests: from one group to eight, or to pairs, which serve them about as well."""
    figures, static, server = run(EIGHT_ENGINES, [(20.0, 2.0, 1000, 200), (15.0, 120.0, 1000, 200)], seed=0)
    widths = [len(layout.groups[0]) for _, layout in server.switches]
    assert widths[0] == 8 and widths[-1] in (1, 2) and len(widths) <= 5
    assert of_the_better("response", figures, static) <= 1.20
    quiet, static_quiet, _ = run(EIGHT_ENGINES, [(20.0, 2.0, 1000, 200)], seed=0)
    assert of_the_better("response", quiet, static_quiet) <= 1.10
    assert static_quiet[1].response >= 2 * quiet.response
