"""Requests that were running when engine after engine died. One of them may be the cause, so no two run at once: the next death then names it."""

from __future__ import annotations

from collections.abc import Callable

from paged_backend.messages import CLEARED_AFTER_TOKENS
from paged_backend.scheduler.sequence import Rows, Sequence


class Quarantine:
    """Invariant: at most one uncleared suspect runs."""

    def __init__(self) -> None:
        self.tell: Callable[[int | None], None] = lambda request_id: None
        self._running: Sequence | None = None
        self._clear_at = 0

    @property
    def one_may_start(self) -> bool:
        return self._running is None

    def note_start(self, sequence: Sequence) -> None:
        if sequence.suspect:
            self._running = sequence
            self._clear_at = len(sequence.token_ids) + CLEARED_AFTER_TOKENS
            self.tell(sequence.leader.request_id)

    def review(self, rows: Rows) -> None:
        """Once a step: has the running suspect shown that it is harmless, or stopped running?"""
        suspect = self._running
        if suspect is not None and (suspect.row is None or rows.num_known[suspect.row] >= self._clear_at):
            self._running = None
            self.tell(None)
