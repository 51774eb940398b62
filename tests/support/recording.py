"""What the controller saw, look by look, as JSON lines: written by a policy around a policy, read back for replays.

Pure. `Recorded` is a policy, so it records wherever a controller runs: offered as an entry point, a real server too.
`python -m tests.support.recording` makes tests/controller/recorded/ anew, in virtual time.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from tests.support.simulation import SimulatedServer, poisson
from vllm_flying.controller.controller import Controller
from vllm_flying.controller.cost_curve import CostCurve
from vllm_flying.controller.lookout import Lookout
from vllm_flying.controller.observation import GroupObservation, Observation, Totals
from vllm_flying.controller.plan import Plan
from vllm_flying.controller.policies import BUILT_IN, Policy
from vllm_flying.controller.response import Targets
from vllm_flying.controller.schedule import Schedule, ScheduleEntry, parse_schedule
from vllm_flying.core.topology import Layout

FIXTURES = Path(__file__).parents[1] / "controller" / "recorded"
DIGITS = 6


@dataclass
class Recorded:
    """A policy that writes down what it is shown."""

    policy: Policy
    file: TextIO

    def __call__(self, seen: Observation) -> Plan | None:
        self.file.write(json.dumps(_plain(asdict(seen)), separators=(",", ":")) + "\n")
        return self.policy(seen)


def observations(file: Path) -> Iterator[Observation]:
    """A recorded sequence."""
    for line in file.read_text().splitlines():
        yield _observation(json.loads(line))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _observation(line: dict[str, Any]) -> Observation:
    groups = [{**group, "engines": tuple(group["engines"])} for group in line["groups"]]
    engines = sum(len(group["engines"]) for group in groups)
    changed: dict[str, Any] = {
        "layout": Layout.of(line["layout"]["groups"], engines),
        "groups": tuple(GroupObservation(**group) for group in groups),
        "costs": {int(width): CostCurve.from_dict(cost) for width, cost in line["costs"].items()},
        "widths": tuple(line["widths"]),
        "max_running": {int(width): most for width, most in line["max_running"].items()},
        "totals": Totals(**line["totals"]),
        "targets": Targets(**line["targets"]),
        "wall_clock": line["wall_clock"] and datetime.fromisoformat(line["wall_clock"]),
        "schedule": line["schedule"]
        and Schedule(tuple(ScheduleEntry(e["minute"], tuple(e["days"]), e["width"]) for e in line["schedule"]["entries"])),
    }
    return Observation(**{**line, **changed})


# ---- the fixtures ---------------------------------------------------------------------------------------------------

straight = CostCurve.straight
PAIR: dict[int, CostCurve] = {1: straight(0.085, 0.0045, 0.004), 2: straight(0.055, 0.0026, 0.0045)}
FOUR: dict[int, CostCurve] = {1: straight(0.020, 40e-6, 0.0005), 2: straight(0.014, 22e-6, 0.0005), 4: straight(0.010, 13e-6, 0.0005)}
QUIET, BURST = (8.0, 0.4, 256, 32), (12.0, 4.0, 64, 24)


@dataclass(frozen=True)
class Run:
    """What a virtual server is given."""

    policy: str
    costs: Mapping[int, CostCurve]
    arrivals: Sequence[tuple[float, int, int]]
    wanted_widths: Mapping[float, int] = field(default_factory=dict)
    schedule: Schedule | None = None


def runs() -> list[Run]:
    """One for each policy that acts."""
    burst = poisson([QUIET, BURST, QUIET], seed=1)
    few = poisson([(20.0, 1.0, 64, 24)], seed=1)
    urgent, hinted = (5.0, 64, 48), (14.0, 64, 24)
    return [
        Run("load", PAIR, burst),
        Run("auto", PAIR, sorted([*burst, hinted]), {hinted[0]: 2}),
        Run("long_context", FOUR, sorted([*few, (6.0, 110_000, 12)])),
        Run("priority", FOUR, sorted([*few, urgent]), {urgent[0]: 2}),
        Run("schedule", PAIR, few, {}, parse_schedule([{"at": "08:30", "width": 1}, {"at": "19:00", "width": 2}])),
    ]


class _Always(Lookout):
    """Every look is shown, also those that a server has no reason for."""

    def is_due(self, now: float, requests: int) -> bool:
        return True


def record(run: Run) -> tuple[str, SimulatedServer]:
    """What the controller saw, as JSON lines, and the server that it saw."""
    file = io.StringIO()
    began = datetime.fromisoformat("2030-01-07T18:59:52")
    server = SimulatedServer(
        run.costs, Layout.separate(max(run.costs)), Controller(Recorded(BUILT_IN[run.policy], file)), interval_s=0.5, began=began,
        schedule=run.schedule, lookout=_Always(),
    )  # fmt: skip
    server.run(run.arrivals, run.wanted_widths)
    return file.getvalue(), server


def main() -> None:
    """Run them and keep what the controller saw."""
    for run in runs():
        text, server = record(run)
        (FIXTURES / f"{run.policy}.jsonl").write_text(text)
        print(run.policy, [(round(time, 1), layout.to_lists()) for time, layout in server.switches])


if __name__ == "__main__":
    main()
