"""The product of one token with a quantised weight: each number is multiplied as it comes, without tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm
from paged_kernels.quant_linear import check_product, format_constants, store_vector
from paged_kernels.quant_tile import INT4, is_packed_alone, load_zeros, numbers

_LANES = 16  # bytes of the weight that a thread sums before it scales


@triton.jit
def _dot(
    w,
    low,
    high,
    sums,
    scale,
    zero,
    CODES: tl.constexpr,
    GROUPED: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    ZEROS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Sums of LANES bytes each of a tile of the weight [ROWS, PARTS * LANES] times the token: [ROWS, PARTS] float32."""
    low_w, high_w = numbers(w, CODES, PACKED)
    product = low_w.to(tl.float32) * low[None, :]
    if CODES >= INT4:
        product += high_w.to(tl.float32) * high[None, :]
    total = tl.sum(tl.reshape(product, (ROWS, PARTS, LANES)), 2)
    if ZEROS:
        total -= zero * sums[None, :]
    if GROUPED:
        total *= scale
    return total


@kernel
def _vector_kernel(
    x, norm_weight, weight, scale, zero, row_scale, bias, residual, out, eps,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr,
    ROW_SCALES: tl.constexpr, NORM: tl.constexpr, PLUS_ONE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, PACKED: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """N rows of the result, from N (GATED: 2 N) rows of the weight. K and BLOCK are in bytes of a row, GROUP in bytes
    that share a scale.
    """
    pdl_release(LAUNCH_PDL)
    PARTS: tl.constexpr = BLOCK // LANES
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, part = tl.arange(0, BLOCK), tl.arange(0, PARTS) * LANES
    there = (row < N)[:, None]
    at = weight + (row.to(tl.int64) * K)[:, None] + column[None, :]
    groups = (row // BLOCK_ROWS * NUM_GROUPS)[:, None]
    up_groups = ((row + N) // BLOCK_ROWS * NUM_GROUPS)[:, None]
    mask = there & (column < K)[None, :]
    next_w = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    next_u = next_w
    if GATED:
        next_u = tl.load(at + N * K, mask=mask, other=0.0, eviction_policy="evict_first")
    pdl_wait(LAUNCH_PDL)

    total = tl.zeros([ROWS, PARTS], tl.float32)
    total_u = tl.zeros([ROWS, PARTS], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, K, BLOCK):
        w, u = next_w, next_u
        inside = begin + column < K
        low_at = begin + column
        if CODES >= INT4:
            low_at = (begin + column) // GROUP * (2 * GROUP) + (begin + column) % GROUP
        low = tl.load(x + low_at, mask=inside, other=0.0).to(tl.float32)
        high = low
        if CODES >= INT4:
            high = tl.load(x + low_at + GROUP, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += low * low
            factor = tl.load(norm_weight + low_at, mask=inside, other=0.0).to(tl.float32)
            low *= factor + 1.0 if PLUS_ONE else factor
            if CODES >= INT4:
                squares += high * high
                factor = tl.load(norm_weight + low_at + GROUP, mask=inside, other=0.0).to(tl.float32)
                high *= factor + 1.0 if PLUS_ONE else factor
        sums = tl.zeros([PARTS], tl.float32)
        if ZEROS:
            sums = tl.sum(tl.reshape(low + high if CODES >= INT4 else low, (PARTS, LANES)), 1)
        group = ((begin + part) // GROUP)[None, :]
        scaled = there & (begin + part < K)[None, :]
        s, z, up_s, up_z = 1.0, 0.0, 1.0, 0.0
        if GROUPED:
            s = tl.load(scale + groups + group, mask=scaled, other=0.0).to(tl.float32)
            if GATED:
                up_s = tl.load(scale + up_groups + group, mask=scaled, other=0.0).to(tl.float32)
        if ZEROS:
            z = load_zeros(zero + groups + group, scaled, CODES)
            if GATED:
                up_z = load_zeros(zero + up_groups + group, scaled, CODES)
        mask = there & (begin + BLOCK + column < K)[None, :]
        next_w = tl.load(at + begin + BLOCK, mask=mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            next_u = tl.load(at + N * K + begin + BLOCK, mask=mask, other=0.0, eviction_policy="evict_first")
        total += _dot(w, low, high, sums, s, z, CODES, GROUPED, ROWS, PARTS, LANES, ZEROS, PACKED)
        if GATED:
            total_u += _dot(u, low, high, sums, up_s, up_z, CODES, GROUPED, ROWS, PARTS, LANES, ZEROS, PACKED)

    store_vector(
        total, total_u, squares, row, scale, row_scale, bias, residual, out, eps, N, K * (2 if CODES >= INT4 else 1),
        GROUPED, ROW_SCALES, NORM, GATED, ACTIVATION, BIAS, ADD,
    )  # fmt: skip


@dataclass(frozen=True)
class QuantVectorShape:
    """How quant_vector_linear divides its work: rows of the result per program, bytes of a row at once, warps."""

    rows: int
    block: int
    num_warps: int


def quant_vector_shape(num_rows: int, row_bytes: int, gated: bool) -> QuantVectorShape:
    """As many bytes in flight as small_linear.vector_shape has of bfloat16. Not measured on a card yet:
    tests/bench/bench_linear.py --formats --sweep.
    """
    block = min(2048, max(256, triton.next_power_of_2(row_bytes)))
    return QuantVectorShape(rows=2 if gated else 4, block=block, num_warps=8 if block >= 2048 else 4)


def quant_vector_linear(
    x: torch.Tensor, linear: Linear, *, norm: Norm | None = None, gated: bool = False, activation: str = "silu",
    residual: torch.Tensor | None = None, out: torch.Tensor | None = None, shape: QuantVectorShape | None = None,
    launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out = residual + gate(W . norm(x) + bias) for one token; each of norm, gate, bias and residual only if asked for.
    W: what the linear means.

    x: [1, K], linear: N rows, or 2 N if gated (rows of the gate, then of what it lets through), K columns; gate:
    activation(first) * second;
    norm: an RMS norm of [K] without bias; residual, out: [1, N], out may be residual.
    x's floating dtype is that of all but the linear's weight and scales; sums in float32, rounded at the end.
    launch_pdl: begin while the kernel before drains; reads nothing but weights before that kernel is complete.
    Raises ValueError for shapes, strides, dtypes or formats that do not fit.
    """
    num_rows = linear.num_rows // 2 if gated else linear.num_rows
    out = x.new_empty(1, num_rows) if out is None else out
    check_product(x, linear, residual, out, num_rows, 1)
    row_bytes = linear.weight.shape[1]
    shape = shape or quant_vector_shape(num_rows, row_bytes, gated)
    if norm is not None and (norm.centred or norm.bias is not None):
        raise ValueError("only an RMS norm without bias can be taken in before a product")
    constants = format_constants(linear)
    lanes = min(_LANES, int(constants["GROUP"]), shape.block) if linear.format.block[1] else min(_LANES, shape.block)
    _vector_kernel[(triton.cdiv(num_rows, shape.rows),)](
        x, x if norm is None else norm.weight, linear.weight, linear.scale,
        linear.scale if linear.zero is None else linear.zero,
        linear.scale if linear.row_scale is None else linear.row_scale, x if linear.bias is None else linear.bias,
        x if residual is None else residual,
        out, 0.0 if norm is None else norm.eps, N=num_rows, K=row_bytes, ROWS=shape.rows, BLOCK=shape.block,
        LANES=lanes, **constants, NORM=norm is not None, PLUS_ONE=norm is not None and norm.plus_one, GATED=gated,
        ACTIVATION=activation, BIAS=linear.bias is not None, ADD=residual is not None,
        PACKED=is_packed_alone(x, linear.format), LAUNCH_PDL=launch_pdl, num_warps=shape.num_warps,
    )  # fmt: skip
    return out
