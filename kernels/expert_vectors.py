"""The experts of a lone token: every weight of those it chose is read once, all of them at the same time, as
`small_linear.vector_linear` reads a matrix.

Two launches: gate and up of each chosen expert with the gate between them; then down of all, weighted, summed and added
to the residual. Sums are float32; what lies between the launches is rounded to the activations' type as in the
reference.

Weights in mxfp4 (kernels/mxfp4.py) become numbers in registers: a byte has two neighbours, the even one below; 16 bytes
share a scale, which multiplies their sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.experts import ExpertLinear, Experts, Gate
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.mxfp4 import GROUP, GROUP_BYTES

_MX_BYTES = tl.constexpr(GROUP_BYTES)
_MX_GROUP = tl.constexpr(GROUP)


@triton.jit
def apply_gate(gate, up, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """silu(gate) * up, or with a limit above 0 the clamped form: kernels/experts.py."""
    if LIMIT > 0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * up


@triton.jit
def _nibble_value(nibble):
    """uint8 0 … 15 -> float32: the bits lie as float16's do, but for the exponent's bias, which 2 ** 14 makes up
    for.
    """
    wide = nibble.to(tl.uint16)
    half = (((wide & 8) << 12) | ((wide & 7) << 9)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 16384.0


@triton.jit
def _scale_value(scale):
    """uint8 -> float32; 0 is 2 ** -127, which has no exponent of its own."""
    wide = scale.to(tl.uint32)
    return tl.where(wide == 0, 0x00400000, wide << 23).to(tl.float32, bitcast=True)


@triton.jit
def _row_sums(
    x, weight, scales, row, there,
    K: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    MXFP4: tl.constexpr,
):  # fmt: skip
    """weight[row] . x, float32 [ROWS]. row: int64; SCALES: of a row."""
    if MXFP4:
        total = tl.zeros([ROWS, BLOCK // _MX_GROUP], tl.float32)
        byte = tl.arange(0, BLOCK // 2)
        group = tl.arange(0, BLOCK // _MX_GROUP)
        for begin in tl.static_range(0, K, BLOCK):
            at = begin // 2 + byte
            inside = at < K // 2
            packed = tl.load(
                weight + row[:, None] * (K // 2) + at[None, :],
                mask=there[:, None] & inside[None, :],
                other=0,
                eviction_policy="evict_first",
            )
            even = tl.load(x + 2 * at, mask=inside, other=0.0).to(tl.float32)
            odd = tl.load(x + 2 * at + 1, mask=inside, other=0.0).to(tl.float32)
            product = _nibble_value(packed & 0xF) * even[None, :] + _nibble_value(packed >> 4) * odd[None, :]
            of_group = begin // _MX_GROUP + group
            scale = tl.load(
                scales + row[:, None] * SCALES + of_group[None, :],
                mask=there[:, None] & (of_group * _MX_GROUP < K)[None, :],
                other=0,
            )
            total += tl.sum(tl.reshape(product, (ROWS, BLOCK // _MX_GROUP, _MX_BYTES)), 2) * _scale_value(scale)
    else:
        total = tl.zeros([ROWS, BLOCK // LANES], tl.float32)
        for begin in tl.static_range(0, K, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < K
            w = tl.load(
                weight + row[:, None] * K + column[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(tl.reshape(w.to(tl.float32) * value[None, :], (ROWS, BLOCK // LANES, LANES)), 2)
    return tl.sum(total, 1)


@kernel
def _gate_up_kernel(
    x, expert_ids, weight, scales, bias, out,
    N: tl.constexpr, K: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, MXFP4: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BIAS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """ROWS numbers of one chosen expert's gated vector: out[choice, N]."""
    pdl_release(LAUNCH_PDL)
    choice = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < N
    pdl_wait(LAUNCH_PDL)
    first = tl.load(expert_ids + choice).to(tl.int64) * (2 * N)
    of_gate = first + (2 * row if INTERLEAVED else row)
    of_up = first + (2 * row + 1 if INTERLEAVED else N + row)
    gate = _row_sums(x, weight, scales, of_gate, there, K, SCALES, ROWS, BLOCK, LANES, MXFP4)
    up = _row_sums(x, weight, scales, of_up, there, K, SCALES, ROWS, BLOCK, LANES, MXFP4)
    if BIAS:
        gate += tl.load(bias + of_gate, mask=there, other=0.0).to(tl.float32)
        up += tl.load(bias + of_up, mask=there, other=0.0).to(tl.float32)
    tl.store(out + choice * N + row, apply_gate(gate, up, LIMIT, ALPHA).to(out.dtype.element_ty), mask=there)


