"""Products of many tokens with weights of fp8 whose blocks have scales: 8-bit tensor cores, and scales of both sides
after each 128 columns.

Source: DeepSeek-V3 technical report, 2024, section 3.3: what 128 columns sum up to is scaled and added in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.activation import activated
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import Linear
from paged_kernels.round_rows import lies_padded

GROUP = 128  # columns that share a scale, of both sides


@triton.jit
def _row_scales(
    scale, row, first_row, group, BLOCK_ROWS: tl.constexpr, NUM_GROUPS: tl.constexpr, LAST: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """[1, ROWS], or [1, 1] if the tile's rows are in one block: scales of a group of columns."""
    if ONE_BLOCK:
        at = (tl.minimum(first_row, LAST) // BLOCK_ROWS * NUM_GROUPS + group) + tl.zeros([1, 1], tl.int32)
    else:
        at = (tl.minimum(row, LAST) // BLOCK_ROWS * NUM_GROUPS + group)[None, :]
    return tl.load(scale + at).to(tl.float32)


@triton.jit
def _store_tile(
    total, row, token, there, known, bias, residual, out, residual_stride, out_stride, BIAS: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    if BIAS:
        total += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)[None, :]
    wanted = known[:, None] & there[None, :]
    if ADD:
        at = residual + (token.to(tl.int64) * residual_stride)[:, None] + row[None, :]
        total += tl.load(at, mask=wanted, other=0.0).to(tl.float32)
    at = out + (token.to(tl.int64) * out_stride)[:, None] + row[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=wanted)


@kernel(ints=["num_tokens"])
def _block_kernel(
    x, x_scales, weight, scale, bias, residual, out, num_tokens, scales_stride, residual_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """Two tiles of TOKENS tokens and ROWS rows of the weight, side by side; GATED: of the first half of the rows and of
    the second. Two products in turn keep the tensor cores busy while what the other summed up to is scaled.

    Programs go down BAND tiles of tokens before they go on to the next rows, so that weights stay in the L2 cache.
    """
    pdl_release(LAUNCH_PDL)
    WIDTH: tl.constexpr = ROWS if GATED else 2 * ROWS  # of the result
    num_down, num_across = tl.cdiv(num_tokens, TOKENS), tl.cdiv(N, WIDTH)
    band = tl.program_id(0) // (BAND * num_across)
    height = tl.minimum(num_down - band * BAND, BAND)
    inner = tl.program_id(0) % (BAND * num_across)
    token = (band * BAND + inner % height) * TOKENS + tl.arange(0, TOKENS)
    first = inner // height * WIDTH
    row = first + tl.arange(0, ROWS)
    NUM_GROUPS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    WHOLE: tl.constexpr = K % BLOCK == 0 and N % WIDTH == 0
    ONE_BLOCK: tl.constexpr = BLOCK_ROWS % ROWS == 0
    SAME_BLOCK: tl.constexpr = BLOCK_ROWS % (2 * ROWS) == 0 and not GATED  # of both tiles
    OTHER: tl.constexpr = N if GATED else ROWS  # rows from a tile to the other
    LAST: tl.constexpr = N - 1
    LAST_OTHER: tl.constexpr = 2 * N - 1 if GATED else N - 1
    known, there = token < num_tokens, row < N
    there_too = there if GATED else row + ROWS < N
    column = tl.arange(0, BLOCK)
    x_at = x + (token.to(tl.int64) * K)[:, None] + column[None, :]
    w_at = weight + (row.to(tl.int64) * K)[:, None] + column[None, :]
    other_at = w_at + OTHER * K
    scales_at = x_scales + token
    # scales are loaded a group ahead
    next_s = _row_scales(scale, row, first, 0, BLOCK_ROWS, NUM_GROUPS, LAST, ONE_BLOCK)
    next_o = next_s
    if not SAME_BLOCK:
        next_o = _row_scales(scale, row + OTHER, first + OTHER, 0, BLOCK_ROWS, NUM_GROUPS, LAST_OTHER, ONE_BLOCK)
    pdl_wait(LAUNCH_PDL)
    next_x = tl.load(scales_at)

    total = tl.zeros([TOKENS, ROWS], tl.float32)
    other = tl.zeros([TOKENS, ROWS], tl.float32)
    for group in tl.range(0, NUM_GROUPS, num_stages=STAGES):
        begin = group * BLOCK
        inside = (begin + column < K)[None, :]
        s, s_o, s_x = next_s, next_o, next_x[:, None]
        ahead = tl.minimum(group + 1, NUM_GROUPS - 1)
        next_s = _row_scales(scale, row, first, ahead, BLOCK_ROWS, NUM_GROUPS, LAST, ONE_BLOCK)
        next_x = tl.load(scales_at + ahead * scales_stride)
        if WHOLE:
            values = tl.load(x_at + begin, mask=known[:, None], other=0.0)
            w = tl.load(w_at + begin)
        else:
            values = tl.load(x_at + begin, mask=known[:, None] & inside, other=0.0)
            w = tl.load(w_at + begin, mask=there[:, None] & inside, other=0.0)
        total += tl.dot(values, tl.trans(w)) * (s_x * s)
        next_o = next_s
        if not SAME_BLOCK:
            next_o = _row_scales(
                scale, row + OTHER, first + OTHER, ahead, BLOCK_ROWS, NUM_GROUPS, LAST_OTHER, ONE_BLOCK
            )
        if WHOLE:
            v = tl.load(other_at + begin)
        else:
            v = tl.load(other_at + begin, mask=there_too[:, None] & inside, other=0.0)
        other += tl.dot(values, tl.trans(v)) * (s_x * s_o)

    if GATED:
        if BIAS:
            total += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)[None, :]
            other += tl.load(bias + N + row, mask=there, other=0.0).to(tl.float32)[None, :]
        total = activated(total, ACTIVATION) * other
    _store_tile(
        total, row, token, there, known, bias, residual, out, residual_stride, out_stride, BIAS and not GATED, ADD
    )
    if not GATED:
        _store_tile(
            other, row + ROWS, token, there_too, known, bias, residual, out, residual_stride, out_stride, BIAS, ADD
        )


@dataclass(frozen=True)
class BlockShape:
    """How block_linear divides its work: tokens (at most 128) and rows of the weight of a tile, two of which are a
    program's; stages of the pipeline, warps.
    """

    tokens: int
    rows: int
    stages: int
    num_warps: int


def block_shape(gated: bool) -> BlockShape:
    """What took least time for 2,048 tokens with Llama-3.1-8B's matrices on an H200: gate and up 639 us, of the other
    shape 686; down 237, of the other shape 312 (tests/bench/bench_linear.py --formats fp8-block --tokens 2048).
    """
    return BlockShape(128, 64, stages=4, num_warps=8) if gated else BlockShape(128, 64, stages=3, num_warps=4)


def block_linear(
    x: torch.Tensor, x_scales: torch.Tensor, linear: Linear, out: torch.Tensor, *, gated: bool = False,
    activation: str = "silu", residual: torch.Tensor | None = None, shape: BlockShape | None = None,
    launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out = residual + gate((x * x_scales) . W + bias); gate, bias and residual only if there are any.

    x: float8_e4m3fn [T, K], contiguous, with scales float32 [T, K / 128], laid out as round_rows does; linear: fp8 in
    blocks whose scales are of 128 columns; out, residual: [T, N] of one floating dtype, rows contiguous, may be
    strided; out may be residual; gated: the weight has 2 N rows, and no block lies in both halves. Sums of 128 columns
    and their sum are float32. Raises ValueError for shapes or formats that do not fit.
    """
    num_tokens, num_columns = x.shape
    num_groups = triton.cdiv(num_columns, GROUP)
    num_rows = linear.num_rows // 2 if gated else linear.num_rows
    if (
        linear.format.codes != "fp8"
        or linear.format.block[1] != GROUP
        or linear.num_columns != num_columns
        or x_scales.shape != (num_tokens, num_groups)
        or not lies_padded(x_scales)
        or (gated and num_rows % linear.format.block[0])
    ):
        raise ValueError(
            f"x {tuple(x.shape)} with scales {tuple(x_scales.shape)} and {linear.format} of {linear.num_rows} x "
            f"{linear.num_columns} do not fit each other"
        )
    for tensor in (out, *([] if residual is None else [residual])):
        if tensor.shape != (num_tokens, num_rows) or tensor.stride(1) != 1:
            raise ValueError(
                f"out and residual {tuple(tensor.shape)} are not [{num_tokens}, {num_rows}] with contiguous rows"
            )
    shape = shape or block_shape(gated)
    grid = triton.cdiv(num_tokens, shape.tokens) * triton.cdiv(linear.num_rows, 2 * shape.rows)
    _block_kernel[(grid,)](
        x, x_scales, linear.weight, linear.scale, out if linear.bias is None else linear.bias,
        out if residual is None else residual, out, num_tokens, x_scales.stride(1),
        0 if residual is None else residual.stride(0), out.stride(0),
        N=num_rows, K=num_columns, TOKENS=shape.tokens, ROWS=shape.rows, BLOCK=GROUP,
        BLOCK_ROWS=linear.format.block[0], BAND=8, STAGES=shape.stages, GATED=gated, ACTIVATION=activation,
        BIAS=linear.bias is not None, ADD=residual is not None, LAUNCH_PDL=launch_pdl, num_warps=shape.num_warps,
    )  # fmt: skip
    return out
