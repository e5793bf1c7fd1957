"""The rows in plain torch: what the host says about a step goes in, a step's inputs come out."""

from __future__ import annotations

import torch
from torch import Tensor


class RowOps:
    """Rows: a running sequence's place in persistent tensors (row_update.py)."""

    def write_spans(self, target: Tensor, spans: Tensor, values: Tensor) -> None:
        """target[row, column : column + length] = values[start : start + length] for every (row, column, start, length)
        of spans [k, 4]; row -1: padding.
        """
        for row, column, start, length in spans.tolist():
            if row >= 0:
                target[row, column : column + length] = values[start : start + length].to(target.dtype)

    def update_page_tables(self, page_tables: Tensor, updates: Tensor) -> None:
        """page_tables[row, index] = page for every (row, index, page) of updates [k, 3]; row -1: padding."""
        rows, index, pages = updates[updates[:, 0] >= 0].T
        page_tables[rows, index] = pages

    def gather_step(
        self,
        rows: Tensor,
        starts: Tensor,
        counts: Tensor,
        offsets: Tensor,
        history: Tensor,
        page_tables: Tensor,
        page_size: int,
        *,
        input_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        page_table: Tensor,
        seq_lens: Tensor,
    ) -> None:
        """A step's inputs from the rows' state: sequence s computes counts[s] tokens of rows[s] from position
        starts[s], as tokens offsets[s] ... of the step.

        rows, starts, counts, offsets [S]; history [R, H]; page_tables [R, P]. Written: input_ids, positions,
        slot_mapping [T]; seq_lens [S], the tokens after the step; page_table [S, W], the first entries of each row's. A
        row of -1 is padding: length 0, and for each of its tokens id 0, position 0, slot -1.
        """
        real = rows >= 0
        mine = rows.clamp(min=0)
        seq_lens.copy_(torch.where(real, starts + counts, 0))
        page_table.copy_(page_tables[mine, : page_table.shape[1]])
        which = torch.repeat_interleave(counts, output_size=len(input_ids))
        at = (starts - offsets)[which] + torch.arange(len(input_ids), dtype=torch.int32, device=rows.device)
        stored = real[which]
        at = torch.where(stored, at, 0)
        input_ids.copy_(torch.where(stored, history[mine[which], at], 0))
        positions.copy_(at)
        slot_mapping.copy_(
            torch.where(stored, page_tables[mine[which], at // page_size].long() * page_size + at % page_size, -1)
        )

    def write_tokens(self, history: Tensor, rows: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """history[rows[m], positions[m]] = token_ids[m]: [R, H], [M] distinct, [M], [M]. A row of -1 is padding."""
        stored = rows >= 0
        history[rows[stored], positions[stored]] = token_ids[stored].to(history.dtype)
