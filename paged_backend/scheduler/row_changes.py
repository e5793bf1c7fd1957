"""What the device has to learn about rows with the next step, gathered until then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.batch import NewRow, TokenEdit


@dataclass
class RowChanges:
    """Invariant: a row's changes are those of the sequence that holds it now; `drop` forgets those of one that leaves it."""

    new_rows: list[NewRow] = field(default_factory=list)
    token_edits: list[TokenEdit] = field(default_factory=list)
    page_updates: list[tuple[int, int, int]] = field(default_factory=list)  # (row, index in its page table, page id)
    page_copies: list[tuple[int, int, int]] = field(default_factory=list)  # (row, page to be copied, page to be written)

    def drop(self, row: int) -> None:
        self.new_rows = [new for new in self.new_rows if new.row != row]
        self.token_edits = [edit for edit in self.token_edits if edit.row != row]
        self.page_updates = [update for update in self.page_updates if update[0] != row]
        self.page_copies = [copy for copy in self.page_copies if copy[0] != row]

    def take(self) -> dict[str, Any]:
        """As fields of a Batch; none are left."""
        taken = {
            "new_rows": tuple(self.new_rows),
            "token_edits": tuple(self.token_edits),
            "page_updates": _matrix(self.page_updates, 3),
            "page_copies": _matrix([copy[1:] for copy in self.page_copies], 2),
        }
        self.new_rows, self.token_edits, self.page_updates, self.page_copies = [], [], [], []
        return taken


def _matrix(entries: list[Any], width: int) -> Int32:
    return np.array(entries, np.int32).reshape(-1, width)
