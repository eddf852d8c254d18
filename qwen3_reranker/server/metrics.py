"""Figures of the server for Prometheus. Numbers and route names only, never text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..engine.engine import PackRecord

_PREFIX = "qwen3_reranker"


class Metrics:
    """Counts requests and forwards of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            f"{_PREFIX}_requests", "Requests answered.", ("path", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            f"{_PREFIX}_request_seconds", "Time of a request.", ("path",), registry=self._registry
        )
        self._documents = Counter(
            f"{_PREFIX}_documents", "Distinct documents scored.", registry=self._registry
        )
        self._tokens = Counter(f"{_PREFIX}_tokens", "Tokens computed.", registry=self._registry)
        self.waiting = Gauge(
            f"{_PREFIX}_waiting_requests", "Requests not yet answered.", registry=self._registry
        )
        self._forward = Histogram(
            f"{_PREFIX}_forward_seconds", "Time of a forward.", registry=self._registry
        )
        self._wait = Histogram(
            f"{_PREFIX}_wait_seconds",
            "Longest time from arrival to first forward, of the calls new in a forward.",
            registry=self._registry,
        )

    def record_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def record_forward(self, record: PackRecord) -> None:
        """Count a forward; called from the thread that scores."""
        self._documents.inc(record.documents)
        self._tokens.inc(record.tokens)
        self._forward.observe(record.run_s)
        if record.wait_s:
            self._wait.observe(record.wait_s)

    def render(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)
