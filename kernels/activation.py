"""The gate of a SwiGLU layer. Source: GLU Variants Improve Transformer, Shazeer, 2020."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait

_BLOCK = 1024


@kernel
def _silu_mul_kernel(gate_up, out, gate_up_stride, out_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr):
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + SIZE + column, mask=inside, other=0.0)
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, (activated.to(tl.float32) * up.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None, launch_pdl: bool = False) -> torch.Tensor:
    """out[t] = silu(gate_up[t, :n]) * gate_up[t, n:], silu(x) = x / (1 + exp(-x)) in float32, rounded before the product as in the reference.

    gate_up: [T, 2 n], out: [T, n], one dtype (bfloat16, float16, float32), rows contiguous, may be strided. out may be gate_up[:, :n].
    launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads nothing before that kernel is complete.
    Raises ValueError for shapes, strides or dtypes that do not fit.
    """
    num_tokens, double = gate_up.shape
    size = double // 2
    out = gate_up.new_empty(num_tokens, size) if out is None else out
    if double % 2 or out.shape != (num_tokens, size) or out.dtype != gate_up.dtype:
        raise ValueError(f"gate_up {tuple(gate_up.shape)} {gate_up.dtype} and out {tuple(out.shape)} {out.dtype} do not fit each other")
    if gate_up.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("rows must be contiguous")
    if num_tokens == 0:
        return out
    _silu_mul_kernel[(num_tokens, triton.cdiv(size, _BLOCK))](
        gate_up, out, gate_up.stride(0), out.stride(0), SIZE=size, BLOCK=_BLOCK, LAUNCH_PDL=launch_pdl, num_warps=4
    )
    return out
