"""Activations rounded to 8 bits for a product on tensor cores, in the launch of the norm before it. One program per
token; the row is read once.

Scales: of a token, of each 128 of its columns, or a fixed one. Source of the ranges: codes.py, whose
    `round_activations` says the same in plain torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import Rounding
from paged_kernels.norm_value import Norm

_LEAST_SCALE = tl.constexpr(1e-12)
_FP8_MAX = tl.constexpr(448.0)
PADDED = 128  # scales of a group of columns are consecutive, one a token, in memory for a multiple of so many tokens


@kernel
def _round_kernel(
    x, norm_weight, input_scale, out, scales, x_stride, scales_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, NORM: tl.constexpr,
    STATIC: tl.constexpr, POWER_OF_TWO: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    pdl_release(LAUNCH_PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    pdl_wait(LAUNCH_PDL)
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)).to(x.dtype.element_ty)
        weight = tl.load(norm_weight + column, mask=inside, other=0.0)
        wide = (weight.to(tl.float32) * normed.to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
    PARTS: tl.constexpr = BLOCK // GROUP
    grouped = tl.reshape(wide, (PARTS, GROUP))
    part = tl.arange(0, PARTS)
    if STATIC:
        scale = tl.zeros([PARTS], tl.float32) + tl.load(input_scale)
    else:
        scale = tl.maximum(tl.max(tl.abs(grouped), 1), _LEAST_SCALE) / _FP8_MAX
        if POWER_OF_TWO:
            scale = tl.exp2(tl.ceil(tl.log2(scale)))
    numbers = tl.reshape(grouped / scale[:, None], (BLOCK,))
    numbers = tl.clamp(numbers, -_FP8_MAX, _FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row * SIZE + column, numbers.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + part * scales_stride + row, scale, mask=part < NUM_GROUPS)


def empty_scales(num_tokens: int, num_groups: int, device: torch.device) -> torch.Tensor:
    """float32 [T, groups] as round_rows lays them out."""
    padded = triton.cdiv(num_tokens, PADDED) * PADDED
    return torch.empty(num_groups, padded, dtype=torch.float32, device=device).t()[:num_tokens]


def lies_padded(scales: torch.Tensor) -> bool:
    """Whether they are laid out as `empty_scales` does."""
    return (len(scales) == 1 or scales.stride(0) == 1) and scales.stride(1) >= triton.cdiv(len(scales), PADDED) * PADDED


def round_rows(
    x: torch.Tensor,
    rounding: Rounding,
    input_scale: torch.Tensor | None = None,
    *,
    norm: Norm | None = None,
    launch_pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x), if asked for, as float8_e4m3fn numbers [T, K], and float32 scales [T, groups]: the row is about numbers
    * its group's scale. They are a view of [groups, T up to a multiple of 128]: kernels read a group's of many tokens.

    x: [T, K], rows contiguous, may be strided; rounding: to fp8, of whole tokens or groups of a power of two of
    columns; input_scale: float32 [1] of a static rounding; norm: a plain one of [K]. Raises ValueError for a rounding
    or a norm that is not supported.
    """
    num_tokens, size = x.shape
    if (
        rounding.codes != "fp8"
        or rounding.group & (rounding.group - 1)
        or x.stride(1) != 1
        or (rounding.static and input_scale is None)
    ):
        raise ValueError(f"rows of {tuple(x.shape)} {x.dtype} cannot be rounded as {rounding}")
    if norm is not None and not norm.is_plain:
        raise ValueError("only a plain RMS norm can be taken in before rounding")
    block = max(triton.next_power_of_2(size), rounding.group)
    group = rounding.group or block
    num_groups = triton.cdiv(size, group)
    out = torch.empty(num_tokens, size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = empty_scales(num_tokens, num_groups, x.device)
    if num_tokens:
        _round_kernel[(num_tokens,)](
            x, x if norm is None else norm.weight, scales if input_scale is None else input_scale, out, scales,
            x.stride(0), scales.stride(1), 0.0 if norm is None else norm.eps,
            SIZE=size, BLOCK=block, GROUP=group, NUM_GROUPS=num_groups, NORM=norm is not None, STATIC=rounding.static,
            POWER_OF_TWO=rounding.power_of_two, LAUNCH_PDL=launch_pdl, num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return out, scales
