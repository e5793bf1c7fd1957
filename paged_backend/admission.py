"""Who of those that wait starts with the next step, and with how much of its budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from paged_backend import budget
from paged_backend.adapters import Adapters
from paged_backend.batch import Int32
from paged_backend.guides import Guides
from paged_backend.limits import SchedulerLimits
from paged_backend.living import Living
from paged_backend.request import Finish
from paged_backend.residents import Residents
from paged_backend.sequence import Sequence, Status
from paged_backend.suspects import Suspects
from paged_backend.waiting_queue import WaitingQueue


class Admission:
    """Oldest first, while rows, budget and pages last. Only a short prompt may overtake, in turns with the oldest: a flood of long ones does not starve it."""

    def __init__(
        self,
        limits: SchedulerLimits,
        waiting: WaitingQueue,
        living: Living,
        residents: Residents,
        guides: Guides,
        adapters: Adapters,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.suspects = Suspects()
        self.prefix_queries = 0  # tokens of prompts
        self.prefix_hits = 0  # of them, those whose pages were found
        self.queue_times: list[float] = []  # seconds from arrival to the first start
        self._limits = limits
        self._waiting = waiting
        self._living = living
        self._residents = residents
        self._guides = guides
        self._adapters = adapters
        self._clock = clock
        self._short_ones_turn = False

    def prepare(self) -> Iterator[tuple[Sequence, Finish]]:
        """Gives those a place in the queue that have got what they waited for: grammars, adapters. Yields those that never will, with their ends."""
        self.suspects.review(self._residents.rows)
        self._adapters.collect()
        yield from self._guides.review_waiting(self._waiting.let_in(self._is_ready))
        yield from ((sequence, finish) for sequence, finish in self._adapters.refusals() if sequence.status is Status.WAITING)

    def admit(self, rows: Int32, counts: Int32) -> tuple[Int32, Int32]:
        """(rows, counts) of the step so far -> the same with those that start in it."""
        left = self._limits.max_batched_tokens - int(counts.sum())
        kept = budget.kept_for_short(counts, self._limits.max_batched_tokens, self.short_tokens)
        table = self._residents.rows
        new_rows: list[int] = []
        new_counts: list[int] = []
        while left > 0:
            sequence, short = self._next(), self._waiting.first_short()
            if sequence is not short and kept >= left:  # nothing of this step is left for a long one, whose turn it stays
                sequence = short
            if sequence is None or sequence.awaits_token or table.num_free < len(sequence.runners):
                break
            num_tokens = len(sequence.token_ids) if self._limits.preemption else sequence.length_limit - 1
            num_computed = self._residents.pages.take(sequence.runners, num_tokens, self._residents.headroom)
            if num_computed is None:
                break
            if sequence is not short or self._short_ones_turn:
                self._short_ones_turn = sequence is not short and short is not None
            row = self._start(sequence, num_computed)
            new_rows.append(row)
            new_counts.append(min(left if sequence is short else left - kept, int(table.num_tokens[row] - table.num_computed[row])))
            left -= new_counts[-1]
            kept -= min(kept, new_counts[-1]) if sequence is short else 0
            self._residents.publish(row, num_computed + new_counts[-1])
        if not new_rows:
            return rows, counts
        return np.concatenate([rows, np.array(new_rows, np.int32)]), np.concatenate([counts, np.array(new_counts, np.int32)])

    @property
    def short_tokens(self) -> int:
        """Of the short prompts that wait; 0 if the first of them will not start: for want of a row, or pages, or priority."""
        first, short = self._next(), self._waiting.first_short()
        if first is None or short is None or not self._residents.rows.num_free or short.sampling.priority_level != first.sampling.priority_level:
            return 0
        num_tokens = len(short.token_ids) + (0 if first is short else len(first.token_ids))
        num_pages = num_tokens // self._limits.page_size + 2
        return self._waiting.short_tokens if num_pages + self._residents.headroom <= self._residents.pages.pool.num_available else 0

    def _next(self) -> Sequence | None:
        """The oldest; or after a long prompt the oldest short one, if it has the same priority."""
        first, short = self._waiting.first(suspects=self.suspects.one_may_start), self._waiting.first_short()
        if first is None or short is None or not self._short_ones_turn:
            return first
        return short if short.sampling.priority_level == first.sampling.priority_level else first

    def _is_ready(self, sequence: Sequence) -> bool:
        return (sequence.guide is None or sequence.guide.compiled) and self._adapters.take(sequence)

    def _start(self, sequence: Sequence, num_computed: int) -> int:
        self._waiting.pop(sequence)
        row = self._living.start(sequence, num_computed)
        for runner in sequence.runners:
            self.suspects.note_start(runner)
        if sequence.admitted is None:
            sequence.admitted = self._clock()
            sequence.num_cached_tokens = num_computed
            self.prefix_queries += sequence.prompt_len
            self.prefix_hits += num_computed
            self.queue_times.append(max(0.0, sequence.admitted - sequence.arrival))
        return row
