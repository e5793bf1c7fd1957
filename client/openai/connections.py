"""Connections from callers: a bound on how many, and how long one may be silent. Both hold before any key is known.

A connection is *busy* while a request on it is being answered. Others may be closed: the longest silent first when
there are too many, and each after some seconds, in which a request's head has to arrive.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from paged_client.openai.metrics import GatewayMetrics

log = logging.getLogger("paged.openai")

BACKLOG = 128  # connections that are accepted at once, before any of them can be refused
_SWEEP_SECONDS = 1.0
_MOST_DESCRIPTORS = 65_536  # more are of no use to one process
_MOST_RESERVED = BACKLOG + 128  # of them for connections just accepted, and for files, pipes and libraries
_REFUSED = (
    b'{"error": {"message": "too many connections", "type": "server_error", "param": null, "code": "overloaded"}}'
)
_REFUSAL = b"\r\n".join(
    [
        b"HTTP/1.1 503 Service Unavailable",
        b"Retry-After: 1",
        b"Connection: close",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(_REFUSED),
        b"",
        _REFUSED,
    ]
)


@dataclass(frozen=True)
class ConnectionLimits:
    max_connections: int
    seconds: float = 30.0  # for the head of a request, and between two requests


def available_descriptors() -> int:
    """Raises the limit on open files as far as this process may, and says how many connections fit under it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    available = min(soft if soft != resource.RLIM_INFINITY else _MOST_DESCRIPTORS, _MOST_DESCRIPTORS)
    return available - min(_MOST_RESERVED, available // 2)


class Connections:
    """All connections of the gateway."""

    def __init__(self, limits: ConnectionLimits, metrics: GatewayMetrics) -> None:
        self.limits = limits
        self._metrics = metrics
        self._quiet_since: dict[Any, float] = {}  # time.monotonic(), by connection
        self._num_closed = 0  # for want of room, since the log last told
        metrics.connections.set_function(lambda: len(self._quiet_since))

    def protocol(self) -> type[asyncio.Protocol]:
        """uvicorn's protocol, each of whose connections is entered here."""
        connections = self

        class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                connections.add(self)

            def connection_lost(self, exc: Exception | None) -> None:
                connections.remove(self)
                super().connection_lost(exc)

        return LimitedProtocol

    def add(self, connection: Any) -> None:
        """Lets one in; if there are too many, a silent one has to go, and this one if none is silent."""
        if len(self._quiet_since) >= self.limits.max_connections:
            self._num_closed += 1
            self._metrics.closed_connections.labels("room").inc()
            oldest = next((one for one in self._quiet_since if not _is_busy(one)), None)
            if oldest is None:
                connection.transport.write(_REFUSAL)
                connection.transport.close()
                return
            self._abort(oldest)
        self._quiet_since[connection] = time.monotonic()

    def remove(self, connection: Any) -> None:
        self._quiet_since.pop(connection, None)

    async def sweep(self) -> None:
        """Closes, for as long as it is awaited, connections that have been silent for too long."""
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self.limits.seconds / 4))
            now = time.monotonic()
            for connection, since in list(self._quiet_since.items()):
                if _is_busy(connection):
                    del self._quiet_since[connection]  # to the end: the longest silent are first
                    self._quiet_since[connection] = now
                elif now - since > self.limits.seconds:
                    self._metrics.closed_connections.labels("silence").inc()
                    self._abort(connection)
            if self._num_closed:
                log.warning(
                    "%d connections were closed or refused: no more than %d can be open",
                    self._num_closed,
                    self.limits.max_connections,
                )
                self._num_closed = 0

    def _abort(self, connection: Any) -> None:
        self.remove(connection)
        connection.transport.abort()


def _is_busy(connection: Any) -> bool:
    """Whether a request on it is being answered, a body that has not arrived included: that has a time limit of its
    own.
    """
    cycle = getattr(connection, "cycle", None)
    return cycle is not None and not cycle.response_complete


def say_failed_accepts(loop: asyncio.AbstractEventLoop) -> None:
    """A connection that cannot be accepted is a line in the log, not a traceback."""

    def tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and "accept" in context.get("message", ""):
            log.warning("a connection could not be accepted: %s; trying again in a second", error.strerror)
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(tell)
