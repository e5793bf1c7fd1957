"""Products of few tokens with a quantised weight: its numbers are read as they are stored and become floats in
registers. Activations are not rounded.

`quant_narrow_linear` takes up to 256 tokens, `quant_vector_linear` (quant_vector.py) one: as the two of
small_linear.py, with the same companions in the same launch. With so few tokens a product takes the time in which the
weight is read, so that a format is as much faster as it has fewer bytes; and rounding activations, which 8-bit tensor
cores need, gains nothing for one (for more, of fp8: fp8_narrow.py). Two numbers in a byte lie so (linear.py) that the
low nibbles of a tile are consecutive columns, and the high ones too.

Formats that are not read here: groups that are no power of two. Sums are float32. In `quant_narrow_linear` what a
large group sums up to is scaled, and so are whole rows; numbers of smaller groups are scaled one by one, and rounded to
x's type before they are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.activation import activated
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import Linear
from paged_kernels.narrow_rows import check_sides
from paged_kernels.quant_tile import (
    CODE_OF,
    FP4,
    FP4_REST,
    INT4,
    INT4_MIDDLE,
    corrected,
    is_packed,
    numbers,
    scaled_fp4,
)
from paged_kernels.small_linear import LinearWorkspace, fetch_lines, leave_part, sum_of_parts

_MAX_SPLIT = 16
_MULTIPROCESSORS = 132  # of an H200
MAX_TOKENS = 256  # of quant_narrow_linear


@triton.jit
def finished(
    total, row, there, scale, row_scale, bias, GROUPED: tl.constexpr, ROW_SCALES: tl.constexpr, BIAS: tl.constexpr
):
    """A sum [ROWS] or [ROWS, TOKENS] of a product with what belongs to its rows: scales and bias. row and there are of
    the same dimensions.
    """
    if not GROUPED:
        total *= tl.load(scale + row, mask=there, other=0.0).to(tl.float32)
    if ROW_SCALES:
        total *= tl.load(row_scale + row, mask=there, other=0.0)
    if BIAS:
        total += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)
    return total


@triton.jit
def store_vector(
    total, total_u, squares, row, scale, row_scale, bias, residual, out, eps,
    N: tl.constexpr, COLUMNS: tl.constexpr, GROUPED: tl.constexpr, ROW_SCALES: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The end of a product of one token: the sums [ROWS, parts] of rows of the weight, and GATED: of those they let
    through, with what belongs to the rows and what hangs on the product, are stored. squares: of the token's COLUMNS.
    """
    result = tl.sum(total, 1)
    up = tl.sum(total_u, 1)
    if NORM:
        shrink = tl.rsqrt(tl.sum(squares, 0) / COLUMNS + eps)
        result *= shrink
        up *= shrink
    result = finished(result, row, row < N, scale, row_scale, bias, GROUPED, ROW_SCALES, BIAS)
    if GATED:
        up = finished(up, N + row, row < N, scale, row_scale, bias, GROUPED, ROW_SCALES, BIAS)
        result = activated(result, ACTIVATION) * up
    if ADD:
        result += tl.load(residual + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < N)


