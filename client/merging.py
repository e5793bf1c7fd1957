"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

T = TypeVar("T")


async def merged(
    streams: Sequence[Callable[[], AbstractAsyncContextManager[AsyncIterator[T]]]], at_once: int
) -> AsyncGenerator[tuple[int, T], None]:
    """(which stream, item) as items come; at_once: how many streams are open together. Closing it cancels what is not
    over.

    Raises the first exception of any stream.
    """
    arrived: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(1)
    places = asyncio.Semaphore(at_once)
    over = False

    async def listen(number: int, open_stream: Callable[[], AbstractAsyncContextManager[AsyncIterator[T]]]) -> None:
        try:
            async with places, open_stream() as stream:
                async for item in stream:
                    await arrived.put((number, item))
            await arrived.put(None)
        except Exception as error:
            if over:  # nobody would take it
                raise
            await arrived.put(error)

    tasks = [asyncio.ensure_future(listen(number, open_stream)) for number, open_stream in enumerate(streams)]
    num_running = len(tasks)
    try:
        while num_running:
            event = await arrived.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                num_running -= 1
            else:
                yield event
    finally:
        over = True
        await cancelled(tasks)


async def cancelled(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancels them, and waits for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
