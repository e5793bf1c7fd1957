"""A request's span, where spans are collected, and the W3C headers that go on to the server, so that its spans become
that span's children.

Without a collector a caller's own headers go on as they came.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paged_backend.tracing import TRACE_HEADERS, Tracing, trace_headers
from paged_client.openai.middleware import REQUEST_ID
from paged_client.question import in_trace


class TraceMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None, endpoints: Collection[str]) -> None:
        """endpoints: paths that may be in a span's name; others may hold what callers wrote."""
        self._app = app
        self._tracing = tracing
        self._endpoints = frozenset(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        caller = trace_headers({name: headers[name] for name in TRACE_HEADERS if name in headers})
        if self._tracing is not None:
            await self._traced(self._tracing, caller, scope, receive, send)
            return
        with in_trace(caller):
            await self._app(scope, receive, send)

    async def _traced(
        self, tracing: Tracing, caller: dict[str, str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        method, path = scope["method"], scope["path"]
        route = path if path in self._endpoints else ""
        attributes = {
            "http.request.method": method,
            "url.scheme": scope["scheme"],
            **({"http.route": route} if route else {}),
        }
        span = tracing.start(
            f"{method} {route}".rstrip(), SpanKind.SERVER, tracing.caller(caller), attributes=attributes
        )

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_attribute("error.type", str(message["status"]))
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        try:
            with in_trace(tracing.headers_of(span)):
                await self._app(scope, receive, noting)
        finally:
            if REQUEST_ID in scope:
                span.set_attribute("gen_ai.response.id", scope[REQUEST_ID])
            span.end()
