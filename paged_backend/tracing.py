"""Where spans go: OpenTelemetry's SDK with an OTLP exporter, set up once in each front end and in the gateway. Off
unless an operator names a collector.

Spans are made when a request is over, from times that were noted on its way, and a thread of the SDK's sends them in
batches: nothing waits for a collector, and one that cannot be reached costs the spans. The SDK reads its own variables
(OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES, OTEL_BSP_* …).
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from paged_backend.errors import EngineError
from paged_backend.extras import install_command

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanKind

TRACE_HEADERS = ("traceparent", "tracestate")  # https://www.w3.org/TR/trace-context/
_LONGEST_HEADER = 4096  # characters
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EXPORTERS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}
_TRACES_PATH = "/v1/traces"  # of OTLP over HTTP
_CLOSE_SECONDS = 2.0  # for what is still to be sent

log = logging.getLogger("paged")


class Tracing:
    """Makes spans of what is over. Thread-safe."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("paged")
        self._headers = TraceContextTextMapPropagator()

    def start(
        self,
        name: str,
        kind: SpanKind,
        parent: Context | None,
        start_ns: int | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> Span:
        """A span that the caller ends. start_ns: nanoseconds since 1970; None: now."""
        return self._tracer.start_span(name, parent, kind, attributes, start_time=start_ns)

    def caller(self, headers: Mapping[str, str]) -> Context:
        """The span in whose course a request was sent, by its W3C headers; what is no such header is left out."""
        return self._headers.extract(headers)

    def headers_of(self, span: Span) -> dict[str, str]:
        """What is sent along with a request that is made in the course of `span`."""
        from opentelemetry.trace import set_span_in_context

        headers: dict[str, str] = {}
        self._headers.inject(headers, set_span_in_context(span))
        return headers

    def close(self) -> None:
        """Sends what is left, for two seconds at most."""
        # an exporter that retries waits longer
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)


class EpochClock:
    """Times of time.monotonic() as spans have them: nanoseconds since 1970.

    The two clocks are read once, one after the other, and some time may pass in between: spans of one request need one
    EpochClock, or one would begin before the other ended.
    """

    def __init__(self) -> None:
        self._ahead_ns = time.time_ns() - time.monotonic_ns()

    def ns(self, monotonic_seconds: float) -> int:
        return self._ahead_ns + int(monotonic_seconds * 1e9)


def trace_headers(given: Mapping[str, Any]) -> dict[str, str]:
    """The W3C headers among request parameters, or among a request's headers, however their names are written."""
    found = {name.lower(): value for name, value in given.items() if name.lower() in TRACE_HEADERS}
    return {
        name: value for name, value in found.items() if isinstance(value, str) and 0 < len(value) <= _LONGEST_HEADER
    }


def asks_for_spans(endpoint: str) -> bool:
    """Whether spans are to be made: `endpoint` or the environment names a collector, and the environment does not
    forbid it.
    """
    environment = os.environ
    if (
        environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
        or environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
    ):
        return False
    return bool(endpoint) or any(environment.get(name) for name in _ENDPOINTS)


def open_tracing(endpoint: str, service: str, attributes: Mapping[str, str]) -> Tracing | None:
    """Spans to `endpoint`, or where the OTEL_* variables say; None: nobody asked for them.

    endpoint: URL of an OTLP collector; "": of the environment. service: its service.name, unless the environment has
        another. attributes: of the resource.

    Raises:
        EngineError: `endpoint` is given, and a package is missing; or the protocol is none that is known.
    """
    if not asks_for_spans(endpoint):
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter(endpoint)
    except ImportError as error:
        if endpoint:
            raise EngineError(f"otlp_traces_endpoint: {error.name} is missing: {install_command('tracing')}") from None
        log.warning(
            "warning: OTEL_EXPORTER_OTLP_ENDPOINT is set, but %s is missing, so no spans are sent: %s",
            error.name,
            install_command("tracing"),
        )
        return None
    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(
        resource=Resource.create({**attributes, **({} if named else {"service.name": service})}), shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


def check_tracing(endpoint: str) -> None:
    """
    Raises:
        EngineError: spans are asked for, and cannot be sent.
    """
    if endpoint:
        tracing = open_tracing(endpoint, "", {})
        if tracing is not None:
            tracing.close()


def _exporter(endpoint: str) -> Any:
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "http/protobuf")
    module = _EXPORTERS.get(protocol)
    if module is None:
        raise EngineError(f"OTEL_EXPORTER_OTLP_PROTOCOL: expected {' or '.join(_EXPORTERS)}, got {protocol!r}")
    exporter = importlib.import_module(module).OTLPSpanExporter
    if not endpoint:
        return exporter()
    over_http = protocol != "grpc"
    complete = endpoint if not over_http or urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + _TRACES_PATH
    return exporter(endpoint=complete)
