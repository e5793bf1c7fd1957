"""Several streams as one: what becomes of those that are not over when it is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from paged_client.merging import merged


def test_streams_that_break_as_they_are_closed_keep_nobody_waiting() -> None:
    """Their errors come while nobody reads any more what arrives, and a piece has taken the only place."""

    @asynccontextmanager
    async def opened(number: int) -> AsyncIterator[AsyncIterator[int]]:
        async def pieces() -> AsyncIterator[int]:
            for piece in range(3 if number == 0 else 0):
                yield piece
            await asyncio.get_running_loop().create_future()

        try:
            yield pieces()
        except asyncio.CancelledError:
            raise ConnectionError("the stream broke") from None

    async def test() -> None:
        streams = merged([partial(opened, 0), partial(opened, 1)], 2)
        assert await anext(streams) == (0, 0)
        await asyncio.sleep(0.01)
        await streams.aclose()

    asyncio.run(asyncio.wait_for(test(), 20))
