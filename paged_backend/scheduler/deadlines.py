"""Requests that waited or lived too long."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from paged_backend.errors import ErrorKind
from paged_backend.messages import Finish
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.sequence import Sequence

_CHECK_SECONDS = 0.05


class Deadlines:
    """Every request has some, so all are looked at; but only when the first of them may be over, and now and then: a
    limit of seconds needs no more.
    """

    def __init__(self, limits: SchedulerLimits, clock: Callable[[], float]) -> None:
        self.next_check = math.inf  # nobody is overdue before
        self._limits = limits
        self._clock = clock
        self._last_check = -math.inf

    def enter(self, sequence: Sequence) -> None:
        self._look_at(self._due(sequence))

    def overdue(self, sequences: Iterable[Sequence]) -> Iterator[tuple[Sequence, Finish]]:
        """Those that must end, and how."""
        now = self._clock()
        if now < self.next_check:
            return
        self._last_check, self.next_check = now, math.inf
        for sequence in sequences:
            age = now - sequence.spec.arrival
            if age > self._longest(sequence):
                error, message = (
                    ErrorKind.CANCELLED,
                    f"not finished after {self._longest(sequence):g} s (request_deadline_seconds)",
                )
            elif self._waits(sequence) and age > self._limits.max_waiting_seconds:
                error, message = (
                    ErrorKind.OVERLOADED,
                    f"not started after {self._limits.max_waiting_seconds:g} s (max_waiting_seconds)",
                )
            else:
                self._look_at(self._due(sequence))
                continue
            yield sequence, Finish(sequence.request_id, error=error, message=message)

    def _look_at(self, moment: float) -> None:
        self.next_check = min(self.next_check, max(moment, self._last_check + _CHECK_SECONDS))

    def _due(self, sequence: Sequence) -> float:
        """When it will be overdue, if nothing happens before."""
        longest = self._longest(sequence)
        return sequence.spec.arrival + (
            min(longest, self._limits.max_waiting_seconds) if self._waits(sequence) else longest
        )

    def _longest(self, sequence: Sequence) -> float:
        """Seconds from its arrival."""
        return min(sequence.spec.sampling.request_deadline_seconds or math.inf, self._limits.request_deadline_seconds)

    @staticmethod
    def _waits(sequence: Sequence) -> bool:
        return sequence.admitted is None and not sequence.spec.resumed and not sequence.answered
