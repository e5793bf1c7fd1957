"""The product of one token with a weight of 4-bit integers that lie in quads, by products of integers.

The token is rounded to integers of 16 bits, 128 columns by one scale, which loses at most 2 ** -16 of their greatest
magnitude: less than bfloat16 has lost of it. Then an instruction multiplies two of its numbers by two of the weight and
adds, exactly. By tensor cores (int4_narrow.py) a number takes about as many instructions, two to two and a half, and
waits for shared memory; here a thread has its words in registers while the token is still being computed, so that the
memory does not fall silent between two products. What a layer does next to the product, the norm before it too, happens
in the same launch.

Source: the products are dp2a of the PTX ISA ("Integer Arithmetic Instructions: dp2a").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.activation import activated
from paged_kernels.device_quads import BLOCK, INT4_ZERO, WORDS
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import WORDS_BLOCK, Linear
from paged_kernels.narrow_rows import check_sides
from paged_kernels.norm_value import Norm
from paged_kernels.quads import words_of

_MOST = tl.constexpr(32767.0)
_ONES = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: the last bits of a float of this exponent count ones
_EIGHT_ONES = tl.constexpr(0x5A000000)  # its bits eight times, without what is beyond 32
_LEAST = tl.constexpr(1e-30)  # what is below it counts as 0


@triton.jit
def _columns(x, norm_weight, at, inside, NORM: tl.constexpr, PLUS_ONE: tl.constexpr):
    """Columns `at` and those after them, normed but for the root, and the sums of the two's squares before that:
    [BLOCKS, WORDS].
    """
    pair = at[:, :, None] + tl.arange(0, 2)[None, None, :]
    low, high = tl.split(tl.load(x + pair, mask=inside, other=0.0).to(tl.float32))
    squares = low * low + high * high
    if NORM:
        factors = tl.load(norm_weight + pair, mask=inside, other=0.0).to(tl.float32)
        factor, high_factor = tl.split(factors + 1.0 if PLUS_ONE else factors)
        low *= factor
        high *= high_factor
    return low, high, squares


@triton.jit
def _greater(a, b):
    """The greater of two, NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _greatest(a, b, c, d):
    return _greater(_greater(tl.abs(a), tl.abs(b)), _greater(tl.abs(c), tl.abs(d)))


@triton.jit
def _pair(low, high, steps):
    """Two floats in steps, rounded, as integers of 16 bits in a word; and their sum, 2 * _ONES too much."""
    low = (low * steps + _ONES).to(tl.int32, bitcast=True)
    high = (high * steps + _ONES).to(tl.int32, bitcast=True)
    return (low & 0xFFFF) | (high << 16), low + high


@triton.jit
def _token(x, norm_weight, at, inside, NORM: tl.constexpr, PLUS_ONE: tl.constexpr):
    """Columns of a token as integers in words, as the words of a weight want them: the words [BLOCKS, WORDS] of columns
    0 and 16, 1 and 17, 8 and 24, 9 and 25 from `at` on, the sums of those eight, what a block is to be multiplied by
    [BLOCKS], and the sums of squares before the norm [BLOCKS, WORDS].
    """
    a, c, squares = _columns(x, norm_weight, at, inside, NORM, PLUS_ONE)
    b, d, more = _columns(x, norm_weight, at + 16, inside, NORM, PLUS_ONE)
    squares += more
    e, g, more = _columns(x, norm_weight, at + 8, inside, NORM, PLUS_ONE)
    squares += more
    f, h, more = _columns(x, norm_weight, at + 24, inside, NORM, PLUS_ONE)
    squares += more
    most = tl.reduce(_greater(_greatest(a, b, c, d), _greatest(e, f, g, h)), 1, _greater)
    most = _greater(most, _LEAST)
    steps = (1.0 / most * _MOST)[:, None]
    first, sums = _pair(a, b, steps)
    second, sum = _pair(c, d, steps)
    sums += sum
    third, sum = _pair(e, f, steps)
    sums += sum
    fourth, sum = _pair(g, h, steps)
    return first, second, third, fourth, sums + sum - _EIGHT_ONES, most / _MOST, squares


@triton.jit
def _two(w, x, SHIFT: tl.constexpr):
    """Two nibbles eight bits apart times the two numbers in a word."""
    return ((w >> SHIFT) & 15) * ((x << 16) >> 16) + ((w >> SHIFT + 8) & 15) * (x >> 16)


