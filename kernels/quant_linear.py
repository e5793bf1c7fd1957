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
from paged_kernels.quant_tile import CODE_OF, INT4, corrected, is_packed, load_zeros, numbers, scaled_numbers
from paged_kernels.small_linear import LinearWorkspace, fetch_lines, leave_part, sum_of_parts

_MAX_SPLIT = 16
_MULTIPROCESSORS = 132  # of an H200
MAX_TOKENS = 256  # of quant_narrow_linear
TOKENS_AT_ONCE = 64  # of one of its programs


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
def _times(
    total, values, high_values, at, row, there, begin, scale, zero,
    K: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, AFTER: tl.constexpr,
    WHOLE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total [ROWS, TOKENS] and STEP bytes of each row of the weight times the tokens. AFTER: they share a scale, and
    their sum is scaled instead of each. WHOLE: nothing is masked.
    """
    DTYPE: tl.constexpr = values.dtype
    column = begin + tl.arange(0, STEP)
    if WHOLE:
        w = tl.load(at + column[None, :], eviction_policy="evict_first")
    else:
        w = tl.load(at + column[None, :], mask=there & (column < K)[None, :], other=0.0, eviction_policy="evict_first")
    if AFTER:
        NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        index = (row // BLOCK_ROWS * NUM_GROUPS + begin // GROUP)[:, None]
        known = there & (begin + tl.arange(0, 1)[None, :] < K)
        s = tl.load(scale + index, mask=known, other=0.0).to(tl.float32)
        z = 0.0
        if ZEROS:
            z = load_zeros(zero + index, known, CODES)
        low, high = numbers(w, CODES, PACKED)
        low = corrected(low, s, z, False, ZEROS, True, DTYPE)  # whole numbers below 256 are exact
        product = tl.dot(low, tl.trans(values), input_precision=PRECISION)
        if CODES >= INT4:
            high = corrected(high, s, z, False, ZEROS, True, DTYPE)
            product = tl.dot(high, tl.trans(high_values), product, input_precision=PRECISION)
        total += product * s
    else:
        low, high = scaled_numbers(
            w, row, there, begin, scale, zero, K, ROWS, STEP, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS, DTYPE,
            PACKED,
        )  # fmt: skip
        total = tl.dot(low, tl.trans(values), total, input_precision=PRECISION)
        if CODES >= INT4:
            total = tl.dot(high, tl.trans(high_values), total, input_precision=PRECISION)
    return total


@kernel(ints=["num_tokens"])
def _narrow_kernel(
    x, weight, scale, zero, row_scale, bias, residual, out, partials, arrivals, num_tokens, x_stride, residual_stride,
    out_stride,
    N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, CODES: tl.constexpr,
    GROUPED: tl.constexpr, ZEROS: tl.constexpr, ROW_SCALES: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, FETCH: tl.constexpr,
    LAUNCH_PDL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the result for TOKENS tokens, or a part of their sums: SPAN bytes of each row of the weight, the
    part-th of SPLIT. FETCH: lines of 128 bytes of each row that are brought to the L2 cache before the token is there.
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
    AFTER: tl.constexpr = GROUPED and GROUP >= 64 and GROUP <= BLOCK
    STEP: tl.constexpr = GROUP if AFTER else BLOCK
    WHOLE: tl.constexpr = N % ROWS == 0 and SPAN * SPLIT == K and SPAN % BLOCK == 0
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    total_u = tl.zeros([ROWS, TOKENS], tl.float32)
    for offset in tl.range(0, SPAN, BLOCK, num_stages=STAGES):
        for inner in tl.static_range(0, BLOCK, STEP):
            begin = part * SPAN + offset + inner
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
                total, values, high_values, at, row, there, begin, scale, zero, K, ROWS, STEP, GROUP, BLOCK_ROWS, CODES,
                GROUPED, ZEROS, AFTER, WHOLE, PACKED, PRECISION,
            )  # fmt: skip
            if GATED:
                total_u = _times(
                    total_u, values, high_values, at + N * K, row + N, there, begin, scale, zero, K, ROWS, STEP, GROUP,
                    BLOCK_ROWS, CODES, GROUPED, ZEROS, AFTER, WHOLE, PACKED, PRECISION,
                )  # fmt: skip

    place = (row % ROWS)[:, None] * TOKENS + token[None, :]
    last = True
    if SPLIT > 1:
        last = leave_part(total, total_u, place, partials, arrivals, tile, part, SPLIT, ROWS * TOKENS, GATED)
    if last:
        if SPLIT > 1:
            total, total_u = sum_of_parts(place, partials, arrivals, tile, ROWS, TOKENS, SPLIT, GATED)
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
    pipeline, warps, and lines of 128 bytes of a row that are fetched ahead.
    """

    rows: int
    block: int
    split: int
    stages: int
    num_warps: int
    fetch: int = 0


def quant_narrow_shape(num_tokens: int, num_rows: int, row_bytes: int, nibbles: bool, gated: bool) -> QuantNarrowShape:
    """For up to 16 tokens two warps a program, so that neither makes floats of what the other has made floats of too;
    for more the four that the tensor cores of Hopper want. Up to 16 tokens as many programs as keep every
    multiprocessor reading; for more a row is seldom split: sums of parts cost gate and up of Llama-3.1-8B a third at 64
    tokens of fp8 on an H200 (tests/bench/bench_linear.py --formats; the bound of 128 programs lies between two that
    were measured, 96 and 320).
    """
    rows, warps, block = (32, 2, 128) if num_tokens <= 16 else (64, 4, 64 if nibbles else 128)
    tiles, split = triton.cdiv(num_rows, rows), 1
    while tiles * split < (640 if num_tokens <= 16 else 128) and row_bytes // (split * 2) >= 512 and split < _MAX_SPLIT:
        split *= 2
    return QuantNarrowShape(rows, block, split, stages=4, num_warps=warps, fetch=4 if num_tokens <= 16 else 0)


def reaches(linear: Linear) -> bool:
    """Whether these kernels read the linear's format: groups of a power of two of columns, at least 16, or whole
    rows.
    """
    group = linear.format.block[1]
    return linear.format.codes != "plain" and (group == 0 or (group >= 16 and group & (group - 1) == 0))


def sums_in_registers(x: torch.Tensor, linear: Linear, gated: bool) -> bool:
    """Whether quant_vector_linear is the faster one for a token, as measured on an H200 with Llama-3.1-8B's matrices:
    for NVFP4, and for fp8 of 4,096 rows (8.8 us against 10.8, 20.6 against 24.1), not of 6,144 and more (13.5 against
    12.4). The bound between is what gives each multiprocessor a program without splitting rows.
    """
    if not is_packed(x, linear.format) or linear.format.codes == "fp4":
        return True
    return linear.format.codes == "fp8" and linear.num_rows // (2 if gated else 1) < 32 * _MULTIPROCESSORS


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
    shape = shape or quant_narrow_shape(num_tokens, num_rows, row_bytes, linear.format.nibbles, gated)
    tiles, tokens = triton.cdiv(num_rows, shape.rows), min(TOKENS_AT_ONCE, max(8, triton.next_power_of_2(num_tokens)))
    split = shape.split if num_tokens <= TOKENS_AT_ONCE and tiles <= len(workspace.arrivals) else 1
    while tiles * split * (2 if gated else 1) * shape.rows * tokens > len(workspace.partials) and split > 1:
        split //= 2
    span = triton.cdiv(triton.cdiv(row_bytes, split), shape.block) * shape.block
    _narrow_kernel[(tiles * split, triton.cdiv(num_tokens, tokens))](
        x, linear.weight, linear.scale, linear.scale if linear.zero is None else linear.zero,
        linear.scale if linear.row_scale is None else linear.row_scale, x if linear.bias is None else linear.bias,
        x if residual is None else residual, out, workspace.partials, workspace.arrivals, num_tokens, x.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0),
        N=num_rows, K=row_bytes, TOKENS=tokens, ROWS=shape.rows, BLOCK=shape.block, SPLIT=split, SPAN=span,
        **format_constants(linear), STAGES=shape.stages, GATED=gated, ACTIVATION=activation,
        BIAS=linear.bias is not None, ADD=residual is not None, FETCH=shape.fetch if launch_pdl else 0,
        LAUNCH_PDL=launch_pdl, PACKED=is_packed(x, linear.format), PRECISION="ieee",
        num_warps=shape.num_warps,
    )  # fmt: skip
    return out


def check_product(
    x: torch.Tensor, linear: Linear, residual: torch.Tensor | None, out: torch.Tensor, num_rows: int, max_tokens: int
) -> None:
    """Raises ValueError if they do not fit each other or these kernels."""
    num_tokens, num_columns = x.shape
    if not reaches(linear):
        raise ValueError(f"{linear.format} is not read by these kernels")
    if (
        not 1 <= num_tokens <= max_tokens
        or linear.num_columns != num_columns
        or not linear.weight.is_contiguous()
        or linear.num_rows % num_rows
    ):
        raise ValueError(
            f"x {tuple(x.shape)} (1 to {max_tokens} tokens) and a weight of {linear.num_rows} x "
            f"{linear.num_columns} do not fit each other"
        )
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None and (
            tensor.shape != (num_tokens, num_rows) or tensor.dtype != x.dtype or tensor.stride(1) != 1
        ):
            raise ValueError(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} is not [{num_tokens}, {num_rows}] {x.dtype} with "
                "contiguous rows"
            )
    if x.stride(1) != 1 or (linear.bias is not None and linear.bias.dtype != x.dtype):
        raise ValueError(f"rows of x must be contiguous, and bias of x's dtype {x.dtype}")
