"""Decode attention over latents: one new token per sequence against the latents of its sequence in the page pool.

The picture is decode_attention.py's: all sequences' tiles lie in one line, which work items share equally, and
decode_plan.py's plan says where each begins; a run is always a single decode. A program takes a block of heads instead
of a KV head: a tile of latents is read once for all of them. There is more to do for a tile than to read it, so that a
pipeline that is emptied at the border of two sequences costs little, and the loop is written as two: sequences, and
their tiles.

A sequence that lies in one work item goes straight to `out`; pieces of one that several share go to a workspace, and a
second launch merges them by log-sum-exp, in the line's order: a piece is as large as RANK numbers of every head in
float32, and one program alone would be long at it.

Sources: absorbed queries: DeepSeek-V2 (2024), section 2.1; a tile of keys that is the values, too: FlashMLA (DeepSeek,
    2025); the rest as in decode_attention.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.decode_plan import (
    AT_LENGTH,
    AT_RECORD,
    AT_RUN,
    AT_TILE,
    LAST_RUN,
    LAST_TO,
    RECORD_WORDS,
    DecodePlan,
    DecodeWorkspace,
)  # fmt: skip
from paged_kernels.device_traits import traits_of
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.latent_tiles import FEW_ROWS, attend_latents, check_latents, head_blocks, most_rows

_MERGED_HEADS = 4  # of a program that merges, and as many pieces at a time


@kernel(ints=["table_stride"])
def _decode_kernel(
    q, latent_pages, page_table, out, line, starts, records, partial_acc, partial_lse, scale, q_stride, out_stride,
    table_stride,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, ROTARY: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, LAUNCH_PDL: tl.constexpr, PLAN_SETTLED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = RANK + ROTARY
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL and not PLAN_SETTLED)
    block = tl.program_id(0) % BLOCKS
    item = tl.program_id(0) // BLOCKS
    share = tl.load(line)
    count = tl.minimum(tl.load(line + 1) - item * share, share)
    start = starts + item * RECORD_WORDS
    record = tl.load(start + AT_RECORD)
    seq = tl.load(start + AT_RUN)
    length = tl.load(start + AT_LENGTH)
    tile = tl.load(start + AT_TILE)
    pdl_wait(LAUNCH_PDL and PLAN_SETTLED)

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, RANK)[None, :]
    turned = RANK + tl.arange(0, ROTARY)[None, :]
    # rows beyond the block's heads repeat the last
    head = (block * GROUP + tl.minimum(row, GROUP - 1))[:, None]
    while count > 0:
        last_key = length - 1
        left = (length + TILE - 1) // TILE - tile
        now = tl.minimum(left, count)
        at = q + seq.to(tl.int64) * q_stride + head * WIDTH
        queries, rotated = tl.load(at + dim), tl.load(at + turned)
        position = last_key + row * 0
        begin, end = tile * TILE, tl.minimum((tile + now) * TILE, length)
        whole_end = end // TILE * TILE
        pages = page_table + seq.to(tl.int64) * table_stride
        acc = tl.zeros([ROWS, RANK], tl.float32)
        m = tl.full([ROWS], float("-inf"), tl.float32)
        l = tl.zeros([ROWS], tl.float32)
        acc, m, l = attend_latents(
            acc, m, l, queries, rotated, position, latent_pages, pages, begin, whole_end, last_key, scale, RANK, ROTARY,
            PAGE_SIZE, TILE, False, PRECISION,
        )  # fmt: skip
        acc, m, l = attend_latents(
            acc, m, l, queries, rotated, position, latent_pages, pages, whole_end, end, last_key, scale, RANK, ROTARY,
            PAGE_SIZE, TILE, True, PRECISION,
        )  # fmt: skip
        result = acc * (1.0 / l)[:, None]
        inside = row < GROUP
        if (tile == 0) & (now == left):
            target = out + seq.to(tl.int64) * out_stride + head * RANK + dim
            tl.store(target, result.to(out.dtype.element_ty), mask=inside[:, None])
        else:
            piece = ((2 * item + (tile == 0).to(tl.int32)) * BLOCKS + block) * GROUP + row
            tl.store(partial_lse + piece, m * (scale * 1.4426950408889634) + tl.log2(l), mask=inside)
            tl.store(partial_acc + piece[:, None] * RANK + dim, result, mask=inside[:, None])
        count -= now
        record += 1
        seq = tl.load(records + record * 2)
        length = tl.load(records + record * 2 + 1)
        tile = 0


@kernel
def _merge_kernel(
    out, starts, partial_acc, partial_lse, out_stride,
    HEADS: tl.constexpr, NUM_HEADS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """The pieces of the sequence that begins in a work item and ends in a later one, for HEADS of its heads."""
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    item = tl.program_id(0)
    start = starts + item * RECORD_WORDS
    last = tl.load(start + LAST_TO)
    if last > item:
        seq = tl.load(start + LAST_RUN)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        there = head < NUM_HEADS
        dim = tl.arange(0, RANK)
        m = tl.full([HEADS], float("-inf"), tl.float32)
        l = tl.zeros([HEADS], tl.float32)
        acc = tl.zeros([HEADS, RANK], tl.float32)
        for begin in range(item, last + 1, PARTS):
            at = begin + tl.arange(0, PARTS)
            piece = tl.where(at == item, 2 * at + 1, 2 * at)[:, None] * NUM_HEADS + head[None, :]
            wanted = (at <= last)[:, None] & there[None, :]
            lse = tl.load(partial_lse + piece, mask=wanted, other=float("-inf"))
            part = tl.load(
                partial_acc + piece[:, :, None] * RANK + dim[None, None, :], mask=wanted[:, :, None], other=0.0
            )
            new_m = tl.maximum(m, tl.max(lse, 0))
            offset = tl.where(there, new_m, 0.0)
            weight = tl.exp2(lse - offset[None, :])
            alpha = tl.exp2(m - offset)
            acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * part, 0)
            l = l * alpha + tl.sum(weight, 0)
            m = new_m
        target = out + seq.to(tl.int64) * out_stride + head[:, None] * RANK + dim[None, :]
        tl.store(target, (acc * (1.0 / tl.where(there, l, 1.0))[:, None]).to(out.dtype.element_ty), mask=there[:, None])


def make_latent_workspace(
    num_heads: int, rank: int, dtype: torch.dtype, device: torch.device, *, tile: int | None = None,
    num_work_items: int | None = None, num_warps: int | None = None, num_stages: int | None = None,
) -> DecodeWorkspace:  # fmt: skip
    """Allocate the scratch for a geometry; the keyword arguments override the launch shape (tests, benchmarks). dtype:
    of queries.

    Of 16-bit numbers a program has 64 rows, whose queries take 72 KiB of shared memory, and the latents of a tile of 32
    tokens 36 KiB: with three of them on their way no more than one program fits on a multiprocessor. Rows that stand
    for no head cost nothing that waiting for latents would not cost. Fewer rows: `most_rows`.
    """
    wide, most = dtype.itemsize > 2, most_rows(dtype, device)
    blocks = head_blocks(num_heads, most)
    multiprocessors = traits_of(device).num_multiprocessors
    items = num_work_items or max(1, multiprocessors // blocks)
    group = num_heads // blocks
    return DecodeWorkspace(
        num_kv_heads=blocks,
        group=group,
        queries=1,
        head_dim=rank,
        tile=tile or (16 if wide else 32),
        num_work_items=items,
        num_warps=num_warps or (4 if most == FEW_ROWS else 8),
        num_stages=num_stages or (1 if wide else 3),
        arrivals=torch.zeros(0, dtype=torch.int32, device=device),  # nobody waits for others
        partial_acc=torch.empty(2 * items, blocks, group, rank, dtype=torch.float32, device=device),
        partial_lse=torch.empty(2 * items, blocks, group, dtype=torch.float32, device=device),
    )


def latent_decode_attention(
    q: torch.Tensor, latent_pages: torch.Tensor, page_table: torch.Tensor, out: torch.Tensor, plan: DecodePlan, *,
    scale: float, launch_pdl: bool = False, plan_settled: bool = False,
) -> None:  # fmt: skip
    """out[s, h] = softmax(q[s, h] . latents[s] * scale) . latents[s, :, :rank], over all tokens of sequence s, as
    planned.

    q: [num_sequences, num_heads, rank + rotary], absorbed queries, and out: [num_sequences, num_heads, rank], of one
    dtype (bfloat16, float16 or float32; sums in float32), in which latents are taken; rows may be strided and are
    aligned to 16 bytes. latent_pages: [num_pages, page_size, rank + rotary], contiguous; page_size, rank and rotary
    powers of two. page_table: int32 [num_sequences, max_pages]; entries past a sequence's length are never read. scale
    > 0. Rows of length 0 are left as they are. launch_pdl, plan_settled: as of paged_decode_attention. Raises
    ValueError if the tensors do not fit each other or the plan's workspace.
    """
    workspace = plan.workspace
    rank, page_size = workspace.head_dim, latent_pages.shape[1]
    rotary = latent_pages.shape[2] - rank
    _check(q, latent_pages, page_table, out, workspace)
    num_heads, most = q.shape[1], most_rows(q.dtype, q.device)
    rows = most if q.is_cuda and most > FEW_ROWS else max(FEW_ROWS, triton.next_power_of_2(workspace.group))
    _decode_kernel[(workspace.num_work_items * workspace.num_kv_heads,)](
        q, latent_pages, page_table, out, plan.line, plan.starts, plan.records, workspace.partial_acc,
        workspace.partial_lse, scale, q.stride(0), out.stride(0), page_table.stride(0),
        BLOCKS=workspace.num_kv_heads, GROUP=workspace.group, RANK=rank, ROTARY=rotary, PAGE_SIZE=page_size,
        TILE=workspace.tile, ROWS=rows, LAUNCH_PDL=launch_pdl, PLAN_SETTLED=plan_settled, PRECISION="ieee",
        num_warps=workspace.num_warps, num_stages=workspace.num_stages,
    )  # fmt: skip
    _merge_kernel[(workspace.num_work_items, triton.cdiv(num_heads, _MERGED_HEADS))](
        out, plan.starts, workspace.partial_acc, workspace.partial_lse, out.stride(0),
        HEADS=_MERGED_HEADS, NUM_HEADS=num_heads, RANK=rank, PARTS=_MERGED_HEADS, LAUNCH_PDL=launch_pdl, num_warps=4,
    )  # fmt: skip


def _check(
    q: torch.Tensor, latent_pages: torch.Tensor, page_table: torch.Tensor, out: torch.Tensor, workspace: DecodeWorkspace
) -> None:
    check_latents(q, latent_pages, page_table, out)
    num_sequences, num_heads, _ = q.shape
    if (
        num_heads != workspace.num_kv_heads * workspace.group
        or out.shape[2] != workspace.head_dim
        or page_table.shape[0] != num_sequences
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, out {tuple(out.shape)} and page_table {tuple(page_table.shape)} do not fit "
            "each other or the workspace"
        )
