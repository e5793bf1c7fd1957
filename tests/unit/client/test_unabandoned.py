"""Operations that are waited for to their end, also by a task that was cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from paged_client.retry_policy import within
from paged_client.unabandoned import Unabandoned


class Operation:
    """Waits for what the test says it brings; `cancel` brings the outcome that it was created with."""

    def __init__(self, on_cancel: Callable[[asyncio.Future[int]], object]) -> None:
        self.brought: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.num_cancels = 0
        self.ended = False
        self._on_cancel = on_cancel

    async def run(self) -> int:
        await asyncio.sleep(0)  # a bare yield, without a future
        try:
            return await self.brought
        finally:
            self.ended = True

    def cancel(self) -> None:
        self.num_cancels += 1
        asyncio.get_running_loop().call_later(0.01, self._on_cancel, self.brought)

    async def awaited(self) -> int:
        return await Unabandoned(self.run(), self.cancel)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(test(), 10)

    asyncio.run(run())


def test_results_and_errors_pass() -> None:
    async def test() -> None:
        operation = Operation(lambda brought: None)
        asyncio.get_running_loop().call_later(0.01, operation.brought.set_result, 7)
        assert await operation.awaited() == 7
        failing = Operation(lambda brought: None)
        asyncio.get_running_loop().call_later(0.01, failing.brought.set_exception, KeyError("x"))
        with pytest.raises(KeyError):
            await failing.awaited()
        done = Operation(lambda brought: None)
        done.brought.set_result(8)
        assert await done.awaited() == 8 and done.num_cancels == 0

    in_loop(test)


@pytest.mark.parametrize(
    "outcome",
    [
        lambda brought: brought.set_result(7),
        lambda brought: brought.set_exception(asyncio.CancelledError()),
        lambda brought: brought.cancel(),
    ],
    ids=["a result", "grpc's cancellation", "a cancelled future"],
)
def test_a_cancelled_task_sees_the_operation_end_whatever_it_brings(
    outcome: Callable[[asyncio.Future[int]], object],
) -> None:
    async def test() -> None:
        operation = Operation(outcome)
        task = asyncio.ensure_future(operation.awaited())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0)
        assert operation.num_cancels == 1 and not operation.brought.done(), "its future is not cancelled over its head"
        with pytest.raises(asyncio.CancelledError):
            await task
        assert operation.ended and task.cancelled()

    in_loop(test)


def test_a_task_that_is_cancelled_before_it_waits_does_not_wait() -> None:
    async def test() -> None:
        operation = Operation(lambda brought: brought.cancel())
        task = asyncio.ensure_future(operation.awaited())
        await asyncio.sleep(0)  # it is at the bare yield now
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert operation.num_cancels == 0

    in_loop(test)


def test_a_time_limit_ends_it() -> None:
    async def test() -> None:
        operation = Operation(lambda brought: brought.set_result(7))
        with pytest.raises(TimeoutError):
            await within(0.02, operation.awaited())
        assert operation.ended and operation.num_cancels == 1

    in_loop(test)


@pytest.mark.parametrize("goes_on", [False, True], ids=["the last", "with another behind it"])
def test_a_result_that_came_just_before_the_cancellation_is_taken_in(goes_on: bool) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        first, second = loop.create_future(), loop.create_future()
        taken: list[int] = []
        cancelled: list[bool] = []

        async def operation() -> None:
            taken.append(await first)
            if goes_on:
                taken.append(await second)

        def cancel() -> None:
            cancelled.append(True)
            loop.call_later(0.01, second.set_result, 2)

        async def awaited() -> None:
            await Unabandoned(operation(), cancel)

        task = asyncio.ensure_future(awaited())
        await asyncio.sleep(0.01)
        first.set_result(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (taken, cancelled) == (([1, 2], [True]) if goes_on else ([1], []))

    in_loop(test)


@pytest.mark.parametrize("came_before", [True, False], ids=["just before", "by the cancellation"])
def test_an_error_does_not_hide_the_cancellation(came_before: bool) -> None:
    """A task that goes on with the error would ask another server for a caller who has left."""

    async def test() -> None:
        future = asyncio.get_running_loop().create_future()

        async def operation() -> None:
            await future

        def cancel() -> None:
            future.set_exception(ConnectionError("the stream broke"))

        async def awaited() -> None:
            await Unabandoned(operation(), cancel)

        task = asyncio.ensure_future(awaited())
        await asyncio.sleep(0.01)
        if came_before:
            cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    in_loop(test)
