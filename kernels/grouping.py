"""Grouping by owner: what belongs to adapter 0, then to adapter 1 …, or to expert 0, expert 1 …, in tiles that have one
owner each.

Few items take one launch: a program for each owner counts everybody's items and writes its own. Many take two: programs
count a chunk of items each, then each writes its chunk behind what the chunks before it have. Either way items keep
their order, so that results do not depend on chance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait

_AT_ONCE = 4096  # items that a program of one launch looks at together
_FEW = 16384  # items that one launch groups
_CHUNK = 512  # items of a program of two launches
_COMPARED = 8192  # items times owners that such a program compares at once
_TILES = 128  # that are written at once


@triton.jit
def _write_tiles(
    tiles, counts, owner, mine, max_tiles, TILE: tl.constexpr, NUM_OWNERS: tl.constexpr, TILES: tl.constexpr
):
    """The tiles of owner `mine`, of all owners' counts; the last owner also marks those that are left. Returns the
    first place of its items.
    """
    num_tiles = (counts + TILE - 1) // TILE
    count = tl.sum(tl.where(owner == mine, counts, 0), 0)
    first = tl.sum(tl.where(owner < mine, counts, 0), 0)
    first_tile = tl.sum(tl.where(owner < mine, num_tiles, 0), 0)
    end_tile = first_tile + (count + TILE - 1) // TILE
    for begin in range(0, end_tile - first_tile, TILES):
        index = begin + tl.arange(0, TILES)
        at = tiles + (first_tile + index) * 3
        wanted = first_tile + index < end_tile
        tl.store(at, tl.zeros([TILES], tl.int32) + mine, mask=wanted)
        tl.store(at + 1, first + index * TILE, mask=wanted)
        tl.store(at + 2, tl.minimum(count - index * TILE, TILE), mask=wanted)
    if mine == NUM_OWNERS - 1:
        for begin in range(end_tile, max_tiles, TILES):
            index = begin + tl.arange(0, TILES)
            tl.store(tiles + index * 3, tl.zeros([TILES], tl.int32) - 1, mask=index < max_tiles)
    return first


@triton.jit
def _counts(found, there, OWNERS: tl.constexpr):
    """How many of `found`, where `there`, each owner has: int32 [OWNERS]. Those of owner -1 are nobody's."""
    return tl.histogram(found, OWNERS, mask=there & (found >= 0))


@kernel(ints=["num_items", "max_tiles"])
def _group_kernel(
    owners, order, tiles, num_items, max_tiles, NUM_OWNERS: tl.constexpr, OWNERS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """One program an owner."""
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    mine = tl.program_id(0)
    owner = tl.arange(0, OWNERS)
    counts = tl.zeros([OWNERS], tl.int32)
    for begin in range(0, num_items, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        there = index < num_items
        counts += _counts(tl.load(owners + index, mask=there, other=-1), there, OWNERS)
    place = _write_tiles(tiles, counts, owner, mine, max_tiles, TILE, NUM_OWNERS, TILES)
    for begin in range(0, num_items, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        found = tl.load(owners + index, mask=index < num_items, other=-1)
        is_mine = (found == mine).to(tl.int32)
        tl.store(order + place + tl.cumsum(is_mine, 0) - 1, index, mask=is_mine > 0)
        place += tl.sum(is_mine, 0)


@kernel(ints=["num_items"])
def _count_kernel(owners, counts, num_items, OWNERS: tl.constexpr, CHUNK: tl.constexpr, LAUNCH_PDL: tl.constexpr):
    """One program a chunk of CHUNK items: counts[chunk, owner]."""
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    index = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    owner = tl.arange(0, OWNERS)
    there = index < num_items
    found = tl.load(owners + index, mask=there, other=-1)
    tl.store(counts + tl.program_id(0) * OWNERS + owner, _counts(found, there, OWNERS))


@kernel(ints=["num_items", "num_chunks", "max_tiles"])
def _place_kernel(
    owners, counts, order, tiles, num_items, num_chunks, max_tiles, NUM_OWNERS: tl.constexpr, OWNERS: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """Programs of chunks write their items, BLOCK at a time; as many behind them as there are owners write the
    tiles.
    """
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    chunk = tl.program_id(0)
    owner = tl.arange(0, OWNERS)
    total = tl.zeros([OWNERS], tl.int32)
    before = tl.zeros([OWNERS], tl.int32)
    for begin in range(0, num_chunks, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        found = tl.load(counts + other[:, None] * OWNERS + owner[None, :], mask=(other < num_chunks)[:, None], other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((other < chunk)[:, None], found, 0), 0)
    if chunk < num_chunks:
        first = tl.cumsum(total, 0) - total + before
        for begin in range(0, CHUNK, BLOCK):
            index = chunk * CHUNK + begin + tl.arange(0, BLOCK)
            found = tl.load(owners + index, mask=index < num_items, other=-1)
            is_of = (found[:, None] == owner[None, :]).to(tl.int32)
            place = tl.sum(is_of * (first[None, :] + tl.cumsum(is_of, 0) - 1), 1)
            tl.store(order + place, index, mask=(found >= 0) & (index < num_items))
            first += tl.sum(is_of, 0)
    else:
        _write_tiles(tiles, total, owner, chunk - num_chunks, max_tiles, TILE, NUM_OWNERS, TILES)


def max_tiles(num_items: int, num_owners: int, tile: int) -> int:
    """Tiles that so many items may need: full ones, and one of each owner that is not."""
    return min(num_items, num_items // tile + num_owners)


def group_by_owner(
    owners: torch.Tensor,
    num_owners: int,
    order: torch.Tensor,
    tiles: torch.Tensor,
    tile: int,
    *,
    launch_pdl: bool = False,
) -> None:
    """order int32 [n]: the items of owner 0, then of owner 1 …, in their order; those of owner -1 are left out, and
    what is behind the last is undefined.

    owners: int32 [n], from -1 to num_owners - 1. tiles int32 [max_tiles(n, num_owners, tile), 3]: owner, first place in
    order and number of items, at most `tile`, of each; owner -1: no tile. launch_pdl: begin while the kernel before
    drains (programmatic dependent launch); reads nothing before it is complete.
    """
    num_items, padded = len(owners), triton.next_power_of_2(num_owners)
    constants = {"NUM_OWNERS": num_owners, "OWNERS": padded, "TILE": tile, "TILES": _TILES, "LAUNCH_PDL": launch_pdl}
    if num_items <= _FEW:
        block = min(_AT_ONCE, max(16, triton.next_power_of_2(num_items)))
        _group_kernel[(num_owners,)](
            owners, order, tiles, num_items, len(tiles), BLOCK=block, **constants, num_warps=8 if block > 1024 else 4
        )  # fmt: skip
        return
    num_chunks = triton.cdiv(num_items, _CHUNK)
    counts = owners.new_empty(num_chunks, padded)
    _count_kernel[(num_chunks,)](
        owners, counts, num_items, OWNERS=padded, CHUNK=_CHUNK, LAUNCH_PDL=launch_pdl, num_warps=4
    )
    _place_kernel[(num_chunks + num_owners,)](
        owners, counts, order, tiles, num_items, num_chunks, len(tiles), CHUNK=_CHUNK,
        BLOCK=max(16, min(_CHUNK, _COMPARED // padded)), **constants, num_warps=4,
    )  # fmt: skip
