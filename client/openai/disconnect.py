"""Callers who do not wait for the answer: what was begun for them is cancelled, here and, by closing the stream, in the
server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from paged_client.openai.pace import Pace, PacedWriter

_SILENCE_SECONDS = 15.0  # a quarter of the time after which nginx gives up
_NOTHING = b":\n\n"  # a comment, which readers of server-sent events pass over

Result = TypeVar("Result")


class CallerLeftError(Exception):
    """Nobody waits for the answer any more."""


async def unless_left(receive: Receive, answering: Coroutine[Any, Any, Result]) -> Result:
    """What `answering` returns or raises. The request's body must have been read.

    Raises:
        CallerLeftError: the connection was closed before; `answering` has been cancelled.
    """
    task, leaving = asyncio.ensure_future(answering), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CallerLeftError
        return task.result()
    finally:
        await _end(task, leaving)


class EventStream(Response):
    """Server-sent events, for as long as somebody listens."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None]) -> None:
        """events: each what is to be written together. source: where they come from. Both are closed, whatever
        happens.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._source = source  # a generator that was never started closes nothing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_left(receive, self._send(send, getattr(scope["app"].state, "pace", None) or Pace()))
        except CallerLeftError:
            pass
        finally:
            await self._events.aclose()
            await self._source.aclose()

    async def _send(self, send: Send, pace: Pace) -> None:
        async def write(events: bytes) -> None:
            await send({"type": "http.response.body", "body": events, "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        writer = PacedWriter(pace, write)
        beside = asyncio.ensure_future(writer.stay_alive(_SILENCE_SECONDS, _NOTHING))
        try:
            async for event in self._events:
                await writer.put(event)
            await writer.flush()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await _end(beside)
            await writer.close()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
