"""Whether spans are made, and where they are sent: the tunable, OpenTelemetry's own variables, and what is missing."""

from __future__ import annotations

import sys
import time

import pytest

pytest.importorskip("opentelemetry.sdk")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.trace import SpanKind

from paged_backend import tracing
from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.tracing import EpochClock, check_tracing, open_tracing, trace_headers
from tests.otlp_collector import collector

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *tracing._ENDPOINTS,
        *tracing._PROTOCOLS,
        "OTEL_SDK_DISABLED",
        "OTEL_TRACES_EXPORTER",
        "OTEL_SERVICE_NAME",
        "OTEL_RESOURCE_ATTRIBUTES",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.mark.parametrize("variable", tracing._ENDPOINTS)
@pytest.mark.parametrize("path", ["", "/v1/traces"], ids=["base", "whole"])
def test_spans_go_where_the_tunable_or_a_variable_says(
    monkeypatch: pytest.MonkeyPatch, variable: str, path: str
) -> None:
    with collector() as seen:
        by_variable = path == "" if variable.endswith("OTLP_ENDPOINT") else path != ""
        if by_variable:
            monkeypatch.setenv(variable, seen.url + path)
        tracing_on = open_tracing("" if by_variable else seen.url + path, "here", {"a": "b"})
        assert tracing_on is not None
        clock, started = EpochClock(), time.monotonic()
        tracing_on.start("one", SpanKind.SERVER, tracing_on.caller({"traceparent": PARENT}), clock.ns(started - 5)).end(
            clock.ns(started - 3)
        )
        tracing_on.close()
        (span,) = seen.wait(1)
    assert seen.paths == ["/v1/traces"]
    assert (span.name, span.trace_id, span.parent_id, span.service) == ("one", TRACE_ID, SPAN_ID, "here")
    assert span.end - span.start == pytest.approx(2, abs=1e-5) and span.end == pytest.approx(time.time() - 3, abs=2)


def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    with collector() as seen:
        tracing_on = open_tracing(seen.url, "paged", {})
        assert tracing_on is not None
        tracing_on.start("one", SpanKind.SERVER, None).end()
        tracing_on.close()
        assert [span.service for span in seen.wait(1)] == ["mine"]


@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
def test_nobody_asks_and_nothing_is_set_up(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    assert open_tracing("", "paged", {}) is None
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:9")
    assert open_tracing("http://localhost:9", "paged", {}) is None


def test_a_package_that_is_missing_is_an_error_to_the_tunable_and_a_warning_to_a_variable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(
        EngineError,
        match=r"^otlp_traces_endpoint: opentelemetry\.sdk\.trace is missing: pip install .*(opentelemetry|tracing)",
    ):
        check_tracing("http://localhost:4318")
    check_tracing("")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    assert open_tracing("", "paged", {}) is None
    assert "no spans are sent: pip install" in caplog.text


def test_a_protocol_that_nobody_speaks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(
        EngineError, match="OTEL_EXPORTER_OTLP_PROTOCOL: expected http/protobuf or grpc, got 'http/json'"
    ):
        check_tracing("http://localhost:4318")


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(
        EngineError,
        match=r"'otlp_traces_endpoint': expected http://HOST:PORT or https://HOST:PORT, got 'localhost:4317'",
    ):
        EngineConfig.parse({"otlp_traces_endpoint": "localhost:4317"})


def test_a_collector_that_is_away_holds_nobody_up() -> None:
    tracing_on = open_tracing("http://127.0.0.1:9", "paged", {})
    assert tracing_on is not None
    for _ in range(3000):  # more than its queue holds
        tracing_on.start("one", SpanKind.SERVER, None).end()
    before = time.monotonic()
    tracing_on.close()
    assert time.monotonic() - before < tracing._CLOSE_SECONDS + 1


def test_headers_are_found_however_they_are_written() -> None:
    assert trace_headers({"Traceparent": PARENT, "TRACESTATE": "a=1", "other": "x"}) == {
        "traceparent": PARENT,
        "tracestate": "a=1",
    }
    assert trace_headers({"traceparent": 7, "tracestate": "x" * 5000}) == {}
