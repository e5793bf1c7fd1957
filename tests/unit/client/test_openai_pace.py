"""Events of a busy gateway are written together, in order and none lost; those of one that keeps up, and every first
one, at once.
"""

from __future__ import annotations

import asyncio

import pytest

from paged_client.openai.pace import Pace, PacedWriter


def test_a_loop_that_is_late_gathers_longer_and_one_in_time_not_at_all() -> None:
    pace, seen = Pace(), []
    for late in (0.0, 0.01, 0.01, 0.01, 0.0015, 0.0, 0.0, 0.0):
        pace.note(late)
        seen.append(pace.seconds)
    assert seen == [0.0, 0.005, 0.01, 0.02, 0.02, 0.01, 0.005, 0.0]


def write(seconds: float, *waits: float) -> list[bytes]:
    """What is written of an event after each of the waits."""
    written: list[bytes] = []

    async def sink(events: bytes) -> None:
        await asyncio.sleep(0)
        written.append(events)

    async def run() -> None:
        writer = PacedWriter(Pace(seconds), sink)
        for number, wait in enumerate(waits):
            await asyncio.sleep(wait)
            await writer.put(b"%d" % number)
        await writer.flush()
        await writer.close()

    asyncio.run(run())
    return written


def test_events_that_come_later_than_the_pause_are_written_at_once() -> None:
    assert write(0.0, 0, 0, 0) == [b"0", b"1", b"2"]
    assert write(0.001, 0, 0.02, 0.02) == [b"0", b"1", b"2"]


def test_the_first_event_is_written_at_once_and_those_within_the_pause_together() -> None:
    assert write(5.0, 0, 0, 0, 0) == [b"0", b"123"]
    assert write(0.05, 0, 0, 0, 0.3, 0) == [b"0", b"12", b"3", b"4"]


def test_an_event_that_comes_while_others_are_written_is_not_forgotten() -> None:
    async def run() -> list[bytes]:
        written: list[bytes] = []
        goes_on = asyncio.Event()

        async def sink(events: bytes) -> None:
            if written:
                await goes_on.wait()
            written.append(events)

        writer = PacedWriter(Pace(0.01), sink)
        await writer.put(b"0")
        await writer.put(b"1")
        await asyncio.sleep(0.05)  # the 1 is being written
        assert written == [b"0"]
        putting = asyncio.ensure_future(writer.put(b"2"))
        await asyncio.sleep(0.05)
        goes_on.set()
        await putting
        await writer.flush()
        await writer.close()
        return written

    assert asyncio.run(run()) == [b"0", b"1", b"2"]


def test_a_write_that_fails_ends_the_stream_with_the_next_event() -> None:
    async def run() -> None:
        async def broken(events: bytes) -> None:
            if events != b"0":
                raise ConnectionError

        writer = PacedWriter(Pace(0.001), broken)
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

        writer = PacedWriter(Pace(0.01), sink)
        await writer.put(b"0")
        await writer.put(b"1")
        await writer.close()
        await asyncio.sleep(0.05)
        return written

    assert asyncio.run(run()) == [b"0"]


def test_a_stream_that_is_silent_says_that_it_is_there() -> None:
    async def run() -> list[bytes]:
        written: list[bytes] = []

        async def sink(events: bytes) -> None:
            written.append(events)

        writer = PacedWriter(Pace(), sink)
        beside = asyncio.ensure_future(writer.stay_alive(0.2, b":"))
        for number in range(4):
            await writer.put(b"%d" % number)
            await asyncio.sleep(0.02)
        while len(written) < 6:
            await asyncio.sleep(0.01)
        beside.cancel()
        return written

    assert asyncio.run(asyncio.wait_for(run(), 60))[-2:] == [b":", b":"]
