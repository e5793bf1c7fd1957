"""Drafts for rows from their own text: what came after the last place where it went as it goes now.

One program for each row looks at up to NGRAM_SEARCHED of its newest tokens, in blocks. Source: prompt lookup decoding
(Saxena, 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_begin
from paged_kernels.reference_rows import NGRAM_LONGEST, NGRAM_SEARCHED, NGRAM_SHORTEST
from paged_kernels.row_update import MOST_DRAFTS


@kernel(unaligned=["rows", "counts"])
def _propose_ngram_kernel(
    history, lengths, rows, counts, history_stride,
    SEARCHED: tl.constexpr, LONGEST: tl.constexpr, SHORTEST: tl.constexpr, ALWAYS: tl.constexpr, BLOCK: tl.constexpr,
    PLACES: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """SHORTEST: so many tokens must be alike. ALWAYS: where fewer are, the newest token is written; or else nothing."""
    pdl_begin(LAUNCH_PDL)
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    count = tl.load(counts + tl.program_id(0))
    length = tl.load(lengths + row)
    tokens = history + row * history_stride
    first = tl.maximum(length - SEARCHED, 0)
    # of each lane, the best place: how many tokens before it are as the newest ones, and then the later the better
    best = tl.zeros([BLOCK], tl.int32)
    for begin in range(first + 1, length, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        alike = place < length
        num_alike = tl.zeros([BLOCK], tl.int32)
        for back in range(LONGEST):
            at = place - 1 - back
            alike = alike & (at >= first)
            newest = tl.load(tokens + length - 1 - back, mask=length - 1 - back >= first, other=-1)
            alike = alike & (tl.load(tokens + at, mask=alike, other=-2) == newest)
            num_alike += alike.to(tl.int32)
        best = tl.maximum(best, tl.where(num_alike >= SHORTEST, num_alike * (SEARCHED + 1) + place - first, 0))
    top = tl.max(best, 0)
    place = first + top % (SEARCHED + 1)
    draft = tl.arange(0, PLACES)
    # what goes beyond the newest token begins again at the place: a text that repeats itself
    source = tl.where(top > 0, place + draft % tl.maximum(length - place, 1), length - 1)
    mine = draft < tl.where((top > 0) | ALWAYS, count, 0)
    tl.store(tokens + length + draft, tl.load(tokens + source, mask=mine, other=0), mask=mine)


def propose_ngram(
    history: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, *, launch_pdl: bool = False
) -> None:
    """history[rows[i], length : length + counts[i]] = what follows the place in the row's newest NGRAM_SEARCHED tokens
    before which most of them, NGRAM_LONGEST at most, are the row's newest, length = lengths[rows[i]]; the last of such
    places. Where fewer than NGRAM_SHORTEST are, the newest token again and again.

    history: int32 [R, H]; lengths: int32 [R], at least 1; rows, distinct, and counts, up to MOST_DRAFTS: int32 [k].
    launch_pdl: as in row_update.write_spans.
    """
    _launch(history, lengths, rows, counts, NGRAM_SHORTEST, True, launch_pdl)


def propose_repeated(
    history: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, *, launch_pdl: bool = False
) -> None:
    """As `propose_ngram`, of rows whose newest NGRAM_LONGEST tokens all stand at another place; nothing is written of
    the others.
    """
    _launch(history, lengths, rows, counts, NGRAM_LONGEST, False, launch_pdl)


def _launch(
    history: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor, shortest: int, always: bool,
    launch_pdl: bool,
) -> None:  # fmt: skip
    if len(rows):
        _propose_ngram_kernel[(len(rows),)](
            history, lengths, rows, counts, history.stride(0),
            SEARCHED=NGRAM_SEARCHED, LONGEST=NGRAM_LONGEST, SHORTEST=shortest, ALWAYS=always, BLOCK=1024,
            PLACES=triton.next_power_of_2(MOST_DRAFTS), LAUNCH_PDL=launch_pdl, num_warps=8,
        )  # fmt: skip
