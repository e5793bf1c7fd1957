"""Requests that waited or lived too long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from paged_backend.errors import ErrorKind
from paged_backend.messages import Finish
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.sequence import Sequence

_CHECK_SECONDS = 0.05


class Deadlines:
    """Looks now and then: a limit of seconds needs no more."""

    def __init__(self, limits: SchedulerLimits, clock: Callable[[], float]) -> None:
        self._max_waiting_seconds = limits.max_waiting_seconds
        self._clock = clock
        self._next_check = 0.0

    def overdue(self, sequences: Iterable[Sequence]) -> Iterator[tuple[Sequence, Finish]]:
        """Those that must end, and how."""
        now = self._clock()
        if now < self._next_check:
            return
        self._next_check = now + _CHECK_SECONDS
        for sequence in sequences:
            age = now - sequence.arrival
            if age > sequence.deadline_seconds:
                error, message = ErrorKind.CANCELLED, f"not finished after {sequence.deadline_seconds:g} s (request_deadline_seconds)"
            elif sequence.admitted is None and not sequence.resumed and not sequence.answered and age > self._max_waiting_seconds:
                error, message = ErrorKind.OVERLOADED, f"not started after {self._max_waiting_seconds:g} s (max_waiting_seconds)"
            else:
                continue
            yield sequence, Finish(sequence.request_id, error=error, message=message)
