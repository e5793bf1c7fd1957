"""Prefill attention over latents: each sequence's newest tokens against the latents of its sequence in the page pool,
causally.

The picture is prefill_attention.py's: a program takes TOKENS new tokens of one sequence, with a block of heads each, on
a line of places where it finds its sequence. Row r of its ROWS is query r % GROUP of token r // GROUP.

    latents   0 .............................. p0 ... p1      positions p0 to p1: the program's tokens
    tiles     |      whole, unmasked          | diagonal, masked |

Queries are absorbed here, too (latent_tiles.py): a prompt's chunk needs no keys and values of heads made of the tokens
before it, at the price of products that are three times as long.
"""

from __future__ import annotations

import torch
import triton.language as tl

from paged_kernels.jit import kernel
from paged_kernels.latent_tiles import FEW_ROWS, attend_latents, check_latents, head_blocks, most_rows
from paged_kernels.prefill_attention import PrefillShape, sequence_at


@kernel(ints=["table_stride", "num_sequences"], unaligned=["page_table", "query_starts", "seq_lens"])
def _prefill_kernel(
    q, latent_pages, page_table, query_starts, seq_lens, out, scale, q_stride, out_stride, table_stride, num_sequences,
    BLOCKS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, ROTARY: tl.constexpr, PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = RANK + ROTARY
    block = tl.program_id(0) % BLOCKS
    place = tl.program_id(0) // BLOCKS
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
    dim = tl.arange(0, RANK)[None, :]
    turned = RANK + tl.arange(0, ROTARY)[None, :]
    query = first_query + row // GROUP
    to_store = (row < TOKENS * GROUP) & (query <= last_query)
    # rows that stand for nothing repeat the last token, so that no row is without keys
    query = tl.minimum(query, last_query)
    head = block * GROUP + row % GROUP
    token = (query_start + query).to(tl.int64)
    at = q + (token * q_stride + head * WIDTH)[:, None]
    queries, rotated = tl.load(at + dim), tl.load(at + turned)
    position = computed + query
    last_position = computed + last_query

    pages = page_table + seq.to(tl.int64) * table_stride
    acc = tl.zeros([ROWS, RANK], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    whole_end = (computed + first_query + 1) // TILE * TILE
    acc, m, l = attend_latents(
        acc, m, l, queries, rotated, position, latent_pages, pages, 0, whole_end, last_position, scale, RANK, ROTARY,
        PAGE_SIZE, TILE, False, PRECISION,
    )  # fmt: skip
    acc, m, l = attend_latents(
        acc, m, l, queries, rotated, position, latent_pages, pages, whole_end, last_position + 1, last_position, scale,
        RANK, ROTARY, PAGE_SIZE, TILE, True, PRECISION,
    )  # fmt: skip
    result = (acc * (1.0 / l)[:, None]).to(out.dtype.element_ty)
    tl.store(out + (token * out_stride + head * RANK)[:, None] + dim, result, mask=to_store[:, None])


def latent_prefill_attention(
    q: torch.Tensor, latent_pages: torch.Tensor, page_table: torch.Tensor, query_starts: torch.Tensor,
    seq_lens: torch.Tensor, out: torch.Tensor, *, scale: float, shape: PrefillShape | None = None,
) -> None:  # fmt: skip
    """out[t, h] = softmax(q[t, h] . latents * scale) . latents[:, :rank] over the tokens of t's sequence up to t.

    q: [num_tokens, num_heads, rank + rotary], absorbed queries, and out: [num_tokens, num_heads, rank], of one dtype
    (bfloat16, float16 or float32; sums in float32), in which latents are taken; rows may be strided and are aligned to
    16 bytes; rows outside every sequence are left as they are. latent_pages: [num_pages, page_size, rank + rotary],
    contiguous, those of the query tokens included; page_size, rank and rotary powers of two. page_table, query_starts,
    seq_lens: as of paged_prefill_attention. scale > 0. shape overrides the launch (tests, benchmarks). Raises
    ValueError if tensors do not fit each other.
    """
    _check(q, latent_pages, page_table, query_starts, seq_lens, out)
    rank, num_heads, num_sequences = out.shape[2], q.shape[1], seq_lens.shape[0]
    if num_sequences == 0:
        return
    # queries of 64 rows and three tiles of latents fill shared memory
    small = PrefillShape(FEW_ROWS, 16, 4, 1) if q.itemsize > 2 else PrefillShape(FEW_ROWS, 32, 4, 3)
    shape = shape or (small if most_rows(q.dtype, q.device) == FEW_ROWS else PrefillShape(64, 32, 8, 3))
    blocks = head_blocks(num_heads, shape.rows)
    group = num_heads // blocks
    tokens = shape.rows // group
    _prefill_kernel[(blocks * (q.shape[0] // tokens + num_sequences),)](
        q, latent_pages, page_table, query_starts, seq_lens, out, scale, q.stride(0), out.stride(0),
        page_table.stride(0), num_sequences,
        BLOCKS=blocks, GROUP=group, RANK=rank, ROTARY=q.shape[2] - rank, PAGE_SIZE=latent_pages.shape[1],
        ROWS=shape.rows, TOKENS=tokens, TILE=shape.tile, PRECISION="ieee", num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )  # fmt: skip


def _check(
    q: torch.Tensor, latent_pages: torch.Tensor, page_table: torch.Tensor, query_starts: torch.Tensor,
    seq_lens: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    check_latents(q, latent_pages, page_table, out)
    if not page_table.shape[0] == seq_lens.shape[0] == query_starts.shape[0] - 1:
        raise ValueError(
            f"{page_table.shape[0]} page table rows, {seq_lens.shape[0]} lengths and {query_starts.shape[0]} "
            "query starts do not fit each other"
        )