@kernel
def _down_kernel(
    gated, expert_ids, weights, weight, scales, bias, residual,
    N: tl.constexpr, K: tl.constexpr, SCALES: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, MXFP4: tl.constexpr, BIAS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """ROWS numbers of the result: residual += the weighted sum over the chosen experts."""
    pdl_release(LAUNCH_PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < N
    pdl_wait(LAUNCH_PDL)
    total = tl.zeros([ROWS], tl.float32)
    for choice in tl.range(0, TOP_K):
        of_expert = tl.load(expert_ids + choice).to(tl.int64) * N + row
        found = _row_sums(gated + choice * K, weight, scales, of_expert, there, K, SCALES, ROWS, BLOCK, LANES, MXFP4)
        if BIAS:
            found += tl.load(bias + of_expert, mask=there, other=0.0).to(tl.float32)
        total += found * tl.load(weights + choice)
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
    before that kernel is complete. Raises ValueError for shapes and dtypes that do not fit.
    """
    top_k = expert_ids.shape[1]
    if (
        x.shape != residual.shape
        or len(x) != 1
        or x.dtype != residual.dtype
        or not (x.is_contiguous() and residual.is_contiguous())
    ):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype} are not one "
            "token of one type"
        )
    size = experts.down.num_columns
    check_experts(x, experts)
    gated = torch.empty(top_k, size, dtype=x.dtype, device=x.device)
    rows, block = vector_shape(x.shape[1])
    _gate_up_kernel[(triton.cdiv(size, rows), top_k)](
        x, expert_ids, *parameters(experts.gate_up, x), gated,
        N=size, K=x.shape[1], SCALES=scales_of_row(experts.gate_up), ROWS=rows, BLOCK=block, LANES=8,
        MXFP4=experts.gate_up.scales is not None, **gate_constants(experts.gate), BIAS=experts.gate_up.bias is not None,
        LAUNCH_PDL=launch_pdl, num_warps=4,
    )  # fmt: skip
    rows, block = vector_shape(size)
    _down_kernel[(triton.cdiv(x.shape[1], rows),)](
        gated, expert_ids, weights, *parameters(experts.down, x), residual,
        N=x.shape[1], K=size, SCALES=scales_of_row(experts.down), TOP_K=top_k, ROWS=rows, BLOCK=block, LANES=8,
        MXFP4=experts.down.scales is not None, BIAS=experts.down.bias is not None, LAUNCH_PDL=launch_pdl, num_warps=4,
    )  # fmt: skip
    return residual


def parameters(linear: ExpertLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, scales and bias; x where there is none."""
    return linear.weight, x if linear.scales is None else linear.scales, x if linear.bias is None else linear.bias


def scales_of_row(linear: ExpertLinear) -> int:
    return 0 if linear.scales is None else linear.scales.shape[2]


def gate_constants(gate: Gate) -> dict[str, object]:
    return {"INTERLEAVED": gate.interleaved, "LIMIT": gate.limit or 0.0, "ALPHA": gate.alpha}


def check_experts(x: torch.Tensor, experts: Experts) -> None:
    """
    Raises:
        ValueError: the experts' matrices do not fit each other or x [T, hidden].
    """
    hidden, size = x.shape[1], experts.down.num_columns
    for name, linear, rows, columns in (
        ("gate_up", experts.gate_up, 2 * size, hidden),
        ("down", experts.down, hidden, size),
    ):
        if linear.weight.shape[1] != rows or linear.num_columns != columns or not linear.weight.is_contiguous():
            raise ValueError(f"{name} {tuple(linear.weight.shape)} is not contiguous [E, {rows}, {columns}]")
        if linear.scales is None and linear.weight.dtype != x.dtype:
            raise ValueError(f"{name} is {linear.weight.dtype}, x is {x.dtype}")
        if linear.bias is not None and linear.bias.dtype != x.dtype:
            raise ValueError(f"{name}'s bias is {linear.bias.dtype}, x is {x.dtype}")


def vector_shape(num_columns: int) -> tuple[int, int]:
    """Rows and columns that a program has in hand at once: some 2,000 numbers of each matrix, as vector_linear's
    measured shapes have.
    """
    block = min(1024, max(GROUP, triton.next_power_of_2(num_columns)))
    return (2 if block == 1024 else 4), block
