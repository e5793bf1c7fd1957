"""Waiting for an operation of grpc's that must not be abandoned.

A task that is cancelled cancels the future that it waits for. Where that is one of grpc's, nobody takes in what the
operation brings, and some 600 bytes of the library's memory are lost for good: a gateway loses them with every caller
who leaves a stream. Here the call is cancelled instead, which ends the operation; its task learns of the cancellation
by that end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")


class Unabandoned(Generic[Result]):
    """Awaited, it returns or raises what the operation does."""

    __slots__ = ("_cancel", "_operation", "is_cancelled")

    def __init__(self, operation: Coroutine[Any, Any, Result], cancel: Callable[[], object]) -> None:
        """cancel: ends the operation soon, by its result or an exception."""
        self._operation = operation
        self._cancel = cancel
        self.is_cancelled = False

    def __await__(self) -> Generator[Any, Any, Result]:
        """
        Raises:
            asyncio.CancelledError: the task was cancelled, whatever came of the operation.
        """
        operation = self._operation
        try:
            waits_for = operation.send(None)
            while True:
                try:
                    value = yield None if waits_for is None else _Waiter(waits_for, self)
                except asyncio.CancelledError as error:
                    if waits_for is None or not waits_for.done():
                        waits_for = operation.throw(error)
                        continue
                    self.is_cancelled = True  # just when the result had come, which is taken in all the same
                    waits_for = operation.send(None)
                    self._cancel()  # and there is more to wait for
                except BaseException as error:
                    waits_for = operation.throw(error)
                else:
                    waits_for = operation.send(value)
        except StopIteration as end:
            if self.is_cancelled:
                raise asyncio.CancelledError from None
            result: Result = end.value
            return result
        except Exception:
            if self.is_cancelled:  # an error that nobody waits for: who has left must not try again
                raise asyncio.CancelledError from None
            raise

    def cancel(self) -> None:
        self.is_cancelled = True
        self._cancel()


class _Waiter:
    """Stands for a future before the task that waits for it (`asyncio.isfuture`), and is cancelled in its place."""

    __slots__ = ("_asyncio_future_blocking", "_future", "_whole")

    def __init__(self, future: Any, whole: Unabandoned[Any]) -> None:
        future._asyncio_future_blocking = False  # it has been yielded: that is what the task looks at
        self._asyncio_future_blocking = True
        self._future = future
        self._whole = whole

    def cancel(self, msg: Any = None) -> bool:
        if self._future.done():
            return False
        self._whole.cancel()
        return True

    def add_done_callback(self, callback: Callable[[Any], object], *, context: Any = None) -> None:
        self._future.add_done_callback(callback, context=context)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = self._future.get_loop()
        return loop
