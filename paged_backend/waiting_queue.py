"""Who waits for a row and pages, in the order in which they will get them."""

from __future__ import annotations

import heapq

from paged_backend.sequence import Sequence, Status


class WaitingQueue:
    """Oldest of the lowest priority_level first. Leaving from the middle is O(1): the entry stays behind and is skipped when met.

    A sequence whose grammar is not ready has no place yet and holds up nobody.
    Invariant: len(queue) is the number of entries whose sequence is WAITING.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[bool, int, int], Sequence]] = []
        self._held: list[Sequence] = []  # their grammars are still being compiled
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def add(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self._num_waiting += 1
        if sequence.guide is not None and not sequence.guide.started:
            self._held.append(sequence)
        else:
            heapq.heappush(self._heap, (sequence.turn(), sequence))

    def let_in(self) -> list[Sequence]:
        """Gives those whose grammars are ready their places. Returns all that were held back: a grammar may turn out to be none."""
        held = [sequence for sequence in self._held if sequence.status is Status.WAITING]
        self._held = []
        for sequence in held:
            if sequence.guide is not None and not sequence.guide.compiled:
                self._held.append(sequence)
            else:
                heapq.heappush(self._heap, (sequence.turn(), sequence))
        return held

    def first(self) -> Sequence | None:
        """Whose turn it is; stays in the queue."""
        while self._heap and self._heap[0][1].status is not Status.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> None:
        """Takes out `first()`, which is about to run."""
        heapq.heappop(self._heap)
        self._num_waiting -= 1

    def leave(self, sequence: Sequence) -> None:
        """A waiting sequence is over."""
        sequence.status = Status.FINISHED
        self._num_waiting -= 1
        if len(self._heap) > 2 * self._num_waiting + 64:  # mostly entries of those that left
            self._heap = [entry for entry in self._heap if entry[1].status is Status.WAITING]
            heapq.heapify(self._heap)
