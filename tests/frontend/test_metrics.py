"""The metrics' reference is up to date, and the dashboard asks for metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

from vllm_flying.frontend.metrics import DEFINITIONS, metrics, reference

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


def test_gains_losses_and_unknown_ones_are_counted_apart() -> None:
    from prometheus_client import REGISTRY

    for gain_s in (0.5, 0.25, -0.125, None):
        metrics().realised("test_metrics", gain_s)

    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(f"vllm_flying_{name}_total", {"rule": "test_metrics", **labels})

    assert value("realised_gain_seconds") == 0.75 and value("realised_loss_seconds") == 0.125
    assert value("gain_measurements", known="true") == 3 and value("gain_measurements", known="false") == 1
