"""The sequences that run: their rows, their pages, and what the device has still to learn of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paged_backend.arrays import Int32
from paged_backend.batch import NewRow, TokenEdit
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.prefix_cache import GONE, first_kept
from paged_backend.scheduler.rows import Rows
from paged_backend.scheduler.sequence import Sequence, Status
from paged_backend.scheduler.sequence_pages import SequencePages


@dataclass
class RowChanges:
    """What the device has to learn about rows with the next step, gathered until then.

    Invariant: a row's changes are those of the sequence that holds it now; `drop` forgets those of one that leaves it.
    """

    new_rows: list[NewRow] = field(default_factory=list)
    token_edits: list[TokenEdit] = field(default_factory=list)
    page_updates: list[tuple[int, int, int]] = field(default_factory=list)  # (row, index in its page table, page id)
    # (row, page to be copied, page to be written)
    page_copies: list[tuple[int, int, int]] = field(default_factory=list)

    def drop(self, row: int) -> None:
        self.new_rows = [new for new in self.new_rows if new.row != row]
        self.token_edits = [edit for edit in self.token_edits if edit.row != row]
        self.page_updates = [update for update in self.page_updates if update[0] != row]
        self.page_copies = [copy for copy in self.page_copies if copy[0] != row]

    def take(self) -> dict[str, Any]:
        """As fields of a Batch, those that have anything; none are left."""
        taken: dict[str, Any] = {}
        if self.new_rows:
            taken["new_rows"], self.new_rows = tuple(self.new_rows), []
        if self.token_edits:
            taken["token_edits"], self.token_edits = tuple(self.token_edits), []
        if self.page_updates:
            taken["page_updates"], self.page_updates = np.array(self.page_updates, np.int32), []
        if self.page_copies:
            taken["page_copies"], self.page_copies = np.array(self.page_copies, np.int32)[:, 1:], []
        return taken


class RunningSequences:
    """Owns rows and pages. A sequence may have several runners (beams.py); they start and stop together.

    Invariant (`check`): each runner has a row and the pages that the row's capacity says; nobody else holds a page.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.table = Rows(limits.max_running, limits.max_model_len, limits.page_size)
        self.pages = SequencePages(limits)
        self.releases_pages = limits.preemption and any(limits.windows)  # what may not be preempted keeps what it has
        self._table_width = -(-limits.max_model_len // limits.page_size)
        self.changes = RowChanges()
        self.runners: list[Sequence] = []  # in the order in which they started; to be looked at only
        self.rows = np.empty(0, np.int32)  # of the runners, in their order; never written, batches have it
        self.num_unsure = 0  # drafts in flight of all rows; to be looked at only
        self._page_size = limits.page_size

    def __len__(self) -> int:
        return len(self.runners)

    # ---- start and stop

    def start(self, sequence: Sequence, num_tokens: int, num_reusable: int) -> int | None:
        """Gives a waiting sequence's runners rows, and pages for `num_tokens` tokens, known or not; those of the first
        `num_reusable` may come from the prefix cache. Returns the row of the first: the others have nothing to compute
        yet. None: rows or pages are short, and nothing has changed.
        """
        if self.table.num_free < len(sequence.runners):
            return None
        first, *others = sequence.runners
        tables = [runner.page_table for runner in sequence.runners]
        num_computed = self.pages.take(tables, first.token_ids, num_tokens, num_reusable, self.headroom())
        if num_computed is None:
            return None
        row = self._occupy(first, num_computed)
        for runner in others:
            self._occupy(runner, 0)
        sequence.status = Status.RUNNING
        return row

    def _occupy(self, runner: Sequence, num_computed: int) -> int:
        """The device learns of it with this step's batch."""
        row, spec = self.table.occupy(runner, num_computed), runner.spec
        self.runners.append(runner)
        self.rows = np.append(self.rows, np.int32(row))
        self.changes.new_rows.append(
            NewRow(
                row=row,
                token_ids=runner.token_ids,
                prompt_len=spec.prompt_len,
                sampling=spec.sampling,
                seed=spec.seed,
                stop_ids=spec.stop_ids,
                bad_words=spec.bad_words,
                features=spec.features,
            )
        )
        for group, pages in enumerate(runner.page_table.groups):
            self.tell_pages(row, group, ((index, page) for index, page in enumerate(pages) if page != GONE))
        return row

    def tell_pages(self, row: int, group: int, pages: Iterable[tuple[int, int]]) -> None:
        """The device learns of (index, page) in a group's page table of a row: the groups' tables lie side by side."""
        first = group * self._table_width
        self.changes.page_updates.extend((row, first + index, page) for index, page in pages)

    def stop(self, sequence: Sequence) -> None:
        """Takes a sequence's rows and pages."""
        for runner in sequence.runners:
            assert runner.row is not None
            self.rows = self.rows[self.rows != runner.row]
            self.changes.drop(runner.row)
            self.num_unsure -= int(self.table.unsure[runner.row])
            self.table.vacate(runner)
            self.pages.release(runner.page_table)
            self.runners.remove(runner)

    # ---- a step

    def computable(self) -> tuple[Int32, Int32]:
        """(rows, counts): how many tokens each row could compute now, 0 included, in the order in which they
        started.
        """
        rows, table = self.rows, self.table
        num_tokens = table.num_tokens[rows]
        counts = num_tokens - table.num_computed[rows]
        counts[num_tokens >= table.length_limit[rows]] = 0  # its last token is in flight and need not be computed
        return rows, counts

    def lack_pages(self, rows: Int32, counts: Int32) -> NDArray[np.bool_]:
        """Which rows have no slot yet for some of their next counts[i] tokens."""
        lack: NDArray[np.bool_] = self.table.num_computed[rows] + counts > self.table.capacity[rows]
        return lack

    def append_page(self, runner: Sequence) -> bool:
        """One more page of each group for it; False if there are not so many."""
        table, row = runner.page_table, runner.row
        assert row is not None
        if not self.pages.append(table):
            return False
        column = len(table) - 1
        for pages in table.groups:
            self.changes.page_updates.append((row, column, pages[-1]))
            column += self._table_width
        self.table.capacity[row] += self._page_size
        return True

    def release_passed(self) -> None:
        """Releases pages that windows have left behind: the steps that read them are launched, and come before any that
        may write them.
        """
        table, rows = self.table, self.rows
        num_computed = table.num_computed[rows] - table.unsure[rows]
        passed = num_computed >= table.release_at[rows]
        for row, computed in zip(rows[passed].tolist(), num_computed[passed].tolist(), strict=True):
            runner = table.sequences[row]
            assert runner is not None
            table.release_at[row] = self.pages.release_passed(runner.page_table, computed)

    def advance(self, rows: Int32, counts: Int32) -> tuple[Int32, NDArray[np.bool_]]:
        """A step will compute the next counts[i] tokens of rows[i]. Returns (starts, samples): the first position of
        each; whether its newest token is computed, so that its successor is sampled.
        """
        table = self.table
        starts = table.num_computed[rows]
        ends = starts + counts
        samples = ends == table.num_tokens[rows]
        table.num_computed[rows] = ends
        table.num_tokens[rows] += samples
        # prompts: their ids are known before they are computed
        for row in rows[(counts > 1) & (ends >= table.publish_at[rows])].tolist():
            self.publish(row, int(table.num_computed[row]))
        return starts, samples

    def expect(self, rows: Int32, drafts: Int32) -> None:
        """The step that `advance` was told of computes drafts[i] drafts of rows[i], too, all of which may be right."""
        for column in (self.table.num_computed, self.table.num_tokens, self.table.unsure):
            column[rows] += drafts
        self.num_unsure += int(drafts.sum())

    def append(self, rows: Int32, token_ids: Int32) -> Int32:
        """The ids of tokens that steps have sampled. Returns how many are known of each row now."""
        table = self.table
        known = table.num_known[rows]
        table.token_ids[rows, known] = token_ids
        known = known + 1
        table.num_known[rows] = known
        for row in rows[np.minimum(known, table.num_computed[rows]) >= table.publish_at[rows]].tolist():
            self.publish(row, int(table.num_computed[row]))
        return known

    def append_run(self, row: int, token_ids: list[int], num_drafts: int, num_wrong: int) -> int:
        """As `append`, for the tokens that a step with drafts brought one row: what was expected and did not come is
        not there. Returns how many are known now.
        """
        table = self.table
        known = int(table.num_known[row])
        end = known + len(token_ids)
        table.token_ids[row, known:end] = token_ids
        table.num_known[row] = end
        if num_wrong:
            table.num_tokens[row] -= num_wrong
            table.num_computed[row] -= num_wrong
        if num_drafts:
            table.unsure[row] -= num_drafts
            self.num_unsure -= num_drafts
        if min(end, table.num_computed[row]) >= table.publish_at[row]:
            self.publish(row, int(table.num_computed[row]))
        return end

    def publish(self, row: int, num_computed: int) -> None:
        """Makes a row's pages findable as far as their tokens are known, and computed before or in this step: whoever
        finds them may use them in the same step, because every layer stores all of a step's keys and values before it
        attends to any.
        """
        table, size = self.table, self._page_size
        sequence = table.sequences[row]
        assert sequence is not None
        if num_computed < table.publish_at[row]:
            return
        first = int(table.publish_at[row]) // size - 1
        end = min(num_computed, int(table.num_known[row])) // size
        self.pages.publish(sequence.page_table, table.token_ids[row], first, end, sequence.spec.sampling.lora_name)
        table.publish_at[row] = (end + 1) * size

    # ---- what it looks like

    def headroom(self) -> int:
        """Pages to leave alone at admission: one for each running sequence that will grow, so that a start does not
        cost a preemption soon.
        """
        return self.table.num_growing * len(self.pages.windows)

    def live_tokens(self) -> int:
        """Slots of held pages that hold a token, in every group; a page shared by several sequences counts once."""
        rows, table = self.rows, self.table
        unused = int((table.capacity[rows] - np.minimum(table.num_computed[rows], table.capacity[rows])).sum())
        return self.pages.pool.num_held * self._page_size - unused * len(self.pages.windows)

    def _surely_computed(self, row: int) -> int:
        return int(self.table.num_computed[row] - self.table.unsure[row])

    def check(self) -> None:
        """Raises AssertionError if an invariant is broken. O(pages + sequences)."""
        self.pages.check(runner.page_table for runner in self.runners)
        assert self.rows.tolist() == [runner.row for runner in self.runners]
        assert self.num_unsure == self.table.unsure.sum()
        for runner in self.runners:
            assert (
                runner.leader.status is Status.RUNNING
                and runner.row is not None
                and self.table.sequences[runner.row] is runner
            )
            assert self.table.capacity[runner.row] == len(runner.page_table) * self._page_size
            for window, num_gone in zip(self.pages.windows, runner.page_table.num_gone, strict=True):
                kept = 0 if window is None else first_kept(self._surely_computed(runner.row), window, self._page_size)
                assert num_gone <= kept, "a page is gone that a window reaches"
            assert self.table.num_computed[runner.row] <= self.table.capacity[runner.row], (
                "computed tokens without a slot"
            )
            assert (
                0
                <= self.table.unsure[runner.row]
                <= self.table.num_tokens[runner.row] - self.table.num_known[runner.row]
            ), "drafts in flight that no step has"
