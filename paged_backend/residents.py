"""The sequences that run: each has a row, pages for what is computed of it, and the device learns of both with the next step."""

from __future__ import annotations

import numpy as np

from paged_backend.batch import Int32, NewRow
from paged_backend.limits import SchedulerLimits
from paged_backend.row_changes import RowChanges
from paged_backend.sequence import Rows, Sequence, Status
from paged_backend.sequence_pages import SequencePages


class Residents:
    """Owns rows and pages. Who runs for a request are its `runners`: the sequence itself, or the beams of its search.

    Invariant (`check`): a runner that was started and not stopped holds a row, and pages for all that is computed of it; nobody else does.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.rows = Rows(limits.max_running, limits.max_model_len, limits.page_size)
        self.pages = SequencePages(limits.num_pages, limits.page_size)
        self.changes = RowChanges()
        self.running: list[Sequence] = []  # in the order in which they started
        self._page_size = limits.page_size
        self._row_numbers: Int32 | None = None  # of `running`, in its order; None: to be gathered again

    @property
    def row_numbers(self) -> Int32:
        """Rows of those that run, in the order in which they started; not to be changed."""
        if self._row_numbers is None:
            self._row_numbers = np.array([runner.row for runner in self.running], np.int32)
        return self._row_numbers

    @property
    def headroom(self) -> int:
        """Pages to leave alone at admission: one for each that will grow, so that a start does not cost a preemption soon."""
        rows = self.row_numbers
        return int((self.rows.capacity[rows] < self.rows.length_limit[rows] - 1).sum())

    def start(self, runner: Sequence, num_computed: int) -> int:
        """Puts a runner, which holds its pages, onto a free row. Returns the row."""
        row = self.rows.occupy(runner, num_computed)
        self.running.append(runner)
        self._row_numbers = None
        new = NewRow(
            row=row,
            token_ids=runner.token_ids,
            prompt_len=runner.prompt_len,
            sampling=runner.sampling,
            seed=runner.seed,
            stop_ids=runner.stop_ids,
            bad_words=runner.bad_words,
            allowed=runner.allowed,
            berth=runner.berth,
        )
        self.changes.new_rows.append(new)
        self.changes.page_updates.extend((row, index, page) for index, page in enumerate(runner.pages))
        return row

    def stop(self, runner: Sequence) -> None:
        """Takes row and pages back."""
        assert runner.row is not None
        self.changes.drop(runner.row)
        self.rows.vacate(runner)
        self.pages.release(runner)
        self.running.remove(runner)
        self._row_numbers = None

    def grow(self, runner: Sequence) -> bool:
        """One more page for a runner; False: there is none."""
        row = runner.row
        assert row is not None
        page = self.pages.append(runner)
        if page is None:
            return False
        self.changes.page_updates.append((row, len(runner.pages) - 1, page))
        self.rows.capacity[row] += self._page_size
        return True

    def publish(self, row: int, num_computed: int) -> None:
        """Makes a row's pages findable as far as their tokens are known, and computed before or in this step: whoever finds them may use them in the same
        step, because every layer stores all of a step's keys and values before it attends to any."""
        table, size = self.rows, self._page_size
        runner = table.sequences[row]
        assert runner is not None
        if num_computed < table.publish_at[row]:
            return
        first = int(table.publish_at[row]) // size - 1
        end = min(num_computed, int(table.num_known[row])) // size
        self.pages.publish(runner, table.token_ids[row], first, end)
        table.publish_at[row] = (end + 1) * size

    def live_tokens(self) -> int:
        """Slots of held pages that hold a token; a page shared by several sequences counts once."""
        rows = self.row_numbers
        unused = int((self.rows.capacity[rows] - np.minimum(self.rows.num_computed[rows], self.rows.capacity[rows])).sum())
        return self.pages.pool.num_held * self._page_size - unused

    def check(self) -> None:
        """Raises AssertionError if the invariant is broken. O(pages + sequences)."""
        self.pages.check(self.running)
        for runner in self.running:
            assert runner.leader.status is Status.RUNNING and runner.row is not None and self.rows.sequences[runner.row] is runner
            assert self.rows.capacity[runner.row] == len(runner.pages) * self._page_size
            assert self.rows.num_computed[runner.row] <= self.rows.capacity[runner.row], "computed tokens without a slot"
