"""Root-mean-square norm. One program per row; the row is read once.

Rounding is the reference's: the normalised row is rounded to the input's type before it is scaled. Sums are float32.
Source: RMSNorm, Zhang and Sennrich, 2019.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait


@kernel
def _norm_kernel(x, weight, out, x_stride, out_stride, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr):
    pdl_release(LAUNCH_PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    scale = tl.load(weight + column, mask=inside, other=0.0)  # no kernel of a step writes weights: need not wait
    pdl_wait(LAUNCH_PDL)
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(wide * wide, 0) / SIZE
    normed = (wide * tl.rsqrt(mean_square + eps)).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, (scale.to(tl.float32) * normed.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None, launch_pdl: bool = False) -> torch.Tensor:
    """out = weight * x / sqrt(mean(x²) + eps) over the last dimension.

    x, out: [..., n] of one dtype (bfloat16, float16, float32), last dimension contiguous, rows evenly strided; weight: [n], same dtype. out may be x.
    launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads only the weight before that kernel is complete.
    Raises ValueError for shapes, strides or dtypes that do not fit.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    rows, out_rows = _rows(x, weight), _rows(out, weight)
    if out.shape != x.shape:
        raise ValueError(f"out {tuple(out.shape)} is not of x's shape {tuple(x.shape)}")
    num_rows, size = rows.shape
    if num_rows:
        block = triton.next_power_of_2(size)
        _norm_kernel[(num_rows,)](
            rows, weight, out_rows, rows.stride(0), out_rows.stride(0), eps,
            SIZE=size, BLOCK=block, LAUNCH_PDL=launch_pdl, num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return out


def _rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x as [rows, n] without a copy."""
    if weight.shape != x.shape[-1:] or x.dtype != weight.dtype:
        raise ValueError(f"{x.dtype} rows of {x.shape[-1]} do not fit a weight {tuple(weight.shape)} of {weight.dtype}")
    if x.stride(-1) != 1 or weight.stride(0) != 1:
        raise ValueError("rows and weight must be contiguous")
    return x.view(-1, x.shape[-1])
