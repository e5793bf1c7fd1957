"""Who starts next, and with how much of a step: the oldest of the lowest priority_level; only a short prompt may
overtake, in turns with the oldest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.messages import Finish
from paged_backend.scheduler import budget
from paged_backend.scheduler.lifecycle import Lifecycle
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.quarantine import Quarantine
from paged_backend.scheduler.sequence import Sequence


class Admission:
    """Owns whose turn it is, and the counts of what was admitted for the first time."""

    def __init__(
        self, limits: SchedulerLimits, living: Lifecycle, quarantine: Quarantine, clock: Callable[[], float]
    ) -> None:
        self._limits = limits
        self._living = living
        self._waiting = living.waiting
        self._running = living.running
        self._features = living.features
        self._quarantine = quarantine
        self._clock = clock
        self._short_is_next = False
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

    def short_tokens(self) -> int:
        """Of the short prompts that wait; 0 if the first of them will not start: for want of a row, or pages, or
        priority.
        """
        first, short = self._next(), self._waiting.first_short()
        if (
            first is None
            or short is None
            or not self._running.table.num_free
            or short.spec.sampling.priority_level != first.spec.sampling.priority_level
        ):
            return 0
        num_tokens = len(short.token_ids) + (0 if first is short else len(first.token_ids))
        num_pages = (num_tokens // self._limits.page_size + 2) * self._limits.num_groups
        return (
            self._waiting.short_tokens
            if num_pages + self._running.headroom() <= self._running.pages.pool.num_available
            else 0
        )

    def admit(self, rows: Int32, counts: Int32) -> tuple[Int32, Int32]:
        """Lets waiting sequences start while rows, pages and what (rows, counts) leave of the budget last. Returns both
        with theirs.
        """
        left = self._limits.max_batched_tokens - int(counts.sum())
        kept = budget.kept_for_short(counts, self._limits.max_batched_tokens, self.short_tokens())
        table = self._running.table
        new_rows: list[int] = []
        new_counts: list[int] = []
        while left > 0:
            sequence, short = self._next(), self._waiting.first_short()
            # nothing of this step is left for a long one, whose turn it stays
            if sequence is not short and kept >= left:
                sequence = short
            row = None if sequence is None else self._start(sequence)
            if row is None:
                break
            if sequence is not short or self._short_is_next:
                self._short_is_next = sequence is not short and short is not None
            start = int(table.num_computed[row])
            count = min(left if sequence is short else left - kept, int(table.num_tokens[row]) - start)
            self._running.publish(row, start + count)
            new_rows.append(row)
            new_counts.append(count)
            left -= count
            kept -= min(kept, count) if sequence is short else 0
        if not new_rows:
            return rows, counts
        return np.concatenate([rows, np.array(new_rows, np.int32)]), np.concatenate(
            [counts, np.array(new_counts, np.int32)]
        )

    def _next(self) -> Sequence | None:
        """The oldest; or after a long prompt the oldest short one, if it has the same priority: a flood of long prompts
        does not keep it waiting.
        """
        first, short = self._waiting.first(suspects=self._quarantine.one_may_start), self._waiting.first_short()
        if first is None or short is None or not self._short_is_next:
            return first
        return short if short.spec.sampling.priority_level == first.spec.sampling.priority_level else first

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
