"""RMS norms of queries and of keys, each over all heads together, where a rank has a part of the heads: the mean
squares of its part, and the norms by the means over all ranks. rank_ops.py stands between the two launches.

Rounding is the reference's: the normalised row is rounded to the input's type before it is scaled. Source: RMSNorm,
Zhang and Sennrich, 2019.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_begin
from paged_kernels.norm_value import Norm


@kernel
def _mean_squares_kernel(
    x, out, x_stride, Q_SIZE: tl.constexpr, K_SIZE: tl.constexpr, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr
):
    """Program 0 of a row has its queries, program 1 its keys."""
    pdl_begin(LAUNCH_PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = Q_SIZE + part * (K_SIZE - Q_SIZE)
    column = tl.arange(0, BLOCK)
    wide = tl.load(x + row * x_stride + part * Q_SIZE + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(out + row * 2 + part, tl.sum(wide * wide, 0) / size)


@kernel
def _norm_parts_kernel(
    x, q_weight, k_weight, mean_squares, x_stride, eps,
    Q_SIZE: tl.constexpr, K_SIZE: tl.constexpr, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """Program 0 of a row has its queries, program 1 its keys."""
    pdl_begin(LAUNCH_PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < Q_SIZE + part * (K_SIZE - Q_SIZE)
    scale = tl.load(q_weight + column, mask=column < (1 - part) * Q_SIZE, other=0.0).to(tl.float32)
    scale += tl.load(k_weight + column, mask=column < part * K_SIZE, other=0.0).to(tl.float32)
    at = x + row * x_stride + part * Q_SIZE + column
    normed = tl.load(at, mask=inside, other=0.0).to(tl.float32) * tl.rsqrt(tl.load(mean_squares + row * 2 + part) + eps)
    normed = scale * normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(at, normed.to(x.dtype.element_ty), mask=inside)


def mean_squares(x: torch.Tensor, sizes: tuple[int, int], *, launch_pdl: bool = False) -> torch.Tensor:
    """rank_ops.RankOps.mean_squares: of the first sizes[0] numbers of each row, and the next sizes[1]; float32 [T, 2].

    x: [T, n], bfloat16, float16 or float32, rows contiguous, may be strided. launch_pdl: begin while the kernel before
    drains (programmatic dependent launch); reads nothing before that kernel is complete. Raises ValueError for rows
    that do not fit.
    """
    _check(x, sizes)
    out = torch.empty(len(x), 2, dtype=torch.float32, device=x.device)
    if len(x):
        block = triton.next_power_of_2(max(sizes))
        _mean_squares_kernel[(len(x), 2)](
            x, out, x.stride(0), Q_SIZE=sizes[0], K_SIZE=sizes[1], BLOCK=block, LAUNCH_PDL=launch_pdl,
            num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return out


def norm_parts(
    x: torch.Tensor, norms: tuple[Norm, Norm], mean_squares: torch.Tensor, *, launch_pdl: bool = False
) -> torch.Tensor:
    """rank_ops.RankOps.norm_parts: x, written over.

    x: as `mean_squares` has it; norms: plain ones of one eps, of x's type; mean_squares: float32 [T, 2], contiguous.
    launch_pdl: as there. Raises ValueError for what does not fit.
    """
    q_norm, k_norm = norms
    sizes = len(q_norm.weight), len(k_norm.weight)
    _check(x, sizes)
    if mean_squares.shape != (len(x), 2) or mean_squares.dtype != torch.float32 or not mean_squares.is_contiguous():
        raise ValueError(f"mean squares {tuple(mean_squares.shape)} {mean_squares.dtype} are not of {len(x)} rows")
    if not (q_norm.is_plain and k_norm.is_plain) or q_norm.eps != k_norm.eps:
        raise ValueError("queries and keys must have plain RMS norms of one kind")
    if len(x):
        block = triton.next_power_of_2(max(sizes))
        _norm_parts_kernel[(len(x), 2)](
            x, q_norm.weight, k_norm.weight, mean_squares, x.stride(0), q_norm.eps,
            Q_SIZE=sizes[0], K_SIZE=sizes[1], BLOCK=block, LAUNCH_PDL=launch_pdl,
            num_warps=min(16, max(1, block // 256)),
        )  # fmt: skip
    return x


def _check(x: torch.Tensor, sizes: tuple[int, int]) -> None:
    if x.dim() != 2 or x.shape[1] < sum(sizes) or x.stride(1) != 1:
        raise ValueError(f"rows {tuple(x.shape)} have no {sizes[0]} and {sizes[1]} numbers without gaps")
