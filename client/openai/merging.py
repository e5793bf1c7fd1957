"""The streams of several prompts as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from paged_client.answers import Delta
from paged_client.async_client import AsyncStream
from paged_client.cluster.resuming import ClusterStream

Pieces = AsyncGenerator[tuple[int, Delta], None]
"""(which prompt, piece)"""


async def merged(streams: Sequence[Callable[[], AsyncStream | ClusterStream]], at_once: int) -> Pieces:
    """Their pieces as they come; at_once: how many are open together. Closing it cancels what is not over."""
    arrived: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue(1)
    places = asyncio.Semaphore(at_once)

    async def listen(number: int, open_stream: Callable[[], AsyncStream | ClusterStream]) -> None:
        try:
            async with places, open_stream() as stream:
                async for delta in stream:
                    await arrived.put((number, delta))
            await arrived.put(None)
        except Exception as error:
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
        await cancelled(tasks)


async def cancelled(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancels them, and waits for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
