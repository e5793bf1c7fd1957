"""Requests that were running when engine after engine died. One of them may be the cause, so no two run at once: the
next death then names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from paged_backend.messages import CLEARED_AFTER_TOKENS, Submit
from paged_backend.scheduler.features import SchedulerFeature
from paged_backend.scheduler.sequence import Sequence


class Quarantine(SchedulerFeature):
    """Invariant (`check`): at most one uncleared suspect runs; every suspect is alive."""

    def __init__(self) -> None:
        self.tell: Callable[[int | None], None] = lambda request_id: None
        self.one_may_start = True
        self._suspects: set[Sequence] = set()
        self._running: Sequence | None = None  # the runner of the one that is not cleared yet
        self._clear_at = 0

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._suspects

    def enter(self, sequence: Sequence, request: Submit) -> bool:
        if request.suspect:
            self._suspects.add(sequence)
        return request.suspect

    def leave(self, sequence: Sequence) -> None:
        self._suspects.discard(sequence)
        if self._running is not None and self._running.leader is sequence:
            self._clear()

    def started(self, sequence: Sequence) -> None:
        self._running = sequence.runners[0]
        self._clear_at = len(self._running.token_ids) + CLEARED_AFTER_TOKENS
        self.one_may_start = False
        self.tell(sequence.request_id)

    def review(self) -> None:
        """Has the running suspect shown that it is harmless, or stopped running?"""
        runner = self._running
        if runner is not None and (runner.row is None or self.rows.num_known[runner.row] >= self._clear_at):
            self._clear()

    def _clear(self) -> None:
        self._running, self.one_may_start = None, True
        self.tell(None)

    def check(self, living: Iterable[Sequence]) -> None:
        assert self._suspects <= set(living), "a suspect is over"
        assert self.one_may_start == (self._running is None)
