"""What a server says of itself to Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from policypatch.serve.engine import Engine, Job

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """Counters of one engine."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        gauges = {
            "running": ("requests that are being answered", lambda: len(engine.running)),
            "waiting": ("requests that wait for a slot", lambda: len(engine.queue)),
        }
        for name, (about, value) in gauges.items():
            Gauge(f"policypatch_{name}", about, registry=self._registry).set_function(value)
        self._answered = Counter("policypatch_answered", "requests answered", ["stack"], registry=self._registry)
        self._tokens = Counter("policypatch_tokens", "tokens of these answers", registry=self._registry)
        self._refused = Counter("policypatch_refused", "requests refused", ["status"], registry=self._registry)
        self._first = Histogram(
            "policypatch_first_token_seconds",
            "from a request to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )

    def answered(self, job: Job) -> None:
        """Count an answer."""
        self._answered.labels("+".join(("base", *job.stack))).inc()
        self._tokens.inc(len(job.written))
        if job.first is not None:
            self._first.observe(job.first - job.since)

    def refused(self, status: int) -> None:
        """Count an error."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)