@triton.jit
def _scales(
    scale, zero, row, there, begin,
    K: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    GROUPED: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Scales and zeros [ROWS, PARTS] of the bytes from `begin` on, as they are stored."""
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    part = begin + tl.arange(0, PARTS) * SHARED
    index = (row // BLOCK_ROWS * NUM_GROUPS)[:, None] + (part // GROUP)[None, :]
    known = there & (part < K)[None, :]
    s, z = index, index
    if GROUPED:
        s = tl.load(scale + index, mask=known, other=0.0)
    if ZEROS:
        z = tl.load(zero + index, mask=known, other=0)
    return s, z


@triton.jit
def _times(
    total, values, high_values, at, row, there, begin, s, z,
    K: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, SHARED: tl.constexpr,
    CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, AFTER: tl.constexpr, STAGED: tl.constexpr,
    FP4_AT_ONCE: tl.constexpr, WHOLE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total [ROWS, TOKENS] and STEP bytes of each row of the weight times the tokens. s, z: of `_scales`. AFTER: they
    share a scale, and their sum is scaled instead of each. STAGED: see QuantNarrowShape. WHOLE: nothing is masked.
    """
    DTYPE: tl.constexpr = values.dtype
    PARTS: tl.constexpr = STEP // SHARED
    column = begin + tl.arange(0, STEP)
    if WHOLE:
        w = tl.load(at + column[None, :], eviction_policy="evict_first")
    else:
        w = tl.load(at + column[None, :], mask=there & (column < K)[None, :], other=0.0, eviction_policy="evict_first")
    s_wide, z_wide = 1.0, 0.0
    if ZEROS:
        z_wide = (z.to(tl.float32) - (INT4_MIDDLE if CODES == INT4 else 0.0))[:, :, None]
    if GROUPED and not AFTER:
        s_wide = s.to(tl.float32)[:, :, None]
    if FP4_AT_ONCE:
        low, high = scaled_fp4(tl.reshape(w, (ROWS, PARTS, SHARED)), s_wide, PACKED, not STAGED)
        low, high = low.to(DTYPE), high.to(DTYPE)
    else:
        # Four bits times a scale of fp8 are exact in bfloat16, and whole numbers below 256; other products are not.
        EXACT: tl.constexpr = AFTER or (CODES == FP4 and s.dtype == tl.float8e4nv)
        low, high = numbers(w, CODES, PACKED, not STAGED)
        low, high = tl.reshape(low, (ROWS, PARTS, SHARED)), tl.reshape(high, (ROWS, PARTS, SHARED))
        low = corrected(low, s_wide, z_wide, GROUPED and not AFTER, ZEROS, EXACT, DTYPE)
        high = corrected(high, s_wide, z_wide, GROUPED and not AFTER, ZEROS, EXACT, DTYPE)
    found = tl.zeros(total.shape, tl.float32) if AFTER else total
    found = tl.dot(tl.reshape(low, (ROWS, STEP)), tl.trans(values), found, input_precision=PRECISION)
    if CODES >= INT4:
        high = tl.reshape(high, (ROWS, STEP))
        found = tl.dot(high, tl.trans(high_values), found, input_precision=PRECISION)
    if AFTER:
        found = total + found * s.to(tl.float32)
    return found


@kernel(ints=["num_tokens"])
def _narrow_kernel(
    x, weight, scale, zero, row_scale, bias, residual, out, partials, arrivals, num_tokens, x_stride, residual_stride,
    out_stride,
    N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, CODES: tl.constexpr,
    GROUPED: tl.constexpr, ZEROS: tl.constexpr, ROW_SCALES: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, FETCH: tl.constexpr,
    LAUNCH_PDL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    AFTER: tl.constexpr, STAGED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the result for TOKENS tokens, or a part of their sums: SPAN bytes of each row of the weight, the
    part-th of SPLIT. FETCH: lines of 128 bytes of each row that are brought to the L2 cache before the token is there.
    AHEAD: scales are loaded a step before they are wanted, which the pipeline of so narrow loads does not do.
    """
    pdl_release(LAUNCH_PDL)
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    row = tile * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = (row < N)[:, None]
    at = weight + (row.to(tl.int64) * K)[:, None]
    if FETCH > 0:
        line = part * SPAN + tl.arange(0, FETCH) * 128
        fetch_lines(at + line[None, :], there & (line < K)[None, :])
        if GATED:
            fetch_lines(at + N * K + line[None, :], there & (line < K)[None, :])
    pdl_wait(LAUNCH_PDL)
    known = (token < num_tokens)[:, None]
    tokens_at = x + (token * x_stride)[:, None]
    STEP: tl.constexpr = GROUP if AFTER else BLOCK
    SHARED: tl.constexpr = GROUP if GROUPED and GROUP < STEP else STEP
    PARTS: tl.constexpr = STEP // SHARED
    WHOLE: tl.constexpr = N % ROWS == 0 and SPAN * SPLIT == K and SPAN % BLOCK == 0
    FP8_SCALES: tl.constexpr = GROUPED and scale.dtype.element_ty == tl.float8e4nv
    FP4_AT_ONCE: tl.constexpr = CODES == FP4 and FP8_SCALES and not AFTER and x.dtype.element_ty != tl.float16
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    total_u = tl.zeros([ROWS, TOKENS], tl.float32)
    next_s, next_z = _scales(scale, zero, row, there, part * SPAN, K, PARTS, SHARED, GROUP, BLOCK_ROWS, GROUPED, ZEROS)
    next_up_s, next_up_z = next_s, next_z
    if GATED:
        next_up_s, next_up_z = _scales(
            scale, zero, row + N, there, part * SPAN, K, PARTS, SHARED, GROUP, BLOCK_ROWS, GROUPED, ZEROS
        )
    for offset in tl.range(0, SPAN, BLOCK, num_stages=STAGES):
        for inner in tl.static_range(0, BLOCK, STEP):
            begin = part * SPAN + offset + inner
            s, z, up_s, up_z = next_s, next_z, next_up_s, next_up_z
            of_scales = begin + STEP if AHEAD else begin
            next_s, next_z = _scales(
                scale, zero, row, there, of_scales, K, PARTS, SHARED, GROUP, BLOCK_ROWS, GROUPED, ZEROS
            )
            if GATED:
                next_up_s, next_up_z = _scales(
                    scale, zero, row + N, there, of_scales, K, PARTS, SHARED, GROUP, BLOCK_ROWS, GROUPED, ZEROS
                )
            if not AHEAD:
                s, z, up_s, up_z = next_s, next_z, next_up_s, next_up_z
            column = begin + tl.arange(0, STEP)
            taken = known if WHOLE else known & (column < K)[None, :]
            low_at = column
            if AFTER and CODES >= INT4:
                low_at = 2 * begin + tl.arange(0, STEP)
            elif CODES >= INT4:
                low_at = column // GROUP * (2 * GROUP) + column % GROUP
            values = tl.load(tokens_at + low_at[None, :], mask=taken, other=0.0)
            high_values = values
            if CODES >= INT4:
                high_values = tl.load(tokens_at + (low_at + GROUP)[None, :], mask=taken, other=0.0)
            total = _times(
                total, values, high_values, at, row, there, begin, s, z, K, ROWS, STEP, SHARED, CODES,
                GROUPED, ZEROS, AFTER, STAGED, FP4_AT_ONCE, WHOLE, PACKED, PRECISION,
            )  # fmt: skip
            if GATED:
                total_u = _times(
                    total_u, values, high_values, at + N * K, row + N, there, begin, up_s, up_z, K, ROWS, STEP, SHARED,
                    CODES, GROUPED, ZEROS, AFTER, STAGED, FP4_AT_ONCE, WHOLE, PACKED, PRECISION,
                )  # fmt: skip
    if FP4_AT_ONCE:
        total *= FP4_REST
        total_u *= FP4_REST

    place = (row % ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    last = True
    sums_of = tl.program_id(1) * (tl.num_programs(0) // SPLIT) + tile
    if SPLIT > 1:
        last = leave_part(total, total_u, place, partials, arrivals, sums_of, part, SPLIT, ROWS * TOKENS, GATED)
    if last:
        if SPLIT > 1:
            total, total_u = sum_of_parts(place, partials, arrivals, sums_of, ROWS, TOKENS, SPLIT, GATED)
        result = finished(total, row[:, None], there, scale, row_scale, bias, GROUPED, ROW_SCALES, BIAS)
        if GATED:
            result = activated(result, ACTIVATION) * finished(
                total_u, N + row[:, None], there, scale, row_scale, bias, GROUPED, ROW_SCALES, BIAS
            )
        wanted = there & (token < num_tokens)[None, :]
        if ADD:
            result += tl.load(residual + row[:, None] + (token * residual_stride)[None, :], mask=wanted, other=0.0).to(
                tl.float32
            )
        tl.store(out + row[:, None] + (token * out_stride)[None, :], result.to(out.dtype.element_ty), mask=wanted)


@dataclass(frozen=True)
class QuantNarrowShape:
    """How quant_narrow_linear divides its work: a tile's rows, its bytes of a row, parts of a row, stages of the
    pipeline, warps, lines of 128 bytes of a row that are fetched ahead, and tokens.

    after: the sum of a group of 128 columns or more is scaled, not each number.
    ahead: scales are loaded a step ahead.
    staged: bytes become floats where they were loaded to, and shared memory brings those to where the tensor cores want
        them, instead of the bytes one by one.
    """

    rows: int
    block: int
    split: int
    stages: int
    num_warps: int
    fetch: int = 0
    tokens: int = 64
    after: bool = True
    ahead: bool = False
    staged: bool = False


def quant_narrow_shape(
    num_tokens: int, num_rows: int, row_bytes: int, codes: str, gated: bool, packed: bool
) -> QuantNarrowShape:
    """For up to 16 tokens two warps a program, so that neither makes floats of what the other has made floats of too;
    for more the four that the tensor cores of Hopper want. Up to 16 tokens as many programs as keep every
    multiprocessor reading; for more a row is seldom split: sums of parts cost gate and up of Llama-3.1-8B a third at 64
    tokens of fp8 on an H200 (tests/bench/bench_linear.py --formats; the bound of 128 programs lies between two that
    were measured, 96 and 320). Four bits: `_nibble_shape`. packed: as `is_packed` says.
    """
    few, nibbles = num_tokens <= 16, codes in ("int4", "fp4")
    if packed and (codes == "fp4" or (nibbles and not few and not (num_tokens <= 32 and num_rows > 2**16))):
        return _nibble_shape(num_tokens, num_rows, row_bytes, codes, gated)
    rows, warps, block = (32, 2, 128) if few else (64, 4, 64 if nibbles else 128)
    split = _split(triton.cdiv(num_rows, rows), row_bytes, 640 if few else 128, 512)
    return QuantNarrowShape(rows, block, split, stages=4, num_warps=warps, fetch=4 if few else 0)


def _nibble_shape(num_tokens: int, num_rows: int, row_bytes: int, codes: str, gated: bool) -> QuantNarrowShape:
    """fp4, and int4 of more than 16 tokens, as measured on an H200 with Llama-3.1-8B's matrices of 4,096 rows, of
    14,336 gated ones and of 128,256. From 8 warps on, and for many tokens, sums are not worth scaling.
    """
    if codes == "fp4" and num_tokens <= 16:
        rows, warps, stages, programs = (32, 2, 4, 640) if num_tokens == 1 else (64, 4, 4, 448)
    elif num_tokens <= 32:
        rows, warps, stages, programs = (64, 4, 4, 192) if codes == "int4" and row_bytes > 4096 else (128, 4, 3, 192)
    elif codes == "fp4" or (num_tokens > 64 and num_rows >= 96 * 128):
        rows, warps, stages, programs = 128, 8, 3, 112
    else:
        rows, warps, stages, programs = 64 if gated or num_tokens > 64 else 128, 4, 3, 192
    split = _split(triton.cdiv(num_rows, rows) * triton.cdiv(num_tokens, 128), row_bytes, programs, 256)
    after = num_tokens <= 64 and warps < 8
    return QuantNarrowShape(
        rows, 64, split, stages, warps, fetch=4 if warps == 2 else 0, tokens=128, after=after, ahead=True,
        staged=warps > 2,
    )  # fmt: skip


def _split(tiles: int, row_bytes: int, programs: int, least: int) -> int:
    """Parts of a row, so that there are as many programs, of at least so many bytes of a row."""
    split = 1
    while tiles * split < programs and row_bytes // (split * 2) >= least and split < _MAX_SPLIT:
        split *= 2
    return split


def reaches(linear: Linear) -> bool:
    """Whether these kernels read the linear's format: groups of a power of two of columns, at least 16, or whole
    rows; two numbers in a byte in halves.
    """
    format, group = linear.format, linear.format.block[1]
    known = format.codes != "plain" and format.order == "halves"
    return known and (group == 0 or (group >= 16 and group & (group - 1) == 0))


def most_tokens(linear: Linear) -> int:
    """Up to how many quant_narrow_linear takes less time than floats of the whole weight and cuBLAS. Gate and up of
    Llama-3.1-8B for 256 tokens on an H200: int4 163 us against 180, NVFP4 314 against 233.
    """
    return 128 if linear.format.codes == "fp4" else MAX_TOKENS


def sums_in_registers(x: torch.Tensor, linear: Linear) -> bool:
    """Whether quant_vector_linear is the faster one for a token: not of NVFP4 with many numbers (28 us against 42 for
    4,096 x 14,336 on an H200).
    """
    return not is_packed(x, linear.format) or (linear.format.codes == "fp4" and linear.weight.numel() < 2**24)


def format_constants(linear: Linear) -> dict[str, int | bool | float]:
    """Of both kernels, in their order."""
    format, row_bytes = linear.format, linear.weight.shape[1]
    grouped = bool(format.block[1])
    group = format.group(linear.num_columns) // (2 if format.nibbles else 1)
    return {
        "GROUP": group if grouped or format.nibbles else row_bytes,
        "BLOCK_ROWS": format.block[0],
        "CODES": CODE_OF[format.codes],
        "GROUPED": grouped,
        "ZEROS": linear.zero is not None,
        "ROW_SCALES": linear.row_scale is not None,
    }


def quant_narrow_linear(
    x: torch.Tensor, linear: Linear, *, workspace: LinearWorkspace, gated: bool = False, activation: str = "silu",
    residual: torch.Tensor | None = None, out: torch.Tensor | None = None, shape: QuantNarrowShape | None = None,
    launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out = residual + gate(x . W + bias) for M tokens, 1 <= M <= 256; gate, bias and residual only if asked for.

    x: [M, K], residual and out: [M, N], rows contiguous, may be strided; out may be residual. Otherwise as
        `quant_vector_linear`.
    """
    num_tokens, row_bytes = len(x), linear.weight.shape[1]
    num_rows = linear.num_rows // 2 if gated else linear.num_rows
    out = x.new_empty(num_tokens, num_rows) if out is None else out
    check_product(x, linear, residual, out, num_rows, MAX_TOKENS)
    codes, packed = linear.format.codes, is_packed(x, linear.format)
    shape = shape or quant_narrow_shape(num_tokens, num_rows, row_bytes, codes, gated, packed)
    tiles, tokens = triton.cdiv(num_rows, shape.rows), min(shape.tokens, max(8, triton.next_power_of_2(num_tokens)))
    sums = tiles * triton.cdiv(num_tokens, tokens)
    split = shape.split if sums <= len(workspace.arrivals) else 1
    while sums * split * (2 if gated else 1) * shape.rows * tokens > len(workspace.partials) and split > 1:
        split //= 2
    span = triton.cdiv(triton.cdiv(row_bytes, split), shape.block) * shape.block
    constants = format_constants(linear)
    _narrow_kernel[(tiles * split, triton.cdiv(num_tokens, tokens))](
        x, linear.weight, linear.scale, linear.scale if linear.zero is None else linear.zero,
        linear.scale if linear.row_scale is None else linear.row_scale, x if linear.bias is None else linear.bias,
        x if residual is None else residual, out, workspace.partials, workspace.arrivals, num_tokens, x.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0),
        N=num_rows, K=row_bytes, TOKENS=tokens, ROWS=shape.rows, BLOCK=shape.block, SPLIT=split, SPAN=span,
        **constants, STAGES=shape.stages, GATED=gated, ACTIVATION=activation,
        BIAS=linear.bias is not None, ADD=residual is not None, FETCH=shape.fetch if launch_pdl else 0,
        LAUNCH_PDL=launch_pdl, PACKED=packed, PRECISION="ieee",
        AFTER=shape.after and constants["GROUPED"] and 64 <= constants["GROUP"] <= shape.block,
        STAGED=shape.staged, AHEAD=shape.ahead, num_warps=shape.num_warps,
    )  # fmt: skip
    return out


def check_product(
    x: torch.Tensor, linear: Linear, residual: torch.Tensor | None, out: torch.Tensor, num_rows: int, max_tokens: int
) -> None:
    """Raises ValueError if they do not fit each other or these kernels."""
    if not reaches(linear) or not linear.weight.is_contiguous():
        raise ValueError(f"{linear.format} of {linear.num_rows} x {linear.num_columns} is not read by these kernels")
    check_sides(x, linear, residual, out, num_rows, max_tokens)
