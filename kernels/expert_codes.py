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
    """Of groups or rows: float32. Bytes are powers of two, as their exponents; 0 is 2 ** -127, which has none of its
    own.
    """
    if at.dtype.element_ty == tl.uint8:
        wide = tl.load(at, mask=known, other=127).to(tl.uint32)
        found = tl.where(wide == 0, 0x00400000, wide << 23).to(tl.float32, bitcast=True)
    else:
        found = tl.load(at, mask=known, other=0.0).to(tl.float32)
    return found


@triton.jit
def apply_gate(gate, up, GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr):
    """activation(gate) * up, or with a limit above 0 the clamped form, or without `up` activation(gate):
    kernels/experts.py.
    """
    if LIMIT > 0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
    if ACTIVATION == "silu":
        found = gate / (1.0 + tl.exp(-ALPHA * gate))
    else:
        found = activated(gate, ACTIVATION)
    if GATED:
        found = found * up
    return found


def format_constants(linear: ExpertLinear) -> dict[str, object]:
    """Of all kernels of experts. K and GROUP are in bytes of a row, or in numbers of a plain one, or in words."""
    format = linear.format
    together = 8 if format.order == "words" else 2 if format.nibbles else 1
    row_size = linear.num_columns // together
    grouped, scaled = bool(format.block[1]), linear.scale is not None
    return {
        "K": row_size,
        "GROUP": format.group(linear.num_columns) // together if scaled else row_size,
        "BLOCK_ROWS": format.block[0],
        "SCALE_ROWS": 1 if linear.scale is None else linear.scale.shape[1],
        "CODES": CODE_OF["words" if format.order == "words" else format.codes],
        "GROUPED": grouped and scaled,
        "ZEROS": linear.zero is not None,
        "ROW_SCALES": linear.row_scale is not None,
        "BIAS": linear.bias is not None,
    }


def parameters(linear: ExpertLinear, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Weight, scale, zero, row_scale and bias; x where there is none. Exponents come as bytes, words as int32."""
    scale, weight = linear.scale, linear.weight
    if linear.format.order == "words":
        weight = weight.view(torch.int32)
    if scale is not None and scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    return weight, *(x if t is None else t for t in (scale, linear.zero, linear.row_scale, linear.bias))


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
