"""What the experts' kernels share: scales, the gate, constants and checks of matrices in every format (linear.py). How
codes become numbers in registers is quant_tile.py's.

A byte with two numbers has them of the same group, half a group apart, so that the low nibbles of a stretch of bytes
are consecutive columns, and the high ones too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.activation import activated
from paged_kernels.experts import ExpertLinear, Experts, Gate, reaches_experts
from paged_kernels.quant_tile import CODE_OF


@triton.jit
def load_scales(at, known):
    """Of groups or rows: float32."""
    return tl.load(at, mask=known, other=0.0).to(tl.float32)


@triton.jit
def apply_gate(gate, up, GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """activation(gate) * up, or with a limit above 0 the clamped form, or without `up` activation(gate):
    kernels/experts.py.
    """
    if LIMIT > 0:
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL) + 1.0
    if ACTIVATION == "silu":
        found = gate / (1.0 + tl.exp(-ALPHA * gate))
    else:
        found = activated(gate, ACTIVATION)
    if GATED:
        found = found * up
    return found


def format_constants(linear: ExpertLinear) -> dict[str, object]:
    """Of the kernels of experts that are not in words. K and GROUP are in bytes of a row, or numbers of a plain one."""
    format = linear.format
    together = 2 if format.nibbles else 1
    row_size = linear.num_columns // together
    grouped, scaled = bool(format.block[1]), linear.scale is not None
    return {
        "K": row_size,
        "GROUP": format.group(linear.num_columns) // together if scaled else row_size,
        "BLOCK_ROWS": format.block[0],
        "SCALE_ROWS": 1 if linear.scale is None else linear.scale.shape[1],
        "CODES": CODE_OF[format.codes],
        "GROUPED": grouped and scaled,
        "ZEROS": linear.zero is not None,
        "ROW_SCALES": linear.row_scale is not None,
        "BIAS": linear.bias is not None,
    }


def parameters(linear: ExpertLinear, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Weight, scale, zero, row_scale and bias; x where there is none."""
    others = (linear.scale, linear.zero, linear.row_scale, linear.bias)
    return linear.weight, *(x if tensor is None else tensor for tensor in others)


def gate_constants(gate: Gate) -> dict[str, object]:
    return {
        "GATED": gate.gated,
        "INTERLEAVED": gate.interleaved,
        "ACTIVATION": gate.activation,
        "LIMIT": gate.limit or 0.0,
        "ALPHA": gate.alpha,
    }


def check_experts(x: torch.Tensor, experts: Experts) -> None:
    """
    Raises:
        ValueError: the experts' matrices do not fit each other or x [T, hidden], or are of a format that is not read.
    """
    hidden, size = x.shape[1], experts.down.num_columns
    for name, linear, rows, columns in (
        ("gate_up", experts.gate_up, experts.gate.num_products * size, hidden),
        ("down", experts.down, hidden, size),
    ):
        if linear.num_rows != rows or linear.num_columns != columns:
            raise ValueError(f"{name} {tuple(linear.weight.shape)} is not [E, {rows}, {columns}]")
        if not all(tensor.is_contiguous() for tensor in linear.tensors):
            raise ValueError(f"{name} {tuple(linear.weight.shape)} or what belongs to it is not contiguous")
        if not reaches_experts(linear.format):
            raise ValueError(f"{name} is of {linear.format}, which is not read by these kernels")
        if linear.format.codes == "plain" and linear.weight.dtype != x.dtype:
            raise ValueError(f"{name} is {linear.weight.dtype}, x is {x.dtype}")
        if linear.bias is not None and linear.bias.dtype != x.dtype:
            raise ValueError(f"{name}'s bias is {linear.bias.dtype}, x is {x.dtype}")


def check_call(x: torch.Tensor, expert_ids: torch.Tensor, experts: Experts, residual: torch.Tensor) -> None:
    """
    Raises:
        ValueError: x and residual [T, hidden], the choice [T, k] and the experts do not fit each other.
    """
    num_tokens = len(expert_ids)
    if (
        x.shape != residual.shape
        or x.dtype != residual.dtype
        or x.stride(1) != 1
        or residual.stride(1) != 1
        or num_tokens != len(x)
    ):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype}"
            f" do not fit {num_tokens} tokens' choice"
        )
    check_experts(x, experts)
