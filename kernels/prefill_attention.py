"""Paged prefill attention: each sequence's newest tokens against all of its keys and values in the page pool, causally.

The picture. A program takes one KV head of one sequence and TOKENS new tokens, with all of the head's queries: row r of
its ROWS is query r % GROUP of token r // GROUP. It walks the sequence's keys in tiles of TILE tokens and keeps a
running softmax. Tiles that every row sees whole need no mask and make up the main loop; those that the causal diagonal
cuts come last, those that the window's edge cuts come first.

    keys      0 .......... first visible ......................... p0 ... p1      positions p0 to p1: the program's
    tokens tiles            | edge, masked |      whole, unmasked     | diagonal, masked |

The grid is a line of places: sequence s, whose queries begin at a, has those from a // TOKENS + s on, as far as the
next one's, which are enough for its tokens wherever it begins. So the places of a step are at most its tokens / TOKENS
and one for each sequence, however unequal the sequences are, and a program finds its sequence by counting those that
begin before. The tiles of a sequence with the most keys come first, so that the last programs to start are short ones.
Lengths are read on the device only.

Sources: FlashAttention-2 (Dao, 2023); all queries of a KV head in one tile: FlashInfer (Ye et al., 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.attention_layout import check_layout
from paged_kernels.device_traits import traits_of
from paged_kernels.jit import kernel

_ROOM_KIB = 200  # of shared memory, for 128 rows of heads of 256 and two tiles of 64 keys


@triton.jit
def _load_pages(pages, base, first_key, last_key, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The page ids of a tile's keys in [first_key, last_key]: [TILE], or one if a page holds whole tiles. Nothing is
    read if last_key < base.
    """
    if PAGE_SIZE >= TILE:
        page = tl.load(pages + base // PAGE_SIZE, mask=base <= last_key, other=0)
    else:
        key = base + tl.arange(0, TILE)
        page = tl.load(
            pages + base // PAGE_SIZE + tl.arange(0, TILE) // PAGE_SIZE,
            mask=(key >= first_key) & (key <= last_key),
            other=0,
        )
    return page


@triton.jit
def _attend(
    acc, m, l, queries, position, in_page, pages, begin, end, first_key, last_key, scale, soft_cap, page_stride,
    VALUE_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax (acc, m, l) after the tiles that begin in [begin, end), multiples of TILE; keys outside
    [first_key, last_key] are not read.

    m: the greatest score so far, before `scale`; l: the sum of exp2 of the scores in units of log 2, less m.
    """
    token = tl.arange(0, TILE)
    dim = tl.arange(0, HEAD_PAD)
    in_head = (dim < HEAD_DIM)[None, :]
    page = _load_pages(pages, begin, first_key, tl.where(begin < end, last_key, -1), PAGE_SIZE, TILE)
    for base in tl.range(begin, end, TILE):
        now_page = page
        # The page ids of the tile after this one, so that its keys' addresses are at hand when their turn to be copied
        # comes.
        page = _load_pages(pages, base + TILE, first_key, tl.where(base + TILE < end, last_key, -1), PAGE_SIZE, TILE)
        if PAGE_SIZE >= TILE:
            where = in_page + (now_page.to(tl.int64) * page_stride + (base % PAGE_SIZE) * HEAD_DIM)
        else:
            where = in_page + (now_page.to(tl.int64) * page_stride)[:, None]
        key = base + token
        to_read = (key >= first_key) & (key <= last_key)
        if MASKED:
            keys = tl.load(where, mask=to_read[:, None] & in_head, other=0.0)
            values = tl.load(where + VALUE_STRIDE, mask=to_read[:, None] & in_head, other=0.0)
        elif HEAD_PAD != HEAD_DIM:
            keys = tl.load(where, mask=in_head, other=0.0)
            values = tl.load(where + VALUE_STRIDE, mask=in_head, other=0.0)
        else:
            keys = tl.load(where)
            values = tl.load(where + VALUE_STRIDE)
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)

        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if SOFT_CAP:
            scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores * (scale * (2.0 * 1.4426950408889634) / soft_cap)) + 1.0))
            factor = 1.4426950408889634
        else:
            factor = scale * 1.4426950408889634
        if MASKED:
            visible = key[None, :] <= position[:, None]
            if WINDOW > 0:
                visible = visible & (key[None, :] > position[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        offset = new_m * factor
        if MASKED and WINDOW > 0:
            offset = tl.where(new_m == float("-inf"), 0.0, offset)  # a row that has seen no key yet
        weights = tl.exp2(scores * factor - offset[:, None])
        alpha = tl.exp2(m * factor - offset)
        l = l * alpha + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * alpha[:, None], input_precision=PRECISION)
        m = new_m
    return acc, m, l


@triton.jit
def sequence_at(place, query_starts, num_sequences, TOKENS: tl.constexpr):
    """The last sequence whose places begin at `place` or before. Places never begin before those of a sequence ahead,
    so counting finds it.
    """
    seq = place * 0
    if num_sequences > 1:
        for begin in range(0, num_sequences, 256):
            other = begin + tl.arange(0, 256)
            starts = tl.load(query_starts + other, mask=other < num_sequences, other=0)
            before = (other < num_sequences) & (starts // TOKENS + other <= place)
            seq += tl.sum(before.to(tl.int32), 0)
        seq = tl.maximum(seq - 1, 0)
    return seq


@kernel(ints=["table_stride", "num_sequences"], unaligned=["page_table", "query_starts", "seq_lens"])
def _prefill_kernel(
    q, kv_pages, page_table, query_starts, seq_lens, out, sinks, scale, soft_cap, q_stride, out_stride, table_stride,
    page_stride, num_sequences,
    HEADS: tl.constexpr, HEAD_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % HEADS
    place = tl.program_id(0) // HEADS
    seq = sequence_at(place, query_starts, num_sequences, TOKENS)
    query_start = tl.load(query_starts + seq)
    query_end = tl.load(query_starts + seq + 1)
    query_len = query_end - query_start
    seq_len = tl.load(seq_lens + seq)
    first_query = (query_end // TOKENS + seq - place) * TOKENS  # of the last tile at the first place
    if (first_query < 0) | (first_query >= query_len) | (seq_len == 0):
        return
    computed = seq_len - query_len  # tokens before the sequence's queries
    last_query = tl.minimum(first_query + TOKENS, query_len) - 1

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_PAD)
    query = first_query + row // GROUP
    to_store = (row < TOKENS * GROUP) & (query <= last_query)
    # rows that stand for nothing repeat the last token, so that no row is without keys
    query = tl.minimum(query, last_query)
    at = (head * GROUP + row % GROUP) * HEAD_DIM
    token = (query_start + query).to(tl.int64)
    queries = tl.load(q + (token * q_stride + at)[:, None] + dim[None, :], mask=(dim < HEAD_DIM)[None, :], other=0.0)
    position = computed + query
    first_position = computed + first_query
    last_position = computed + last_query

    in_page = kv_pages + head * HEAD_STRIDE + ((tl.arange(0, TILE) % PAGE_SIZE) * HEAD_DIM)[:, None] + dim[None, :]
    pages = page_table + seq.to(tl.int64) * table_stride
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    whole_end = (first_position + 1) // TILE * TILE
    first_key = 0
    whole_begin = 0
    if WINDOW > 0:
        first_key = tl.maximum(first_position + 1 - WINDOW, 0)
        begin = first_key // TILE * TILE
        whole_begin = tl.minimum((tl.maximum(last_position + 1 - WINDOW, 0) + TILE - 1) // TILE * TILE, whole_end)
        acc, m, l = _attend(
            acc, m, l, queries, position, in_page, pages, begin, whole_begin, first_key, last_position, scale, soft_cap,
            page_stride, VALUE_STRIDE, HEAD_DIM, HEAD_PAD, PAGE_SIZE, TILE, WINDOW, SOFT_CAP, True, PRECISION,
        )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, queries, position, in_page, pages, whole_begin, whole_end, first_key, last_position, scale, soft_cap,
        page_stride, VALUE_STRIDE, HEAD_DIM, HEAD_PAD, PAGE_SIZE, TILE, WINDOW, SOFT_CAP, False, PRECISION,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, queries, position, in_page, pages, whole_end, last_position + 1, first_key, last_position, scale,
        soft_cap, page_stride, VALUE_STRIDE, HEAD_DIM, HEAD_PAD, PAGE_SIZE, TILE, WINDOW, SOFT_CAP, True, PRECISION,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks + head * GROUP + row % GROUP).to(tl.float32)
        greatest = m if SOFT_CAP else m * scale
        # beyond 2^100 times the rest the rest is nothing, too
        l += tl.exp2(tl.minimum((sink - greatest) * 1.4426950408889634, 100.0))
    result = (acc * (1.0 / l)[:, None]).to(out.dtype.element_ty)
    tl.store(
        out + (token * out_stride + at)[:, None] + dim[None, :],
        result,
        mask=to_store[:, None] & (dim < HEAD_DIM)[None, :],
    )


@dataclass(frozen=True)
class PrefillShape:
    """How a launch is cut: query rows (tokens × queries of a KV head) per program and keys per tile, both powers of
    two.
    """

    rows: int
    tile: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def _launch_shape(head_dim: int, q: torch.Tensor, num_rows: int) -> PrefillShape:
    """Tuned on an H100 for 16-bit numbers, and on nothing where shared memory is short; float32 has no tensor core to
    feed and is here to be compared with.
    """
    head_pad = triton.next_power_of_2(head_dim)
    if q.dtype == torch.float32:
        return PrefillShape(32, 32, 4, 1)
    if head_pad > 128:
        has_room = traits_of(q.device).shared_kib >= _ROOM_KIB
        return PrefillShape(128, 64, 8, 2) if has_room else PrefillShape(64, 32, 8, 2)
    if num_rows <= 64:
        return PrefillShape(64, 64, 4, 3)
    if head_pad <= 64:
        # registers for two programs on a multiprocessor: one softens scores while the other multiplies
        return PrefillShape(128, 128, 8, 3, 128)
    return PrefillShape(128, 64, 8, 3)


def paged_prefill_attention(
    q: torch.Tensor, kv_pages: torch.Tensor, page_table: torch.Tensor, query_starts: torch.Tensor,
    seq_lens: torch.Tensor, out: torch.Tensor, *, max_query_len: int, scale: float, sliding_window: int = 0,
    soft_cap: float = 0.0, sinks: torch.Tensor | None = None, shape: PrefillShape | None = None,
) -> None:  # fmt: skip
    """out[t, h] = softmax(cap(q[t, h] . K * scale)) . V over the keys of t's sequence up to t's own, the last
    `sliding_window` of them (0 = all).

    q, out: [num_tokens, num_q_heads, head_dim], rows may be strided; rows outside every sequence are left as they are.
    kv_pages: [num_pages, 2, num_kv_heads, page_size, head_dim], keys then values, those of the query tokens included;
    page_size a power of two. page_table: int32 [num_sequences, max_pages]; entries past a sequence's length are never
    read. query_starts: int32 [num_sequences + 1], where each sequence's queries begin in q and where the last one's
    end; equal neighbours mean no queries. seq_lens: int32 [num_sequences], tokens including the queries, which are a
    sequence's newest; 0: padding, its rows of out are left as they are. max_query_len: at least the greatest number of
    queries of a sequence, which only chooses a launch. q and out of one dtype (bfloat16, float16 or float32; sums in
    float32), in which K and V are taken, whatever type the store has; rows aligned to 16 bytes.
    cap(x) = soft_cap * tanh(x / soft_cap), or x if soft_cap is 0; scale > 0. sinks: [num_q_heads], any floating dtype:
    a score more for each head, of a token without a value. shape overrides the tuned launch (tests, benchmarks).
    Raises ValueError if tensors do not fit each other.
    """
    _check(q, kv_pages, page_table, query_starts, seq_lens, out)
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.stride(0) != 1):
        raise ValueError(f"sinks {tuple(sinks.shape)} are not one for each of {q.shape[1]} query heads, side by side")
    num_kv_heads, page_size, head_dim = kv_pages.shape[2:]
    group = q.shape[1] // num_kv_heads
    num_sequences = seq_lens.shape[0]
    if num_sequences == 0 or max_query_len <= 0:
        return
    shape = shape or _launch_shape(head_dim, q, max_query_len * group)
    rows = max(shape.rows, triton.next_power_of_2(group))
    tokens = rows // group
    _prefill_kernel[(num_kv_heads * (q.shape[0] // tokens + num_sequences),)](
        q, kv_pages, page_table, query_starts, seq_lens, out, q if sinks is None else sinks, scale, soft_cap,
        q.stride(0), out.stride(0), page_table.stride(0), kv_pages.stride(0), num_sequences,
        HEADS=num_kv_heads, HEAD_STRIDE=kv_pages.stride(2), VALUE_STRIDE=kv_pages.stride(1),
        GROUP=group, HEAD_DIM=head_dim, HEAD_PAD=max(16, triton.next_power_of_2(head_dim)), PAGE_SIZE=page_size,
        ROWS=rows, TOKENS=tokens, TILE=shape.tile, WINDOW=sliding_window, SOFT_CAP=soft_cap != 0.0,
        SINKS=sinks is not None, PRECISION="ieee", num_warps=shape.num_warps, num_stages=shape.num_stages,
        maxnreg=shape.max_registers,
    )  # fmt: skip


def _check(
    q: torch.Tensor,
    kv_pages: torch.Tensor,
    page_table: torch.Tensor,
    query_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
) -> None:
    _, two, num_kv_heads, _, head_dim = kv_pages.shape
    if two != 2 or q.shape[2] != head_dim or q.shape[1] % num_kv_heads or out.shape != q.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, out {tuple(out.shape)} and kv_pages {tuple(kv_pages.shape)} do not fit each other"
        )
    if not page_table.shape[0] == seq_lens.shape[0] == query_starts.shape[0] - 1:
        raise ValueError(
            f"{page_table.shape[0]} page table rows, {seq_lens.shape[0]} lengths and {query_starts.shape[0]} "
            "query starts do not fit each other"
        )
    check_layout(q, kv_pages, page_table, out)
