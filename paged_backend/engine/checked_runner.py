"""`debug_checks`: a runner that looks at every step before it is launched, and stops the engine at the first mistake
rather than compute with it.

It keeps page tables of its own from what the scheduler says, so a page that is out of bounds, missing, or written by
two sequences is found on the host, before a kernel follows it into another request's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.batch import Batch, Drafts, StepResult, TokenMasks
from paged_backend.engine.engine import Runner


@dataclass(frozen=True)
class TableBounds:
    """What a batch must keep to."""

    num_rows: int
    num_pages: int
    page_size: int
    max_model_len: int
    max_batched_tokens: int
    windows: tuple[int | None, ...] = (None,)  # tokens that each KV group keeps of a sequence; None: all


class BrokenStepError(AssertionError):
    """A step that must not run; our bug, never a caller's. The message names row, position and page."""


class CheckedRunner:
    """Stands before another runner. Invariant: `_tables` has each row's page ids as the device will have them after the
    step, −1 where none was given.
    """

    def __init__(self, runner: Runner, bounds: TableBounds, check: Callable[[], None]) -> None:
        """check: raises AssertionError if something else is wrong; called before every step."""
        self._runner = runner
        self._bounds = bounds
        self._check = check
        width = -(-bounds.max_model_len // bounds.page_size)
        # of each KV group, side by side
        self._tables = np.full((bounds.num_rows, len(bounds.windows) * width), -1, np.int64)
        self._group_tables = np.split(self._tables, len(bounds.windows), axis=1)

    def launch(self, batch: Batch) -> None:
        """
        Raises:
            BrokenStepError: the batch is out of bounds; nothing was launched.
            AssertionError: `check` found something.
        """
        self._check()
        self._check_rows(batch)
        self._update_tables(batch)
        self._check_copies(batch)
        self._check_pages(batch)
        self._runner.launch(batch)

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        return self._runner.finished(keep)

    def _check_rows(self, batch: Batch) -> None:
        bounds, ends = self._bounds, batch.starts + batch.counts
        _require(len(set(batch.rows.tolist())) == len(batch.rows), f"a row twice in one step: {batch.rows.tolist()}")
        _require(_within(batch.rows, bounds.num_rows), f"rows {batch.rows.tolist()}, there are {bounds.num_rows}")
        _require(bool((batch.starts >= 0).all() and (batch.counts > 0).all()), "a sequence without tokens in a step")
        _require(
            bool((ends <= bounds.max_model_len).all()),
            f"position {int(ends.max()) - 1}, the longest sequence has {bounds.max_model_len} tokens",
        )
        if batch.drafts is not None:
            _check_speculation(batch, batch.drafts)
        _require(
            batch.num_tokens <= bounds.max_batched_tokens,
            f"{batch.num_tokens} tokens in one step, the budget is {bounds.max_batched_tokens}",
        )

    def _update_tables(self, batch: Batch) -> None:
        for new in batch.new_rows:
            _require(
                0 <= new.row < self._bounds.num_rows,
                f"a new sequence on row {new.row}, there are {self._bounds.num_rows}",
            )
            self._tables[new.row] = -1
        rows, indices, pages = batch.page_updates.T
        _require(
            _within(rows, self._bounds.num_rows),
            f"page updates of rows {rows.tolist()}, there are {self._bounds.num_rows}",
        )
        _require(
            _within(indices, self._tables.shape[1]),
            f"page updates at {indices.tolist()}, a page table has {self._tables.shape[1]} entries",
        )
        _require(
            _within(pages, self._bounds.num_pages),
            f"page updates to pages {pages.tolist()}, there are {self._bounds.num_pages}",
        )
        self._tables[rows, indices] = pages

    def _check_copies(self, batch: Batch) -> None:
        """Pages that become copies, and tokens that are replaced, are where they can be."""
        copies, num_pages = batch.page_copies, self._bounds.num_pages
        _require(_within(copies, num_pages), f"page copies {copies.tolist()}, there are {num_pages} pages")
        targets = copies[:, 1].tolist()
        _require(len(set(targets)) == len(targets), f"a page becomes a copy of two: {copies.tolist()}")
        _require(
            not set(targets) & set(copies[:, 0].tolist()),
            f"a page is copied and overwritten in one step: {copies.tolist()}",
        )
        for edit in batch.token_edits:
            end, limit = edit.start + len(edit.token_ids), self._bounds.max_model_len
            _require(
                0 <= edit.row < self._bounds.num_rows,
                f"tokens of row {edit.row} change, there are {self._bounds.num_rows} rows",
            )
            _require(
                edit.start >= 0 and end <= limit,
                f"tokens at {edit.start} to {end} change, the longest sequence has {limit}",
            )

    def _check_pages(self, batch: Batch) -> None:
        """Every token has a slot in every group, and nobody writes where another sequence of the step reads or
        writes.
        """
        size = self._bounds.page_size
        written: dict[int, tuple[int, int]] = {}  # page -> group, row
        lengths = dict(zip(batch.rows.tolist(), (batch.starts + batch.counts).tolist(), strict=True))
        # where a row's length is not known yet, the first position that it may begin at
        firsts = batch.starts if batch.drafts is None else batch.starts - batch.drafts.unsure
        starts = list(zip(batch.rows.tolist(), firsts.tolist(), strict=True))
        for group, table in enumerate(self._group_tables):
            for row, start in starts:
                first, end = self._first_read(group, start), -(-lengths[row] // size)
                pages = table[row, first:end]
                _require(
                    bool((pages >= 0).all()),
                    f"row {row} has no page for position {(first + int((pages < 0).argmax())) * size}",
                )
                for page in table[row, start // size : end].tolist():
                    _require(
                        page not in written,
                        f"page {page} is written by rows {written.get(page, (0, 0))[1]} and {row} in one step",
                    )
                    written[page] = group, row
        for group, table in enumerate(self._group_tables):
            for row, start in starts:
                for index in range(self._first_read(group, start), start // size):
                    page = int(table[row, index])
                    _require(
                        page not in written or self._reads_what_is_new(group, index, page, written[page], lengths),
                        f"page {page}, which row {row} reads, is overwritten",
                    )

    def _first_read(self, group: int, start: int) -> int:
        """Index of the first page that a token at that position attends to."""
        window = self._bounds.windows[group]
        return 0 if window is None else max(start - window + 1, 0) // self._bounds.page_size

    def _reads_what_is_new(
        self, group: int, index: int, page: int, writer: tuple[int, int], lengths: dict[int, int]
    ) -> bool:
        """A prompt's pages may be shared in the step that fills them: at the same place of both tables, and whole."""
        other, row = writer
        return bool(
            group == other
            and self._group_tables[group][row, index] == page
            and (index + 1) * self._bounds.page_size <= lengths[row]
        )


def _check_speculation(batch: Batch, drafts: Drafts) -> None:
    _require(
        bool((drafts.counts >= 0).all() and (drafts.counts < batch.counts).all()),
        f"{drafts.counts.tolist()} of {batch.counts.tolist()} tokens are drafts",
    )
    _require(
        bool((drafts.counts[~batch.samples] == 0).all()), "a sequence has drafts whose newest token is not computed"
    )
    _require(
        bool((drafts.unsure >= 0).all() and (drafts.unsure <= batch.starts).all()),
        f"the first positions {batch.starts.tolist()} may be {drafts.unsure.tolist()} less",
    )
    counts = dict(zip(batch.rows.tolist(), drafts.counts.tolist(), strict=True))
    sure = drafts.unsure == 0
    newest = dict(zip(batch.rows[sure].tolist(), batch.starts[sure].tolist(), strict=True))
    for edit in drafts.given:
        _require(
            edit.row in newest and edit.start == newest[edit.row] + 1 and len(edit.token_ids) == counts[edit.row],
            f"{len(edit.token_ids)} drafts at {edit.start} of row {edit.row} are not behind its newest token",
        )
    masks = batch.ask(TokenMasks)
    ahead = [] if masks is None else masks.ahead.tolist()
    expected = [[edit.row, place] for edit in drafts.given for place in range(1, counts[edit.row] + 1)]
    _require(sorted(ahead) == sorted(expected), f"masks behind drafts {sorted(ahead)}, of which there are {expected}")


def _within(values: Int32, end: int) -> bool:
    return bool(((values >= 0) & (values < end)).all())


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise BrokenStepError(message)
