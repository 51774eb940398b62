"""How long requests waited to be scheduled, by vLLM's own metric: no client can see that."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import Server

METRIC = "vllm:request_queue_time_seconds"


@dataclass(frozen=True)
class QueueTime:
    """Seconds that so many finished requests of all engines waited, since the server's start."""

    seconds: float
    requests: float

    @classmethod
    def of(cls, server: Server) -> QueueTime:
        families = text_string_to_metric_families(server.client.get("/metrics").text)
        samples = [sample for family in families if family.name == METRIC for sample in family.samples]
        seconds, requests = (
            sum(sample.value for sample in samples if sample.name == METRIC + suffix) for suffix in ("_sum", "_count")
        )
        return cls(seconds, requests)

    def mean_since(self, earlier: QueueTime) -> float:
        """Seconds per request that finished since then. Raises ValueError if none did."""
        if self.requests == earlier.requests:
            raise ValueError(f"the server's metric {METRIC} counted no request in this time")
        return (self.seconds - earlier.seconds) / (self.requests - earlier.requests)
