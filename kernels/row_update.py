"""Keeps the rows: what the host says about a step goes into the rows' state, a step's inputs come out of it, and
sampled tokens go back.

A *row* is a running sequence's place in persistent device tensors: `history` [rows, max_len] has its tokens,
`page_tables` [rows, max_pages] its pages. The host sends a step as slices of one small buffer; these kernels read the
slices where they lie. Everywhere a row of -1 is padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_begin

MOST_DRAFTS = 15  # of a row in a step
_BLOCK = 1024


@kernel(unaligned=["spans", "values"])
def _write_spans_kernel(
    target, spans, values, target_stride, spans_stride, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr
):
    pdl_begin(LAUNCH_PDL)
    span = spans + tl.program_id(0).to(tl.int64) * spans_stride
    row = tl.load(span).to(tl.int64)
    column = tl.load(span + 1).to(tl.int64)
    start = tl.load(span + 2).to(tl.int64)
    length = tl.where(row < 0, 0, tl.load(span + 3))
    for begin in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        index = begin + tl.arange(0, BLOCK)
        value = tl.load(values + start + index, mask=index < length)
        tl.store(target + row * target_stride + column + index, value.to(target.dtype.element_ty), mask=index < length)


@kernel(ints=["count"], unaligned=["updates"])
def _update_page_tables_kernel(
    page_tables, updates, count, tables_stride, updates_stride, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr
):
    pdl_begin(LAUNCH_PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    update = updates + index.to(tl.int64) * updates_stride
    row = tl.load(update, mask=index < count, other=-1).to(tl.int64)
    column = tl.load(update + 1, mask=row >= 0, other=0)
    page = tl.load(update + 2, mask=row >= 0, other=0)
    tl.store(page_tables + row * tables_stride + column, page, mask=row >= 0)


@kernel(ints=["count"], unaligned=["rows", "positions", "token_ids"])
def _write_tokens_kernel(
    history,
    num_tokens,
    rows,
    positions,
    token_ids,
    count,
    history_stride,
    BLOCK: tl.constexpr,
    COUNTS: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    pdl_begin(LAUNCH_PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + index, mask=index < count, other=-1).to(tl.int64)
    position = tl.load(positions + index, mask=row >= 0, other=0)
    token = tl.load(token_ids + index, mask=row >= 0, other=0)
    tl.store(history + row * history_stride + position, token.to(history.dtype.element_ty), mask=row >= 0)
    if COUNTS:
        tl.store(num_tokens + row, (position + 1).to(num_tokens.dtype.element_ty), mask=row >= 0)


@kernel(ints=["count"], unaligned=["rows", "positions", "token_ids", "input_ids"])
def _accept_tokens_kernel(
    history, lengths, rows, positions, token_ids, input_ids, out, count, history_stride,
    BLOCK: tl.constexpr, MOST_DRAFTS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    pdl_begin(LAUNCH_PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = index < count
    row = tl.load(rows + index, mask=mine, other=-1).to(tl.int64)
    token = tl.load(token_ids + index, mask=mine, other=0).to(tl.int32)
    # every draft of the row up to this token's input is what was sampled before it
    accepted = mine
    for back in range(MOST_DRAFTS):
        at = index - back
        follows = mine & (at > 0) & (row >= 0)
        follows = follows & (tl.load(rows + at - 1, mask=follows, other=-1).to(tl.int64) == row)
        sampled = tl.load(token_ids + at - 1, mask=follows, other=0).to(tl.int32)
        draft = tl.load(input_ids + at, mask=follows, other=0).to(tl.int32)
        accepted = accepted & ((follows == 0) | (sampled == draft))
    tl.store(out + index, tl.where(accepted, token, -1), mask=mine)
    stored = accepted & (row >= 0)
    position = tl.load(positions + index, mask=stored, other=0).to(tl.int32)
    tl.store(history + row * history_stride + position, token.to(history.dtype.element_ty), mask=stored)
    next_row = tl.load(rows + index + 1, mask=index + 1 < count, other=-1).to(tl.int64)
    next_draft = tl.load(input_ids + index + 1, mask=index + 1 < count, other=0).to(tl.int32)
    last = stored & ((next_row != row) | (next_draft != token))
    tl.store(lengths + row, position + 1, mask=last)


@kernel(ints=["table_stride"], unaligned=["rows", "starts", "counts", "offsets"])
def _gather_step_kernel(
    rows, starts, counts, offsets, history, page_tables, lengths,
    input_ids, positions, slot_mapping, page_table, seq_lens,
    history_stride, tables_stride, table_stride,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, LENGTHS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    pdl_begin(LAUNCH_PDL)
    sequence = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + sequence).to(tl.int64)
    real = row >= 0
    start = tl.where(real, tl.load(starts + sequence), 0)
    if LENGTHS:
        start = tl.where(start < 0, tl.load(lengths + row, mask=real, other=0) - 2 - start, start)
    count = tl.load(counts + sequence)
    offset = tl.load(offsets + sequence)
    known = tl.where(real, count, 0)
    length = start + known
    tl.store(seq_lens + sequence, length)
    for begin in range(0, count, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        mine = index < count
        position = tl.where(real, start + index, 0)
        page = tl.load(page_tables + row * tables_stride + position // PAGE_SIZE, mask=index < known, other=0)
        slot = tl.where(real, page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE, -1)
        token = tl.load(history + row * history_stride + position, mask=index < known, other=0)
        tl.store(input_ids + offset + index, token.to(input_ids.dtype.element_ty), mask=mine)
        tl.store(positions + offset + index, position.to(positions.dtype.element_ty), mask=mine)
        tl.store(slot_mapping + offset + index, slot.to(slot_mapping.dtype.element_ty), mask=mine)
    num_pages = (length + PAGE_SIZE - 1) // PAGE_SIZE
    for begin in range(0, num_pages, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        page = tl.load(page_tables + row * tables_stride + index, mask=index < num_pages, other=0)
        tl.store(page_table + sequence * table_stride + index, page, mask=index < num_pages)


def write_spans(target: torch.Tensor, spans: torch.Tensor, values: torch.Tensor, *, launch_pdl: bool = False) -> None:
    """target[row, column : column + length] = values[start : start + length] for every (row, column, start, length) of
    spans: new rows' prompts, pages, lists.

    target: [R, W] and values: [N], any dtypes that convert, last dimension contiguous. spans: int32 [k, 4], rows
    contiguous, not overlapping.
    launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads nothing before that kernel
        is complete.
    """
    if len(spans) == 0:
        return
    parts = min(8, triton.cdiv(target.shape[1], _BLOCK))
    _write_spans_kernel[(len(spans), parts)](
        target, spans, values, target.stride(0), spans.stride(0), BLOCK=_BLOCK, LAUNCH_PDL=launch_pdl, num_warps=4
    )


def update_page_tables(page_tables: torch.Tensor, updates: torch.Tensor, *, launch_pdl: bool = False) -> None:
    """page_tables[row, index] = page for every (row, index, page) of updates.

    page_tables: int32 [R, P]; updates: int32 [k, 3], rows contiguous, no (row, index) twice. launch_pdl: as in
        `write_spans`.
    """
    if len(updates) == 0:
        return
    block = 256
    _update_page_tables_kernel[(triton.cdiv(len(updates), block),)](
        page_tables,
        updates,
        len(updates),
        page_tables.stride(0),
        updates.stride(0),
        BLOCK=block,
        LAUNCH_PDL=launch_pdl,
        num_warps=min(8, block // 32),
    )


def write_tokens(
    history: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor,
    *, num_tokens: torch.Tensor | None = None, launch_pdl: bool = False,
) -> None:  # fmt: skip
    """history[rows[m], positions[m]] = token_ids[m], and num_tokens[rows[m]] = positions[m] + 1 if given.

    history: [R, H] and num_tokens: [R], int32 or int64; rows, positions, token_ids: [M] integers; rows distinct.
        launch_pdl: as in `write_spans`.
    """
    if len(rows) == 0:
        return
    block = min(_BLOCK, max(32, triton.next_power_of_2(len(rows))))
    _write_tokens_kernel[(triton.cdiv(len(rows), block),)](
        history, history if num_tokens is None else num_tokens, rows, positions, token_ids, len(rows),
        history.stride(0),
        BLOCK=block, COUNTS=num_tokens is not None, LAUNCH_PDL=launch_pdl, num_warps=min(8, block // 32),
    )  # fmt: skip


def accept_tokens(
    history: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor,
    input_ids: torch.Tensor, *, launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """As `write_tokens`, where a row may come several times, one after another: token m was sampled behind
    input_ids[m], which is a draft of the token before it unless it is the row's first. A row gets the tokens up to the
    first that its draft differs from, that one included; lengths becomes how many the row has.

    history: [R, H], lengths: int32 [R]; rows, positions, token_ids: [M] integers; input_ids: [M] at least, int32 or
    int64. A row comes MOST_DRAFTS + 1 times at most.
    Returns [M] int32: token_ids, -1 for those that no row gets. launch_pdl: as in `write_spans`.
    """
    out = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    if len(rows) == 0:
        return out
    block = min(256, max(32, triton.next_power_of_2(len(rows))))
    _accept_tokens_kernel[(triton.cdiv(len(rows), block),)](
        history, lengths, rows, positions, token_ids, input_ids, out, len(rows), history.stride(0),
        BLOCK=block, MOST_DRAFTS=MOST_DRAFTS, LAUNCH_PDL=launch_pdl, num_warps=block // 32,
    )  # fmt: skip
    return out


def gather_step(
    rows: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor, offsets: torch.Tensor, history: torch.Tensor,
    page_tables: torch.Tensor, page_size: int, *, input_ids: torch.Tensor, positions: torch.Tensor,
    slot_mapping: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor,
    lengths: torch.Tensor | None = None, launch_pdl: bool = False,
) -> None:  # fmt: skip
    """A step's inputs from the rows' state: sequence s computes counts[s] tokens of rows[s] from position starts[s], as
    tokens offsets[s] ... of the step.

    rows, starts, counts, offsets: int32 [S]. history: [R, H]; page_tables: int32 [R, P]. Written: input_ids, positions,
    slot_mapping [T]; seq_lens [S], the tokens after the step; page_table int32 [S, P], of each row only the entries of
    pages in use. A padding sequence gets length 0 and for each of its counts[s] tokens id 0, position 0 and slot -1.
    lengths: int32 [R], of the rows, in tokens; a start of -1 - j is the position j behind the row's newest token.
    launch_pdl: as in `write_spans`.
    """
    if len(rows) == 0:
        return
    _gather_step_kernel[(len(rows),)](
        rows, starts, counts, offsets, history, page_tables, rows if lengths is None else lengths, input_ids, positions,
        slot_mapping, page_table, seq_lens, history.stride(0), page_tables.stride(0), page_table.stride(0),
        PAGE_SIZE=page_size, BLOCK=256, LENGTHS=lengths is not None, LAUNCH_PDL=launch_pdl, num_warps=4,
    )  # fmt: skip
