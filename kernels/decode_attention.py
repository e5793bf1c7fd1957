"""Paged decode attention: one new token per sequence against its keys and values in the page pool.

The picture. Every sequence is cut into tiles of `tile` tokens and all tiles lie in one line. Work item s of a fixed
number of work items walks tiles [s * share, (s + 1) * share) of that line, for each KV head in a program of its own, in
one software-pipelined loop that runs on across the borders of sequences, so the memory pipe never drains. A sequence
that lies in one work item goes straight to `out`; pieces of one that several share go to a workspace, and the last of
its programs to arrive merges them by log-sum-exp, in the line's order, so results do not depend on who came last.

    line    | sequence 0 (8 tiles) | 1 (3)  |   sequence 2 (6)   |  ...
    work items   |   s0    |    s1    |    s2    |    s3    |             s1 finishes sequence 0 with s0, does all of 1,
    and begins 2

Keys and values of 8 bits come in pairs, as 16-bit numbers, of which tensor cores' operands are made with the
instructions that there are for those. Each number becomes two of float16, 2^-8 of the true ones, by moving bits; so a
head's even and odd dimensions are two products of half the depth.

The programs of a work item read the same pages at the same time, each its head: a page's heads are neighbours in
memory.

`plan_decode_attention` derives the line from the device's lengths once per step (and per sliding window); all layers
share the plan. No length is ever read by the host, the grid is fixed and nothing is allocated: both launches can be
captured in a CUDA graph.

Sources: split over KV: Flash-Decoding (Dao et al., 2023); the line cut in equal shares: Stream-K (Osama et al., 2023),
    FlashInfer (Ye et al., 2025).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.attention_layout import check_layout
from paged_kernels.decode_pieces import merge_pieces, put_piece
from paged_kernels.decode_plan import (
    AT_LENGTH,
    AT_RECORD,
    AT_SEQ,
    AT_TILE,
    BEGUN_IN,
    BEGUN_TO,
    LAST_SEQ,
    LAST_TO,
    RECORD_WORDS,
    DecodePlan,
    DecodeWorkspace,
    first_token,
    make_decode_plan,
    make_decode_workspace,
    plan_decode_attention,
)  # fmt: skip
from paged_kernels.jit import kernel, pdl_release, pdl_wait

__all__ = [
    "DecodePlan",
    "DecodeWorkspace",
    "make_decode_plan",
    "make_decode_workspace",
    "paged_decode_attention",
    "plan_decode_attention",
]


@triton.jit
def _visible(base, length, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Which tokens of the tile that begins at position `base` are to be read: [TILE]."""
    token = tl.arange(0, TILE)
    visible = token < length - base
    if WINDOW > 0:
        visible = visible & (token >= length - WINDOW - base)
    return visible


