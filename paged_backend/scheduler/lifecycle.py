"""Every sequence from the moment it enters until it ends: where it stands, and how it gets from one place to the next.

enter --> waiting --start--> running --end--> over
             ^                  |
             +---- preempt -----+
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32
from paged_backend.messages import Finish
from paged_backend.scheduler.features import LiveFeatures
from paged_backend.scheduler.running import RunningSequences
from paged_backend.scheduler.sequence import Sequence, Status
from paged_backend.scheduler.waiting import WaitingQueue


class Lifecycle:
    """Owns who lives, and the ends that nobody has been told of yet. Nobody else moves a sequence from one place to
    another.

    Invariant (`check`): a sequence waits or runs; the runners of running ones hold rows and pages, those of waiting
    ones neither, and there are no others.
    """

    def __init__(self, waiting: WaitingQueue, running: RunningSequences, features: LiveFeatures) -> None:
        self.waiting = waiting
        self.running = running
        self.num_preemptions = 0
        self.features = features
        self.finishes: list[Finish] = []  # that nobody has been told of
        self._by_id: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        """Oldest first; they may end meanwhile."""
        return iter(list(self._by_id.values()))

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._by_id

    def find(self, request_id: int) -> Sequence | None:
        return self._by_id.get(request_id)

    # ---- enter, start, preempt, end

    def enter(self, sequence: Sequence) -> None:
        self._by_id[sequence.request_id] = sequence
        self.waiting.add(sequence, self.features.prepared(sequence))

    def start(self, sequence: Sequence, num_tokens: int) -> int | None:
        """Lets one run that is first in its lane of the queue; see RunningSequences.start."""
        row = self.running.start(sequence, num_tokens, self.features.num_reusable(sequence))
        if row is not None:
            self.waiting.pop(sequence)
            for feature in self.features.of(sequence):
                feature.started(sequence)
        return row

    def preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's pages; it waits again and recomputes, from the prefix cache where its pages
        survive.
        """
        # None: its results are not waited for, its runners will be others
        row, table = sequence.row, self.running.table
        sequence.num_awaited = 0 if row is None else table.num_in_flight(row)
        self.running.stop(sequence)
        for feature in self.features.of(sequence):
            feature.preempted(sequence)
        self.waiting.add(sequence, self.features.prepared(sequence))
        self.num_preemptions += 1

    def end(self, sequence: Sequence, finish: Finish) -> None:
        """The end of a sequence, whatever it was doing."""
        self._leave(sequence)
        self.finishes.append(finish)

    def end_all(self, ends: Iterable[tuple[Sequence, Finish]]) -> None:
        for sequence, finish in ends:
            self.end(sequence, finish)

    def refuse(self, finish: Finish) -> None:
        """A request that never lived."""
        self.finishes.append(finish)

    def forget(self, request_id: int) -> None:
        """Nothing more is said of a request. Unknown ids (already over) are fine."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._leave(sequence)
        else:
            self.finishes = [finish for finish in self.finishes if finish.request_id != request_id]

    def _leave(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self.running.stop(sequence)
            sequence.status = Status.FINISHED
        else:
            self.waiting.leave(sequence)
        self.features.leave(sequence)
        del self._by_id[sequence.request_id]

    def take_finishes(self) -> tuple[Finish, ...]:
        """Those not told yet, in their order; none are left."""
        finishes, self.finishes = tuple(self.finishes), []
        return finishes

    def num_tokens(self, sequence: Sequence) -> int:
        """Its known tokens, of prompt and answer; of several answers, the longest."""
        known = self.running.table.num_known
        return max(
            len(runner.token_ids) if runner.row is None else int(known[runner.row]) for runner in sequence.runners
        )

    # ---- pages for a step

    def secure_pages(self, rows: Int32, counts: Int32, short: NDArray[np.bool_]) -> tuple[Int32, Int32]:
        """Gives every row the pages its tokens need. Rows that cannot get any go without a step, those of preempted
        sequences drop out.

        short: which rows have not got them yet, as `RunningSequences.lack_pages` says.
        """
        table = self.running.table
        ends = table.num_computed[rows[short]] + counts[short]
        stalled = set()
        num_preemptions = self.num_preemptions
        for row, end in zip(rows[short].tolist(), ends.tolist(), strict=True):
            runner = table.sequences[row]
            if runner is not None and not self._grow(runner, row, end):
                stalled.add(row)
        if stalled or self.num_preemptions != num_preemptions:
            keep = np.array(
                [table.sequences[row] is not None and row not in stalled for row in rows.tolist()], np.bool_
            )
            rows, counts = rows[keep], counts[keep]
        return rows, counts

    def _grow(self, runner: Sequence, row: int, num_tokens: int) -> bool:
        """Pages for so many tokens of a runner, at the cost of the youngest others if need be."""
        table = self.running.table
        while table.capacity[row] < num_tokens:
            while not self.running.append_page(runner):
                if table.capacity[row] >= num_tokens - table.unsure[row]:
                    return False  # drafts in flight may be wrong: nobody is preempted for them
                victim = max(self.running.runners, key=Sequence.priority_key).leader
                if victim is runner.leader:
                    return False  # it keeps what it has and waits: whoever is older will finish
                self.preempt(victim)
        return True

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken. O(pages + sequences)."""
        self.running.check()
        self.features.check(self)
        waiting = [sequence for sequence in self if sequence.status is Status.WAITING]
        assert len(waiting) == self.waiting.num_waiting
        assert not any(
            len(runner.page_table) or runner.row is not None for sequence in waiting for runner in sequence.runners
        )
        running = {id(runner) for runner in self.running.runners}
        expected = {id(runner) for sequence in self if sequence.status is Status.RUNNING for runner in sequence.runners}
        assert running == expected and len(running) == len(self.running.runners), (
            "a sequence is neither waiting nor running"
        )
