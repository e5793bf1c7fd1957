"""Products of few tokens with weights of fp8 by 8-bit tensor cores: both sides are multiplied as they are stored.

`fp8_narrow_linear` takes up to 256 tokens that round_rows.py has rounded, as `narrow_linear` of small_linear.py takes
them in 16 bits: the weight's rows are the long side of a tile and tokens the short one, a matrix with few rows is split
along its columns, and what hangs on the product happens in the same launch. Nothing is converted, so that 64 tokens
cost little more than 16: gate and up of Llama-3.1-8B on an H200, with norm, rounding and gate, 37 us and 33, where the
weight is read in 25 (tests/bench/bench_linear.py --formats fp8-channel,fp8-block).

The tensor cores of Hopper add products of fp8 with 14 bits. So what each BLOCK of columns sums up to is added in
float32, as cuBLASLt does without fast accumulation; with weights whose blocks of 128 columns have scales, after it was
scaled (DeepSeek-V3 technical report, 2024, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.block_linear import GROUP
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import Linear
from paged_kernels.narrow_rows import store_rows
from paged_kernels.round_rows import lies_padded
from paged_kernels.small_linear import LinearWorkspace, fetch_lines, leave_part

MAX_TOKENS = 256
_MULTIPROCESSORS = 132  # of an H200


@triton.jit
def _sum_of_parts(theirs, place, arrivals, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr):
    """As small_linear.sum_of_parts, with all parts in flight at once."""
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(theirs + part * (ROWS * TOKENS) + place, cache_modifier=".cg")
    tl.store(arrivals, 0)
    return total


@kernel(ints=["num_tokens"])
def _fp8_kernel(
    x, x_scales, weight, scale, bias, residual, out, partials, arrivals, num_tokens, x_stride, scales_stride,
    residual_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, SPAN: tl.constexpr, BLOCK_ROWS: tl.constexpr, GROUPED: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, FETCH: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the weight times TOKENS tokens, or a part of their sums: SPAN columns, the part-th of SPLIT.
    Programs of the same rows are neighbours. GATED: of each 16 rows 8 are of the first half of the weight and 8 of the
    second, so that in the tensor cores' layout a thread has what belongs together. FETCH: lines of 128 bytes of each
    row that are brought to the L2 cache before the tokens are there.
    """
    pdl_release(LAUNCH_PDL)
    tile = tl.program_id(1) // SPLIT
    part = tl.program_id(1) % SPLIT
    HEIGHT: tl.constexpr = ROWS // 2 if GATED else ROWS  # of the result
    index = tl.arange(0, ROWS)
    row = tile * HEIGHT + (index // 16 * 8 + index % 8 if GATED else index)
    there = row < N
    if GATED:
        row += index // 8 % 2 * N
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    known = token < num_tokens
    column = part * SPAN + tl.arange(0, BLOCK)
    at = weight + (row.to(tl.int64) * K)[:, None]
    if FETCH > 0:
        line = part * SPAN + tl.arange(0, FETCH) * 128
        fetch_lines(at + line[None, :], there[:, None] & (line < K)[None, :])
    NUM_GROUPS: tl.constexpr = (K + BLOCK - 1) // BLOCK if GROUPED else 1
    WHOLE: tl.constexpr = N % HEIGHT == 0 and SPAN * SPLIT == K
    # Scales of the weight's rows, or those of the first group of columns; of the next ones later.
    group = tl.minimum(part * (SPAN // BLOCK) if GROUPED else 0, NUM_GROUPS - 1)
    scale_at = scale + row // BLOCK_ROWS * NUM_GROUPS
    next_s = tl.load(scale_at + group, mask=there, other=0.0).to(tl.float32)
    pdl_wait(LAUNCH_PDL)

    tokens_at = x + (token * x_stride)[:, None]
    scales_at = x_scales + token
    next_x = tl.load(scales_at + group * scales_stride)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for begin in tl.range(0, SPAN, BLOCK, num_stages=STAGES):
        if WHOLE:
            values = tl.load(tokens_at + (begin + column)[None, :], mask=known[:, None], other=0.0)
            w = tl.load(at + (begin + column)[None, :], eviction_policy="evict_first")
        else:
            inside = (begin + column < K)[None, :]
            values = tl.load(tokens_at + (begin + column)[None, :], mask=known[:, None] & inside, other=0.0)
            w = tl.load(
                at + (begin + column)[None, :], mask=there[:, None] & inside, other=0.0, eviction_policy="evict_first"
            )
        product = tl.dot(w, tl.trans(values))
        if GROUPED:
            s, s_x = next_s, next_x
            ahead = tl.minimum(group + begin // BLOCK + 1, NUM_GROUPS - 1)
            next_s = tl.load(scale_at + ahead, mask=there, other=0.0).to(tl.float32)
            next_x = tl.load(scales_at + ahead * scales_stride)
            product *= s[:, None] * s_x[None, :]
        total += product

    last = True
    if SPLIT > 1:
        sums = tile * tl.num_programs(0) + tl.program_id(0)
        place = index[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        last = leave_part(total, total, place, partials, arrivals, sums, part, SPLIT, ROWS * TOKENS, False)
    if last:
        sum_of_all = total
        if SPLIT > 1:
            theirs = partials + sums.to(tl.int64) * (SPLIT * ROWS * TOKENS)
            sum_of_all = _sum_of_parts(theirs, place, arrivals + sums, ROWS, TOKENS, SPLIT)
        if not GROUPED:
            sum_of_all *= next_s[:, None] * next_x[None, :]
        if BIAS:
            sum_of_all += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)[:, None]
        store_rows(
            sum_of_all, tile * HEIGHT, token, known, residual, residual_stride, out, out_stride, N, HEIGHT, TOKENS,
            GATED, ACTIVATION, ADD,
        )  # fmt: skip


@dataclass(frozen=True)
class Fp8NarrowShape:
    """How fp8_narrow_linear divides its work: a tile's rows of the weight, tokens (at most 128) and columns, parts
    of a row, stages of the pipeline, warps, and lines of 128 bytes of a row that are fetched ahead.
    """

    rows: int
    tokens: int
    block: int
    split: int
    stages: int
    num_warps: int
    fetch: int = 0


def fp8_narrow_shape(num_tokens: int, linear: Linear) -> Fp8NarrowShape:
    """Nearly what took least time on an H200 with each matrix of Llama-3.1-8B and 16, 32, 64 and 128 tokens, by one
    rule: rows are split until most multiprocessors have a program, and long rows once more; of 64 tokens, which take as
    long to load as 64 rows, until there are twice as many. Tiles are higher where they are enough without.
    """
    rows, columns, grouped = linear.num_rows, linear.num_columns, bool(linear.format.block[1])
    tokens = 32 if num_tokens <= 32 else 64 if num_tokens <= 64 else 128
    fewest = 192 if tokens == 64 else 96  # programs
    high = tokens == 128 or (tokens == 64 and rows >= 128 * fewest)
    height, split = 128 if high else 64, 1
    tiles = triton.cdiv(rows, height) * triton.cdiv(num_tokens, tokens)
    while columns >= 1024 * split and (
        tiles * split < fewest or (tiles * split < 2 * fewest and columns > 4096 * split)
    ):
        split *= 2
    # up to 32 tokens bytes on their way count for more than programs
    wide = tokens == 32 and not grouped and columns % (2 * GROUP * split) == 0
    return Fp8NarrowShape(
        rows=height,
        tokens=tokens,
        block=2 * GROUP if wide else GROUP,
        split=split,
        stages=6 if tokens == 32 and not wide and tiles * split <= 2 * _MULTIPROCESSORS else 4,
        num_warps=8 if tokens == 128 else 4,
        fetch=8 if tiles * split <= 1024 else 4,
    )


def fp8_narrow_linear(
    x: torch.Tensor, x_scales: torch.Tensor, linear: Linear, out: torch.Tensor, *, workspace: LinearWorkspace,
    gated: bool = False, activation: str = "silu", residual: torch.Tensor | None = None,
    shape: Fp8NarrowShape | None = None, launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out = residual + gate((x * x_scales) . W + bias) for 1 to 256 tokens; gate, bias and residual only if asked for.

    x: float8_e4m3fn [T, K], rows contiguous, may be strided, with scales float32 [T, 1], or [T, K / 128] if blocks of
    128 columns of the weight have scales, laid out as round_rows does; linear: fp8, a scale a row or a block; out,
    residual: [T, N] of one floating dtype, rows contiguous, may be strided; out may be residual; gated: the weight has
    2 N rows, and no block lies in both halves. launch_pdl: as of `vector_linear`. Raises ValueError for shapes or
    formats that do not fit.
    """
    num_tokens, num_columns = x.shape
    num_rows = linear.num_rows // 2 if gated else linear.num_rows
    _check(x, x_scales, linear, residual, out, num_rows)
    assert linear.scale is not None
    shape = shape or fp8_narrow_shape(num_tokens, linear)
    tiles = triton.cdiv(num_rows, shape.rows // (2 if gated else 1))
    across = triton.cdiv(num_tokens, shape.tokens)
    split = shape.split if tiles * across <= len(workspace.arrivals) else 1
    while split > 1 and tiles * across * split * shape.rows * shape.tokens > len(workspace.partials):
        split //= 2
    grouped = bool(linear.format.block[1])
    block = GROUP if grouped else shape.block
    span = triton.cdiv(triton.cdiv(num_columns, split), block) * block
    _fp8_kernel[(across, tiles * split)](
        x, x_scales, linear.weight, linear.scale, out if linear.bias is None else linear.bias,
        out if residual is None else residual, out, workspace.partials, workspace.arrivals, num_tokens, x.stride(0),
        x_scales.stride(1), 0 if residual is None else residual.stride(0), out.stride(0),
        N=num_rows, K=num_columns, TOKENS=shape.tokens, ROWS=shape.rows, BLOCK=block,
        SPLIT=split, SPAN=span, BLOCK_ROWS=linear.format.block[0], GROUPED=grouped, STAGES=shape.stages, GATED=gated,
        ACTIVATION=activation, BIAS=linear.bias is not None, ADD=residual is not None,
        FETCH=shape.fetch if launch_pdl else 0, LAUNCH_PDL=launch_pdl, num_warps=shape.num_warps,
    )  # fmt: skip
    return out


def reaches(linear: Linear, gated: bool) -> bool:
    """Whether this kernel multiplies by the linear: a scale a row, or blocks of 128 columns that lie in one half of the
    rows if these are gated.
    """
    rows, columns = linear.format.block
    return (
        linear.format.codes == "fp8"
        and (columns == GROUP or (columns == 0 and rows == 1))
        and (not gated or linear.num_rows // 2 % rows == 0)
    )


def _check(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    linear: Linear,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    num_rows: int,
) -> None:
    num_tokens, num_columns = x.shape
    groups = triton.cdiv(num_columns, linear.format.block[1] or num_columns)
    if (
        not 1 <= num_tokens <= MAX_TOKENS
        or not reaches(linear, num_rows != linear.num_rows)
        or linear.num_columns != num_columns
        or x_scales.shape != (num_tokens, groups)
        or not lies_padded(x_scales)
        or not linear.weight.is_contiguous()
        or x.stride(1) != 1
    ):
        raise ValueError(
            f"x {tuple(x.shape)} (1 to {MAX_TOKENS} tokens) with scales {tuple(x_scales.shape)} and {linear.format} of "
            f"{linear.num_rows} x {linear.num_columns} do not fit each other"
        )
    for tensor in (out, *([] if residual is None else [residual])):
        if tensor.shape != (num_tokens, num_rows) or tensor.stride(1) != 1:
            raise ValueError(
                f"out and residual {tuple(tensor.shape)} are not [{num_tokens}, {num_rows}] with contiguous rows"
            )
