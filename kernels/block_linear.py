"""Products of many tokens with weights of fp8 whose blocks have scales: 8-bit tensor cores, and scales of both sides
after each 128 columns.

Source: DeepSeek-V3 technical report, 2024, section 3.3: what 128 columns sum up to is scaled and added in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import Linear

GROUP = 128  # columns that share a scale, of both sides


@kernel(ints=["num_tokens"])
def _block_kernel(
    x, x_scales, weight, scale, bias, residual, out, num_tokens, residual_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """A tile of TOKENS x ROWS of the result. Programs go down BAND tiles of tokens before they go on to the next rows,
    so that weights stay in the L2 cache.
    """
    pdl_release(LAUNCH_PDL)
    num_down, num_across = tl.cdiv(num_tokens, TOKENS), tl.cdiv(N, ROWS)
    band = tl.program_id(0) // (BAND * num_across)
    height = tl.minimum(num_down - band * BAND, BAND)
    inner = tl.program_id(0) % (BAND * num_across)
    token = (band * BAND + inner % height) * TOKENS + tl.arange(0, TOKENS)
    row = inner // height * ROWS + tl.arange(0, ROWS)
    NUM_GROUPS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    known, there = token < num_tokens, row < N
    column = tl.arange(0, BLOCK)
    x_at = x + (token.to(tl.int64) * K)[:, None]
    w_at = weight + (row.to(tl.int64) * K)[:, None]
    pdl_wait(LAUNCH_PDL)

    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for group in tl.range(0, NUM_GROUPS, num_stages=STAGES):
        inside = (group * BLOCK + column < K)[None, :]
        values = tl.load(x_at + (group * BLOCK + column)[None, :], mask=known[:, None] & inside, other=0.0)
        w = tl.load(w_at + (group * BLOCK + column)[None, :], mask=there[:, None] & inside, other=0.0)
        x_scale = tl.load(x_scales + token * NUM_GROUPS + group, mask=known, other=0.0)
        w_scale = tl.load(scale + row // BLOCK_ROWS * NUM_GROUPS + group, mask=there, other=0.0)
        total += tl.dot(values, tl.trans(w)) * (x_scale[:, None] * w_scale[None, :])
    if BIAS:
        total += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)[None, :]
    wanted = known[:, None] & there[None, :]
    if ADD:
        total += tl.load(
            residual + (token.to(tl.int64) * residual_stride)[:, None] + row[None, :], mask=wanted, other=0.0
        ).to(tl.float32)
    tl.store(
        out + (token.to(tl.int64) * out_stride)[:, None] + row[None, :], total.to(out.dtype.element_ty), mask=wanted
    )


@dataclass(frozen=True)
class BlockShape:
    """How block_linear divides its work: a tile's tokens and rows of the weight, stages of the pipeline, warps."""

    tokens: int
    rows: int
    stages: int
    num_warps: int


def block_shape(num_tokens: int) -> BlockShape:
    """Not measured on a card yet: tests/bench/bench_linear.py --formats fp8-block --tokens 256,2048 --sweep."""
    return (
        BlockShape(tokens=64, rows=128, stages=4, num_warps=4)
        if num_tokens <= 256
        else BlockShape(tokens=128, rows=128, stages=4, num_warps=8)
    )


def block_linear(
    x: torch.Tensor, x_scales: torch.Tensor, linear: Linear, out: torch.Tensor, *, residual: torch.Tensor | None = None,
    shape: BlockShape | None = None, launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out = residual + (x * x_scales) . W + bias; bias and residual only if there are any.

    x: float8_e4m3fn [T, K], contiguous, with scales float32 [T, K / 128] (round_rows.py); linear: fp8 in blocks whose
    scales are of 128 columns; out, residual: [T, N] of one floating dtype, rows contiguous, may be strided; out may be
    residual. Sums of 128 columns and their sum are float32. Raises ValueError for shapes or formats that do not fit.
    """
    num_tokens, num_columns = x.shape
    num_groups = triton.cdiv(num_columns, GROUP)
    if (
        linear.format.codes != "fp8"
        or linear.format.block[1] != GROUP
        or linear.num_columns != num_columns
        or x_scales.shape != (num_tokens, num_groups)
    ):
        raise ValueError(
            f"x {tuple(x.shape)} with scales {tuple(x_scales.shape)} and {linear.format} of {linear.num_columns} "
            "columns do not fit each other"
        )
    for tensor in (out, *([] if residual is None else [residual])):
        if tensor.shape != (num_tokens, linear.num_rows) or tensor.stride(1) != 1:
            raise ValueError(
                f"out and residual {tuple(tensor.shape)} are not [{num_tokens}, {linear.num_rows}] with contiguous rows"
            )
    shape = shape or block_shape(num_tokens)
    grid = triton.cdiv(num_tokens, shape.tokens) * triton.cdiv(linear.num_rows, shape.rows)
    _block_kernel[(grid,)](
        x, x_scales, linear.weight, linear.scale, out if linear.bias is None else linear.bias,
        out if residual is None else residual, out, num_tokens, 0 if residual is None else residual.stride(0),
        out.stride(0),
        N=linear.num_rows, K=num_columns, TOKENS=shape.tokens, ROWS=shape.rows, BLOCK=GROUP,
        BLOCK_ROWS=linear.format.block[0], BAND=8, STAGES=shape.stages, BIAS=linear.bias is not None,
        ADD=residual is not None, LAUNCH_PDL=launch_pdl, num_warps=shape.num_warps,
    )  # fmt: skip
    return out
