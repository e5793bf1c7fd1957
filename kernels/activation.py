"""Activations of perceptrons, alone or as the gate of a GLU layer. Sources: GLU Variants Improve Transformer, Shazeer,
2020; of each, at ACTIVATIONS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.reference_layers import ACTIVATIONS

_BLOCK = 1024


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """reference_layers.ACTIVATIONS[ACTIVATION] of float32 numbers."""
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # x (1 + tanh(y)) / 2 = x / (1 + exp(-2 y))
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACTIVATION == "relu2")
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = x * x
    return x


@kernel
def _gate_kernel(
    x,
    out,
    x_stride,
    out_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    """GATED: rows of 2 SIZE numbers, of which the first half is activated."""
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    result = activated(gate, ACTIVATION).to(out.dtype.element_ty)
    if GATED:
        up = tl.load(x + row * x_stride + SIZE + column, mask=inside, other=0.0)
        result = (result.to(tl.float32) * up.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, result, mask=inside)


@kernel
def _scale_kernel(
    logits,
    stride,
    multiplier,
    soft_cap,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPPED: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + tl.program_id(0).to(tl.int64) * stride + column
    x = tl.load(at, mask=column < SIZE, other=0.0).to(tl.float32) * multiplier
    if CAPPED:  # tanh(y) = 1 - 2 / (exp(2 y) + 1)
        x = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * x / soft_cap) + 1.0))
    tl.store(at, x.to(logits.dtype.element_ty), mask=column < SIZE)


def scale_logits(
    logits: torch.Tensor, multiplier: float, soft_cap: float | None, *, launch_pdl: bool = False
) -> torch.Tensor:
    """logits [k, vocab], rows contiguous, written over with cap(multiplier * logits); cap(x) = soft_cap * tanh(x /
    soft_cap), or x if it is None.

    Computed in float32. launch_pdl: as of `gate`. Raises ValueError for rows that are not contiguous.
    """
    if logits.stride(1) != 1:
        raise ValueError("rows must be contiguous")
    num_rows, size = logits.shape
    if num_rows:
        _scale_kernel[(num_rows, triton.cdiv(size, _BLOCK))](
            logits, logits.stride(0), float(multiplier), float(soft_cap or 1.0),
            SIZE=size, BLOCK=_BLOCK, CAPPED=soft_cap is not None, LAUNCH_PDL=launch_pdl, num_warps=4,
        )  # fmt: skip
    return logits


def gate(
    gate_up: torch.Tensor, activation: str = "silu", *, out: torch.Tensor | None = None, launch_pdl: bool = False
) -> torch.Tensor:
    """out[t] = activation(gate_up[t, :n]) * gate_up[t, n:], the activation in float32 and rounded before the product as
    in the reference.

    gate_up: [T, 2 n], out: [T, n], one dtype (bfloat16, float16, float32), rows contiguous, may be strided. out may be
    gate_up[:, :n].
    launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads nothing before that kernel
    is complete. Raises ValueError for shapes, strides, dtypes or activations that do not fit.
    """
    if gate_up.shape[1] % 2:
        raise ValueError(
            f"gate_up {tuple(gate_up.shape)}: rows of an odd length do not fit, for they have no two halves"
        )
    return _launch(gate_up, gate_up.shape[1] // 2, activation, out, launch_pdl)


def activate(
    x: torch.Tensor, activation: str, *, out: torch.Tensor | None = None, launch_pdl: bool = False
) -> torch.Tensor:
    """out[t] = activation(x[t]): [T, n], out may be x. Otherwise as `gate`."""
    return _launch(x, x.shape[1], activation, out, launch_pdl)


def _launch(x: torch.Tensor, size: int, activation: str, out: torch.Tensor | None, launch_pdl: bool) -> torch.Tensor:
    out = x.new_empty(len(x), size) if out is None else out
    if out.shape != (len(x), size) or out.dtype != x.dtype:
        raise ValueError(
            f"rows {tuple(x.shape)} {x.dtype} and out {tuple(out.shape)} {out.dtype} do not fit each other"
        )
    if x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("rows must be contiguous")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation} is none of {', '.join(ACTIVATIONS)}")
    if len(x):
        _gate_kernel[(len(x), triton.cdiv(size, _BLOCK))](
            x,
            out,
            x.stride(0),
            out.stride(0),
            SIZE=size,
            BLOCK=_BLOCK,
            GATED=size != x.shape[1],
            ACTIVATION=activation,
            LAUNCH_PDL=launch_pdl,
            num_warps=4,
        )
    return out
