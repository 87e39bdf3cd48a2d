"""What a server counts and measures, for Prometheus: queue, batch, tokens, latencies."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter(
            "ddt_requests", "Requests answered", ["path", "status"], registry=own
        )
        self.seconds = Histogram(
            "ddt_request_seconds",
            "Seconds from a request's arrival to the end of its answer",
            ["path"],
            buckets=SECONDS,
            registry=own,
        )
        self.waiting = Gauge("ddt_queue_waiting", "Requests that wait to begin", registry=own)
        self.active = Gauge("ddt_requests_active", "Requests that have begun", registry=own)
        self.queued = Histogram(
            "ddt_queue_seconds", "Seconds before a request begins", buckets=SECONDS, registry=own
        )
        self.rows = Gauge("ddt_batch_rows", "Rows of the batch in use", registry=own)
        self.batch = Histogram(
            "ddt_batch_size", "Answers written side by side, a step", buckets=ROWS, registry=own
        )
        self.tokens = Counter("ddt_tokens", "Tokens written, codes and text", registry=own)
        self.work = Counter(
            "ddt_work_seconds", "Seconds of the model's thread", ["kind"], registry=own
        )
        self.given_up = Counter(
            "ddt_requests_given_up", "Requests given up before their end", ["reason"], registry=own
        )

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)
