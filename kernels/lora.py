"""Low-rank adapters of many sequences in one step: out[t] += B[a] . (A[a] . x[t]), with the adapter a of token t's
sequence.

Adapters lie in *adapter slots* of one size: `weights` [adapters, elements] is the memory of all, `ranks` [adapters] how
long each one's vectors are. An adapter of rank r takes the first r * (elements of rank 1) of its slot, so adapters of
any rank are moved by one copy and nothing is padded. Of a packed product with a weight [N, K], made of parts (q, k and
v; gate and up) whose rows add up to N, r * offset elements from the adapter's beginning lie A [parts r, K], and behind
it B [N, r]:

    adapter | ... | A of part 0, of part 1 ... | B of part 0, of part 1 ... | A of the next product ...
                ^ r * offset

Tokens are grouped by adapter once a step (`group_tokens`), in tiles of one adapter each; tokens without an adapter are
in no tile, and cost nothing. Then every product takes two launches: `adapter_shrink` multiplies tiles with A (long
sums, so they may be split; the parts are added in order, so that results do not depend on chance), `adapter_expand`
multiplies the result with B and adds it to the product. Sums are float32.
Sources: Hu et al., 2021 (LoRA); Chen et al., 2023 (Punica: SGMV); Sheng et al., 2023 (S-LoRA).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from paged_kernels import grouping
from paged_kernels.jit import kernel, pdl_begin, pdl_release, pdl_wait

_MAX_SPLIT = 8


@kernel(unaligned=["rows", "query_starts"])
def _assign_kernel(
    rows, query_starts, row_adapters, token_adapters, adapters_stride, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr
):
    pdl_begin(LAUNCH_PDL)
    sequence = tl.program_id(0)
    row = tl.load(rows + sequence).to(tl.int64)
    begin = tl.load(query_starts + sequence)
    end = tl.load(query_starts + sequence + 1)
    adapter = tl.load(row_adapters + row * adapters_stride, mask=row >= 0, other=-1)
    for at in range(begin, end, BLOCK):
        index = at + tl.arange(0, BLOCK)
        tl.store(token_adapters + index, tl.zeros([BLOCK], tl.int32) + adapter, mask=index < end)


@kernel(ints=["num_tokens", "offset"])
def _shrink_kernel(
    x, weights, ranks, order, tiles, hidden, num_tokens, offset, x_stride, weights_stride,
    K: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, LAUNCH_PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """COLUMNS of the hidden vectors of a tile's tokens: the sum over SPAN elements of x, the split-th of them."""
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)  # in every program: the next kernel takes our end for that of all before us
    tile = tiles + tl.program_id(0) * 3
    adapter = tl.load(tile)
    split = tl.program_id(2)
    if adapter >= 0:
        rank = tl.load(ranks + adapter)
        if tl.program_id(1) * COLUMNS < PARTS * rank:
            first = tl.load(tile + 1)
            position = tl.arange(0, TILE)
            known = (position < tl.load(tile + 2))[:, None]
            token = tl.load(order + first + position, mask=position < tl.load(tile + 2), other=0)
            column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            there = (column < PARTS * rank)[:, None]
            tokens_at = x + (token.to(tl.int64) * x_stride)[:, None]
            at = (
                weights
                + adapter.to(tl.int64) * weights_stride
                + rank.to(tl.int64) * offset
                + (column.to(tl.int64) * K)[:, None]
            )
            total = tl.zeros([TILE, COLUMNS], tl.float32)
            for begin in range(0, SPAN, BLOCK):
                element = split * SPAN + begin + tl.arange(0, BLOCK)
                inside = (element < K)[None, :]
                values = tl.load(tokens_at + element[None, :], mask=known & inside, other=0.0)
                a = tl.load(at + element[None, :], mask=there & inside, other=0.0)
                total = tl.dot(values, tl.trans(a), total, input_precision=PRECISION)
            place = (split * num_tokens + first + position).to(tl.int64)
            tl.store(
                hidden + (place * WIDTH)[:, None] + column[None, :],
                total,
                mask=known & (column < PARTS * rank)[None, :],
            )


