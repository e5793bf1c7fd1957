"""Attention of a step with one decoding token, from the QKV product to the heads' outputs, in one launch: what rope_kv
and decode_attention do in two.

The picture. A sequence is cut into tiles of `tile` tokens, and work item i has tiles [i * share, (i + 1) * share), for
each KV head in a program of its own. Keys and values lie in pages, but for the newest token's, which are still in the
QKV product: the program that has the last tile puts them into it in registers, and writes them into their page.

    tokens       |  tile 0  |  tile 1  |  tile 2  |  tile 3  |  tile 4 . newest|
    work items   |         i0          |         i1          |       i2        |

What earlier steps stored does not depend on the QKV product: a program reads a tile into registers while the kernel
that makes the product still runs, and only then waits for it. It begins with its last tile, so that the one with the
newest token is among those, and goes back to the first.

All programs of a KV head norm and rotate its query heads, in registers. Number d of a head is turned against its
partner p(d), for which the head is read a second time, in another order. Rounding is that of rope_kv, and pieces are
merged as in decode_attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.decode_attention import check_decode, launch_constants, load_pages
from paged_kernels.decode_pieces import merge_run, put_piece, put_whole
from paged_kernels.decode_plan import DecodeWorkspace, first_token
from paged_kernels.decode_tile import attend, empty_sums, result_of, tokens_to_read
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.lone_token import HeadRules, LoneToken
from paged_kernels.norm_value import Norm
from paged_kernels.rope_kv import check_heads, check_norms

MOST_QUERIES, WIDEST_HEAD = 16, 256  # query heads of a KV head, and numbers of a head, that registers have room for


@triton.jit
def _partner_of(dim, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of each number of a head: the place of the one it is turned against, which cosine and sine of the row of angles
    turn the two, and the sign of the sine. Three times [HEAD_PAD].
    """
    HALF: tl.constexpr = ROTARY // 2
    if INTERLEAVED:
        is_first = dim % 2 == 0
        partner, angle = dim ^ 1, dim // 2
    else:
        is_first = dim < HALF
        angle = tl.where(is_first, dim, dim - HALF)
        partner = tl.where(is_first, dim + HALF, dim - HALF)
    return partner, angle, tl.where(is_first, -1.0, 1.0)


@triton.jit
def _normed(x, shrink, weight, DTYPE: tl.constexpr, PLUS_ONE: tl.constexpr):
    """[heads, HEAD_PAD] float32, rounded to DTYPE twice (once with PLUS_ONE), float32 again."""
    if PLUS_ONE:
        x = (x * shrink) * (weight + 1.0)
    else:
        x = (x * shrink).to(DTYPE).to(tl.float32) * weight
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _load_heads(heads, dim, partner, asked, ROTARY: tl.constexpr):
    """The heads that begin at `heads` [heads, 1], and of each number the partner: [heads, HEAD_PAD] of their type."""
    x = tl.load(heads + dim[None, :], mask=asked, other=0.0)
    partners = x
    if ROTARY > 0:
        partners = tl.load(heads + partner[None, :], mask=asked & (dim < ROTARY)[None, :], other=0.0)
    return x, partners


