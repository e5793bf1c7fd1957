"""Bodies of requests: how long each may be, how long it may take to arrive, and how many bytes of all may be here at
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive

from paged_client.openai.errors import RefusalError
from paged_client.retry_policy import within

# of each body are not counted, so that those who hold all the room keep nobody with an ordinary question out
FREE_BYTES = 64 * 1024


@dataclass(frozen=True)
class BodyLimits:
    max_body_bytes: int = 16 * 2**20  # of one
    max_bodies_bytes: int = 256 * 2**20  # of all that are being read or answered
    seconds: float = 30.0  # for a body to arrive


class Bodies:
    """The bodies in flight."""

    def __init__(self, limits: BodyLimits) -> None:
        self.limits = limits
        self.bytes_in_flight = 0  # of all, beyond what is free

    @contextmanager
    def place(self) -> Iterator[BodyPlace]:
        """Room for one request's body, until its answer is over."""
        place = BodyPlace(self)
        try:
            yield place
        finally:
            place.release()


class BodyPlace:
    """One request's share of the room."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._bytes_in_flight = 0

    async def read(self, headers: Headers, receive: Receive) -> bytes:
        """The body; what has come of it, if the caller leaves.

        Raises:
            RefusalError: it is too long or too slow, or there is no room for it now.
        """
        limits = self._bodies.limits
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limits.max_body_bytes:
            raise _too_long(limits)
        try:
            return await within(limits.seconds, self._read(receive))
        except TimeoutError:
            raise RefusalError(f"the body had not arrived after {limits.seconds:g} s", 408, code="timeout") from None

    async def _read(self, receive: Receive) -> bytes:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            chunk = message.get("body", b"")
            size += len(chunk)
            self._grow(size)
            chunks.append(chunk)
            if not message.get("more_body", False):
                break
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _grow(self, size: int) -> None:
        limits = self._bodies.limits
        if size > limits.max_body_bytes:
            raise _too_long(limits)
        more = max(0, size - FREE_BYTES) - self._bytes_in_flight
        if more > 0 and self._bodies.bytes_in_flight + more > limits.max_bodies_bytes:
            reason = (
                f"the bodies of all requests together are longer than {limits.max_bodies_bytes} bytes "
                "(max_bodies_bytes)"
            )
            raise RefusalError(reason, 503, code="overloaded")
        self._bytes_in_flight += more
        self._bodies.bytes_in_flight += more

    def release(self) -> None:
        self._bodies.bytes_in_flight -= self._bytes_in_flight
        self._bytes_in_flight = 0


def check_framing(headers: Headers) -> None:
    """A body has one length: where two are given, this process and a proxy before it may read different ones (request
    smuggling).

    Raises:
        RefusalError: 400, after which the connection must be closed.
    """
    if "content-length" in headers and "transfer-encoding" in headers:
        raise RefusalError("Content-Length beside Transfer-Encoding: send one of them")


def check_type(headers: Headers) -> None:
    """Any web page can have a browser send a form, or text, to this machine; for JSON the browser asks us first.

    Raises:
        RefusalError: 415.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusalError("send the body as JSON, with Content-Type: application/json", 415)


def _too_long(limits: BodyLimits) -> RefusalError:
    return RefusalError(f"the body is longer than {limits.max_body_bytes} bytes", 413)
