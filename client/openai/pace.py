"""How long the events of a stream are gathered before they are written together: not at all while the process keeps up,
and longer the further it is behind.

A write is a system call, and with many streams it is what most of the gateway's own time goes into. The first event of
a stream, its last ones, and any that comes later than a pause after the write before, never wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

_LOOK_SECONDS = 0.05  # between two looks at how late the loop is
_LATE_SECONDS = 0.002  # a loop that comes so much too late has a queue
_IN_TIME_SECONDS = 0.001
_SHORTEST_SECONDS = 0.005
_LONGEST_SECONDS = 0.04  # at 25 writes a second a text still flows


class Pace:
    """Of one event loop."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds  # between two writes of a stream, at least

    async def watch(self) -> None:
        """Adapts it, for as long as it is awaited."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LOOK_SECONDS
            await asyncio.sleep(_LOOK_SECONDS)
            self.note(loop.time() - due)

    def note(self, late: float) -> None:
        """late: seconds that a timer came after its time."""
        if late > _LATE_SECONDS:
            self.seconds = min(max(2 * self.seconds, _SHORTEST_SECONDS), _LONGEST_SECONDS)
        elif late < _IN_TIME_SECONDS:
            self.seconds = self.seconds / 2 if self.seconds > _SHORTEST_SECONDS else 0.0


class PacedWriter:
    """Writes a stream's events in their order."""

    def __init__(self, pace: Pace, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._pace = pace
        self._write = write
        self._loop = asyncio.get_running_loop()  # which is a system call at each event, before Python 3.12
        self._written_at = float("-inf")  # loop.time()
        self._waiting: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()

    async def put(self, event: bytes) -> None:
        """
        Raises:
            whatever `write` does, also of an event before.
        """
        if self._flushing is not None and self._flushing.done():
            self._flushing.result()
            self._flushing = None
        self._waiting.append(event)
        if self._timer is None:
            due = self._written_at + self._pace.seconds
            if due <= self._loop.time():
                await self.flush()
            else:
                self._timer = self._loop.call_at(due, self._begin_flush)

    async def flush(self) -> None:
        """Writes what waits."""
        self._forget_timer()
        async with self._writing:
            waiting, self._waiting = self._waiting, []
            if waiting:
                self._written_at = self._loop.time()
                await self._write(b"".join(waiting))

    async def stay_alive(self, seconds: float, nothing: bytes) -> None:
        """Writes `nothing` wherever nothing else was written for so long, for as long as it is awaited: proxies close a
        connection that is silent, as it is while a model writes what can be told only when it is whole.
        """
        since = self._loop.time()
        while True:
            since = max(since, self._written_at)
            silent = self._loop.time() - since
            if silent < seconds:
                await asyncio.sleep(seconds - silent)
                continue
            async with self._writing:
                since = self._loop.time()
                await self._write(nothing)

    async def close(self) -> None:
        """Nothing is written any more."""
        self._forget_timer()
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)

    def _begin_flush(self) -> None:
        self._timer = None
        self._flushing = self._loop.create_task(self.flush())

    def _forget_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