@kernel(ints=["num_tokens", "offset"])
def _expand_kernel(
    hidden, weights, ranks, order, tiles, out, num_tokens, offset, weights_stride, out_stride,
    WIDTH: tl.constexpr, SIZE_0: tl.constexpr, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr, SPLIT: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, LAUNCH_PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """COLUMNS of the product of a tile's tokens, all of one part."""
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    tile = tiles + tl.program_id(0) * 3
    adapter = tl.load(tile)
    if adapter >= 0:
        rank = tl.load(ranks + adapter)
        first = tl.load(tile + 1)
        position = tl.arange(0, TILE)
        known = (position < tl.load(tile + 2))[:, None]
        token = tl.load(order + first + position, mask=position < tl.load(tile + 2), other=0)
        block = tl.program_id(1)
        end_0: tl.constexpr = (SIZE_0 + COLUMNS - 1) // COLUMNS
        end_1: tl.constexpr = end_0 + (SIZE_1 + COLUMNS - 1) // COLUMNS
        part = (block >= end_0).to(tl.int32) + (block >= end_1).to(tl.int32)
        block -= tl.where(part == 0, 0, tl.where(part == 1, end_0, end_1))
        size = tl.where(part == 0, SIZE_0, tl.where(part == 1, SIZE_1, SIZE_2))
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < size
        column += tl.where(part == 0, 0, tl.where(part == 1, SIZE_0, SIZE_0 + SIZE_1))
        at = (
            weights
            + adapter.to(tl.int64) * weights_stride
            + rank.to(tl.int64) * offset
            + (column.to(tl.int64) * rank)[:, None]
        )
        total = tl.zeros([TILE, COLUMNS], tl.float32)
        for begin in range(0, rank, RANKS):
            index = begin + tl.arange(0, RANKS)
            mask = (index < rank)[None, :]
            h = tl.zeros([TILE, RANKS], tl.float32)
            for split in range(SPLIT):
                place = (split * num_tokens + first + position).to(tl.int64)
                h += tl.load(
                    hidden + (place * WIDTH)[:, None] + (part * rank + index)[None, :], mask=known & mask, other=0.0
                )
            b = tl.load(at + index[None, :], mask=inside[:, None] & mask, other=0.0)
            total = tl.dot(h.to(b.dtype), tl.trans(b), total, input_precision=PRECISION)
        out_at = out + (token.to(tl.int64) * out_stride)[:, None] + column[None, :]
        wanted = known & inside[None, :]
        value = tl.load(out_at, mask=wanted, other=0.0).to(tl.float32) + total
        tl.store(out_at, value.to(out.dtype.element_ty), mask=wanted)


def tile_tokens(num_tokens: int) -> int:
    """Tokens of a tile in a step of so many: few where every token may have another adapter, more where prompts are
    read.
    """
    return 16 if num_tokens <= 256 else 32 if num_tokens <= 1024 else 64


def num_tiles(num_tokens: int, num_adapters: int) -> int:
    """Tiles that a step of so many tokens may need: full ones, and one of each adapter that is not."""
    return min(num_tokens, num_tokens // tile_tokens(num_tokens) + num_adapters)


def num_splits(num_tokens: int, num_columns: int) -> int:
    """Parts of adapter_shrink's sums in a step of so many tokens, each num_columns long: several where there is little
    else to do at once.
    """
    most = _MAX_SPLIT if num_tokens <= 64 else 2 if num_tokens <= 256 else 1
    return max(1, min(most, num_columns // 512))


def assign_adapters(
    rows: torch.Tensor,
    query_starts: torch.Tensor,
    row_adapters: torch.Tensor,
    token_adapters: torch.Tensor,
    *,
    launch_pdl: bool = False,
) -> None:
    """token_adapters[t] = row_adapters[rows[s]] for the tokens t of sequence s, query_starts[s] ... query_starts[s + 1]
    - 1; -1 for a row of -1, padding.

    rows: int32 [S]; query_starts: int32 [S + 1]; row_adapters: int32 [R], may be strided; token_adapters: int32 [T].
    launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads nothing before that kernel
        is complete.
    """
    _assign_kernel[(len(rows),)](
        rows,
        query_starts,
        row_adapters,
        token_adapters,
        row_adapters.stride(0),
        BLOCK=128,
        LAUNCH_PDL=launch_pdl,
        num_warps=1,
    )


def group_tokens(
    token_adapters: torch.Tensor,
    num_adapters: int,
    order: torch.Tensor,
    tiles: torch.Tensor,
    *,
    launch_pdl: bool = False,
) -> None:
    """Groups a step's tokens by adapter, in their order: order int32 [T] names the tokens of adapter 0, then of adapter
    1 ...; those of -1 are left out.

    What is behind the last is undefined. tiles int32 [num_tiles(T, num_adapters), 3]: adapter, first place in order and
    number of tokens of each; -1: no tile.

    token_adapters: int32 [T]. launch_pdl: as in `assign_adapters`.
    """
    grouping.group_by_owner(
        token_adapters, num_adapters, order, tiles, tile_tokens(len(token_adapters)), launch_pdl=launch_pdl
    )


def adapter_shrink(
    x: torch.Tensor, weights: torch.Tensor, ranks: torch.Tensor, order: torch.Tensor, tiles: torch.Tensor, offset: int,
    num_parts: int, hidden: torch.Tensor, *, launch_pdl: bool = False,
) -> None:  # fmt: skip
    """hidden[:, i, :parts r].sum(0) = A . x[order[i]] for the places i of each tile, with A [parts r, K] of the tile's
    adapter, whose rank is r.

    x: [T, K], rows contiguous; weights: [adapters, elements], of x's dtype; ranks: int32 [adapters]; order, tiles: as
    group_tokens left them; offset: elements of rank 1 before A. hidden: float32 [num_splits(T, K), T, parts * largest
    rank], contiguous; what belongs to no tile stays undefined.
    launch_pdl: as in `assign_adapters`. Raises ValueError for shapes and dtypes that do not fit.
    """
    (num_tokens, size), (splits, hidden_tokens, width) = x.shape, hidden.shape
    if (
        x.dtype != weights.dtype
        or x.stride(1) != 1
        or hidden_tokens != num_tokens
        or not hidden.is_contiguous()
        or width % num_parts
    ):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}, weights {weights.dtype} and hidden {tuple(hidden.shape)} of "
            f"{num_parts} parts do not fit each other"
        )
    columns, block = min(32, max(16, triton.next_power_of_2(width))), min(128, max(16, triton.next_power_of_2(size)))
    span = triton.cdiv(triton.cdiv(size, splits), block) * block
    _shrink_kernel[(len(tiles), triton.cdiv(width, columns), splits)](
        x, weights, ranks, order, tiles, hidden, num_tokens, offset, x.stride(0), weights.stride(0),
        K=size, PARTS=num_parts, WIDTH=width, TILE=tile_tokens(num_tokens), COLUMNS=columns, BLOCK=block, SPAN=span,
        LAUNCH_PDL=launch_pdl, PRECISION="ieee", num_warps=4,
    )  # fmt: skip


def adapter_expand(
    hidden: torch.Tensor, weights: torch.Tensor, ranks: torch.Tensor, order: torch.Tensor, tiles: torch.Tensor,
    offset: int, out_sizes: Sequence[int], out: torch.Tensor, *, launch_pdl: bool = False,
) -> None:  # fmt: skip
    """out[order[i]] += B . hidden[:, i].sum(0) for the places i of each tile: rows of B [N, r], and columns of out, of
    part p by the p-th r of hidden.

    hidden: as adapter_shrink left it; offset: elements of rank 1 before B; out_sizes: of the one to three parts,
    together N; out: [T, N], rows contiguous. Otherwise as `adapter_shrink`. The sum over the parts of hidden is rounded
    to the dtype of the weights, the result once more.
    """
    splits, num_tokens, width = hidden.shape
    if (
        out.shape != (num_tokens, sum(out_sizes))
        or out.dtype != weights.dtype
        or out.stride(1) != 1
        or width % len(out_sizes)
        or len(out_sizes) > 3
    ):
        raise ValueError(
            f"out {tuple(out.shape)} {out.dtype}, parts of {tuple(out_sizes)} and hidden {tuple(hidden.shape)} "
            "do not fit each other"
        )
    sizes = [*out_sizes, 0, 0][:3]
    columns = min(64 if num_tokens <= 256 else 128, max(16, triton.next_power_of_2(max(sizes))))
    ranks_at_once = min(64, max(16, triton.next_power_of_2(width // len(out_sizes))))
    _expand_kernel[(len(tiles), sum(triton.cdiv(size, columns) for size in sizes))](
        hidden, weights, ranks, order, tiles, out, num_tokens, offset, weights.stride(0), out.stride(0),
        WIDTH=width, SIZE_0=sizes[0], SIZE_1=sizes[1], SIZE_2=sizes[2], SPLIT=splits,
        TILE=tile_tokens(num_tokens), COLUMNS=columns, RANKS=ranks_at_once, LAUNCH_PDL=launch_pdl, PRECISION="ieee",
        num_warps=4,
    )  # fmt: skip