@triton.jit
def _load_pages(pages, base, length, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """The page ids of a tile's tokens: [TILE], or one if a page holds whole tiles. Nothing is read if length is 0."""
    if PAGE_SIZE >= TILE:
        page = tl.load(pages + base // PAGE_SIZE, mask=length > 0, other=0)
    else:
        page = tl.load(
            pages + base // PAGE_SIZE + tl.arange(0, TILE) // PAGE_SIZE,
            mask=_visible(base, length, TILE, WINDOW),
            other=0,
        )
    return page


@triton.jit
def _unpack(pairs):
    """Two float8_e4m3fn in each int16 as float16 of 2^-8 of their value: the lower byte's, the upper byte's. NaN
    becomes 480 * 2^-8.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, sign;
        shl.b32 low, $2, 7;
        shr.b32 high, $2, 1;
        shl.b32 sign, $2, 8;
        and.b32 low, low, 0x3f803f80;
        and.b32 high, high, 0x3f803f80;
        lop3.b32 $1, $2, 0x80008000, high, 0xea;
        lop3.b32 $0, sign, 0x80008000, low, 0xea;
        }""",
        "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _as_float16(x):
    """Of queries, which are never near its limits; should one be beyond them, it must not become an infinity."""
    return tl.clamp(x.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)


@triton.jit
def _softmax_step(scores, visible, m, scale, soft_cap, SOFT_CAP: tl.constexpr):
    """A step of online softmax (Milakov and Gimelshein, 2018) in base 2: the tile's weights, the new maximum m, and
    alpha, by which sums under the old maximum are to be multiplied.
    """
    if SOFT_CAP:
        scores = (
            soft_cap
            * (1.0 - 2.0 / (tl.exp2(scores * (scale * (2.0 * 1.4426950408889634) / soft_cap)) + 1.0))
            * 1.4426950408889634
        )
    else:
        scores = scores * (scale * 1.4426950408889634)
    scores = tl.where(visible[None, :], scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, 1))
    return tl.exp2(scores - new_m[:, None]), new_m, tl.exp2(m - new_m)


@triton.jit
def _attend(
    queries, odd_queries, in_head, keys, values, visible, m, ls, acc, odd, scale, soft_cap,
    SOFT_CAP: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes a tile in: the new m, ls, acc and odd. odd_queries: where the odd dimensions of the queries lie; of PACKED
    keys and values only.
    """
    if PACKED:
        even_keys, odd_keys = _unpack(tl.trans(keys))
        scores = tl.dot(_as_float16(queries), even_keys)
        scores = tl.dot(_as_float16(tl.load(odd_queries, mask=in_head, other=0.0)), odd_keys, scores)
    else:
        scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision=PRECISION)
    weights, m, alpha = _softmax_step(scores, visible, m, scale, soft_cap, SOFT_CAP)
    ls = ls * alpha[:, None] + weights
    if PACKED:
        even_values, odd_values = _unpack(values)
        acc = tl.dot(weights.to(tl.float16), even_values, acc * alpha[:, None])
        odd = tl.dot(weights.to(tl.float16), odd_values, odd * alpha[:, None])
    else:
        acc = tl.dot(
            weights.to(queries.dtype), values.to(queries.dtype), acc * alpha[:, None], input_precision=PRECISION
        )
    return m, ls, acc, odd


@triton.jit
def _result(m, ls, acc, odd, begins, sinks, GROUP: tl.constexpr, SINKS: tl.constexpr, PACKED: tl.constexpr):
    """What a piece of a sequence comes to, [ROWS, HEAD_PAD] float32, and its sum of softmax under m, [ROWS]."""
    ROWS: tl.constexpr = acc.shape[0]
    l = tl.sum(ls, 1)
    # counted once for a sequence, in the piece that begins it. Beyond 2^100 times the rest the rest is nothing, too
    if SINKS:
        sink = tl.load(sinks + tl.minimum(tl.arange(0, ROWS), GROUP - 1)).to(tl.float32) * 1.4426950408889634
        l += tl.where(begins, tl.exp2(tl.minimum(sink - m, 100.0)), 0.0)
    if PACKED:
        result = tl.reshape(tl.join(acc, odd), [ROWS, 2 * acc.shape[1]]) * (256.0 / l)[:, None]
    else:
        result = acc * (1.0 / l)[:, None]
    return result, l


@kernel(ints=["table_stride"])
def _decode_kernel(
    q, kv_pages, page_table, out, sinks, line, starts, records, arrivals, partial_acc, partial_lse,
    scale, soft_cap, q_stride, out_stride, table_stride,
    HEADS: tl.constexpr, PAGE_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr,
    ROWS: tl.constexpr, FEW_PARTS: tl.constexpr, PARTS: tl.constexpr, PACKED: tl.constexpr, LAUNCH_PDL: tl.constexpr,
    PLAN_SETTLED: tl.constexpr, COMPILED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    CELLS: tl.constexpr = HEAD_DIM // 2 if PACKED else HEAD_DIM  # of a head in the store: numbers, or pairs of them
    ZERO: tl.constexpr = 0 if PACKED else 0.0
    CELLS_PAD: tl.constexpr = max(16, HEAD_PAD // 2) if PACKED else HEAD_PAD
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL and not PLAN_SETTLED)
    head = tl.program_id(0) % HEADS
    item = tl.program_id(0) // HEADS
    share = tl.load(line)
    count = tl.minimum(tl.load(line + 1) - item * share, share)
    if count <= 0:
        pdl_wait(LAUNCH_PDL and PLAN_SETTLED)  # whoever waits for this kernel relies on it having waited
        return
    start = starts + item * RECORD_WORDS
    record = tl.load(start + AT_RECORD)
    seq = tl.load(start + AT_SEQ)
    length = tl.load(start + AT_LENGTH)
    tile = tl.load(start + AT_TILE)
    begun_in = tl.load(start + BEGUN_IN)
    begun_to = tl.load(start + BEGUN_TO)
    first_seq = seq
    last_seq = tl.load(start + LAST_SEQ)
    last_to = tl.load(start + LAST_TO)
    q += head * (GROUP * HEAD_DIM)
    out += head * (GROUP * HEAD_DIM)
    kv_pages += head * HEAD_STRIDE

    token = tl.arange(0, TILE)
    cell = tl.arange(0, CELLS_PAD)
    row = tl.arange(0, ROWS)
    in_head = (cell < CELLS)[None, :]
    q_offset = tl.minimum(row, GROUP - 1)[:, None] * HEAD_DIM + cell[None, :] * (HEAD_DIM // CELLS)
    in_page = kv_pages + ((token % PAGE_SIZE) * CELLS)[:, None] + cell[None, :]  # a tile begins at a multiple of TILE

    base = first_token(length, TILE, WINDOW) + tile * TILE
    page = _load_pages(page_table + seq.to(tl.int64) * table_stride, base, length, PAGE_SIZE, TILE, WINDOW)
    next_seq = tl.load(records + (record + 1) * 2)
    next_length = tl.load(records + (record + 1) * 2 + 1)
    pdl_wait(LAUNCH_PDL and PLAN_SETTLED)

    m = tl.full([ROWS], float("-inf"), tl.float32)
    # summed over its columns only when a sequence ends: a reduction across warps costs three barriers
    ls = tl.zeros([ROWS, TILE], tl.float32)
    acc = tl.zeros([ROWS, CELLS_PAD], tl.float32)
    odd = tl.zeros([ROWS, CELLS_PAD if PACKED else 1], tl.float32)
    came_last = begun_in * 0
    for step in range(count):
        now_seq, now_length, now_tile, now_base, now_page = seq, length, tile, base, page
        # The tile after this one. Its page ids are read before this tile's keys: loads return in order, and a load
        # behind them would come too late.
        ends = base + TILE >= length
        tile = tl.where(ends, 0, tile + 1)
        record = tl.where(ends, record + 1, record)
        seq = tl.where(ends, next_seq, seq)
        length = tl.where(ends, next_length, length)
        base = tl.where(ends, first_token(length, TILE, WINDOW), base + TILE)
        pages = page_table + seq.to(tl.int64) * table_stride
        page = _load_pages(pages, base, tl.where(step + 1 < count, length, 0), PAGE_SIZE, TILE, WINDOW)
        next_seq = tl.load(records + (record + 1) * 2)
        next_length = tl.load(records + (record + 1) * 2 + 1)

        visible = _visible(now_base, now_length, TILE, WINDOW)
        if PAGE_SIZE >= TILE:
            where = in_page + (now_page.to(tl.uint32).to(tl.int64) * PAGE_STRIDE + (now_base % PAGE_SIZE) * CELLS)
        else:
            where = in_page + (now_page.to(tl.uint32).to(tl.int64) * PAGE_STRIDE)[:, None]
        now_q = q + now_seq.to(tl.int64) * q_stride + q_offset
        queries = tl.load(now_q, mask=in_head, other=0.0)
        keys = tl.load(where, mask=visible[:, None] & in_head, other=ZERO, eviction_policy="evict_first")
        values = tl.load(
            where + VALUE_STRIDE, mask=visible[:, None] & in_head, other=ZERO, eviction_policy="evict_first"
        )

        m, ls, acc, odd = _attend(queries, now_q + 1, in_head, keys, values, visible, m, ls, acc, odd, scale, soft_cap,
                                  SOFT_CAP, PACKED, PRECISION)  # fmt: skip

        if ends | (step + 1 == count):
            begins = now_tile <= step
            result, l = _result(m, ls, acc, odd, begins, sinks + head * GROUP, GROUP, SINKS, PACKED)
            if ends & begins:
                dim = tl.arange(0, HEAD_PAD)
                target = out + now_seq.to(tl.int64) * out_stride + row[:, None] * HEAD_DIM + dim[None, :]
                tl.store(
                    target, result.to(out.dtype.element_ty), mask=(row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
                )
            else:
                first, last = tl.where(begins, item, begun_in), tl.where(begins, last_to, begun_to)
                was_last = put_piece(result, m + tl.log2(l), item, head, begins, first, last, arrivals,
                                     partial_acc, partial_lse, HEADS, GROUP, HEAD_DIM, COMPILED)  # fmt: skip
                came_last += was_last * tl.where(begins, 2, 1)
            m = tl.full([ROWS], float("-inf"), tl.float32)
            ls = tl.zeros([ROWS, TILE], tl.float32)
            acc = tl.zeros([ROWS, CELLS_PAD], tl.float32)
            if PACKED:
                odd = tl.zeros([ROWS, CELLS_PAD], tl.float32)

    if came_last > 0:
        merge_pieces(came_last, first_seq, last_seq, item, begun_in, begun_to, last_to, head, out, out_stride, arrivals,
                     partial_acc, partial_lse, HEADS, GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD, FEW_PARTS,
                     PARTS)  # fmt: skip


def paged_decode_attention(
    q: torch.Tensor, kv_pages: torch.Tensor, page_table: torch.Tensor, out: torch.Tensor, plan: DecodePlan,
    *, scale: float, soft_cap: float = 0.0, sinks: torch.Tensor | None = None, launch_pdl: bool = False,
    plan_settled: bool = False,
) -> None:  # fmt: skip
    """out[s, h] = softmax(cap(q[s, h] . K[s] * scale)) . V[s] over the last `sliding_window` tokens of sequence s, as
    planned.

    q, out: [num_sequences, num_q_heads, head_dim], rows may be strided. kv_pages: [num_pages, 2, num_kv_heads,
    page_size, head_dim], keys then values, with page_size a power of two. page_table: int32 [num_sequences, max_pages];
    entries past a sequence's length are never read. q and out of one dtype (bfloat16, float16 or float32; sums in
    float32), in which K and V are taken whatever type the store has (float8_e4m3fn beside 16-bit queries as float16,
    NaN as 480); rows aligned to 16 bytes. Rows of length 0 are left as they are. cap(x) = soft_cap * tanh(x /
    soft_cap), or x if soft_cap is 0.
    sinks: [num_q_heads], any floating dtype: a score more for each head, of a token without a value. launch_pdl: begin
    while the kernel before drains (programmatic dependent launch), but read nothing before that kernel is complete;
    with plan_settled, the plan and the page table are read earlier: only for when neither was written by the kernel
    before, nor by one it did not wait for. Raises ValueError if the tensors do not fit each other or the plan's
    workspace.
    """
    workspace = plan.workspace
    _check(q, kv_pages, page_table, out, workspace)
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.stride(0) != 1):
        raise ValueError(f"sinks {tuple(sinks.shape)} are not one for each of {q.shape[1]} query heads, side by side")
    page_size, head_dim = kv_pages.shape[3:]
    packed = q.is_cuda and q.itemsize == 2 and kv_pages.itemsize == 1
    group_pad, head_pad = (
        triton.next_power_of_2(workspace.group),
        max(32 if packed else 16, triton.next_power_of_2(head_dim)),
    )
    kv_pages = kv_pages.view(torch.int16) if packed else kv_pages
    # wide heads become float32 in shared memory, too, where the last stage would not fit beside them
    grows = head_pad > 128 and q.itemsize > kv_pages.itemsize > 1
    _decode_kernel[(workspace.num_work_items * workspace.num_kv_heads,)](
        q, kv_pages, page_table, out, q if sinks is None else sinks, plan.line, plan.starts, plan.records,
        workspace.arrivals, workspace.partial_acc, workspace.partial_lse,
        scale * 256 if packed else scale, soft_cap, q.stride(0), out.stride(0), page_table.stride(0),
        HEADS=workspace.num_kv_heads, PAGE_STRIDE=kv_pages.stride(0), VALUE_STRIDE=kv_pages.stride(1),
        HEAD_STRIDE=kv_pages.stride(2), GROUP=workspace.group, GROUP_PAD=group_pad, HEAD_DIM=head_dim,
        HEAD_PAD=head_pad, PAGE_SIZE=page_size, TILE=workspace.tile, WINDOW=plan.sliding_window,
        SOFT_CAP=soft_cap != 0.0, SINKS=sinks is not None, ROWS=max(16, group_pad),
        FEW_PARTS=max(2, 2048 // (group_pad * head_pad)), PARTS=max(4, 8192 // (group_pad * head_pad)), PACKED=packed,
        LAUNCH_PDL=launch_pdl, PLAN_SETTLED=plan_settled, COMPILED=q.is_cuda, PRECISION="ieee",
        num_warps=workspace.num_warps, num_stages=workspace.num_stages - grows,
    )  # fmt: skip


def _check(
    q: torch.Tensor, kv_pages: torch.Tensor, page_table: torch.Tensor, out: torch.Tensor, workspace: DecodeWorkspace
) -> None:
    num_sequences, num_q_heads, head_dim = q.shape
    _, two, num_kv_heads, _, kv_head_dim = kv_pages.shape
    if (two, num_kv_heads, kv_head_dim) != (2, workspace.num_kv_heads, workspace.head_dim) or head_dim != kv_head_dim:
        raise ValueError(
            f"kv_pages {tuple(kv_pages.shape)} do not fit the workspace's {workspace.num_kv_heads} KV heads of "
            f"{workspace.head_dim}"
        )
    if num_q_heads != num_kv_heads * workspace.group or out.shape != q.shape or page_table.shape[0] != num_sequences:
        raise ValueError(
            f"q {tuple(q.shape)}, out {tuple(out.shape)} and page_table {tuple(page_table.shape)} do not fit "
            "each other or the workspace"
        )
    check_layout(q, kv_pages, page_table, out)
    if kv_pages.itemsize == 1 and kv_pages.dtype != torch.float8_e4m3fn:
        raise ValueError(f"kv_pages {kv_pages.dtype}: of the types of 8 bits only float8_e4m3fn is known")
