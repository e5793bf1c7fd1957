"""How long to wait and how often to try again: one request's time, counted from its first attempt."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from paged_client.errors import AnswerTimeoutError, PagedError, UnavailableError

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_WAIT_SECONDS = 1e6  # more is more than sockets and locks can be told

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """Seconds; None: no limit."""

    timeout: float | None = 600.0  # for the whole answer, retries included
    delta_timeout: float | None = None  # for the next piece of it
    retries: int = 2  # after UNAVAILABLE, and only before the first token: nothing that was shown is ever shown twice


class RetryPolicy:
    """Time and attempts that one request has left."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._end = None if limits.timeout is None else time.monotonic() + limits.timeout
        self._num_retries = 0

    def seconds(self) -> float | None:
        """How long to wait for the next piece.

        Raises:
            AnswerTimeoutError: the time is up.
        """
        if self._end is None:
            return self._limits.delta_timeout
        left = min(self._end - time.monotonic(), _LONGEST_WAIT_SECONDS)
        if left <= 0:
            raise self.over()
        return left if self._limits.delta_timeout is None else min(left, self._limits.delta_timeout)

    def over(self) -> AnswerTimeoutError:
        """What to raise when the time that `seconds` said has passed."""
        limits = self._limits
        if self._end is not None and time.monotonic() >= self._end - 0.001:
            return AnswerTimeoutError(f"the answer was not complete after {limits.timeout:g} s (timeout)")
        return AnswerTimeoutError(f"no piece of the answer for {limits.delta_timeout or 0:g} s (delta_timeout)")

    def pause(self, error: PagedError, begun: bool) -> float | None:
        """Seconds to sleep before the next attempt; None: do not try again. begun: a token has come."""
        if begun or not isinstance(error, UnavailableError) or self._num_retries >= self._limits.retries:
            return None
        pause = _FIRST_PAUSE_SECONDS * 2**self._num_retries * random.uniform(0.5, 1.0)
        self._num_retries += 1
        return pause if self._end is None or time.monotonic() + pause < self._end else None


async def within(seconds: float | None, awaited: Awaitable[Result]) -> Result:
    """As asyncio.wait_for, which before Python 3.12 forgets that it was cancelled if the result came in the same
    moment: who left would stay.

    Raises:
        TimeoutError: the result did not come within `seconds`; nobody waits for it any more.
    """
    task = asyncio.ensure_future(awaited)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if task.done():
            return task.result()
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
