"""How waiting sequences start: they get a place in the queue once they have what they need, then a row and pages in the
order that fairness.py decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.messages import Finish
from paged_backend.scheduler.fairness import Fairness
from paged_backend.scheduler.lifecycle import Lifecycle
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.sequence import Sequence


class Admission:
    """Owns the counts of what was admitted for the first time."""

    def __init__(
        self, limits: SchedulerLimits, living: Lifecycle, fairness: Fairness, clock: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._living = living
        self._fairness = fairness
        self._waiting = living.waiting
        self._running = living.running
        self._features = living.features
        self._clock = clock
        self.prefix_queries = 0  # prompt tokens of the admitted
        self.prefix_hits = 0  # of which were found in the prefix cache
        self._queue_times: list[float] = []

    def review(self) -> Iterator[tuple[Sequence, Finish]]:
        """Gives those a place in the queue that have got what they waited for; yields those that never will get it, or
        need not go on with it.
        """
        for feature in self._features.active:
            feature.review()
        let_in = self._waiting.let_in(self._is_ready)
        for feature in self._features.active:
            yield from feature.endings(let_in)

    def _is_ready(self, sequence: Sequence) -> bool:
        self._running.table.attend_to(sequence.request_id)
        ready = self._features.prepare(sequence)
        self._running.table.attend_to(None)
        return ready

    def admit(self, rows: Int32, counts: Int32) -> tuple[Int32, Int32]:
        """Lets waiting sequences start while rows, pages and what (rows, counts) leave of the budget last. Returns both
        with theirs.
        """
        table = self._running.table
        if not table.num_free:
            return rows, counts
        budget = self._fairness.start_budget(rows, counts)
        new_rows: list[int] = []
        new_counts: list[int] = []
        while (start := self._fairness.next_start(budget)) is not None:
            row = self._start(start.sequence)
            if row is None:
                break
            self._fairness.started(start)
            num_computed = int(table.num_computed[row])
            count = budget.take(int(table.num_tokens[row]) - num_computed, num_computed, start.is_short)
            self._running.publish(row, num_computed + count)
            new_rows.append(row)
            new_counts.append(count)
        if not new_rows:
            return rows, counts
        return np.concatenate([rows, np.array(new_rows, np.int32)]), np.concatenate(
            [counts, np.array(new_counts, np.int32)]
        )

    def _start(self, sequence: Sequence) -> int | None:
        """Returns its row; None: it must wait, and so must all behind it."""
        if sequence.awaits_token:
            return None
        row = self._living.start(
            sequence, len(sequence.token_ids) if self._limits.preemption else sequence.spec.length_limit - 1
        )
        if row is None:
            return None
        if sequence.admitted is None:
            num_computed = int(self._running.table.num_computed[row])
            sequence.admitted = self._clock()
            sequence.num_cached_tokens = num_computed
            self.prefix_queries += sequence.spec.prompt_len
            self.prefix_hits += num_computed
            self._queue_times.append(max(0.0, sequence.admitted - sequence.spec.arrival))
        return row

    def take_queue_times(self) -> tuple[float, ...]:
        """Seconds from arrival to admission, of those admitted since the last call."""
        queue_times, self._queue_times = tuple(self._queue_times), []
        return queue_times
