"""Latents in tiles: the loop that decode and prefill attention over latents have in common.

A latent is what a token keeps in a layer of multi-head latent attention (MLA; DeepSeek-V2, 2024): RANK numbers, of
which every head would make its key and its value, and ROTARY numbers that are rotated, which all heads' keys share.
Nobody makes those keys and values: a query is multiplied into the latents' space once ("absorbed"), so that all heads
attend to the latents themselves, as to one head of keys whose first RANK numbers are the values.

A tile is read once and multiplied twice. Scores are two products, of RANK and of ROTARY numbers: together they are no
power of two, and padded they would be nearly twice as many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.device_traits import traits_of

_MOST_ROWS = 64  # of a program, for 16-bit numbers: so many rows of 512 sums in float32 fill half of the registers
FEW_ROWS = 16
_ROOM_KIB = 200  # of shared memory for most rows, in which their queries and some latents lie


@triton.jit
def _load_pages(pages, base, last_key, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The page ids of a tile's keys up to last_key: [TILE], or one if a page holds whole tiles. Nothing is read if
    last_key < base.
    """
    if PAGE_SIZE >= TILE:
        page = tl.load(pages + base // PAGE_SIZE, mask=base <= last_key, other=0)
    else:
        token = tl.arange(0, TILE)
        page = tl.load(pages + base // PAGE_SIZE + token // PAGE_SIZE, mask=base + token <= last_key, other=0)
    return page


@triton.jit
def attend_latents(
    acc, m, l, queries, rotated, position, latent_pages, pages, begin, end, last_key, scale,
    RANK: tl.constexpr, ROTARY: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax (acc [ROWS, RANK], m, l) after the tiles that begin in [begin, end), multiples of TILE; keys
    beyond last_key are not read.

    queries [ROWS, RANK] and rotated [ROWS, ROTARY]: the two parts of absorbed queries; position [ROWS]: a row sees the
    keys up to it, which only MASKED tiles heed. m: the greatest score so far, before `scale`; l: the sum of exp2 of the
    scores in units of log 2, less m.
    """
    WIDTH: tl.constexpr = RANK + ROTARY
    token = tl.arange(0, TILE)
    dim = tl.arange(0, RANK)[None, :]
    turned = RANK + tl.arange(0, ROTARY)[None, :]
    factor = scale * 1.4426950408889634
    page = _load_pages(pages, begin, tl.where(begin < end, last_key, -1), PAGE_SIZE, TILE)
    for base in tl.range(begin, end, TILE):
        now_page = page
        # The page ids of the tile after this one, so that its latents' addresses are at hand when their turn to be
        # copied comes.
        page = _load_pages(pages, base + TILE, tl.where(base + TILE < end, last_key, -1), PAGE_SIZE, TILE)
        if PAGE_SIZE >= TILE:
            slot = now_page.to(tl.int64) * PAGE_SIZE + base % PAGE_SIZE + token
        else:
            slot = now_page.to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE
        where = latent_pages + (slot * WIDTH)[:, None]
        key = base + token
        if MASKED:
            to_read = (key <= last_key)[:, None]
            latents = tl.load(where + dim, mask=to_read, other=0.0)
            keys = tl.load(where + turned, mask=to_read, other=0.0)
        else:
            latents = tl.load(where + dim)
            keys = tl.load(where + turned)
        latents, keys = latents.to(queries.dtype), keys.to(queries.dtype)

        scores = tl.dot(queries, tl.trans(latents), input_precision=PRECISION)
        scores = tl.dot(rotated, tl.trans(keys), scores, input_precision=PRECISION)
        if MASKED:
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        new_m = tl.maximum(m, tl.max(scores, 1))
        weights = tl.exp2(scores * factor - (new_m * factor)[:, None])
        alpha = tl.exp2((m - new_m) * factor)
        l = l * alpha + tl.sum(weights, 1)
        acc = tl.dot(weights.to(latents.dtype), latents, acc * alpha[:, None], input_precision=PRECISION)
        m = new_m
    return acc, m, l


def most_rows(dtype: torch.dtype, device: torch.device) -> int:
    """Query heads, times tokens of a prompt, that a program attends with there: FEW_ROWS of float32, which is here to
    be compared with, and where shared memory is short. 16 rows and three tiles of 32 latents take 91 KiB.
    """
    return FEW_ROWS if dtype.itemsize > 2 or traits_of(device).shared_kib < _ROOM_KIB else _MOST_ROWS


def head_blocks(num_heads: int, most: int = _MOST_ROWS) -> int:
    """Into how few equal blocks of at most `most` heads the heads of a token can be divided: a program has one."""
    return next(count for count in range(1, num_heads + 1) if num_heads % count == 0 and num_heads // count <= most)


def check_latents(q: torch.Tensor, latent_pages: torch.Tensor, page_table: torch.Tensor, out: torch.Tensor) -> None:
    """What both attention kernels take for granted: of latents that are tiles of powers of two, which fit into shared
    memory, and of how tensors lie.

    Raises:
        ValueError: they are others, or are of two types.
    """
    (num_tokens, num_heads, width), rank = q.shape, out.shape[2]
    if any(size < 16 or size & (size - 1) for size in (rank, width - rank)) or rank > 512 or width - rank > 64:
        sizes = f"{rank} + {width - rank}"
        raise ValueError(f"latents of {sizes} numbers are not of powers of two, 16 to 512 and 16 to 64")
    if latent_pages.ndim != 3 or latent_pages.shape[2] != width or not latent_pages.is_contiguous():
        raise ValueError(f"latent_pages {tuple(latent_pages.shape)} are not contiguous latents of {width} numbers")
    page_size = latent_pages.shape[1]
    if page_size & (page_size - 1):
        raise ValueError(f"page_size {page_size} is no power of two")
    if out.shape[:2] != (num_tokens, num_heads) or out.dtype != q.dtype:
        raise ValueError(f"q {tuple(q.shape)} {q.dtype} and out {tuple(out.shape)} {out.dtype} do not fit each other")
    if q.stride()[1:] != (width, 1) or out.stride()[1:] != (rank, 1) or page_table.stride(1) != 1:
        raise ValueError("heads and page tables must be contiguous")
