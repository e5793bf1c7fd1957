"""A tile of a run's keys and values in decode attention (decode_attention.py): who sees which of its tokens, and what
it adds to a running softmax.

Keys and values of 8 bits come in pairs, as 16-bit numbers, of which tensor cores' operands are made with the
instructions that there are for those. Each number becomes two of float16, 2^-8 of the true ones, by moving bits; so a
head's even and odd dimensions are two products of half the depth.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_to_read(base, length, before, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Which tokens of the tile that begins at position `base` some decode of a run sees, the last of which comes behind
    `before` others: [TILE].
    """
    token = tl.arange(0, TILE)
    visible = token < length - base
    if WINDOW > 0:
        visible = visible & (token >= length - before - WINDOW - base)
    return visible


@triton.jit
def tokens_seen(
    to_read, row, base, length, before,
    GROUP: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Which tokens of the tile each row sees: [ROWS, TILE]; where decodes are not packed, [TILE], what is read. Rows
    that stand for nothing see what the run's last decode does.
    """
    if QUERIES > 1:
        token = tl.arange(0, TILE)[None, :]
        end = (length - before - base + tl.minimum(row // GROUP, before))[:, None]
        visible = token < end
        if WINDOW > 0:
            visible = visible & (token >= end - WINDOW)
    else:
        visible = to_read
    return visible


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
def _softmax_step(scores, visible, m, scale, soft_cap, SOFT_CAP: tl.constexpr, QUERIES: tl.constexpr):
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
    scores = tl.where(visible if QUERIES > 1 else visible[None, :], scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, 1))
    least = new_m
    if QUERIES > 1:
        least = tl.where(new_m == float("-inf"), 0.0, new_m)  # of a row that has seen no token yet
    return tl.exp2(scores - least[:, None]), new_m, tl.exp2(m - least)


@triton.jit
def empty_sums(ROWS: tl.constexpr, TILE: tl.constexpr, CELLS_PAD: tl.constexpr, PACKED: tl.constexpr):
    """m, ls, acc and odd of a run that begins. ls is summed over its columns only when the run ends: a reduction across
    warps costs three barriers.
    """
    m = tl.full([ROWS], float("-inf"), tl.float32)
    ls = tl.zeros([ROWS, TILE], tl.float32)
    acc = tl.zeros([ROWS, CELLS_PAD], tl.float32)
    odd = tl.zeros([ROWS, CELLS_PAD if PACKED else 1], tl.float32)
    return m, ls, acc, odd


@triton.jit
def attend(
    queries, odd_queries, asked, keys, values, visible, m, ls, acc, odd, scale, soft_cap,
    SOFT_CAP: tl.constexpr, PACKED: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes a tile in: the new m, ls, acc and odd. odd_queries: where the odd dimensions of the queries lie; of PACKED
    keys and values only. asked: which of them are there.
    """
    if PACKED:
        even_keys, odd_keys = _unpack(tl.trans(keys))
        scores = tl.dot(_as_float16(queries), even_keys)
        scores = tl.dot(_as_float16(tl.load(odd_queries, mask=asked, other=0.0)), odd_keys, scores)
    else:
        scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision=PRECISION)
    weights, m, alpha = _softmax_step(scores, visible, m, scale, soft_cap, SOFT_CAP, QUERIES)
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
def result_of(
    m, ls, acc, odd, begins, sinks, GROUP: tl.constexpr, SINKS: tl.constexpr, PACKED: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """What a piece of a run comes to, [ROWS, HEAD_PAD] float32, and m and the sum of softmax under it, [ROWS]. A row
    that sees nothing of the piece comes to 0, under an m of -inf.
    """
    ROWS: tl.constexpr = acc.shape[0]
    l = tl.sum(ls, 1)
    # counted once for a run, in the piece that begins it. Beyond 2^100 times the rest the rest is nothing, too
    if SINKS:
        row = tl.arange(0, ROWS)
        head = row % GROUP if QUERIES > 1 else tl.minimum(row, GROUP - 1)
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        if QUERIES > 1:
            m = tl.where(begins & (m == float("-inf")), sink, m)
        l += tl.where(begins, tl.exp2(tl.minimum(sink - m, 100.0)), 0.0)
    total = tl.where(l == 0.0, 1.0, l) if QUERIES > 1 else l
    if PACKED:
        result = tl.reshape(tl.join(acc, odd), [ROWS, 2 * acc.shape[1]]) * (256.0 / total)[:, None]
    else:
        result = acc * (1.0 / total)[:, None]
    return result, m, total
