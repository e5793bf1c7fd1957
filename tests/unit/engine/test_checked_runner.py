"""debug_checks: a step that would leave its pages is never launched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from paged_backend.batch import Batch, NewRow, StepResult, TokenEdit
from paged_backend.engine.checked_runner import BrokenStepError, CheckedRunner, TableBounds
from paged_backend.request import SamplingParams

BOUNDS = TableBounds(num_rows=4, num_pages=10, page_size=4, max_model_len=20, max_batched_tokens=16)


class Launched:
    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def launch(self, batch: Batch) -> None:
        self.batches.append(batch)

    def finished(self, keep: int) -> Iterator[tuple[Batch, StepResult]]:
        return iter(())


def step(*sequences: tuple[int, int, int], pages: tuple[tuple[int, int, int], ...] = (), new: bool = True) -> Batch:
    """sequences: (row, start, count); pages: (row, index, page)."""
    rows, starts, counts = (np.array(column, np.int32) for column in zip(*sequences, strict=True))
    new_rows = (
        tuple(
            NewRow(row, np.zeros(start + count, np.int32), 1, SamplingParams(), 0, (), ())
            for row, start, count in sequences
        )
        if new
        else ()
    )
    updates = np.array(pages, np.int32).reshape(-1, 3)
    return Batch(1, rows, starts, counts, np.ones(len(rows), np.bool_), rows.astype(np.int64), new_rows, updates)


GOOD = step((0, 0, 6), (1, 0, 3), pages=((0, 0, 7), (0, 1, 9), (1, 0, 2)))
BROKEN = {
    "a page past the pool": (step((0, 0, 3), pages=((0, 0, 10),)), "pages .10., there are 10"),
    "a negative page": (step((0, 0, 3), pages=((0, 0, -1),)), "pages .-1., there are 10"),
    "an entry past the page table": (step((0, 0, 3), pages=((0, 5, 1),)), "a page table has 5 entries"),
    "a row that does not exist": (step((4, 0, 3), pages=((4, 0, 1),)), "rows .4., there are 4"),
    "a token without a page": (step((0, 0, 5), pages=((0, 0, 1),)), "row 0 has no page for position 4"),
    "a token past the longest sequence": (
        step((0, 19, 2), pages=tuple((0, index, index) for index in range(5))),
        "position 20",
    ),
    "more tokens than the budget": (
        step((0, 0, 17), pages=tuple((0, index, index) for index in range(5))),
        "17 tokens in one step",
    ),
    "two sequences on one row": (step((0, 0, 1), (0, 0, 1), pages=((0, 0, 1),)), "a row twice"),
    "a page written twice": (
        step((0, 0, 3), (1, 0, 3), pages=((0, 0, 1), (1, 0, 1))),
        "page 1 is written by rows 0 and 1",
    ),
    "a copy past the pool": (
        replace(step((0, 0, 3), pages=((0, 0, 1),)), page_copies=np.array([[1, 10]], np.int32)),
        "page copies .*10.*, there are 10 pages",
    ),
    "a copy of two pages": (
        replace(step((0, 0, 3), pages=((0, 0, 1),)), page_copies=np.array([[2, 4], [3, 4]], np.int32)),
        "a page becomes a copy of two",
    ),
    "a copy of a copy": (
        replace(step((0, 0, 3), pages=((0, 0, 1),)), page_copies=np.array([[2, 3], [3, 4]], np.int32)),
        "copied and overwritten",
    ),
    "a token past the end of its row": (
        replace(step((0, 0, 3), pages=((0, 0, 1),)), token_edits=(TokenEdit(0, 19, np.zeros(2, np.int32)),)),
        "tokens at 19 to 21 change",
    ),
    "a page read while it is overwritten": (
        step((0, 4, 1), (1, 0, 3), pages=((0, 0, 3), (0, 1, 4), (1, 0, 3))),
        "page 3, which row 0 reads, is overwritten",
    ),
}


@pytest.mark.parametrize(("batch", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_step_out_of_bounds_is_never_launched(batch: Batch, reason: str) -> None:
    inner = Launched()
    with pytest.raises(BrokenStepError, match=reason):
        CheckedRunner(inner, BOUNDS, lambda: None).launch(batch)
    assert not inner.batches


def test_good_steps_are_launched_and_pages_are_remembered_from_step_to_step() -> None:
    inner = Launched()
    runner = CheckedRunner(inner, BOUNDS, lambda: None)
    runner.launch(GOOD)
    runner.launch(step((0, 6, 2), (1, 3, 1), new=False))
    with pytest.raises(BrokenStepError, match="row 1 has no page for position 4"):
        runner.launch(step((0, 8, 1), (1, 4, 1), pages=((0, 2, 1),), new=False))
    assert len(inner.batches) == 2


def test_a_sequence_on_a_row_used_before_has_none_of_its_predecessors_pages() -> None:
    runner = CheckedRunner(Launched(), BOUNDS, lambda: None)
    runner.launch(GOOD)
    with pytest.raises(BrokenStepError, match="row 0 has no page for position 4"):
        runner.launch(step((0, 0, 5), pages=((0, 0, 7),)))


def test_a_prompts_page_may_be_shared_in_the_step_that_fills_it_but_not_half_full() -> None:
    shared = step((0, 0, 6), (1, 4, 2), pages=((0, 0, 7), (0, 1, 8), (1, 0, 7), (1, 1, 9)))
    CheckedRunner(Launched(), BOUNDS, lambda: None).launch(shared)
    half = replace(shared, counts=np.array([3, 2], np.int32))
    with pytest.raises(BrokenStepError, match="page 7, which row 1 reads"):
        CheckedRunner(Launched(), BOUNDS, lambda: None).launch(half)


def test_what_else_is_wrong_is_asked_before_every_step() -> None:
    def broken() -> None:
        raise AssertionError("a page is free twice")

    inner = Launched()
    with pytest.raises(AssertionError, match="a page is free twice"):
        CheckedRunner(inner, BOUNDS, broken).launch(GOOD)
    assert not inner.batches
