"""All sequences that are not over: they come, wait, run, lose their pages and wait again, and leave."""

from __future__ import annotations

from paged_backend.adapters import Adapters
from paged_backend.beams import Beams
from paged_backend.residents import Residents
from paged_backend.sequence import Sequence, Status
from paged_backend.waiting_queue import WaitingQueue


class Living:
    """Every move of a sequence from one state to another goes through here, and takes what it holds along.

    Invariant (`check`): a sequence waits, without row and pages, or all its runners are residents; a berth is held by who needs it.
    """

    def __init__(self, waiting: WaitingQueue, residents: Residents, beams: Beams, adapters: Adapters) -> None:
        self.by_id: dict[int, Sequence] = {}  # oldest first
        self.num_preemptions = 0
        self._waiting = waiting
        self._residents = residents
        self._beams = beams
        self._adapters = adapters

    def add(self, sequence: Sequence) -> None:
        """A new one: it waits."""
        self._beams.enrol(sequence)
        self.by_id[sequence.request_id] = sequence
        self._waiting.add(sequence)

    def start(self, sequence: Sequence, num_computed: int) -> int:
        """One that left the queue, whose runners hold their pages, runs. Returns the first runner's row: the others have nothing to compute yet."""
        first, *others = sequence.runners
        row = self._residents.start(first, num_computed)
        for runner in others:
            self._residents.start(runner, 0)
        sequence.status = Status.RUNNING
        return row

    def preempt(self, sequence: Sequence) -> None:
        """Takes a running sequence's pages; it waits again and recomputes, from the prefix cache where its pages survive."""
        row, rows = sequence.row, self._residents.rows  # no row: its runners' results are not waited for, they will be others
        sequence.awaits_token = row is not None and bool(rows.num_tokens[row] > rows.num_known[row])
        for runner in sequence.runners:
            self._residents.stop(runner)
        self._beams.fold(sequence)
        self._waiting.add(sequence)
        self.num_preemptions += 1

    def leave(self, sequence: Sequence) -> None:
        """The end of a sequence, whatever it was doing."""
        if sequence.status is Status.RUNNING:
            for runner in sequence.runners:
                self._residents.stop(runner)
            sequence.status = Status.FINISHED
        else:
            self._waiting.leave(sequence)
        self._adapters.release(sequence)
        del self.by_id[sequence.request_id]

    def num_tokens(self, sequence: Sequence) -> int:
        """Its known tokens, of prompt and answer; of several answers, the longest."""
        known = self._residents.rows.num_known
        return max(len(runner.token_ids) if runner.row is None else int(known[runner.row]) for runner in sequence.runners)

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken, here or further down. O(pages + sequences)."""
        self._residents.check()
        self._adapters.check(self.by_id.values())
        waiting = [sequence for sequence in self.by_id.values() if sequence.status is Status.WAITING]
        assert len(waiting) == len(self._waiting)
        assert not any(runner.pages or runner.row is not None for sequence in waiting for runner in sequence.runners)
        running = {id(runner) for runner in self._residents.running}
        expected = {id(runner) for sequence in self.by_id.values() if sequence.status is Status.RUNNING for runner in sequence.runners}
        assert running == expected and len(running) == len(self._residents.running), "a sequence is neither waiting nor running"
