"""Products of few tokens with weights of 4-bit integers by 16-bit tensor cores: numbers lie as these want them
(quads.py), and become floats in the registers from which they are multiplied.

`int4_narrow_linear` takes up to 256 tokens, as fp8_narrow.py does: the weight's rows are the long side of a tile and
tokens the short one, a matrix with few rows is split along its columns, and what hangs on the product happens in the
same launch. Activations are not rounded. A number costs 1.4 instructions; what each group of columns sums up to is
scaled, not each number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.device_quads import BLOCK, INT4_ZERO, WORDS, numbers_of_quads
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import WORDS_BLOCK, Linear
from paged_kernels.narrow_rows import check_sides, store_rows
from paged_kernels.quads import words_of
from paged_kernels.sampling import arrive
from paged_kernels.small_linear import LinearWorkspace, fetch_lines

MAX_TOKENS = 256
_MANY_ROWS = 2**14
_LEAST_COLUMNS = 512  # of a part
_LOADED = 128  # numbers that a thread has on their way at most, when parts are summed up


@kernel(ints=["num_tokens"])
def _int4_kernel(
    x, weight, scale, zero, bias, residual, out, partials, arrivals, num_tokens, x_stride, residual_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    SPAN: tl.constexpr, TOGETHER: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, AT_ONCE: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    FETCH: tl.constexpr, PACKED: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the weight times TOKENS tokens, or a part of their sums: SPAN blocks of 128 columns, the part-th of
    SPLIT. Programs of the same rows are neighbours. TOGETHER: blocks of a stage; GROUP: blocks that share a scale.
    GATED: of each 16 rows 8 are of the first half of the weight and 8 of the second, so that in the tensor cores'
    layout a thread has what belongs together. AT_ONCE: parts whose sums are read together. FETCH: so many blocks are
    brought to the L2 cache before the tokens are there.
    """
    pdl_release(LAUNCH_PDL)
    tile = tl.program_id(1) // SPLIT
    part = tl.program_id(1) % SPLIT
    HEIGHT: tl.constexpr = ROWS // 2 if GATED else ROWS  # of the result
    NUM_ROWS: tl.constexpr = 2 * N if GATED else N
    BLOCKS: tl.constexpr = K // BLOCK
    NUM_GROUPS: tl.constexpr = BLOCKS // GROUP
    index = tl.arange(0, ROWS)
    row = tile * HEIGHT + (index // 16 * 8 + index % 8 if GATED else index)
    row = tl.minimum(row, N - 1)  # what is beyond is not stored
    if GATED:
        row += index // 8 % 2 * N
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    known = token < num_tokens
    first = part * SPAN
    end = tl.minimum(first + SPAN, BLOCKS)
    words_at = weight + (row * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
    if FETCH > 0:
        early = first + tl.arange(0, FETCH)
        lines_at = weight + (row * WORDS)[:, None] + (early * (NUM_ROWS * WORDS))[None, :]
        fetch_lines(lines_at, (row % 2 == 0)[:, None] & (early < end)[None, :])  # a line has two rows
    # Scales of the first group of columns; of the next ones later.
    group = tl.minimum(first // GROUP, NUM_GROUPS - 1)
    next_s = tl.load(scale + row + group * NUM_ROWS).to(tl.float32)
    pdl_wait(LAUNCH_PDL)

    tokens_at = x + (token * x_stride)[:, None] + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for begin in tl.range(first, end, TOGETHER, num_stages=STAGES):
        for inner in tl.static_range(TOGETHER):
            block = begin + inner
            w = tl.load(words_at + block * (NUM_ROWS * WORDS), eviction_policy="evict_first")
            values = tl.load(tokens_at + block * BLOCK, mask=known[:, None], other=0.0)
            s = next_s
            z = tl.full([ROWS], INT4_ZERO, tl.int32)
            if ZEROS:
                z = tl.load(zero + row + block // GROUP * NUM_ROWS).to(tl.int32)
            if NUM_GROUPS > 1:
                ahead = tl.minimum((block + 1) // GROUP, NUM_GROUPS - 1)
                next_s = tl.load(scale + row + ahead * NUM_ROWS).to(tl.float32)
            numbers = numbers_of_quads(w, z, x.dtype.element_ty, PACKED)
            product = tl.dot(numbers, tl.trans(values), input_precision="ieee")
            total += product * s[:, None]

    last = True
    if SPLIT > 1:
        sums = tile * tl.num_programs(0) + tl.program_id(0)
        parts_at = partials + sums.to(tl.int64) * (SPLIT * ROWS * TOKENS) + index[:, None] * TOKENS
        parts_at += tl.arange(0, TOKENS)[None, :]
        tl.store(parts_at + part * (ROWS * TOKENS), total, mask=known[None, :])
        last = arrive(arrivals + sums, SPLIT)
    if last:
        sum_of_all = total
        if SPLIT > 1:
            sum_of_all = tl.zeros([ROWS, TOKENS], tl.float32)
            for other in tl.range(0, SPLIT, loop_unroll_factor=AT_ONCE):
                theirs = parts_at + other * (ROWS * TOKENS)
                sum_of_all += tl.load(theirs, mask=known[None, :], other=0.0, cache_modifier=".cg")
            tl.store(arrivals + sums, 0)
        if BIAS:
            sum_of_all += tl.load(bias + row).to(tl.float32)[:, None]
        store_rows(
            sum_of_all, tile * HEIGHT, token, known, residual, residual_stride, out, out_stride, N, HEIGHT, TOKENS,
            GATED, ACTIVATION, ADD,
        )  # fmt: skip


@dataclass(frozen=True)
class Int4NarrowShape:
    """How int4_narrow_linear divides its work: a tile's rows of the weight and tokens (at most 128), parts of a row,
    stages of the pipeline, warps, blocks of 128 columns that are fetched ahead, and those of a stage, if they divide a
    part.
    """

    rows: int
    tokens: int
    split: int
    stages: int
    num_warps: int
    fetch: int = 0
    together: int = 1


def int4_narrow_shape(num_tokens: int, linear: Linear, dtype: torch.dtype = torch.bfloat16) -> Int4NarrowShape:
    """Nearly what took least time on an H200 with each matrix of Llama-3.1-8B and 32, 64, 128 and 256 tokens, and for
    up to 16 in whole steps of one token, where a product runs beside the end of the kernel before it: what is fastest
    after itself (tiles of 64 rows, two blocks a stage) took 0.97 ms for 8 layers and the head instead of 0.86.

    Rows are split until there are enough programs, of four blocks of columns at least. Tiles are higher for few tokens,
    and where a matrix has many rows. float32, which no tensor core multiplies, is here to be compared with: a larger
    tile would fit no registers, and take minutes to compile.
    """
    if dtype == torch.float32:
        return Int4NarrowShape(rows=16, tokens=16, split=1, stages=1, num_warps=4)
    tokens = min(128, max(16, triton.next_power_of_2(num_tokens)))
    many_rows = linear.num_rows >= _MANY_ROWS and 32 <= tokens <= 64
    rows = 128 if many_rows or tokens == 16 else 64
    tiles, split = triton.cdiv(linear.num_rows, rows) * triton.cdiv(num_tokens, tokens), 1
    enough = 256 if tokens <= 32 else 192
    while not many_rows and tiles * split < enough and linear.num_columns >= 2 * split * _LEAST_COLUMNS:
        split *= 2
    return Int4NarrowShape(
        rows=rows,
        tokens=tokens,
        split=split,
        stages=4 if tokens == 32 else 3,
        num_warps=8 if many_rows and tokens == 32 else 4,
        fetch=4 if tokens <= 32 else 0,
        together=2 if 32 <= tokens <= 64 and not many_rows else 1,
    )


def int4_narrow_linear(
    x: torch.Tensor, linear: Linear, *, workspace: LinearWorkspace, gated: bool = False, activation: str = "silu",
    residual: torch.Tensor | None = None, out: torch.Tensor | None = None, shape: Int4NarrowShape | None = None,
    launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out = residual + gate(x . W + bias) for 1 to 256 tokens; gate, bias and residual only if asked for. W: what the
    linear means.

    x: [T, K], rows contiguous, may be strided; linear: int4 in quads, N rows, or 2 N if gated (rows of the gate, then
    of what it lets through), K columns; gate: activation(first) * second; residual, out: [T, N], rows contiguous, may
    be strided; out may be residual. x's floating dtype is that of all but the weight and its scales; sums in float32,
    rounded at the end. launch_pdl: begin while the kernel before drains; reads nothing but weights before that kernel
    is complete. Raises ValueError for shapes, strides, dtypes or formats that do not fit.
    """
    num_tokens, num_columns = x.shape
    num_rows = linear.num_rows // 2 if gated else linear.num_rows
    out = x.new_empty(num_tokens, num_rows) if out is None else out
    words = words_of(linear)
    check_sides(x, linear, residual, out, num_rows, MAX_TOKENS)
    assert linear.scale is not None
    shape = shape or int4_narrow_shape(num_tokens, linear, x.dtype)
    tiles = triton.cdiv(num_rows, shape.rows // (2 if gated else 1))
    across = triton.cdiv(num_tokens, shape.tokens)
    split = shape.split if tiles * across <= len(workspace.arrivals) else 1
    while split > 1 and tiles * across * split * shape.rows * shape.tokens > len(workspace.partials):
        split //= 2
    blocks = num_columns // WORDS_BLOCK
    together = shape.together if blocks % (split * shape.together) == 0 else 1
    at_once = _LOADED * 32 * shape.num_warps // (shape.rows * shape.tokens)
    _int4_kernel[(across, tiles * split)](
        x, words, linear.scale, linear.scale if linear.zero is None else linear.zero,
        x if linear.bias is None else linear.bias, x if residual is None else residual, out, workspace.partials,
        workspace.arrivals, num_tokens, x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        N=num_rows, K=num_columns, TOKENS=shape.tokens, ROWS=shape.rows, SPLIT=split,
        SPAN=triton.cdiv(blocks, split), TOGETHER=together, GROUP=linear.format.group(num_columns) // WORDS_BLOCK,
        ZEROS=linear.zero is not None, STAGES=shape.stages, AT_ONCE=max(1, min(split, at_once)),
        GATED=gated, ACTIVATION=activation,
        BIAS=linear.bias is not None, ADD=residual is not None, FETCH=shape.fetch if launch_pdl else 0,
        PACKED=x.is_cuda and x.dtype != torch.float32, LAUNCH_PDL=launch_pdl, num_warps=shape.num_warps,
    )  # fmt: skip
    return out
