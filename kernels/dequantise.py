"""A quantised weight as floats of the activations' type, for products of so many tokens that the tensor cores' time
counts and cuBLAS is the best there is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.device_quads import BLOCK, INT4_ZERO, WORDS, numbers_of_quads
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import WORDS_BLOCK, Linear
from paged_kernels.quads import words_of
from paged_kernels.quant_linear import format_constants, reaches
from paged_kernels.quant_tile import INT4, load_tile

_ROWS, _BLOCK = 8, 256
_ROWS_OF_QUADS = 32


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


@kernel
def _quads_kernel(
    weight, scale, zero, out,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    PACKED: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """A block of 128 columns of ROWS rows. GROUP: blocks that share a scale."""
    pdl_release(LAUNCH_PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    there = row < N
    of_block = (block * N + row).to(tl.int64)
    w = tl.load(weight + (of_block * WORDS)[:, None] + tl.arange(0, WORDS)[None, :], mask=there[:, None], other=0)
    group = block // GROUP * N + row
    z = tl.full([ROWS], INT4_ZERO, tl.int32)
    if ZEROS:
        z = tl.load(zero + group, mask=there, other=0).to(tl.int32)
    s = tl.load(scale + group, mask=there, other=0.0).to(tl.float32)
    # what is put in place two at once is exact in 16 bits
    numbers = numbers_of_quads(w, z, out.dtype.element_ty if PACKED else tl.float32, PACKED).to(tl.float32) * s[:, None]
    column = block * BLOCK + tl.arange(0, BLOCK)
    pdl_wait(LAUNCH_PDL)
    place = out + (row.to(tl.int64) * K)[:, None] + column[None, :]
    tl.store(place, numbers.to(out.dtype.element_ty), mask=there[:, None])


def dequantised(linear: Linear, dtype: torch.dtype, *, launch_pdl: bool = False) -> torch.Tensor:
    """What the linear means, [out, in] of `dtype`, in new memory. Raises ValueError for a format that neither
    quant_linear.py nor int4_narrow.py reads.
    """
    in_quads = linear.format.order == "quads"
    if not in_quads and not reaches(linear):
        raise ValueError(f"{linear.format} is not read by these kernels")
    num_rows = linear.num_rows
    out = torch.empty(num_rows, linear.num_columns, dtype=dtype, device=linear.weight.device)
    if in_quads:
        _quads_kernel[(triton.cdiv(num_rows, _ROWS_OF_QUADS), linear.num_columns // WORDS_BLOCK)](
            words_of(linear), linear.scale, linear.scale if linear.zero is None else linear.zero, out,
            N=num_rows, K=linear.num_columns, ROWS=_ROWS_OF_QUADS,
            GROUP=linear.format.group(linear.num_columns) // WORDS_BLOCK, ZEROS=linear.zero is not None,
            PACKED=out.is_cuda and dtype != torch.float32, LAUNCH_PDL=launch_pdl, num_warps=4,
        )  # fmt: skip
        return out
    row_bytes = linear.weight.shape[1]
    _dequantise_kernel[(triton.cdiv(num_rows, _ROWS), triton.cdiv(row_bytes, _BLOCK))](
        linear.weight, linear.scale, linear.scale if linear.zero is None else linear.zero,
        linear.scale if linear.row_scale is None else linear.row_scale, out,
        N=num_rows, K=row_bytes, ROWS=_ROWS, BLOCK=_BLOCK, **format_constants(linear), LAUNCH_PDL=launch_pdl,
        num_warps=4,
    )  # fmt: skip
    return out
