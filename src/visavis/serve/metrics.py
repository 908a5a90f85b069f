"""Counters and gauges of the server in Prometheus' text form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TEXT = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The measurements of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"visavis_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"visavis_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            name = f"visavis_{name}"
            return Histogram(name, text, labels, registry=registry, buckets=_SECONDS)

        self.requests = counter("requests", "Requests answered.", "route", "method", "status")
        self.seconds = histogram("request_seconds", "Seconds per request.", "route")
        self.first_token = histogram("first_token_seconds", "Seconds to the first token.", "model")
        self.prompt_tokens = counter("prompt_tokens", "Tokens read.", "model", "kind")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens found in the cache.", "model")
        self.new_tokens = counter("new_tokens", "Tokens generated.", "model")
        self.batch_items = counter("batch_items", "Inputs embedded.", "model")
        self.batches = counter("batches", "Batches embedded.", "model")
        self.model_seconds = counter("model_seconds", "Seconds of work.", "model", "kind")
        self.waiting = gauge("waiting", "Requests or inputs that wait.", "model", "kind")
        self.growing = gauge("growing_answers", "Answers being generated.", "model")
        self.loaded = gauge("model_loaded", "1 while the model is in memory.", "model")
        self.refused = counter("refused", "Requests refused because a queue is full.", "model")

    def text(self) -> bytes:
        """Return all measurements in Prometheus' text form."""
        return generate_latest(self.registry)
