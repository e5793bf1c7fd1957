"""The product of one token with a weight of fp8: each number is multiplied as it comes, without tensor cores.

Numbers are read four in a word (`dot_of_fp8` of quant_tile.py), which takes about five instructions a number with all
that is around them, instead of seven, for which a multiprocessor has no time at 4.6 TB/s. Activations are not rounded.
Otherwise as `vector_linear` of small_linear.py: the first numbers are on their way while the token is still being
computed, and what a layer does next to the product happens in the same launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm
from paged_kernels.quant_linear import check_product, store_vector
from paged_kernels.quant_tile import dot_of_fp8, fours

_LANES = tl.constexpr(4)  # words of the weight that a thread sums before it scales: 16 bytes


@triton.jit
def _load(at, word, begin, there, K: tl.constexpr, WHOLE: tl.constexpr):
    """Words from `begin` on of each row; 0 beyond the row. WHOLE: all are there, or none."""
    mask = begin < K // 4 if WHOLE else there & (begin + word < K // 4)[None, :]
    return tl.load(at + begin, mask=mask, other=0, eviction_policy="evict_first")


@kernel
def _fp8_vector_kernel(
    x, norm_weight, weight, scale, row_scale, bias, residual, out, eps,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, GROUPED: tl.constexpr, ROW_SCALES: tl.constexpr, NORM: tl.constexpr,
    PLUS_ONE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    PACKED: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """ROWS of the N rows of the result, from as many (GATED: twice) rows of the weight, BLOCK columns at once; GROUP
    columns of BLOCK_ROWS rows share a scale.
    """
    pdl_release(LAUNCH_PDL)
    WORDS: tl.constexpr = BLOCK // 4
    PARTS: tl.constexpr = WORDS // _LANES
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word, column = tl.arange(0, WORDS), tl.arange(0, BLOCK)
    there = (row < N)[:, None]
    at = weight + (row.to(tl.int64) * (K // 4))[:, None] + word[None, :]
    WHOLE: tl.constexpr = N % ROWS == 0 and K % BLOCK == 0
    next_w = _load(at, word, 0, there, K, WHOLE)
    next_u = next_w
    if GATED:
        next_u = _load(at + N * (K // 4), word, 0, there, K, WHOLE)
    pdl_wait(LAUNCH_PDL)

    part = tl.arange(0, PARTS) * (4 * _LANES)
    scales_at = scale + (row // BLOCK_ROWS * NUM_GROUPS)[:, None]
    up_scales_at = scale + ((row + N) // BLOCK_ROWS * NUM_GROUPS)[:, None]
    total = tl.zeros([ROWS, PARTS], tl.float32)
    total_u = tl.zeros([ROWS, PARTS], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, K, BLOCK):
        w, u = next_w, next_u
        # the token before the weights of the next turn: loads return in order
        inside = begin + column < K if not WHOLE else begin >= 0
        value = tl.load(x + begin + column, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            factor = tl.load(norm_weight + begin + column, mask=inside, other=0.0).to(tl.float32)
            value *= factor + 1.0 if PLUS_ONE else factor
        s, up_s = 1.0, 1.0
        if GROUPED:
            group = ((begin + part) // GROUP)[None, :]
            scaled = there & (begin + part < K)[None, :] if not WHOLE else begin >= 0
            s = tl.load(scales_at + group, mask=scaled, other=0.0).to(tl.float32)
            if GATED:
                up_s = tl.load(up_scales_at + group, mask=scaled, other=0.0).to(tl.float32)
        if BLOCK < K:
            next_w = _load(at, word, (begin + BLOCK) // 4, there, K, WHOLE)
            if GATED:
                next_u = _load(at + N * (K // 4), word, (begin + BLOCK) // 4, there, K, WHOLE)
        a, b, c, d = fours(value)
        sums = dot_of_fp8(w, a, b, c, d, PACKED)
        total += tl.sum(tl.reshape(sums, (ROWS, PARTS, _LANES)), 2) * s
        if GATED:
            sums = dot_of_fp8(u, a, b, c, d, PACKED)
            total_u += tl.sum(tl.reshape(sums, (ROWS, PARTS, _LANES)), 2) * up_s

    store_vector(
        total, total_u, squares, row, scale, row_scale, bias, residual, out, eps, N, K, GROUPED,
        ROW_SCALES, NORM, GATED, ACTIVATION, BIAS, ADD,
    )  # fmt: skip


@dataclass(frozen=True)
class Fp8VectorShape:
    """How fp8_vector_linear divides its work: rows of the result per program, columns at once, warps."""

    rows: int
    block: int
    num_warps: int


def fp8_vector_shape(num_rows: int, num_columns: int, gated: bool) -> Fp8VectorShape:
    """Nearly what took least time in whole steps of Llama-3.1-8B and Llama-3.2-1B on an H200."""
    if gated:
        return Fp8VectorShape(rows=4, block=1024, num_warps=4)
    if 2048 < num_columns <= 4096:  # at once
        return Fp8VectorShape(rows=4 if num_rows > 4096 else 8, block=4096, num_warps=8)
    block = min(4096, max(512, triton.next_power_of_2(num_columns)))
    return Fp8VectorShape(rows=8, block=block, num_warps=4)


def reaches(linear: Linear) -> bool:
    """Whether this kernel multiplies by the linear: fp8 whose rows are whole words of 16 bytes, with a scale a row, or
    groups of columns that are a multiple of 16.
    """
    columns = linear.format.block[1]
    return linear.format.codes == "fp8" and linear.num_columns % 16 == 0 and columns % 16 == 0


def fp8_vector_linear(
    x: torch.Tensor, linear: Linear, *, norm: Norm | None = None, gated: bool = False, activation: str = "silu",
    residual: torch.Tensor | None = None, out: torch.Tensor | None = None, shape: Fp8VectorShape | None = None,
    launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out = residual + gate(W . norm(x) + bias) for one token; each of norm, gate, bias and residual only if asked for.
    W: what the linear means.

    x: [1, K], linear: fp8 of which `reaches` is true, N rows, or 2 N if gated (rows of the gate, then of what it lets
    through), K columns; gate: activation(first) * second; norm: an RMS norm of [K] without bias; residual, out: [1, N],
    out may be residual. x's floating dtype is that of all but the weight and its scales; sums in float32, rounded at
    the end. launch_pdl: begin while the kernel before drains; reads nothing but weights before that kernel is complete.
    Raises ValueError for shapes, strides, dtypes or formats that do not fit.
    """
    num_rows = linear.num_rows // 2 if gated else linear.num_rows
    out = x.new_empty(1, num_rows) if out is None else out
    check_product(x, linear, residual, out, num_rows, 1)
    num_columns, block = linear.num_columns, linear.format.block
    if not reaches(linear):
        raise ValueError(f"{linear.format} of {linear.num_rows} x {num_columns} is not read in words of fp8")
    if norm is not None and (norm.centred or norm.bias is not None):
        raise ValueError("only an RMS norm without bias can be taken in before a product")
    assert linear.scale is not None
    shape = shape or fp8_vector_shape(num_rows, num_columns, gated)
    _fp8_vector_kernel[(triton.cdiv(num_rows, shape.rows),)](
        x, x if norm is None else norm.weight, linear.weight.view(torch.int32), linear.scale,
        linear.scale if linear.row_scale is None else linear.row_scale, x if linear.bias is None else linear.bias,
        x if residual is None else residual, out, 0.0 if norm is None else norm.eps,
        N=num_rows, K=num_columns, ROWS=shape.rows, BLOCK=shape.block, GROUP=block[1] or num_columns,
        BLOCK_ROWS=block[0], GROUPED=bool(block[1]), ROW_SCALES=linear.row_scale is not None, NORM=norm is not None,
        PLUS_ONE=norm is not None and norm.plus_one, GATED=gated, ACTIVATION=activation, BIAS=linear.bias is not None,
        ADD=residual is not None, PACKED=x.is_cuda, LAUNCH_PDL=launch_pdl, num_warps=shape.num_warps, num_stages=1,
    )  # fmt: skip
    return out
