"""What every request passes before the gateway reads it, and every response on its way out: key, body, number, metrics.

And what no failure passes: its text, into the log.
"""

from __future__ import annotations

import logging
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paged_client.openai.auth import check_key
from paged_client.openai.errors import RefusalError
from paged_client.openai.limits import Bodies, check_framing, check_type
from paged_client.openai.message_events import error_body
from paged_client.openai.metrics import GatewayMetrics

REQUEST_ID = "paged.request_id"  # in the scope: the number that the caller reads in x-request-id

log = logging.getLogger("paged.openai")

_ANTHROPICS = "/v1/messages"


def response_of(refusal: RefusalError, scope: Scope | None = None) -> Response:
    """In OpenAI's words, or Anthropic's on its paths. scope: of the request, where the path may be one of these."""
    if scope is not None and scope["path"].startswith(_ANTHROPICS):
        body = error_body(str(refusal), refusal.status, scope.get(REQUEST_ID, ""))
    else:
        body = refusal.body()
    return JSONResponse(body, refusal.status, refusal.headers())


class GatewayMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, api_key: str, bodies: Bodies, metrics: GatewayMetrics) -> None:
        self._app = app
        self._api_key = api_key
        self._bodies = bodies
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = scope[REQUEST_ID] = "req_" + secrets.token_hex(12)
        closing = False
        with self._metrics.request(scope["path"]) as measured, self._bodies.place() as place:

            async def named(message: Message) -> None:
                if message["type"] == "http.response.start":
                    measured.begin(message["status"])
                    headers = MutableHeaders(scope=message)
                    headers["x-request-id"] = request_id
                    if scope["path"].startswith(_ANTHROPICS):
                        headers["request-id"] = request_id  # where Anthropic's clients look for it
                    if closing:
                        headers["connection"] = "close"
                await send(message)

            try:
                headers = Headers(scope=scope)
                try:
                    check_framing(headers)
                except RefusalError:
                    closing = True
                    raise
                check_key(scope["path"], headers, self._api_key)
                if scope["method"] == "POST":
                    check_type(headers)
                body = await place.read(headers, receive)
                await self._app(scope, _replayed(body, receive), named)
            except RefusalError as refusal:
                await response_of(refusal, scope)(scope, receive, named)
            except Exception as error:  # its text may quote the prompt
                log.error("%s failed: %s", request_id, _place_of(error))
                if not measured.status:
                    failure = RefusalError("the gateway failed; its log says where", 500)
                    await response_of(failure, scope)(scope, receive, named)


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
