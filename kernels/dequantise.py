"""A quantised weight as floats of the activations' type, for products of so many tokens that the tensor cores' time
counts and cuBLAS is the best there is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import Linear
from paged_kernels.quant_linear import format_constants, reaches
from paged_kernels.quant_tile import INT4, load_tile

_ROWS, _BLOCK = 8, 256


@kernel
def _dequantise_kernel(
    weight, scale, zero, row_scale, out,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr,
    ROW_SCALES: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the result, what BLOCK bytes of each become."""
    pdl_release(LAUNCH_PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * BLOCK
    there = (row < N)[:, None]
    at = weight + (row.to(tl.int64) * K)[:, None]
    low, high = load_tile(at, row, there, begin, scale, zero, K, ROWS, BLOCK, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS)
    factor = tl.full([ROWS], 1.0, tl.float32)
    if not GROUPED:
        factor *= tl.load(scale + row, mask=row < N, other=0.0).to(tl.float32)
    if ROW_SCALES:
        factor *= tl.load(row_scale + row, mask=row < N, other=0.0)
    column = begin + tl.arange(0, BLOCK)
    wanted = there & (column < K)[None, :]
    pdl_wait(LAUNCH_PDL)
    if CODES >= INT4:
        place = out + (row.to(tl.int64) * (2 * K))[:, None] + (column // GROUP * (2 * GROUP) + column % GROUP)[None, :]
        tl.store(place + GROUP, (high * factor[:, None]).to(out.dtype.element_ty), mask=wanted)
    else:
        place = out + (row.to(tl.int64) * K)[:, None] + column[None, :]
    tl.store(place, (low * factor[:, None]).to(out.dtype.element_ty), mask=wanted)


def dequantised(linear: Linear, dtype: torch.dtype, *, launch_pdl: bool = False) -> torch.Tensor:
    """What the linear means, [out, in] of `dtype`, in new memory. Raises ValueError for a format that quant_linear.py
    does not read.
    """
    if not reaches(linear):
        raise ValueError(f"{linear.format} is not read by these kernels")
    num_rows, row_bytes = linear.weight.shape
    out = torch.empty(num_rows, linear.num_columns, dtype=dtype, device=linear.weight.device)
    _dequantise_kernel[(triton.cdiv(num_rows, _ROWS), triton.cdiv(row_bytes, _BLOCK))](
        linear.weight, linear.scale, linear.scale if linear.zero is None else linear.zero,
        linear.scale if linear.row_scale is None else linear.row_scale, out,
        N=num_rows, K=row_bytes, ROWS=_ROWS, BLOCK=_BLOCK, **format_constants(linear), LAUNCH_PDL=launch_pdl,
        num_warps=4,
    )  # fmt: skip
    return out
