"""Paged decode attention: one new token per sequence, or a few, against its keys and values in the page pool.

The picture. Every sequence is cut into tiles of `tile` tokens and all tiles lie in one line. Work item s of a fixed
number of work items walks tiles [s * share, (s + 1) * share) of that line, for each KV head in a program of its own, in
one software-pipelined loop that runs on across the borders of sequences, so the memory pipe never drains. A sequence
that lies in one work item goes straight to `out`; pieces of one that several share go to a workspace, and the last of
its programs to arrive merges them by log-sum-exp, in the line's order, so results do not depend on who came last.

    line    | sequence 0 (8 tiles) | 1 (3)  |   sequence 2 (6)   |  ...
    work items   |   s0    |    s1    |    s2    |    s3    |             s1 finishes sequence 0 with s0, does all of 1,
    and begins 2

Drafts of a sequence are decodes of one more token each. With its newest token they make a run (decode_plan.py), which
lies on the line once: a program's tile of queries has the heads of all of them, each sees as far as its own token, and
keys and values are read once for all.

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
from paged_kernels.decode_pieces import merge_pieces, place_of_row, put_piece, put_whole
from paged_kernels.decode_plan import (
    AT_LENGTH,
    AT_RECORD,
    AT_RUN,
    AT_TILE,
    BEGUN_IN,
    BEGUN_TO,
    LAST_RUN,
    LAST_TO,
    RECORD_WORDS,
    DecodePlan,
    DecodeWorkspace,
    first_token,
    make_decode_plan,
    make_decode_workspace,
    packed_queries,
    plan_decode_attention,
)  # fmt: skip
from paged_kernels.decode_tile import attend, empty_sums, result_of, tokens_seen, tokens_to_read
from paged_kernels.jit import kernel, pdl_release, pdl_wait

__all__ = [
    "DecodePlan",
    "DecodeWorkspace",
    "make_decode_plan",
    "make_decode_workspace",
    "packed_queries",
    "paged_decode_attention",
    "plan_decode_attention",
]


@triton.jit
def load_pages(
    pages, base, length, before, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr
):  # fmt: skip
    """The page ids of a tile's tokens: [TILE], or one if a page holds whole tiles. Nothing is read if length is 0."""
    if PAGE_SIZE >= TILE:
        page = tl.load(pages + base // PAGE_SIZE, mask=length > 0, other=0)
    else:
        page = tl.load(
            pages + base // PAGE_SIZE + tl.arange(0, TILE) // PAGE_SIZE,
            mask=tokens_to_read(base, length, before, TILE, WINDOW),
            other=0,
        )
    return page


@kernel(ints=["table_stride"])
def _decode_kernel(
    q, kv_pages, page_table, out, sinks, line, starts, records, arrivals, partial_acc, partial_lse,
    scale, soft_cap, q_stride, out_stride, table_stride,
    HEADS: tl.constexpr, PAGE_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, MERGED_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr,
    ROWS: tl.constexpr, FEW_PARTS: tl.constexpr, PARTS: tl.constexpr, PACKED: tl.constexpr, LAUNCH_PDL: tl.constexpr,
    PLAN_SETTLED: tl.constexpr, COMPILED: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr,
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
    run = tl.load(start + AT_RUN)
    length = tl.load(start + AT_LENGTH)
    tile = tl.load(start + AT_TILE)
    begun_in = tl.load(start + BEGUN_IN)
    begun_to = tl.load(start + BEGUN_TO)
    first_run = run
    last_run = tl.load(start + LAST_RUN)
    last_to = tl.load(start + LAST_TO)
    q += head * (GROUP * HEAD_DIM)
    out += head * (GROUP * HEAD_DIM)
    kv_pages += head * HEAD_STRIDE

    token = tl.arange(0, TILE)
    cell = tl.arange(0, CELLS_PAD)
    row = tl.arange(0, ROWS)
    in_head = (cell < CELLS)[None, :]
    q_offset = place_of_row(tl.minimum(row, GROUP * QUERIES - 1)[:, None], q_stride, GROUP, HEAD_DIM, QUERIES)
    q_offset += cell[None, :] * (HEAD_DIM // CELLS)
    in_page = kv_pages + ((token % PAGE_SIZE) * CELLS)[:, None] + cell[None, :]  # a tile begins at a multiple of TILE

    before = run % QUERIES
    base = first_token(length - before, TILE, WINDOW) + tile * TILE
    pages = page_table + (run // QUERIES).to(tl.int64) * table_stride  # the last decode's: it has them all
    page = load_pages(pages, base, length, before, PAGE_SIZE, TILE, WINDOW)
    next_run = tl.load(records + (record + 1) * 2)
    next_length = tl.load(records + (record + 1) * 2 + 1)
    pdl_wait(LAUNCH_PDL and PLAN_SETTLED)

    m, ls, acc, odd = empty_sums(ROWS, TILE, CELLS_PAD, PACKED)
    came_last = begun_in * 0
    for step in range(count):
        now_run, now_length, now_tile, now_base, now_page = run, length, tile, base, page
        # The tile after this one. Its page ids are read before this tile's keys: loads return in order, and a load
        # behind them would come too late.
        ends = base + TILE >= length
        tile = tl.where(ends, 0, tile + 1)
        record = tl.where(ends, record + 1, record)
        run = tl.where(ends, next_run, run)
        length = tl.where(ends, next_length, length)
        before = run % QUERIES
        base = tl.where(ends, first_token(length - before, TILE, WINDOW), base + TILE)
        pages = page_table + (run // QUERIES).to(tl.int64) * table_stride
        page = load_pages(pages, base, tl.where(step + 1 < count, length, 0), before, PAGE_SIZE, TILE, WINDOW)
        next_run = tl.load(records + (record + 1) * 2)
        next_length = tl.load(records + (record + 1) * 2 + 1)

        now_before = now_run % QUERIES
        to_read = tokens_to_read(now_base, now_length, now_before, TILE, WINDOW)
        visible = tokens_seen(to_read, row, now_base, now_length, now_before, GROUP, TILE, WINDOW, QUERIES)
        asked = in_head
        if QUERIES > 1:
            asked = in_head & (row < GROUP * (now_before + 1))[:, None]
        if PAGE_SIZE >= TILE:
            where = in_page + (now_page.to(tl.uint32).to(tl.int64) * PAGE_STRIDE + (now_base % PAGE_SIZE) * CELLS)
        else:
            where = in_page + (now_page.to(tl.uint32).to(tl.int64) * PAGE_STRIDE)[:, None]
        now_first = (now_run // QUERIES - now_before).to(tl.int64)
        now_q = q + now_first * q_stride + q_offset
        queries = tl.load(now_q, mask=asked, other=0.0)
        wanted = to_read[:, None] & in_head
        keys = tl.load(where, mask=wanted, other=ZERO, eviction_policy="evict_first")
        values = tl.load(where + VALUE_STRIDE, mask=wanted, other=ZERO, eviction_policy="evict_first")

        m, ls, acc, odd = attend(queries, now_q + 1, asked, keys, values, visible, m, ls, acc, odd, scale, soft_cap,
                                 SOFT_CAP, PACKED, QUERIES, PRECISION)  # fmt: skip

        if ends | (step + 1 == count):
            begins = now_tile <= step
            result, m, l = result_of(m, ls, acc, odd, begins, sinks + head * GROUP, GROUP, SINKS, PACKED, QUERIES)
            num_rows = GROUP * (now_before + 1)
            if ends & begins:
                put_whole(result, num_rows, out + now_first * out_stride, out_stride, GROUP, HEAD_DIM, QUERIES)
            else:
                first, last = tl.where(begins, item, begun_in), tl.where(begins, last_to, begun_to)
                was_last = put_piece(result, m + tl.log2(l), num_rows, item, head, begins, first, last, arrivals,
                                     partial_acc, partial_lse, HEADS, GROUP * QUERIES, HEAD_DIM, COMPILED)  # fmt: skip
                came_last += was_last * tl.where(begins, 2, 1)
            m, ls, acc, odd = empty_sums(ROWS, TILE, CELLS_PAD, PACKED)

    if came_last > 0:
        merge_pieces(came_last, first_run, last_run, item, begun_in, begun_to, last_to, head, out, out_stride, arrivals,
                     partial_acc, partial_lse, HEADS, GROUP, MERGED_ROWS, HEAD_DIM, HEAD_PAD, FEW_PARTS, PARTS,
                     QUERIES)  # fmt: skip


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
    before, nor by one it did not wait for. Of a plan with runs, values of a run's own tokens must be finite: 0 times
    them is what they are to the tokens before. Raises ValueError if the tensors do not fit each other or the plan's
    workspace.
    """
    workspace = plan.workspace
    check_decode(q, kv_pages, page_table, out, workspace)
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.stride(0) != 1):
        raise ValueError(f"sinks {tuple(sinks.shape)} are not one for each of {q.shape[1]} query heads, side by side")
    packed = q.is_cuda and q.itemsize == 2 and kv_pages.itemsize == 1
    kv_pages = kv_pages.view(torch.int16) if packed else kv_pages
    constants = launch_constants(workspace, kv_pages.shape[3], packed)
    # wide heads become float32 in shared memory, too, where the last stage would not fit beside them
    grows = constants["HEAD_PAD"] > 128 and q.itemsize > kv_pages.itemsize > 1
    _decode_kernel[(workspace.num_work_items * workspace.num_kv_heads,)](
        q, kv_pages, page_table, out, q if sinks is None else sinks, plan.line, plan.starts, plan.records,
        workspace.arrivals, workspace.partial_acc, workspace.partial_lse,
        scale * 256 if packed else scale, soft_cap, q.stride(0), out.stride(0), page_table.stride(0),
        **constants, PAGE_STRIDE=kv_pages.stride(0), VALUE_STRIDE=kv_pages.stride(1), HEAD_STRIDE=kv_pages.stride(2),
        WINDOW=plan.sliding_window, SOFT_CAP=soft_cap != 0.0, SINKS=sinks is not None, LAUNCH_PDL=launch_pdl,
        PLAN_SETTLED=plan_settled, COMPILED=q.is_cuda, PRECISION="ieee", num_warps=workspace.num_warps,
        num_stages=workspace.num_stages - grows,
    )  # fmt: skip


def launch_constants(workspace: DecodeWorkspace, page_size: int, pairs: bool) -> dict[str, int]:
    """Constants of a launch that follow from a workspace. pairs: of K and V of 8 bits."""
    rows = triton.next_power_of_2(workspace.group * workspace.queries)
    merged = min(rows, max(16, triton.next_power_of_2(workspace.group)))  # at once: more do not fit into registers
    head_pad = max(32 if pairs else 16, triton.next_power_of_2(workspace.head_dim))
    return {
        "HEADS": workspace.num_kv_heads,
        "GROUP": workspace.group,
        "QUERIES": workspace.queries,
        "ROWS": max(16, rows),
        "HEAD_DIM": workspace.head_dim,
        "HEAD_PAD": head_pad,
        "PAGE_SIZE": page_size,
        "TILE": workspace.tile,
        "PACKED": pairs,
        "MERGED_ROWS": merged,
        "FEW_PARTS": max(2, 2048 // (merged * head_pad)),
        "PARTS": max(4, 8192 // (merged * head_pad)),
    }


def check_decode(
    q: torch.Tensor, kv_pages: torch.Tensor, page_table: torch.Tensor, out: torch.Tensor, workspace: DecodeWorkspace
) -> None:
    """Raises ValueError if the tensors do not fit each other or the workspace."""
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
