"""An OpenTelemetry collector on this machine: what is sent to it over OTLP/HTTP can be read as spans."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Seen:
    """A span, as the collector got it."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str  # "": none
    start: float  # seconds
    end: float
    attributes: dict[str, Any]
    failed: bool
    service: str
    kind: int


@dataclass
class Collector:
    url: str = ""
    spans: list[Seen] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)  # bodies
    paths: list[str] = field(default_factory=list)

    def take(self, path: str, body: bytes) -> None:
        self.paths.append(path)
        self.raw.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = next(one.value.string_value for one in resource.resource.attributes if one.key == "service.name")
            for scope in resource.scope_spans:
                self.spans += [_seen(span, service) for span in scope.spans]

    def wait(self, count: int, trace_id: str = "", seconds: float = 15.0) -> list[Seen]:
        """At least so many spans, the earliest first. trace_id: of this trace alone."""
        end = time.monotonic() + seconds
        while (
            len(found := [span for span in self.spans if trace_id in (span.trace_id, "")]) < count
            and time.monotonic() < end
        ):
            time.sleep(0.02)
        assert len(found) >= count, [(span.name, span.trace_id) for span in self.spans]
        return sorted(found, key=lambda span: span.start)


def _seen(span: Any, service: str) -> Seen:
    attributes = {one.key: _value(one.value) for one in span.attributes}
    hexadecimal = [part.hex() for part in (span.trace_id, span.span_id, span.parent_span_id)]
    return Seen(
        span.name,
        *hexadecimal,
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        attributes,
        span.status.code == 2,
        service,
        span.kind,
    )


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@contextmanager
def collector() -> Iterator[Collector]:
    seen = Collector()

    class Door(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.take(self.path, body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    seen.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        server.shutdown()
        server.server_close()
