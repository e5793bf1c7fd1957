"""The experts of a lone token: every weight of those it chose is read once, all of them at the same time, as
`small_linear.vector_linear` reads a matrix.

Two launches: gate and up of each chosen expert with the gate between them; then down of all, weighted, summed and added
to the residual. Sums are float32; what lies between the launches is rounded to the activations' type as in the
reference.

Weights of few bits become numbers in registers (expert_codes.py). What belongs to a stretch of columns, its scale and
its zero, is applied to the stretch's sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.expert_codes import (
    apply_gate,
    check_experts,
    format_constants,
    gate_constants,
    load_scales,
    parameters,
)
from paged_kernels.experts import ExpertLinear, Experts
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.quant_tile import INT4, PLAIN, dot_of_fp8, fours, is_packed_alone, load_zeros, numbers

_LANES = 16  # bytes of a weight that a thread sums before they are scaled


@triton.jit
def _fetched(weight, row, there, begin, K: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of one expert's weight, as it is stored: [ROWS, BLOCK], or in words of four [ROWS, BLOCK / 4]."""
    IN: tl.constexpr = 4 if weight.dtype.element_ty == tl.int32 else 1
    column = begin // IN + tl.arange(0, BLOCK // IN)
    return tl.load(
        weight + row[:, None] * (K // IN) + column[None, :],
        mask=there[:, None] & (column < K // IN)[None, :],
        other=0 if IN == 4 else 0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def _of_expert(weight, expert, NUMBERS: tl.constexpr):
    """Where the weight of an expert begins, of NUMBERS bytes or numbers."""
    return weight + expert * (NUMBERS // 4 if weight.dtype.element_ty == tl.int32 else NUMBERS)


@triton.jit
def _of_parts(of_groups, PARTS: tl.constexpr):
    """[ROWS, groups] -> what belongs to each of PARTS parts of them: [ROWS, PARTS]."""
    shape: tl.constexpr = (of_groups.shape[0], of_groups.shape[1], PARTS // of_groups.shape[1])
    return tl.reshape(tl.broadcast_to(of_groups[:, :, None], shape), (of_groups.shape[0], PARTS))


@triton.jit
def _partial_sums(
    w, x, scale, zero, row, there, begin,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Summed along the second dimension they are a fetched tile times x: float32 [ROWS, BLOCK / LANES]."""
    PARTS: tl.constexpr = BLOCK // LANES
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    column = begin + tl.arange(0, BLOCK)
    inside = column < K
    at = column // GROUP * (2 * GROUP) + column % GROUP if CODES >= INT4 else column
    low = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    high = low
    if w.dtype == tl.int32:
        a, b, c, d = fours(low)
        found = tl.sum(tl.reshape(dot_of_fp8(w, a, b, c, d, PACKED), (ROWS, PARTS, LANES // 4)), 2)
    else:
        low_w, high_w = w, w
        if CODES != PLAIN:
            low_w, high_w = numbers(w, CODES, PACKED)
        product = low_w.to(tl.float32) * low[None, :]
        if CODES >= INT4:
            high = tl.load(x + at + GROUP, mask=inside, other=0.0).to(tl.float32)
            product += high_w.to(tl.float32) * high[None, :]
        found = tl.sum(tl.reshape(product, (ROWS, PARTS, LANES)), 2)
    SHARED: tl.constexpr = min(GROUP, BLOCK) if GROUPED else BLOCK
    group = begin + tl.arange(0, BLOCK // SHARED) * SHARED
    of_group = (row // BLOCK_ROWS * NUM_GROUPS)[:, None] + (group // GROUP)[None, :]
    known = there[:, None] & (group < K)[None, :]
    if ZEROS:
        sums = tl.sum(tl.reshape(low + high if CODES >= INT4 else low, (PARTS, LANES)), 1)
        found -= _of_parts(load_zeros(zero + of_group, known, CODES), PARTS) * sums[None, :]
    if GROUPED:
        found *= _of_parts(load_scales(scale + of_group, known), PARTS)
    return found


@triton.jit
def _scales_of_rows(
    scale, row_scale, row, there,
    ROWS: tl.constexpr, CODES: tl.constexpr, GROUPED: tl.constexpr, ROW_SCALES: tl.constexpr,
):  # fmt: skip
    """What the sums of whole rows are multiplied with: float32 [ROWS]."""
    found = tl.full([ROWS], 1.0, tl.float32)
    if (CODES != PLAIN) and (not GROUPED):
        found *= load_scales(scale + row, there)
    if ROW_SCALES:
        found *= tl.load(row_scale + row, mask=there, other=0.0)
    return found


@kernel
def _gate_up_kernel(
    x, expert_ids, weight, scale, zero, row_scale, bias, out,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, SCALE_ROWS: tl.constexpr, CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr,
    ROW_SCALES: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, PACKED: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """ROWS numbers of one chosen expert's gated vector: out[choice, N]."""
    pdl_release(LAUNCH_PDL)
    choice = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < N
    of_gate = 2 * row if INTERLEAVED else row
    of_up = 2 * row + 1 if INTERLEAVED else N + row
    pdl_wait(LAUNCH_PDL)
    expert = tl.load(expert_ids + choice).to(tl.int64)
    num_scales: tl.constexpr = SCALE_ROWS * ((K + GROUP - 1) // GROUP)
    num_rows: tl.constexpr = 2 * N if GATED else N
    weight = _of_expert(weight, expert, num_rows * K)
    scale += expert * num_scales
    zero += expert * num_scales
    row_scale += expert * num_rows
    bias += expert * num_rows
    gate_parts = tl.zeros([ROWS, BLOCK // LANES], tl.float32)
    up_parts = tl.zeros([ROWS, BLOCK // LANES], tl.float32)
    w = _fetched(weight, of_gate, there, 0, K, BLOCK)
    u = w
    if GATED:
        u = _fetched(weight, of_up, there, 0, K, BLOCK)
    for begin in tl.static_range(0, K, BLOCK):
        next_w, next_u = w, u
        if begin + BLOCK < K:
            next_w = _fetched(weight, of_gate, there, begin + BLOCK, K, BLOCK)
            if GATED:
                next_u = _fetched(weight, of_up, there, begin + BLOCK, K, BLOCK)
        gate_parts += _partial_sums(
            w, x, scale, zero, of_gate, there, begin,
            K, ROWS, BLOCK, LANES, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS, PACKED,
        )  # fmt: skip
        if GATED:
            up_parts += _partial_sums(
                u, x, scale, zero, of_up, there, begin,
                K, ROWS, BLOCK, LANES, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS, PACKED,
            )  # fmt: skip
        w, u = next_w, next_u
    gate = tl.sum(gate_parts, 1) * _scales_of_rows(scale, row_scale, of_gate, there, ROWS, CODES, GROUPED, ROW_SCALES)
    up = tl.sum(up_parts, 1)
    if GATED:
        up *= _scales_of_rows(scale, row_scale, of_up, there, ROWS, CODES, GROUPED, ROW_SCALES)
    if BIAS:
        gate += tl.load(bias + of_gate, mask=there, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + of_up, mask=there, other=0.0).to(tl.float32)
    found = apply_gate(gate, up, GATED, ACTIVATION, LIMIT, ALPHA)
    tl.store(out + choice * N + row, found.to(out.dtype.element_ty), mask=there)


@kernel
def _down_kernel(
    gated, expert_ids, weights, weight, scale, zero, row_scale, bias, residual,
    N: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, SCALE_ROWS: tl.constexpr, CODES: tl.constexpr, GROUPED: tl.constexpr,
    ZEROS: tl.constexpr, ROW_SCALES: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """ROWS numbers of the result: residual += the weighted sum over the chosen experts."""
    pdl_release(LAUNCH_PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < N
    COLUMNS: tl.constexpr = 2 * K if CODES >= INT4 else K
    num_scales: tl.constexpr = SCALE_ROWS * ((K + GROUP - 1) // GROUP)
    BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    pdl_wait(LAUNCH_PDL)
    parts = tl.zeros([ROWS, BLOCK // LANES], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # two tiles are on their way while one is multiplied, also across experts; rows are summed once, in the end
    w = _fetched(_of_expert(weight, tl.load(expert_ids).to(tl.int64), N * K), row, there, 0, K, BLOCK)
    next_w = w
    for step in tl.static_range(-1, TOP_K * BLOCKS):
        ahead = step + 2
        after_next = next_w
        if ahead < TOP_K * BLOCKS:
            of_ahead = _of_expert(weight, tl.load(expert_ids + ahead // BLOCKS).to(tl.int64), N * K)
            after_next = _fetched(of_ahead, row, there, ahead % BLOCKS * BLOCK, K, BLOCK)
        if step >= 0:
            choice = step // BLOCKS
            expert = tl.load(expert_ids + choice).to(tl.int64)
            of_choice = tl.load(weights + choice)
            factor = of_choice * _scales_of_rows(
                scale + expert * num_scales, row_scale + expert * N, row, there, ROWS, CODES, GROUPED, ROW_SCALES
            )
            parts += factor[:, None] * _partial_sums(
                w, gated + choice * COLUMNS, scale + expert * num_scales, zero + expert * num_scales, row, there,
                step % BLOCKS * BLOCK,
                K, ROWS, BLOCK, LANES, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS, PACKED,
            )  # fmt: skip
            if BIAS and step % BLOCKS == 0:
                total += of_choice * tl.load(bias + expert * N + row, mask=there, other=0.0).to(tl.float32)
            w = next_w
        next_w = after_next
    total += tl.sum(parts, 1)
    before = tl.load(residual + row, mask=there, other=0.0).to(tl.float32)
    tl.store(residual + row, (before + total).to(residual.dtype.element_ty), mask=there)


def add_experts_of_one(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    residual: torch.Tensor,
    *,
    launch_pdl: bool = False,
) -> torch.Tensor:
    """reference.add_experts for one token: residual, which is written over.

    x, residual: [1, hidden], of one dtype (bfloat16, float16, float32), contiguous; expert_ids: int32 [1, k]; weights:
    float32 [1, k]. launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads nothing
    before that kernel is complete. Raises ValueError for shapes, dtypes and formats that do not fit.
    """
    top_k = expert_ids.shape[1]
    if (
        x.shape != residual.shape
        or len(x) != 1
        or x.dtype != residual.dtype
        or not (x.is_contiguous() and residual.is_contiguous())
    ):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype}"
            " are not one token of one type"
        )
    check_experts(x, experts)
    if experts.has_words:
        raise ValueError("numbers in words are read by expert_words.py alone")
    size, hidden = experts.down.num_columns, x.shape[1]
    gated = torch.empty(top_k, size, dtype=x.dtype, device=x.device)
    rows, block, lanes = vector_shape(experts.gate_up)
    _gate_up_kernel[(triton.cdiv(size, rows), top_k)](
        x, expert_ids, *_in_words(experts.gate_up, x), gated, N=size, ROWS=rows, BLOCK=block, LANES=lanes,
        **format_constants(experts.gate_up), **gate_constants(experts.gate),
        PACKED=_packed(x, experts.gate_up), LAUNCH_PDL=launch_pdl, num_warps=4,
    )  # fmt: skip
    rows, block, lanes = vector_shape(experts.down)
    _down_kernel[(triton.cdiv(hidden, rows),)](
        gated, expert_ids, weights, *_in_words(experts.down, x), residual,
        N=hidden, TOP_K=top_k, ROWS=rows, BLOCK=block, LANES=lanes,
        **format_constants(experts.down), PACKED=_packed(x, experts.down), LAUNCH_PDL=launch_pdl,
        num_warps=4,
    )  # fmt: skip
    return residual


def _reads_words(linear: ExpertLinear) -> bool:
    """Whether four numbers of fp8 are read at once."""
    return linear.format.codes == "fp8" and linear.num_columns % 16 == 0


def _in_words(linear: ExpertLinear, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight, *others = parameters(linear, x)
    return (weight.view(torch.int32) if _reads_words(linear) else weight, *others)


def _packed(x: torch.Tensor, linear: ExpertLinear) -> bool:
    return x.is_cuda if _reads_words(linear) else is_packed_alone(x, linear.format)


def vector_shape(linear: ExpertLinear) -> tuple[int, int, int]:
    """Rows that a program has in hand at once, numbers or bytes of each, and how many a thread sums: 4 KiB of each
    matrix, of more rows where these are long; nearly what took least time in whole steps of Qwen3-30B-A3B in bfloat16
    and fp8 on an H200. Not measured for weights of fewer bits.
    """
    row_size, element = linear.weight.shape[2], linear.weight.element_size()
    at_once = (2048 if row_size * element < 2048 else 1024) // element
    block = min(at_once, max(32, triton.next_power_of_2(row_size)))
    rows = max(2, min(8, 4096 // (block * element)))
    group = linear.format.group(linear.num_columns) // (2 if linear.format.nibbles else 1)
    lanes = _LANES // element
    if linear.format.block[1] and linear.format.codes != "plain":
        lanes = min(lanes, group)
    return rows, block, min(lanes, block)
