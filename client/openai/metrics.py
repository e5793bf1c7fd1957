"""The gateway's own `/metrics`, for Prometheus. The model's are at Triton Server's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

from paged_client.answers import Usage
from paged_client.openai.server_metrics import ServerMetrics

__all__ = ["CONTENT_TYPE", "GatewayMetrics", "MeasuredRequest"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_CALLER_LEFT = 499  # a response that was never begun


class GatewayMetrics:
    """Counts requests, never pieces of answers: those are too many."""

    def __init__(self, endpoints: tuple[str, ...]) -> None:
        """endpoints: paths that have series of their own; all others are one."""
        self._endpoints = frozenset(endpoints)
        self.registry = registry = CollectorRegistry()
        by_endpoint = ["endpoint"]
        self._requests = Counter(
            "paged_gateway_requests", "Requests that are over.", [*by_endpoint, "status"], registry=registry
        )
        self._running = Gauge("paged_gateway_requests_in_flight", "Requests that are not over.", registry=registry)
        self._seconds = Histogram(
            "paged_gateway_request_seconds",
            "From the request's head to the response's end.",
            by_endpoint,
            buckets=_SECONDS,
            registry=registry,
        )
        self._first_seconds = Histogram(
            "paged_gateway_response_start_seconds",
            "To the response's head, which of a stream leaves with the first piece of the answer.",
            by_endpoint,
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter("paged_gateway_tokens", "Tokens of answered requests.", ["kind"], registry=registry)
        self.closed_connections = Counter(
            "paged_gateway_connections_closed", "Connections that were closed unasked.", ["reason"], registry=registry
        )
        self.connections = Gauge("paged_gateway_connections", "Connections from callers.", registry=registry)
        self.body_bytes = Gauge(
            "paged_gateway_body_bytes", "Of the bodies in flight, beyond what is free.", registry=registry
        )
        ProcessCollector(registry=registry)
        self.server: ServerMetrics | None = None  # whose numbers are told beside the gateway's own

    @contextmanager
    def request(self, path: str) -> Iterator[MeasuredRequest]:
        endpoint = path if path in self._endpoints else "other"
        measured = MeasuredRequest()
        self._running.inc()
        try:
            yield measured
        finally:
            self._running.dec()
            self._requests.labels(endpoint, str(measured.status or _CALLER_LEFT)).inc()
            self._seconds.labels(endpoint).observe(time.monotonic() - measured.started)
            if measured.first:
                self._first_seconds.labels(endpoint).observe(measured.first - measured.started)

    def count(self, usage: Usage) -> None:
        """Tokens of one prompt and its answers."""
        self._tokens.labels("prompt").inc(usage.num_input_tokens)
        self._tokens.labels("cached").inc(usage.num_cached_tokens)
        self._tokens.labels("answer").inc(usage.num_output_tokens)

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """A request that uses an adapter, if any, is under way."""
        with nullcontext() if self.server is None else self.server.adapter(name):
            yield

    async def text(self) -> bytes:
        return generate_latest(self.registry) + (b"" if self.server is None else await self.server.text())


class MeasuredRequest:
    """One request on its way."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first = 0.0
        self.status = 0  # of the response, once that has begun

    def begin(self, status: int) -> None:
        self.status = status
        self.first = time.monotonic()
