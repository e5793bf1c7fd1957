"""Root-mean-square norm, alone and fused with the addition of the residual before it. One program per row; the row is read once.

Rounding is the reference's: the sum and the normalised row are rounded to the input's type before they are used. Sums are float32.
Source: RMSNorm, Zhang and Sennrich, 2019.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel


@kernel
def _norm_kernel(
    x, residual, weight, out, residual_out, x_stride, residual_stride, out_stride, residual_out_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    if LAUNCH_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    scale = tl.load(weight + column, mask=inside, other=0.0)  # no kernel of a step writes weights: need not wait
    if LAUNCH_PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        added = tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(residual_out.dtype.element_ty)
        tl.store(residual_out + row * residual_out_stride + column, value, mask=inside)
    wide = value.to(tl.float32)
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
    _launch(rows, rows, weight, out_rows, out_rows, eps, False, launch_pdl)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
    *, out: torch.Tensor | None = None, residual_out: torch.Tensor | None = None, launch_pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """residual_out = x + residual; out = rms_norm(residual_out, weight, eps); returns (out, residual_out).

    All [..., n] as in `rms_norm`; out may be x and residual_out may be residual.
    Raises ValueError for shapes, strides or dtypes that do not fit.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    residual_out = torch.empty_like(residual, memory_format=torch.contiguous_format) if residual_out is None else residual_out
    if not x.shape == residual.shape == out.shape == residual_out.shape:
        raise ValueError(f"x {tuple(x.shape)}, residual {tuple(residual.shape)} and what they are written to must have one shape")
    _launch(_rows(x, weight), _rows(residual, weight), weight, _rows(out, weight), _rows(residual_out, weight), eps, True, launch_pdl)
    return out, residual_out


def _rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x as [rows, n] without a copy."""
    if weight.shape != x.shape[-1:] or x.dtype != weight.dtype:
        raise ValueError(f"{x.dtype} rows of {x.shape[-1]} do not fit a weight {tuple(weight.shape)} of {weight.dtype}")
    if x.stride(-1) != 1 or weight.stride(0) != 1:
        raise ValueError("rows and weight must be contiguous")
    return x.view(-1, x.shape[-1])


def _launch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, residual_out: torch.Tensor, eps: float, add: bool, launch_pdl: bool
) -> None:
    num_rows, size = x.shape
    if num_rows == 0:
        return
    block = triton.next_power_of_2(size)
    pdl = {"launch_pdl": True} if launch_pdl else {}
    _norm_kernel[(num_rows,)](
        x, residual, weight, out, residual_out, x.stride(0), residual.stride(0), out.stride(0), residual_out.stride(0), eps,
        SIZE=size, BLOCK=block, ADD=add, LAUNCH_PDL=launch_pdl, num_warps=min(16, max(1, block // 256)), **pdl,
    )  # fmt: skip
