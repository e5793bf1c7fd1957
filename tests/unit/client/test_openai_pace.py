"""Events of a busy gateway are written together, in order and none lost; those of one that keeps up, and every first
one, at once.
"""

from __future__ import annotations

import asyncio

import pytest

from paged_client.openai.pace import Pace, PacedWriter


def test_a_loop_that_is_late_gathers_longer_and_one_in_time_not_at_all() -> None:
    pace, seen = Pace(), []
    for late in (0.0, 0.01, 0.01, 0.01, 0.01, 0.0015, 0.0, 0.0, 0.0, 0.0):
        pace.note(late)
        seen.append(pace.seconds)
    assert seen == [0, 0.005, 0.01, 0.02, 0.04, 0.04, 0.02, 0.01, 0.005, 0.0]


def write(seconds: float, *waits: float) -> list[bytes]:
    """What is written of an event after each of the waits."""
    written: list[bytes] = []

    async def sink(events: bytes) -> None:
        await asyncio.sleep(0)
        written.append(events)

    async def run() -> None:
        pace = Pace()
        pace.seconds = seconds
        writer = PacedWriter(pace, sink)
        for number, wait in enumerate(waits):
            await asyncio.sleep(wait)
            await writer.put(b"%d" % number)
        await writer.flush()
        await writer.close()

    asyncio.run(run())
    return written


def test_who_keeps_up_writes_at_once() -> None:
    assert write(0.0, 0, 0, 0) == [b"0", b"1", b"2"]


def test_who_is_behind_writes_the_first_at_once_and_the_others_together() -> None:
    assert write(5.0, 0, 0, 0, 0) == [b"0", b"123"]
    assert write(0.02, 0, 0, 0, 0.2, 0) == [b"0", b"12", b"34"]


def test_a_write_that_fails_ends_the_stream_with_the_next_event() -> None:
    async def run() -> None:
        async def broken(events: bytes) -> None:
            if events != b"0":
                raise ConnectionError

        pace = Pace()
        pace.seconds = 0.001
        writer = PacedWriter(pace, broken)
        await writer.put(b"0")
        await writer.put(b"1")
        await asyncio.sleep(0.05)
        with pytest.raises(ConnectionError):
            await writer.put(b"2")
        await writer.close()

    asyncio.run(run())


def test_nothing_is_written_after_the_close() -> None:
    async def run() -> list[bytes]:
        written: list[bytes] = []

        async def sink(events: bytes) -> None:
            written.append(events)

        pace = Pace()
        pace.seconds = 0.01
        writer = PacedWriter(pace, sink)
        await writer.put(b"0")
        await writer.put(b"1")
        await writer.close()
        await asyncio.sleep(0.05)
        return written

    assert asyncio.run(run()) == [b"0"]
