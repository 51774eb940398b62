"""The metrics' reference is up to date, and the dashboard asks for metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

from vllm_flying.frontend.metrics import DEFINITIONS, reference

REPOSITORY = Path(__file__).parents[2]


def test_the_reference_is_up_to_date() -> None:
    written = (REPOSITORY / "docs" / "metrics.md").read_text()
    assert written == reference(), "run: python -m vllm_flying.frontend.metrics > docs/metrics.md"


def test_the_dashboard_shows_existing_metrics() -> None:
    board = json.loads((REPOSITORY / "configs" / "grafana" / "vllm-flying.json").read_text())
    queries = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    asked = set(re.findall(r"vllm_flying_[a-z_]+", queries)) - {"vllm_flying_requests_"}
    suffixes = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket"]}
    known = {f"vllm_flying_{d.name}{suffix}" for d in DEFINITIONS.values() for suffix in suffixes[d.kind]}
    assert asked <= known and len(asked) >= 6
