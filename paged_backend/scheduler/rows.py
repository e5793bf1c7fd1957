"""The table of rows: what every step touches of the sequences that run, in columns, so that a step over 256 of them is
a handful of array operations.

The same rows exist on the device (runner/step_tensors.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from paged_backend.arrays import Int32
from paged_backend.scheduler.sequence import Sequence, Status

_FREE = -1
_NEVER = int(np.iinfo(np.int32).max)


class Rows:
    """Columns of per-step facts, one row per running sequence.

    num_tokens counts a token from the moment its sampling is launched, num_known from the moment its id has come back;
    num_computed counts tokens whose K and V are in the pool or will be when the launched steps are over. Both are what
    they are at most: with drafts in flight `unsure` tokens of each may turn out not to be there.
    """

    def __init__(self, max_num_sequences: int, max_model_len: int, page_size: int) -> None:
        self.page_size = page_size
        self.sequences: list[Sequence | None] = [None] * max_num_sequences
        self.request_id = np.full(max_num_sequences, _FREE, np.int64)
        # Of the request that a row works for: a beam has no id that anybody else knows. The last is that of a request
        # without a row that is attended to.
        self.running_id = np.full(max_num_sequences + 1, _FREE, np.int64)
        self.token_ids = np.zeros((max_num_sequences, max_model_len + 1), np.int32)
        self.num_tokens = np.zeros(max_num_sequences, np.int32)
        self.num_known = np.zeros(max_num_sequences, np.int32)
        self.num_computed = np.zeros(max_num_sequences, np.int32)
        self.unsure = np.zeros(max_num_sequences, np.int32)  # drafts in flight
        self.length_limit = np.zeros(max_num_sequences, np.int32)
        self.capacity = np.zeros(max_num_sequences, np.int32)  # slots in held pages
        # computed tokens that make a page one which no window reaches any more
        self.release_at = np.zeros(max_num_sequences, np.int32)
        # known and computed tokens that make the next page publishable
        self.publish_at = np.zeros(max_num_sequences, np.int32)
        self.stop_ids = np.full((max_num_sequences, 4), -1, np.int32)  # widened on demand
        self.features = np.zeros(max_num_sequences, np.int32)
        self.unanswered = np.zeros(max_num_sequences, np.bool_)
        self._free = list(range(max_num_sequences - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def share_request_ids(self, path: Path) -> None:
        """Keeps `running_id` in a file from now on, int64 [num_rows + 1]."""
        shared = np.asarray(np.memmap(path, np.int64, "w+", shape=self.running_id.shape))
        shared[:] = self.running_id
        self.running_id = shared

    def attend_to(self, request_id: int | None) -> None:
        """A request without a row is looked at, or none any more: should this process die meanwhile, it may have been
        the cause.
        """
        self.running_id[-1] = _FREE if request_id is None else request_id

    def occupy(self, sequence: Sequence, num_computed: int) -> int:
        """Moves a waiting sequence, whose pages are held and whose first `num_computed` tokens are in them, onto a free
        row.
        """
        row = self._free.pop()
        spec, table, num_tokens = sequence.spec, sequence.page_table, len(sequence.token_ids)
        self.sequences[row] = sequence
        self.request_id[row] = spec.request_id
        self.running_id[row] = sequence.leader.request_id
        self.token_ids[row, :num_tokens] = sequence.token_ids
        self.num_tokens[row] = self.num_known[row] = num_tokens
        self.num_computed[row] = num_computed
        self.length_limit[row] = spec.length_limit
        self.capacity[row] = len(table) * self.page_size
        self.release_at[row] = 0
        self.publish_at[row] = _NEVER if table.salt is None else num_computed + self.page_size
        width = len(spec.stop_ids)
        if width > self.stop_ids.shape[1]:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, width - self.stop_ids.shape[1])), constant_values=-1)
        self.stop_ids[row, :width] = spec.stop_ids
        self.features[row] = spec.features
        self.unanswered[row] = not sequence.answered
        sequence.row, sequence.status = row, Status.RUNNING
        return row

    @property
    def num_growing(self) -> int:
        """Rows whose sequences may still need a page; asked once for each start, so nothing is gathered."""
        return int(np.count_nonzero(self.capacity < self.length_limit - 1))

    def token_ids_of(self, sequence: Sequence) -> Int32:
        """Its known tokens; a view."""
        assert sequence.row is not None
        return self.token_ids[sequence.row, : self.num_known[sequence.row]]

    def rewrite(self, sequence: Sequence, token_ids: Int32, num_computed: int) -> None:
        """Gives a row other tokens, all known, of which the first `num_computed` are in its sequence's pages. They are
        not for others to find.
        """
        row = sequence.row
        assert row is not None
        self.token_ids[row, : len(token_ids)] = token_ids
        self.num_tokens[row] = self.num_known[row] = len(token_ids)
        self.num_computed[row] = num_computed
        self.capacity[row] = len(sequence.page_table) * self.page_size
        self.release_at[row] = 0
        self.publish_at[row] = _NEVER

    def num_in_flight(self, row: int) -> int:
        """Launched steps whose tokens for that row have not come back."""
        return int(self.num_tokens[row] - self.unsure[row] - self.num_known[row])

    def vacate(self, sequence: Sequence) -> None:
        """Takes a sequence off its row; its known tokens go back into `sequence.token_ids`."""
        row = sequence.row
        assert row is not None
        sequence.token_ids = self.token_ids[row, : self.num_known[row]].copy()
        self.sequences[row] = None
        self.request_id[row] = self.running_id[row] = _FREE
        self.num_tokens[row] = self.num_known[row] = self.num_computed[row] = self.capacity[row] = 0
        self.length_limit[row] = self.unsure[row] = 0
        self.stop_ids[row] = -1
        self._free.append(row)
        sequence.row = None