@triton.jit
def _turned(
    x, partners, weight, partner_weight, cos, sin, eps,
    HEAD_DIM: tl.constexpr, NORM: tl.constexpr, PLUS_ONE: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Heads, normed and rotated: [heads, HEAD_PAD] of x's type."""
    DTYPE: tl.constexpr = x.dtype
    x, partners = x.to(tl.float32), partners.to(tl.float32)
    if NORM:
        shrink = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x = _normed(x, shrink, weight[None, :], DTYPE, PLUS_ONE)
        if ROTARY > 0:
            partners = _normed(partners, shrink, partner_weight[None, :], DTYPE, PLUS_ONE)
    if ROTARY > 0:
        x = x * cos[None, :] + partners * sin[None, :]
    return x.to(DTYPE)


@triton.jit
def _load_weight(weight, dim, partner, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr):
    """Of a norm, for a head's numbers and for their partners: [HEAD_PAD] float32 each."""
    own = tl.load(weight + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    of_partner = own
    if ROTARY > 0:
        of_partner = tl.load(weight + partner, mask=dim < ROTARY, other=0.0).to(tl.float32)
    return own, of_partner


@triton.jit
def _load_tile(
    in_page, page, base, length, in_head,
    PAGE_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Stored keys and values of a tile, [TILE, HEAD_PAD] each, 0 for the newest token's. Nothing is read if length is
    0.
    """
    if PAGE_SIZE >= TILE:
        where = in_page + (page.to(tl.uint32).to(tl.int64) * PAGE_STRIDE + (base % PAGE_SIZE) * HEAD_DIM)
    else:
        where = in_page + (page.to(tl.uint32).to(tl.int64) * PAGE_STRIDE)[:, None]
    stored = tl.arange(0, TILE) < length - 1 - base
    wanted = (stored & tokens_to_read(base, length, 0, TILE, WINDOW))[:, None] & in_head
    keys = tl.load(where, mask=wanted, other=0.0, eviction_policy="evict_first")
    values = tl.load(where + VALUE_STRIDE, mask=wanted, other=0.0, eviction_policy="evict_first")
    return keys, values


@kernel(unaligned=["positions", "slot_mapping", "seq_lens", "page_table"])
def _lone_kernel(
    qkv, q_weight, k_weight, rope_table, query_factors, positions, slot_mapping, seq_lens, kv_pages, page_table, out,
    sinks, arrivals, partial_acc, partial_lse, eps, scale, soft_cap, rope_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, PACKED: tl.constexpr,
    MERGED_ROWS: tl.constexpr, FEW_PARTS: tl.constexpr, PARTS: tl.constexpr, PAGE_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr, HEAD_STRIDE: tl.constexpr, NORM: tl.constexpr, PLUS_ONE: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, FACTORS: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, LAUNCH_PDL: tl.constexpr, STORE_SETTLED: tl.constexpr,
    COMPILED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL and not STORE_SETTLED)
    head = tl.program_id(0) % HEADS
    item = tl.program_id(0) // HEADS
    num_items = tl.num_programs(0) // HEADS
    length = tl.load(seq_lens)
    first = first_token(length, TILE, WINDOW)
    tiles = (length - first + TILE - 1) // TILE
    share = tl.maximum((tiles + num_items - 1) // num_items, 1)
    last_item = (tiles + share - 1) // share - 1
    if item > last_item:  # which is -1 for a length of 0
        pdl_wait(LAUNCH_PDL and STORE_SETTLED)  # whoever waits for this kernel relies on it having waited
        return
    end = tl.minimum((item + 1) * share, tiles)
    count = end - item * share
    base = first + (end - 1) * TILE

    token = tl.arange(0, TILE)
    dim = tl.arange(0, HEAD_PAD)
    row = tl.arange(0, ROWS)
    in_head = (dim < HEAD_DIM)[None, :]
    kv_pages += head * HEAD_STRIDE
    in_page = kv_pages + ((token % PAGE_SIZE) * HEAD_DIM)[:, None] + dim[None, :]  # a tile begins at a multiple of TILE
    page = load_pages(page_table, base, length, 0, PAGE_SIZE, TILE, WINDOW)
    next_base = tl.maximum(base - TILE, 0)
    next_page = load_pages(page_table, next_base, tl.where(count > 1, length, 0), 0, PAGE_SIZE, TILE, WINDOW)
    slot = tl.load(slot_mapping).to(tl.int64)
    position = tl.load(positions).to(tl.int64)
    keys, values = _load_tile(in_page, page, base, length, in_head, PAGE_STRIDE, VALUE_STRIDE, HEAD_DIM, PAGE_SIZE,
                              TILE, WINDOW)  # fmt: skip
    partner, cos, sin = dim, dim, dim
    q_scale, q_partner_scale, k_scale, k_partner_scale = dim, dim, dim, dim
    if ROTARY > 0:
        partner, angle, sign = _partner_of(dim, ROTARY, INTERLEAVED)
        angles = rope_table + position * rope_stride + angle
        cos = tl.load(angles, mask=dim < ROTARY, other=1.0)
        sin = tl.load(angles + ROTARY // 2, mask=dim < ROTARY, other=0.0) * sign
    if NORM:
        q_scale, q_partner_scale = _load_weight(q_weight, dim, partner, HEAD_DIM, ROTARY)
        k_scale, k_partner_scale = _load_weight(k_weight, dim, partner, HEAD_DIM, ROTARY)
    if FACTORS:
        factor = tl.load(query_factors + position)
    pdl_wait(LAUNCH_PDL and STORE_SETTLED)

    q_heads = qkv + (head * GROUP + tl.minimum(row, GROUP - 1))[:, None] * HEAD_DIM
    k_head = qkv + (HEADS * GROUP + head + tl.arange(0, 1))[:, None] * HEAD_DIM
    asked = (dim < tl.where(item == last_item, HEAD_DIM, 0))[None, :]
    x, partners = _load_heads(q_heads, dim, partner, in_head, ROTARY)
    key, key_partners = _load_heads(k_head, dim, partner, asked, ROTARY)
    value = tl.load(k_head + HEADS * HEAD_DIM + dim[None, :], mask=asked, other=0.0)
    queries = _turned(x, partners, q_scale, q_partner_scale, cos, sin, eps, HEAD_DIM, NORM, PLUS_ONE, ROTARY)
    if FACTORS:
        queries = (queries.to(tl.float32) * factor).to(DTYPE)
    if item == last_item:
        key = _turned(key, key_partners, k_scale, k_partner_scale, cos, sin, eps, HEAD_DIM, NORM, PLUS_ONE, ROTARY)
        target = kv_pages + slot // PAGE_SIZE * PAGE_STRIDE + slot % PAGE_SIZE * HEAD_DIM + dim[None, :]
        to_store = (dim < tl.where(slot >= 0, HEAD_DIM, 0))[None, :]
        tl.store(target, key, mask=to_store)
        tl.store(target + VALUE_STRIDE, value, mask=to_store)
        newest = (token == length - 1 - base)[:, None]
        keys = tl.where(newest, key, keys)
        values = tl.where(newest, value, values)

    m, ls, acc, odd = empty_sums(ROWS, TILE, HEAD_PAD, PACKED)
    for step in range(count):
        # The tile before this one is read before this one is multiplied, and the page ids of the next before it: loads
        # return in order.
        page, base_after = next_page, tl.maximum(next_base - TILE, 0)
        next_page = load_pages(page_table, base_after, tl.where(step + 2 < count, length, 0), 0, PAGE_SIZE, TILE,
                               WINDOW)  # fmt: skip
        next_keys, next_values = _load_tile(in_page, page, next_base, tl.where(step + 1 < count, length, 0), in_head,
                                            PAGE_STRIDE, VALUE_STRIDE, HEAD_DIM, PAGE_SIZE, TILE, WINDOW)  # fmt: skip
        visible = tokens_to_read(base, length, 0, TILE, WINDOW)
        m, ls, acc, odd = attend(queries, q_heads, in_head, keys, values, visible, m, ls, acc, odd, scale, soft_cap,
                                 SOFT_CAP, PACKED, QUERIES, PRECISION)  # fmt: skip
        keys, values, base, next_base = next_keys, next_values, next_base, base_after

    result, m, l = result_of(m, ls, acc, odd, item == 0, sinks + head * GROUP, GROUP, SINKS, PACKED, QUERIES)
    out += head * (GROUP * HEAD_DIM)
    if last_item == 0:
        put_whole(result, GROUP, out, 0, GROUP, HEAD_DIM, QUERIES)
    else:
        was_last = put_piece(result, m + tl.log2(l), GROUP, item, head, item == 0, 0, last_item, arrivals, partial_acc,
                             partial_lse, HEADS, GROUP, HEAD_DIM, COMPILED)  # fmt: skip
        if was_last > 0:
            merge_run(0, last_item, GROUP, head, out, 0, arrivals, partial_acc, partial_lse, HEADS, GROUP, MERGED_ROWS,
                      HEAD_DIM, HEAD_PAD, FEW_PARTS, PARTS, QUERIES)  # fmt: skip


def computes(qkv: torch.Tensor, heads: HeadRules, kv_pages: torch.Tensor) -> bool:
    """Whether `lone_attention` is for such heads: stored in the product's type, normed one by one or not at all, not
    too wide and not too many to a KV head.
    """
    num_kv_heads, head_dim = kv_pages.shape[2], kv_pages.shape[4]
    return (
        qkv.dtype == kv_pages.dtype
        and head_dim <= WIDEST_HEAD
        and heads.num_heads <= MOST_QUERIES * num_kv_heads
        and all(len(norm.weight) == head_dim and not norm.partial for norm in heads.qk_norm or ())
    )


def lone_attention(
    qkv: torch.Tensor, heads: HeadRules, kv_pages: torch.Tensor, at: LoneToken, workspace: DecodeWorkspace,
    *, scale: float, sliding_window: int = 0, soft_cap: float = 0.0, sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None, launch_pdl: bool = False, store_settled: bool = False,
) -> torch.Tensor:  # fmt: skip
    """rope_kv.rope_write_kv of one token, then decode_attention.paged_decode_attention of its queries: returns out
    [1, num_heads, D].

    qkv: [1, (num_heads + 2 num_kv_heads) D], contiguous. kv_pages: [num_pages, 2, num_kv_heads, page_size, D], of qkv's
    dtype; page_size a power of two. The token's own slot is written and not read. A sequence of length 0 writes
    nothing, neither into pages nor to out. workspace: of one query to a run; nothing of it is kept.
    launch_pdl: begin while the kernel before drains (programmatic dependent launch), but read nothing before that
    kernel is complete; with store_settled, all is read earlier but qkv: only for when nothing else was written by the
    kernel before, nor by one it did not wait for. Raises ValueError for what does not fit or `computes` denies.
    """
    page_size, head_dim = kv_pages.shape[3:]
    out = qkv.new_empty(1, heads.num_heads, head_dim) if out is None else out
    check_heads(qkv, heads.num_heads, heads.rope_table, at.position, kv_pages, at.slot, out)
    check_decode(out, kv_pages, at.page_table, out, workspace)
    q_norm, k_norm = (Norm(qkv, 0.0),) * 2 if heads.qk_norm is None else heads.qk_norm
    if heads.qk_norm is not None:
        check_norms(q_norm, k_norm, head_dim)
    if at.seq_len.shape != (1,) or workspace.queries != 1 or not computes(qkv, heads, kv_pages):
        raise ValueError(
            f"qkv {tuple(qkv.shape)} {qkv.dtype} with kv_pages {kv_pages.dtype}, heads of {head_dim}, "
            f"{workspace.group} queries to each, in runs of {workspace.queries}: not of this kernel"
        )
    if sinks is not None and (sinks.shape != (heads.num_heads,) or sinks.stride(0) != 1):
        raise ValueError(f"sinks {tuple(sinks.shape)} are not one for each of {heads.num_heads} query heads")
    table, factors, added = (qkv if x is None else x for x in (heads.rope_table, heads.query_factors, sinks))
    _lone_kernel[(workspace.num_work_items * workspace.num_kv_heads,)](
        qkv, q_norm.weight, k_norm.weight, table, factors, at.position, at.slot, at.seq_len, kv_pages, at.page_table,
        out, added, workspace.arrivals, workspace.partial_acc, workspace.partial_lse, q_norm.eps, scale, soft_cap,
        table.stride(0),
        **launch_constants(workspace, page_size, False),
        PAGE_STRIDE=kv_pages.stride(0), VALUE_STRIDE=kv_pages.stride(1), HEAD_STRIDE=kv_pages.stride(2),
        NORM=heads.qk_norm is not None, PLUS_ONE=q_norm.plus_one,
        ROTARY=0 if heads.rope_table is None else heads.rope_table.shape[1], INTERLEAVED=heads.interleaved,
        FACTORS=heads.query_factors is not None, WINDOW=sliding_window, SOFT_CAP=soft_cap != 0.0,
        SINKS=sinks is not None, LAUNCH_PDL=launch_pdl, STORE_SETTLED=store_settled, COMPILED=qkv.is_cuda,
        PRECISION="ieee", num_warps=workspace.num_warps, num_stages=1,
    )  # fmt: skip
    return out
