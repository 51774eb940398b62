"""Prometheus metrics of the plugin, on vLLM's own /metrics; docs/metrics.md is made from this file.

Pure but for prometheus_client, which vLLM brings. Names begin with `vllm_flying_`: collectors named `vllm:...` are
dropped when vLLM makes its own anew. With several API servers prometheus_client adds their values up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from vllm_flying.controller.observation import Observation
from vllm_flying.controller.policies import predicted_response

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Definition:
    """One metric."""

    kind: str
    name: str
    text: str
    labels: tuple[str, ...] = ()


DEFINITIONS = {
    "width": Definition("gauge", "engine_width", "Engines in the group that an engine belongs to.", ("engine",)),
    "switches": Definition(
        "counter", "switches", "Switches of layout; widths such as 1+1; reason operator, hint, request or controller.",
        ("source", "target", "reason", "outcome"),
    ),
    "phases": Definition("histogram", "switch_phase_seconds", "Seconds spent in each phase of a switch.", ("phase",)),
    "paused": Definition("counter", "requests_paused", "Begun requests that a switch left waiting for their layout."),
    "moved": Definition("counter", "requests_moved", "Begun requests that moved into the new layout with their KV."),
    "again": Definition("counter", "requests_recomputed", "Begun requests whose KV was given up at a switch."),
    "recomputed": Definition("counter", "recomputed_tokens", "Tokens whose KV was given up at switches; 0 where "
                             "memory suffices."),
    "prefixes": Definition("counter", "prefixes_moved", "Hot cached prefixes that followed a switch without a request."),
    "prefix_tokens": Definition("counter", "prefix_tokens_moved", "Tokens of these whose KV was copied."),
    "bytes": Definition("counter", "kv_bytes_moved", "Bytes of KV that went from worker to worker at switches."),
    "hints": Definition("counter", "hints", "Requests with a parallelism_hint, by whether a group of that width took them, also after their begin.",
                        ("hint", "honoured")),
    "decisions": Definition("counter", "decisions", "Plans of the controller, by rule and what became of them.",
                            ("rule", "done")),
    "rate": Definition("gauge", "arrival_rate", "Requests per second that arrive, over two seconds, as the controller sees it."),
    "trend": Definition("gauge", "arrival_trend", "How much more these are than over sixteen seconds; below zero where "
                        "fewer come than before."),
    "ttft": Definition("gauge", "predicted_ttft_seconds", "Time to the first token predicted for a usual request in the "
                       "present layout."),
    "tpot": Definition("gauge", "predicted_tpot_seconds", "Time between two tokens predicted for it."),
    "failures": Definition("counter", "policy_failures", "Looks at which the policy raised; the layout stayed as it was."),
    "predicted": Definition("counter", "predicted_gain_seconds", "Seconds that carried-out plans were to save.",
                            ("rule",)),
    "saved": Definition("counter", "realised_gain_seconds", "Seconds that a usual request was found to take less after "
                        "carried-out plans.", ("rule",)),
    "lost": Definition("counter", "realised_loss_seconds", "Seconds that it was found to take more.", ("rule",)),
    "measured": Definition("counter", "gain_measurements", "Carried-out plans with a predicted gain, by whether what they "
                           "really gained is known.", ("rule", "known")),
}  # fmt: skip


class Metrics:
    """The collectors of this process."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        def make(definition: Definition) -> Any:
            name = f"vllm_flying_{definition.name}"
            if definition.kind == "gauge":
                return Gauge(name, definition.text, definition.labels, multiprocess_mode="mostrecent")
            if definition.kind == "histogram":
                return Histogram(name, definition.text, definition.labels, buckets=BUCKETS)
            return Counter(name, definition.text, definition.labels)

        self._collectors = {key: make(definition) for key, definition in DEFINITIONS.items()}

    def layout(self, groups: list[list[int]]) -> None:
        """The announced layout."""
        for group in groups:
            for engine in group:
                self._collectors["width"].labels(str(engine)).set(len(group))

    def switched(self, record: dict[str, Any]) -> None:
        """A switch ended."""
        names = ["+".join(str(len(group)) for group in record[side]) for side in ("from", "to")]
        reason = record["reason"].split(":")[0].split()[0]
        self._collectors["switches"].labels(*names, reason, record["outcome"]).inc()
        for phase, seconds in record["seconds"].items():
            self._collectors["phases"].labels(phase).observe(seconds)
        if record["outcome"] == "committed":
            self.layout(record["to"])
            self._collectors["paused"].inc(record["requests"]["paused"])
            self._collectors["again"].inc(record["requests"]["recomputed"])
            self._collectors["recomputed"].inc(record["recomputed_tokens"])
            self._collectors["moved"].inc(record["requests"]["moved"])
            self._collectors["prefixes"].inc(record["prefixes"]["moved"])
            self._collectors["prefix_tokens"].inc(record["prefixes"]["tokens"])
            self._collectors["bytes"].inc(record["kv"]["bytes"] + record["precopied"]["bytes"])

    def hinted(self, hint: str, honoured: bool) -> None:
        """A request with a hint was routed."""
        self._collectors["hints"].labels(hint, str(honoured).lower()).inc()

    def decided(self, rule: str, done: bool, gain_s: float) -> None:
        """The controller had a plan."""
        self._collectors["decisions"].labels(rule, str(done).lower()).inc()
        if done:
            self._collectors["predicted"].labels(rule).inc(max(0.0, gain_s))

    def observed(self, seen: Observation) -> None:
        """The controller looked."""
        self._collectors["rate"].set(seen.arrival_rate)
        self._collectors["trend"].set(seen.arrival_trend)
        predicted = predicted_response(seen, seen.layout)
        if predicted is not None:
            self._collectors["ttft"].set(predicted.ttft_s)
            self._collectors["tpot"].set(predicted.tpot_s)

    def policy_failed(self) -> None:
        """The policy raised."""
        self._collectors["failures"].inc()

    def realised(self, rule: str, gain_s: float | None) -> None:
        """A plan's gain was measured; None if it stays unknown. Counters only rise: losses have their own."""
        self._collectors["measured"].labels(rule, str(gain_s is not None).lower()).inc()
        if gain_s is not None:
            self._collectors["saved"].labels(rule).inc(max(0.0, gain_s))
            self._collectors["lost"].labels(rule).inc(max(0.0, -gain_s))


@cache
def metrics() -> Metrics:
    """The collectors; made on first use, when vLLM has set up its registry."""
    return Metrics()


def reference() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics", "", "On vLLM's own `/metrics`. With several API servers the counters of all are added up.", "",
        "| metric | kind | labels | meaning |", "|---|---|---|---|",
    ]  # fmt: skip
    for definition in DEFINITIONS.values():
        suffix = "_total" if definition.kind == "counter" else ""
        labels = ", ".join(f"`{label}`" for label in definition.labels)
        lines.append(f"| `vllm_flying_{definition.name}{suffix}` | {definition.kind} | {labels} | {definition.text} |")
    return "\n".join([*lines, "", "Made from `src/vllm_flying/frontend/metrics.py` by "
                      "`python -m vllm_flying.frontend.metrics`.", ""])  # fmt: skip


if __name__ == "__main__":
    print(reference(), end="")
