"""Products of many tokens with the experts they chose: tokens are grouped by expert (kernels/grouping.py), and tiles of
weights multiply tiles of one expert's tokens on the tensor cores, the weights' rows on the long side, as in
`small_linear.narrow_linear`.

Two launches of one kernel, gate_up with the gate behind it and down with each token's weight of the expert, and one
that adds up a token's answers in the order of its choice, so that results do not depend on chance. Programs are as many
as fit the device and go through tiles × rows of weights, neighbours the same tokens; how many tiles there are the
device alone knows, the rest of the worst case is passed over. Sums are float32.

Weights in mxfp4 (kernels/mxfp4.py) become the activations' type on their way to the tensor cores, in registers.
Sources: MegaBlocks (Gale et al., 2022); persistent programs over experts × tiles: the grouped products of CUTLASS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.expert_vectors import apply_gate, check_experts, gate_constants, parameters, scales_of_row
from paged_kernels.experts import ExpertLinear, Experts, Gate
from paged_kernels.grouping import group_by_owner, max_tiles
from paged_kernels.jit import kernel, pdl_begin, pdl_release, pdl_wait
from paged_kernels.mxfp4 import GROUP

_MX_GROUP = tl.constexpr(GROUP)
_ROWS = 64  # of the weight: what one instruction of the tensor cores takes
_SHARED_BYTES = 108 * 1024  # of a program: two of them share a multiprocessor
_MAX_STAGES = 6
_COMBINED = 1024  # numbers of a token that one program adds up


@triton.jit
def _numbers(packed, scale, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 [ROWS, BLOCK / 2] and [ROWS, BLOCK / 32] -> [ROWS, BLOCK] of type DTYPE."""
    wide = packed.to(tl.uint16)
    low = ((wide & 0x8) << 12) | ((wide & 0x7) << 9)
    high = ((wide & 0x80) << 8) | ((wide & 0x70) << 5)
    halves = tl.join(low, high).reshape(packed.shape[0], BLOCK // _MX_GROUP, _MX_GROUP).to(tl.float16, bitcast=True)
    power = ((scale.to(tl.uint32) << 23).to(tl.float32, bitcast=True) * 16384.0)[:, :, None]
    return (halves.to(tl.float32) * power).to(DTYPE).reshape(packed.shape[0], BLOCK)


@triton.jit
def _add_product(
    total, weight, scales, row, there, values, begin,
    K: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr, MXFP4: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total [ROWS, TOKENS] + columns begin … begin + BLOCK of the weight's rows @ values [BLOCK, TOKENS]. row:
    int64.
    """
    if MXFP4:
        byte = begin // 2 + tl.arange(0, BLOCK // 2)
        w = tl.load(
            weight + (row * (K // 2))[:, None] + byte[None, :], mask=there[:, None] & (byte < K // 2)[None, :], other=0
        )
        group = begin // _MX_GROUP + tl.arange(0, BLOCK // _MX_GROUP)
        scale = tl.load(
            scales + (row * SCALES)[:, None] + group[None, :],
            mask=there[:, None] & (group * _MX_GROUP < K)[None, :],
            other=0,
        )
        total = tl.dot(_numbers(w, scale, BLOCK, values.dtype), values, total)
    else:
        column = begin + tl.arange(0, BLOCK)
        w = tl.load(
            weight + (row * K)[:, None] + column[None, :], mask=there[:, None] & (column < K)[None, :], other=0.0
        )
        total = tl.dot(w, values, total, input_precision=PRECISION)
    return total


@kernel(ints=["num_tiles"])
def _products_kernel(
    x, weight, scales, bias, order, tiles, pair_weights, out, num_tiles, x_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, SCALES: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr, ALPHA: tl.constexpr, BIAS: tl.constexpr, MXFP4: tl.constexpr, LAUNCH_PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """GATED: out[place] = gate(weight . x[token of place]). Otherwise out[pair of place] = its weight * (weight .
    x[place]).
    """
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    num_blocks: tl.constexpr = (N + ROWS - 1) // ROWS
    for item in range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        tile = tiles + (item // num_blocks) * 3
        expert = tl.load(tile)
        if expert >= 0:
            place = tl.load(tile + 1) + tl.arange(0, TOKENS)
            known = tl.arange(0, TOKENS) < tl.load(tile + 2)
            pair = tl.load(order + place, mask=known, other=0)
            source = pair // TOP_K if GATED else place
            row = (item % num_blocks) * ROWS + tl.arange(0, ROWS)
            there = row < N
            first = expert.to(tl.int64) * ((2 if GATED else 1) * N)
            of_row = first + (2 * row if INTERLEAVED else row)
            of_up = first + (2 * row + 1 if INTERLEAVED else N + row)
            tokens_at = x + (source.to(tl.int64) * x_stride)[None, :]
            total = tl.zeros([ROWS, TOKENS], tl.float32)
            total_up = tl.zeros([ROWS, TOKENS], tl.float32)
            for begin in tl.range(0, K, BLOCK, num_stages=STAGES):
                column = begin + tl.arange(0, BLOCK)
                values = tl.load(tokens_at + column[:, None], mask=known[None, :] & (column < K)[:, None], other=0.0)
                total = _add_product(
                    total, weight, scales, of_row, there, values, begin, K, SCALES, BLOCK, MXFP4, PRECISION
                )
                if GATED:
                    total_up = _add_product(
                        total_up, weight, scales, of_up, there, values, begin, K, SCALES, BLOCK, MXFP4, PRECISION
                    )
            if BIAS:
                total += tl.load(bias + of_row, mask=there, other=0.0).to(tl.float32)[:, None]
            if GATED:
                if BIAS:
                    total_up += tl.load(bias + of_up, mask=there, other=0.0).to(tl.float32)[:, None]
                total = apply_gate(total, total_up, LIMIT, ALPHA)
                target = place
            else:
                total *= tl.load(pair_weights + pair, mask=known, other=0.0)[None, :]
                target = pair
            at = out + (target.to(tl.int64) * out_stride)[None, :] + row[:, None]
            tl.store(at, total.to(out.dtype.element_ty), mask=there[:, None] & known[None, :])


@kernel
def _combine_kernel(
    answers,
    residual,
    residual_stride,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    """residual[t] += the sum of answers[t * TOP_K …]."""
    pdl_begin(LAUNCH_PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        total += tl.load(answers + (token * TOP_K + choice) * N + column, mask=inside, other=0.0).to(tl.float32)
    at = residual + token * residual_stride + column
    tl.store(
        at, (tl.load(at, mask=inside, other=0.0).to(tl.float32) + total).to(residual.dtype.element_ty), mask=inside
    )


@dataclass(frozen=True)
class ProductShape:
    """How a grouped product divides its work: tokens of a tile, rows and columns of the weight at once, stages of the
    pipeline, warps.
    """

    tokens: int
    rows: int
    block: int
    stages: int
    num_warps: int


def product_shape(
    num_pairs: int, num_experts: int, *, gated: bool, mxfp4: bool, element_bytes: int = 2
) -> ProductShape:
    """num_pairs: tokens times the experts of each. Tiles have as many tokens as an expert gets on the average, from 16
    on: weights are read fast while there are few, and multiplied fast when there are many. The pipeline is as deep as
    lets two programs share a multiprocessor. Chosen by the registers and the shared memory that it takes when compiled
    for sm_90; not measured.
    """
    share = num_pairs / num_experts
    tokens = 16 if share <= 16 else 32 if share <= 32 else 64 if share <= 64 else 128
    block = 64 if tokens >= 64 or element_bytes == 4 else 128
    weight_bytes = _ROWS * block * (2 if gated else 1) * (0.5 + 1 / GROUP if mxfp4 else element_bytes)
    stages = int(_SHARED_BYTES // (weight_bytes + tokens * block * element_bytes))
    return ProductShape(tokens, _ROWS, block, max(2, min(_MAX_STAGES, stages)), 8 if tokens == 128 else 4)


def add_experts(
    x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, experts: Experts, residual: torch.Tensor, *,
    shape: ProductShape | None = None, num_programs: int = 8, launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """reference.add_experts: residual, which is written over.

    x, residual: [T, hidden], of one dtype (bfloat16, float16, float32; of 16 bits with weights in mxfp4), rows
    contiguous; expert_ids: int32 [T, k], contiguous; weights: float32 [T, k], contiguous. num_programs: as many as run
    at once. launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads nothing before that
    kernel is complete. Raises ValueError for shapes and dtypes that do not fit.
    """
    num_tokens, top_k = expert_ids.shape
    if (
        x.shape != residual.shape
        or x.dtype != residual.dtype
        or x.stride(1) != 1
        or residual.stride(1) != 1
        or num_tokens != len(x)
    ):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype} do not fit "
            f"{num_tokens} tokens' choice"
        )
    mxfp4 = experts.gate_up.scales is not None
    if mxfp4 and x.dtype.itemsize != 2:
        raise ValueError(f"x is {x.dtype}: weights in mxfp4 are multiplied with bfloat16 or float16")
    check_experts(x, experts)
    if num_tokens == 0:
        return residual
    pairs = num_tokens * top_k
    chosen = {"mxfp4": mxfp4, "element_bytes": x.dtype.itemsize}
    first, second = (
        shape or product_shape(pairs, experts.num_experts, gated=gated, **chosen) for gated in (True, False)
    )
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    tiles = torch.empty(max_tiles(pairs, experts.num_experts, first.tokens), 3, dtype=torch.int32, device=x.device)
    group_by_owner(expert_ids.view(-1), experts.num_experts, order, tiles, first.tokens, launch_pdl=launch_pdl)
    gated = torch.empty(pairs, experts.down.num_columns, dtype=x.dtype, device=x.device)
    answers = torch.empty(pairs, x.shape[1], dtype=x.dtype, device=x.device)
    grouped = order, tiles, weights
    _multiply_tiles(
        x, experts.gate_up, gated, grouped, first, num_programs, top_k=top_k, gate=experts.gate, launch_pdl=launch_pdl
    )
    _multiply_tiles(
        gated, experts.down, answers, grouped, second, num_programs, top_k=top_k, gate=None, launch_pdl=launch_pdl
    )
    hidden = x.shape[1]
    block = min(_COMBINED, triton.next_power_of_2(hidden))
    _combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
        answers, residual, residual.stride(0), N=hidden, TOP_K=top_k, BLOCK=block, LAUNCH_PDL=launch_pdl, num_warps=4
    )
    return residual


def _multiply_tiles(
    x: torch.Tensor, linear: ExpertLinear, out: torch.Tensor, grouped: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    shape: ProductShape, num_programs: int, *, top_k: int, gate: Gate | None, launch_pdl: bool,
) -> None:  # fmt: skip
    order, tiles, weights = grouped
    rows, constants = out.shape[1], gate_constants(gate or Gate())
    items = len(tiles) * triton.cdiv(rows, shape.rows)
    _products_kernel[(min(items, num_programs),)](
        x, *parameters(linear, x), order, tiles, weights, out, len(tiles), x.stride(0), out.stride(0),
        N=rows, K=linear.num_columns, SCALES=scales_of_row(linear), TOP_K=top_k, TOKENS=shape.tokens, ROWS=shape.rows,
        BLOCK=shape.block, STAGES=shape.stages, GATED=gate is not None, **constants, BIAS=linear.bias is not None,
        MXFP4=linear.scales is not None, LAUNCH_PDL=launch_pdl, PRECISION="ieee", num_warps=shape.num_warps,
    )  # fmt: skip