@triton.jit
def _dots(w, a, b, c, d, PACKED: tl.constexpr):
    """Words of the weight times the words of a token that `_token` returns, summed: int32."""
    if PACKED:
        found = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, sum;
            and.b32 low, $1, 0x0f0f0f0f;
            shr.u32 high, $1, 4;
            and.b32 high, high, 0x0f0f0f0f;
            dp2a.lo.s32.u32 sum, $2, low, 0;
            dp2a.hi.s32.u32 sum, $3, low, sum;
            dp2a.lo.s32.u32 sum, $4, high, sum;
            dp2a.hi.s32.u32 $0, $5, high, sum;
            }""",
            "=r,r,r,r,r,r", [w, a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        found = _two(w, a, 0) + _two(w, b, 16) + _two(w, c, 4) + _two(w, d, 20)
    return found


@triton.jit
def _load(weight, at, begin, block, ALL: tl.constexpr, NUM_ROWS: tl.constexpr):
    """Words [APART, BLOCKS, TOGETHER, WORDS] of blocks `begin` and the next ones; 0 beyond the last."""
    mask = begin < ALL if ALL % block.shape[0] == 0 else (begin + block < ALL)[None, :, None, None]
    at += begin * (NUM_ROWS * WORDS)
    return tl.load(weight + at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _scaled(w, a, b, c, d, sums, zero, s, PACKED: tl.constexpr):
    """Words [APART, BLOCKS, TOGETHER, WORDS] times the token, less zeros [APART, BLOCKS, TOGETHER], times s of the
    same shape: float32 sums [APART, BLOCKS, TOGETHER, WORDS / 4].
    """
    dots = _dots(w, a[None, :, None, :], b[None, :, None, :], c[None, :, None, :], d[None, :, None, :], PACKED)
    part = tl.sum(tl.reshape(dots, (w.shape[0], w.shape[1], w.shape[2], WORDS // 4, 4)), 4)
    part -= zero[:, :, :, None] * sums[None, :, None, :]
    return part.to(tl.float32) * s[:, :, :, None]


@kernel
def _int4_vector_kernel(
    x, norm_weight, weight, scale, zero, bias, residual, out, eps,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, APART: tl.constexpr, BLOCKS: tl.constexpr,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, NORM: tl.constexpr, PLUS_ONE: tl.constexpr, GATED: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PACKED: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """ROWS of the N rows of the result, from as many (GATED: twice) rows of the weight, BLOCKS blocks of 128 columns at
    once; GROUP blocks share a scale. APART: rows that neighbouring threads have.
    """
    pdl_release(LAUNCH_PDL)
    ALL: tl.constexpr = K // BLOCK
    NUM_ROWS: tl.constexpr = 2 * N if GATED else N
    TOGETHER: tl.constexpr = ROWS // APART  # rows of a thread
    index = tl.arange(0, APART)[:, None, None] + tl.arange(0, TOGETHER)[None, None, :] * APART
    row = tl.program_id(0) * ROWS + index
    there = row < N
    if N % ROWS != 0:
        row = tl.minimum(row, N - 1)  # what is beyond is not stored
    block, word = tl.arange(0, BLOCKS), tl.arange(0, WORDS)
    at = (row * WORDS)[:, :, :, None] + (block * (NUM_ROWS * WORDS))[None, :, None, None] + word[None, None, None, :]
    next_w = _load(weight, at, 0, block, ALL, NUM_ROWS)
    next_u = next_w
    if GATED:
        next_u = _load(weight + N * WORDS, at, 0, block, ALL, NUM_ROWS)
    pdl_wait(LAUNCH_PDL)

    column = (block * BLOCK)[:, None] + (word % 4 * 32 + word // 4 * 2)[None, :]
    total = tl.zeros([APART, BLOCKS, TOGETHER, WORDS // 4], tl.float32)
    total_u = tl.zeros([APART, BLOCKS, TOGETHER, WORDS // 4], tl.float32)
    squares = tl.zeros([BLOCKS, WORDS], tl.float32)
    for begin in range(0, ALL, BLOCKS):
        w, u = next_w, next_u
        inside = (begin + block < ALL)[:, None, None] if ALL % BLOCKS != 0 else begin >= 0
        a, b, c, d, sums, s_x, more = _token(x, norm_weight, column + begin * BLOCK, inside, NORM, PLUS_ONE)
        if NORM:
            squares += more
        if BLOCKS < ALL:
            next_w = _load(weight, at, begin + BLOCKS, block, ALL, NUM_ROWS)
            if GATED:
                next_u = _load(weight + N * WORDS, at, begin + BLOCKS, block, ALL, NUM_ROWS)
        group = begin + block
        if ALL % BLOCKS != 0:
            group = tl.minimum(group, ALL - 1)
        of_scales = (group // GROUP * NUM_ROWS)[None, :, None] + row
        z = tl.full([APART, BLOCKS, TOGETHER], INT4_ZERO, tl.int32)
        up_z = z
        s = tl.load(scale + of_scales).to(tl.float32)
        if ZEROS:
            z = tl.load(zero + of_scales).to(tl.int32)
        sums = tl.sum(tl.reshape(sums, (BLOCKS, WORDS // 4, 4)), 2)
        total += _scaled(w, a, b, c, d, sums, z, s * s_x[None, :, None], PACKED)
        if GATED:
            up_s = tl.load(scale + N + of_scales).to(tl.float32)
            if ZEROS:
                up_z = tl.load(zero + N + of_scales).to(tl.int32)
            total_u += _scaled(u, a, b, c, d, sums, up_z, up_s * s_x[None, :, None], PACKED)

    result = tl.sum(tl.sum(total, 3), 1)
    up = tl.sum(tl.sum(total_u, 3), 1)
    row, there = tl.reshape(row, (APART, TOGETHER)), tl.reshape(there, (APART, TOGETHER))
    if NORM:
        shrink = tl.rsqrt(tl.sum(tl.sum(squares, 1), 0) / K + eps)
        result *= shrink
        up *= shrink
    if BIAS:
        result += tl.load(bias + row).to(tl.float32)
        if GATED:
            up += tl.load(bias + N + row).to(tl.float32)
    if GATED:
        result = activated(result, ACTIVATION) * up
    if ADD:
        result += tl.load(residual + row).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=there)


@dataclass(frozen=True)
class Int4VectorShape:
    """How int4_vector_linear divides its work: rows of the result per program, blocks of 128 columns at once, warps,
    and how many of the rows lie in neighbouring threads: these have as many times more of the token, and fewer sums to
    exchange.
    """

    rows: int
    blocks: int
    num_warps: int
    apart: int = 1


def is_vector(linear: Linear, gated: bool) -> bool:
    """Whether int4_vector_linear takes less time for a token than int4_narrow_linear, as measured in whole steps on an
    H200: everywhere in Llama-3.2-1B (0.69 ms instead of 0.81), and but for gate and up in Llama-3.1-8B (8 layers and
    the head 0.78 ms instead of 0.82, and 0.84 with gate and up so, too).
    """
    return not gated or linear.num_columns <= 2048


def int4_vector_shape(num_rows: int, num_columns: int, gated: bool) -> Int4VectorShape:
    """Nearly what took least time in whole steps of Llama-3.1-8B and Llama-3.2-1B on an H200."""
    blocks = min(16, triton.next_power_of_2(num_columns // WORDS_BLOCK))
    return Int4VectorShape(rows=8 if gated else 16, blocks=blocks, num_warps=4, apart=4)


def int4_vector_linear(
    x: torch.Tensor, linear: Linear, *, norm: Norm | None = None, gated: bool = False, activation: str = "silu",
    residual: torch.Tensor | None = None, out: torch.Tensor | None = None, shape: Int4VectorShape | None = None,
    launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out = residual + gate(W . norm(x) + bias) for one token; each of norm, gate, bias and residual only if asked for.
    W: what the linear means.

    x: [1, K]; linear: int4 in quads, N rows, or 2 N if gated (rows of the gate, then of what it lets through), K
    columns; gate: activation(first) * second; norm: an RMS norm of [K] without bias; residual, out: [1, N], out may be
    residual. x's floating dtype is that of all but the weight and its scales; sums in float32, rounded at the end.
    launch_pdl: begin while the kernel before drains; reads nothing but weights before that kernel is complete. Raises
    ValueError for shapes, strides, dtypes or formats that do not fit.
    """
    num_rows = linear.num_rows // 2 if gated else linear.num_rows
    out = x.new_empty(1, num_rows) if out is None else out
    words = words_of(linear)
    check_sides(x, linear, residual, out, num_rows, 1)
    if norm is not None and (norm.centred or norm.bias is not None):
        raise ValueError("only an RMS norm without bias can be taken in before a product")
    assert linear.scale is not None
    num_columns = linear.num_columns
    shape = shape or int4_vector_shape(num_rows, num_columns, gated)
    _int4_vector_kernel[(triton.cdiv(num_rows, shape.rows),)](
        x, x if norm is None else norm.weight, words, linear.scale,
        linear.scale if linear.zero is None else linear.zero, x if linear.bias is None else linear.bias,
        x if residual is None else residual, out, 0.0 if norm is None else norm.eps,
        N=num_rows, K=num_columns, ROWS=shape.rows, APART=shape.apart, BLOCKS=shape.blocks,
        GROUP=linear.format.group(num_columns) // WORDS_BLOCK, ZEROS=linear.zero is not None, NORM=norm is not None,
        PLUS_ONE=norm is not None and norm.plus_one, GATED=gated, ACTIVATION=activation, BIAS=linear.bias is not None,
        ADD=residual is not None, PACKED=x.is_cuda, LAUNCH_PDL=launch_pdl, num_warps=shape.num_warps, num_stages=1,
    )  # fmt: skip
    return out
