"""Who waits for a row and pages, in the order in which they will get them."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from paged_backend.scheduler.sequence import Sequence, Status

_Entry = tuple[tuple[int, int], Sequence]


class WaitingQueue:
    """Oldest of the lowest priority_level first, in three lanes: suspects, of whom one may run at a time; short ones,
    who need not wait behind a flood of long ones; and the others. Leaving from the middle is O(1): the entry stays
    behind and is skipped when met.

    A sequence whose grammar or adapter is not ready has no place yet and holds up nobody.
    Invariant: `num_waiting` is the number of sequences that wait, in a lane or not; `short_tokens` is how many tokens
        the prompts in the short lane have.
    """

    def __init__(self, short_len: int, is_suspect: Callable[[Sequence], bool]) -> None:
        """short_len: the longest prompt that counts as short, in tokens."""
        self.num_waiting = 0
        self.short_tokens = 0
        self._is_suspect = is_suspect
        self._short_len = short_len
        self._short: list[_Entry] = []
        self._long: list[_Entry] = []
        self._suspects: list[_Entry] = []
        self._unready: set[Sequence] = set()  # not prepared yet: in no lane
        self._num_left = 0  # entries of those that left

    def add(self, sequence: Sequence, prepared: bool) -> None:
        """prepared: it has what it must have before it can start."""
        sequence.status = Status.WAITING
        self.num_waiting += 1
        if prepared:
            self._place(sequence)
        else:
            self._unready.add(sequence)

    def let_in(self, is_ready: Callable[[Sequence], bool]) -> list[Sequence]:
        """Gives those of the held back that are ready, asked in their turn, their places, and returns them: a grammar
        may turn out to be none.
        """
        let_in = [sequence for sequence in sorted(self._unready, key=Sequence.priority_key) if is_ready(sequence)]
        self._unready.difference_update(let_in)
        for sequence in let_in:
            self._place(sequence)
        return let_in

    def first(self, *, suspects: bool = True) -> Sequence | None:
        """Whose turn it is; stays in the queue. suspects: they count."""
        lanes = (self._short, self._long, self._suspects) if suspects else (self._short, self._long)
        heads = [head for head in map(self._head, lanes) if head is not None]
        return min(heads, key=Sequence.priority_key) if heads else None

    def first_short(self) -> Sequence | None:
        """Whose turn it is among the short ones; stays in the queue."""
        return self._head(self._short)

    def pop(self, sequence: Sequence) -> None:
        """Takes out a lane's first, which is about to run."""
        lane = self._lane(sequence)
        assert lane[0][1] is sequence
        heapq.heappop(lane)
        self._forget(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A waiting sequence is over."""
        sequence.status = Status.FINISHED
        self._forget(sequence)
        self._num_left += 1
        if self._num_left > self.num_waiting + 64:  # mostly entries of those that left
            self._num_left = 0
            for lane in (self._short, self._long, self._suspects):
                lane[:] = [entry for entry in lane if entry[1].status is Status.WAITING]
                heapq.heapify(lane)

    def _place(self, sequence: Sequence) -> None:
        lane = self._lane(sequence)
        self.short_tokens += sequence.spec.prompt_len if lane is self._short else 0
        heapq.heappush(lane, (sequence.priority_key(), sequence))

    def _forget(self, sequence: Sequence) -> None:
        self.num_waiting -= 1
        if sequence in self._unready:
            self._unready.remove(sequence)
        elif self._lane(sequence) is self._short:
            self.short_tokens -= sequence.spec.prompt_len

    def _lane(self, sequence: Sequence) -> list[_Entry]:
        if self._is_suspect(sequence):
            return self._suspects
        return self._short if sequence.spec.prompt_len <= self._short_len else self._long

    @staticmethod
    def _head(lane: list[_Entry]) -> Sequence | None:
        while lane and lane[0][1].status is not Status.WAITING:
            heapq.heappop(lane)
        return lane[0][1] if lane else None
