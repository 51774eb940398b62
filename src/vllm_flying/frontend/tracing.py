"""One OpenTelemetry span per switch, where vLLM's own spans go.

May import vllm; opentelemetry only once vLLM says that it is there. With `--otlp-traces-endpoint` vLLM's `init_tracer`
sets the tracer provider of an API server's process; without it spans don't record and nothing is done. vLLM's
`instrument_manual` can't say that a span failed, so the span comes from the tracer that it would take, directly.
"""

from __future__ import annotations

import json
import time
from typing import Any

from vllm.tracing.otel import is_otel_available

SPAN = "flying.switch"
INSTRUMENT = "vllm.flying"


def trace_switch(record: dict[str, Any], started_ns: int) -> None:
    """The span of a switch that ends now and began at `started_ns`, nanoseconds since 1970.

    As in the metrics, a later wave of a migration that fails counts by itself, beside the switch it belongs to.
    """
    # Not vLLM's `is_tracing_available`: that one answers yes without opentelemetry too (it tests a function for truth).
    if not is_otel_available():
        return
    from opentelemetry import trace

    span = trace.get_tracer(INSTRUMENT).start_span(SPAN, start_time=started_ns)
    if not span.is_recording():
        return
    span.set_attributes(_attributes(record))
    if record["outcome"] != "committed":
        span.set_status(trace.StatusCode.ERROR, record["error"])
    span.end(end_time=time.time_ns())


def _attributes(record: dict[str, Any]) -> dict[str, str | int | float]:
    plain = ("epoch", "reason", "method", "outcome", "waves")
    return {
        **{f"flying.{name}": record[name] for name in plain},
        # Attributes are flat: a list of lists must be text.
        **{f"flying.{side}": json.dumps(record[side]) for side in ("from", "to")},
        **{f"flying.requests.{name}": number for name, number in record["requests"].items()},
        **{f"flying.prefixes.{name}": number for name, number in record["prefixes"].items()},
        "flying.kv.bytes": record["kv"]["bytes"],
        "flying.precopied.bytes": record["precopied"]["bytes"],
        **{f"flying.seconds.{phase}": seconds for phase, seconds in record["seconds"].items()},
    }
