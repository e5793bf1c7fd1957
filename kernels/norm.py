"""Norms of rows, and their addition to a residual stream. One program per row; the row is read once.

Rounding is the reference's: of a plain RMS norm the normalised row is rounded to the input's type before it is scaled;
all others once, at the end. Sums are float32. Sources: RMSNorm, Zhang and Sennrich, 2019; LayerNorm, Ba et al., 2016.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.norm_value import Norm


@triton.jit
def _normalise(
    wide,
    scale,
    shift,
    inside,
    eps,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    CENTRED: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """A row [BLOCK] in float32 after the norm, in float32."""
    if CENTRED:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / SIZE, 0.0)
    mean_square = tl.sum(wide * wide, 0) / SIZE
    normed = wide * tl.rsqrt(mean_square + eps)
    if PLUS_ONE:
        normed = normed * (scale.to(tl.float32) + 1.0)
    elif CENTRED or BIAS:
        normed = normed * scale.to(tl.float32)
    else:
        normed = scale.to(tl.float32) * normed.to(DTYPE).to(tl.float32)
    if BIAS:
        normed = normed + shift.to(tl.float32)
    return normed


@kernel
def _norm_kernel(
    x, weight, bias, out, x_stride, out_stride, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    CENTRED: tl.constexpr, PLUS_ONE: tl.constexpr, BIAS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    pdl_release(LAUNCH_PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    scale = tl.load(weight + column, mask=inside, other=0.0)  # no kernel of a step writes weights: need not wait
    shift = scale
    if BIAS:
        shift = tl.load(bias + column, mask=inside, other=0.0)
    pdl_wait(LAUNCH_PDL)
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    normed = _normalise(wide, scale, shift, inside, eps, out.dtype.element_ty, SIZE, CENTRED, PLUS_ONE, BIAS)
    tl.store(out + row * out_stride + column, normed.to(out.dtype.element_ty), mask=inside)


@kernel
def _add_scaled_kernel(
    residual, x, weight, bias, residual_stride, x_stride, eps, multiplier, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, CENTRED: tl.constexpr, PLUS_ONE: tl.constexpr, BIAS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    pdl_release(LAUNCH_PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    scale = tl.zeros([BLOCK], x.dtype.element_ty)
    if NORM:
        scale = tl.load(weight + column, mask=inside, other=0.0)
    shift = scale
    if BIAS:
        shift = tl.load(bias + column, mask=inside, other=0.0)
    pdl_wait(LAUNCH_PDL)
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    at = residual + row * residual_stride + column
    before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        wide = _normalise(wide, scale, shift, inside, eps, x.dtype.element_ty, SIZE, CENTRED, PLUS_ONE, BIAS)
    tl.store(at, (before + multiplier * wide).to(residual.dtype.element_ty), mask=inside)


def norm(x: torch.Tensor, how: Norm, *, out: torch.Tensor | None = None, launch_pdl: bool = False) -> torch.Tensor:
    """out = reference.norm(x, how), over the last dimension.

    x, out: [..., n] of one dtype (bfloat16, float16, float32), last dimension contiguous, rows evenly strided; weight
    and bias: [n], same dtype. out may be x.
    launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads only weight and bias before
    that kernel is complete. Raises ValueError for shapes, strides or dtypes that do not fit.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    rows, out_rows = _rows(x, how), _rows(out, how)
    if out.shape != x.shape:
        raise ValueError(f"out {tuple(out.shape)} is not of x's shape {tuple(x.shape)}")
    num_rows, size = rows.shape
    if num_rows:
        block = triton.next_power_of_2(size)
        _norm_kernel[(num_rows,)](
            rows, how.weight, how.weight if how.bias is None else how.bias, out_rows, rows.stride(0),
            out_rows.stride(0), how.eps,
            SIZE=size, BLOCK=block, CENTRED=how.centred, PLUS_ONE=how.plus_one, BIAS=how.bias is not None,
            LAUNCH_PDL=launch_pdl, num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return out


def add_scaled(
    residual: torch.Tensor, x: torch.Tensor, how: Norm | None, multiplier: float, *, launch_pdl: bool = False
) -> torch.Tensor:
    """residual += multiplier * norm(x), where there is a norm; returns residual. Both [T, n] of one dtype, rows
    contiguous, may be strided.

    Otherwise as `norm`; reads residual after the kernel before is complete, too.
    """
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(1) != 1 or x.stride(1) != 1:
        raise ValueError(
            f"residual {tuple(residual.shape)} {residual.dtype} and x {tuple(x.shape)} {x.dtype} do not fit, or "
            "their rows are not contiguous"
        )
    if how is not None:
        _rows(x, how)
    num_rows, size = x.shape
    if num_rows:
        block = triton.next_power_of_2(size)
        of = Norm(x, 0.0) if how is None else how
        _add_scaled_kernel[(num_rows,)](
            residual, x, of.weight, of.weight if of.bias is None else of.bias, residual.stride(0), x.stride(0), of.eps,
            float(multiplier),
            SIZE=size, BLOCK=block, NORM=how is not None, CENTRED=of.centred, PLUS_ONE=of.plus_one,
            BIAS=of.bias is not None, LAUNCH_PDL=launch_pdl, num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return residual


def _rows(x: torch.Tensor, how: Norm) -> torch.Tensor:
    """x as [rows, n] without a copy."""
    for name, tensor in (("weight", how.weight), ("bias", how.bias)):
        if tensor is not None and (tensor.shape != x.shape[-1:] or x.dtype != tensor.dtype):
            raise ValueError(
                f"{x.dtype} rows of {x.shape[-1]} do not fit a {name} {tuple(tensor.shape)} of {tensor.dtype}"
            )
        if tensor is not None and tensor.stride(0) != 1:
            raise ValueError("rows and weight must be contiguous")
    if x.stride(-1) != 1:
        raise ValueError("rows and weight must be contiguous")
    return x.view(-1, x.shape[-1])
