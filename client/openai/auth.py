"""What every request passes before the gateway reads it: the API key, the limit on its body. And what no failure passes: its text, into the log."""

from __future__ import annotations

import hmac
import logging
import secrets
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paged_client.openai.errors import RefusalError

log = logging.getLogger("paged.openai")

OPEN_PATHS = ("/health", "/v1/health")  # load balancers have no key


def response_of(refusal: RefusalError) -> Response:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers())


@dataclass(frozen=True)
class Rules:
    api_key: str = ""  # "": everybody may ask
    max_body_bytes: int = 16 * 2**20


class Door:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = "req_" + secrets.token_hex(12)
        begun = False

        async def named(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_key(scope["path"], headers)
            if scope["method"] == "POST":
                _check_type(headers)
            body = await self._read(headers, receive)
            await self._app(scope, _replayed(body, receive), named)
        except RefusalError as refusal:
            await response_of(refusal)(scope, receive, named)
        except Exception as error:  # its text may quote the prompt
            log.error("%s failed: %s", request_id, _place_of(error))
            if not begun:
                await response_of(RefusalError("the gateway failed; its log says where", 500))(scope, receive, named)

    def _check_key(self, path: str, headers: Headers) -> None:
        key = self._rules.api_key
        if not key or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise RefusalError("no valid API key: send the header Authorization: Bearer KEY", 401, code="invalid_api_key")

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        limit = self._rules.max_body_bytes
        length = headers.get("content-length", "0")
        size = int(length) if length.isdecimal() else 0
        chunks: list[bytes] = []
        more = True
        while more and size <= limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            chunks.append(message.get("body", b""))
            size = max(size, sum(map(len, chunks)))
            more = message.get("more_body", False)
        if size > limit:
            raise RefusalError(f"the body is longer than {limit} bytes", 413)
        return b"".join(chunks)


def _check_type(headers: Headers) -> None:
    """Any web page can have a browser send a form, or text, to this machine; for JSON the browser asks us first."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusalError("send the body as JSON, with Content-Type: application/json", 415)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` of an application that has not seen the body yet."""
    waiting = [body]

    async def next_message() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return next_message


def _place_of(error: Exception) -> str:
    """The kind of failure, and where it happened."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "nowhere"
    return f"{type(error).__name__} at {place}"
