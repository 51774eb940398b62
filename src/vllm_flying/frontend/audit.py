"""Decisions of the controller, and what they gained, as JSON lines and as sentences.

Pure: no torch, no vllm.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_flying.controller.controller import Decision
from vllm_flying.controller.plan import Plan
from vllm_flying.controller.realised_gain import RealisedGain

KEPT = 500


class AuditLog:
    """The last decisions in the server's runtime directory, and all of them in a file of the operator's."""

    def __init__(self, recent: Path, file: Path | None) -> None:
        self._recent = recent
        self._file = file
        self._said: tuple[Any, str] | None = None

    def note(self, decision: Decision, before: list[list[int]], record: dict[str, Any] | None = None) -> bool:
        """Write a decision down; one that only repeats the last is left out. Whether it was written."""
        plan = decision.plan
        if plan is None:
            self._said = None
            return False
        said = (plan.layout, decision.verdict.split(" of ")[0].split(" for ")[0])
        if said == self._said and record is None:
            return False
        self._said = said
        entry = {
            "time": round(time.time(), 3),
            "from": before,
            "to": plan.layout.to_lists(),
            "rule": plan.rule,
            "reason": plan.reason,
            "verdict": decision.verdict,
            "predicted_gain_s": round(plan.gain_s, 6),
            "outcome": record["outcome"] if record else None,
            "seconds": record["seconds"]["total"] if record else None,
        }
        self._append(entry)
        return True

    def realised(self, plan: Plan, before: list[list[int]], gain: RealisedGain) -> None:
        """Write down what a switch gained."""
        self._append(
            {
                "time": round(time.time(), 3),
                "from": before,
                "to": plan.layout.to_lists(),
                "rule": plan.rule,
                "predicted_gain_s": round(plan.gain_s, 6),
                "realised": {
                    "gain_s": _rounded(gain.gain_s),
                    "staying_s": _rounded(gain.staying_s),
                    "measured_s": _rounded(gain.measured_s),
                    "requests": gain.requests,
                    "window_s": round(gain.window_s, 3),
                    "unknown": gain.unknown,
                },
            }
        )

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry) + "\n"
        lines = [*self._recent.read_text().splitlines(keepends=True), line] if self._recent.exists() else [line]
        self._recent.write_text("".join(lines[-KEPT:]))
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(line)


def read_decisions(path: Path) -> Iterator[dict[str, Any]]:
    """Decisions in a file, oldest first; nothing if there is no such file."""
    if path.exists():
        for line in path.read_text().splitlines():
            yield json.loads(line)


def sentence(entry: dict[str, Any]) -> str:
    """A decision, or what it gained, in words."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["time"]))
    if "realised" in entry:
        return f"{when}  {entry['rule']}: {_realised_sentence(entry)}"
    wish = f"{when}  {entry['rule']}: from {entry['from']} to {entry['to']}, because {entry['reason']}"
    if entry["outcome"]:
        return f"{wish}. It was {entry['outcome'].replace('_', ' ')}, in {1e3 * entry['seconds']:.0f} ms."
    return f"{wish}. Not done: {entry['verdict']}."


def _realised_sentence(entry: dict[str, Any]) -> str:
    gain = entry["realised"]
    plan = f"the switch from {entry['from']} to {entry['to']} was to save {entry['predicted_gain_s']:.3f} s per request"
    if gain["gain_s"] is None:
        return f"{plan}; what it saved is unknown: in the {gain['window_s']:.1f} s after it {gain['unknown']}."
    outcome = "saved" if gain["gain_s"] >= 0 else "cost"
    return (
        f"{plan} and {outcome} {abs(gain['gain_s']):.3f} s: requests took {gain['measured_s']:.3f} s (mean of "
        f"{gain['requests']}), and would have taken {gain['staying_s']:.3f} s in the old layout by its costs."
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
