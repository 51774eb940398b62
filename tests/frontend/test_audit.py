"""Decisions can be read back as sentences, and repetitions are left out."""

from __future__ import annotations

from pathlib import Path

from vllm_flying.controller.controller import Decision
from vllm_flying.controller.plan import Plan
from vllm_flying.controller.realised_gain import NOTHING_DONE, RealisedGain
from vllm_flying.core.topology import Layout
from vllm_flying.frontend.audit import KEPT, AuditLog, read_decisions, sentence

PLAN = Plan(Layout.of([[0, 1]], 2), "load", "it is quiet", gain_s=0.5)
DONE = {"outcome": "committed", "seconds": {"total": 0.012}}


def test_decisions_are_kept_once_and_told(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "recent", tmp_path / "all")
    held = Decision(1.0, PLAN, False, "within the cooldown of 1 s")
    assert log.note(held, [[0], [1]])
    assert not log.note(held, [[0], [1]]), "nothing new"
    assert log.note(Decision(2.0, PLAN, True, "switch"), [[0], [1]], DONE)
    assert not log.note(Decision(3.0, None, False, "stay"), [[0, 1]])
    first, second = read_decisions(tmp_path / "all")
    assert "Not done: within the cooldown of 1 s." in sentence(first)
    assert "load: from [[0], [1]] to [[0, 1]], because it is quiet. It was committed, in 12 ms." in sentence(second)


def test_what_a_switch_gained_is_told(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "recent", None)
    for gain in (
        RealisedGain(12, 10.0, staying_s=1.5, measured_s=1.25),
        RealisedGain(12, 10.0, staying_s=1.25, measured_s=1.5),
        RealisedGain(0, 9.75, unknown=NOTHING_DONE),
    ):
        log.realised(PLAN, [[0], [1]], gain)
    entries = list(read_decisions(tmp_path / "recent"))
    assert [entry["realised"]["gain_s"] for entry in entries] == [0.25, -0.25, None]
    saved, cost, unknown = (sentence(entry).partition("  ")[2] for entry in entries)
    plan = "load: the switch from [[0], [1]] to [[0, 1]] was to save 0.500 s per request"
    assert saved == (
        f"{plan} and saved 0.250 s: requests took 1.250 s (mean of 12), and would have taken 1.500 s in the old layout by "
        "its costs."
    )
    assert cost.startswith(f"{plan} and cost 0.250 s: requests took 1.500 s")
    assert unknown == f"{plan}; what it saved is unknown: in the 9.8 s after it no request came and was done."


def test_the_recent_file_stays_small(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "recent", None)
    for index in range(KEPT + 5):
        log.note(Decision(float(index), PLAN, True, "switch"), [[0], [1]], DONE)
    assert len(list(read_decisions(tmp_path / "recent"))) == KEPT
    assert list(read_decisions(tmp_path / "absent")) == []
