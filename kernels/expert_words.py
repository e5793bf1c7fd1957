"""Products of tokens with experts of MXFP4 by 8-bit tensor cores: four bits become eight, activations two times eight.

A number of 4 bits times a power of two is one of float8_e4m3fn, if the exponents of a row differ by no more than 11
(words.py sees to that): a byte of a table of eight, which one instruction looks up for four numbers at once. A bfloat16
is the sum of two numbers of float8_e4m3fn, as soon as its row is scaled by a power of two: four of its eight
significant bits each. Only numbers below 2 ** -9 of the row's greatest lose anything, less than 2 ** -16 of that. So
both sides are multiplied as they are, no slower than in 16 bits, while a number of the weight takes 1.2 instructions
instead of 2.5: what these products are short of is instructions, not memory.

The tensor cores of Hopper add products of fp8 with 14 bits, so what each 128 columns sum up to is added in float32
(fp8_narrow.py). Up to 32 tokens of a tile, both parts of a token are multiplied side by side. Otherwise as
expert_products.py: tiles have one expert's tokens, and the gate is taken in: of a gated matrix each 16 rows of a tile
are 8 of the gate and 8 of up, so that a thread has what belongs together. A lone token has too few tiles for all
multiprocessors: their columns are shared out, and the next launch adds up the parts.
Sources: splitting a number over several of lower precision: Ootomo and Yokota, 2022; experts: MegaBlocks, 2022.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.device_words import BLOCK, WORDS, WORDS_REST, numbers_of_words
from paged_kernels.expert_codes import apply_gate, check_call, gate_constants
from paged_kernels.expert_products import combine, group
from paged_kernels.expert_tiles import WordsShape, words_shapes
from paged_kernels.experts import ExpertLinear, Experts, Gate
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.linear import WORDS_BLOCK

# bits of 2 ** -119 and 2 ** 127: the greatest of a row counts as between them, so that its scale and what is the
# reciprocal of that are ordinary numbers
_LOWEST, _HIGHEST = tl.constexpr(8 << 23), tl.constexpr(254 << 23)
_SIDE_BY_SIDE = tl.constexpr(32)  # tokens of a tile, up to which both parts of each are multiplied together
_COMBINED = 256  # numbers of a token that one program adds up


@triton.jit
def _gated_sum(
    sums, bias, expert, choice, column, inside,
    N: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """gate(sum of the parts + bias) of a lone token's choice, [columns]."""
    NUM_ROWS: tl.constexpr = 2 * N if GATED else N
    of_gate = 2 * column if GATED and INTERLEAVED else column
    of_up = 2 * column + 1 if INTERLEAVED else N + column
    gate, up = tl.zeros(column.shape, tl.float32), tl.zeros(column.shape, tl.float32)
    for part in tl.static_range(PARTS):
        at = sums + (part * TOP_K + choice) * NUM_ROWS
        gate += tl.load(at + of_gate, mask=inside, other=0.0)
        if GATED:
            up += tl.load(at + of_up, mask=inside, other=0.0)
    if BIAS:
        gate += tl.load(bias + expert * NUM_ROWS + of_gate, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + expert * NUM_ROWS + of_up, mask=inside, other=0.0).to(tl.float32)
    return apply_gate(gate, up, GATED, ACTIVATION, LIMIT, ALPHA)


@triton.jit
def store_split(wide, out, scales, row, column, PADDED: tl.constexpr):
    """Leaves a row, float32 [columns] and 0 behind its end, as its two parts in out[row, 0 and 1, PADDED], and its
    scale in scales[row]. A row with a number that is not finite has scale NaN.
    """
    power = tl.max(tl.abs(wide), 0).to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.minimum(tl.maximum(power, _LOWEST), _HIGHEST)
    power -= 7 << 23  # the greatest becomes 128 to 256
    scale = power.to(tl.float32, bitcast=True)
    wide *= ((254 << 23) - power).to(tl.float32, bitcast=True)
    # Four bits, rounded to nearest, and the four that are left. From a number that was converted and is converted back,
    # ptxas of CUDA 12.8 makes a wrong kernel.
    bits = wide.to(tl.int32, bitcast=True)
    high = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    low = wide - high
    there = column < PADDED
    tl.store(out + row * (2 * PADDED) + column, high.to(out.dtype.element_ty), mask=there)
    tl.store(out + row * (2 * PADDED) + PADDED + column, low.to(out.dtype.element_ty), mask=there)
    lost = tl.max(tl.where(wide - wide == 0.0, 0, 1), 0)  # a number that is none, or infinite, makes all of the row so
    tl.store(scales + row, tl.where(lost > 0, float("nan"), scale))


@kernel
def _split_kernel(
    x, bias, expert_ids, out, scales, x_stride,
    SIZE: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    TOP_K: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """One row: out[row, 0 and 1, PADDED] and scales[row]. PARTS: if not 0, x is what so many programs each summed up of
    a row of gate_up's product.
    """
    pdl_release(LAUNCH_PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    pdl_wait(LAUNCH_PDL)
    if PARTS > 0:
        expert = tl.load(expert_ids + row).to(tl.int64)
        wide = _gated_sum(
            x, bias, expert, row, column, column < SIZE,
            SIZE, TOP_K, PARTS, BIAS, GATED, INTERLEAVED, ACTIVATION, LIMIT, ALPHA,
        )  # fmt: skip
        wide = tl.where(column < SIZE, wide, 0.0).to(tl.bfloat16).to(tl.float32)
    else:
        wide = tl.load(x + row * x_stride + column, mask=column < SIZE, other=0.0).to(tl.float32)
    store_split(wide, out, scales, row, column, PADDED)


@kernel(ints=["num_tiles"])
def _words_kernel(
    x, x_scales, weight, exponents, row_scale, bias, order, tiles, pair_weights, out, num_tiles, x_stride,
    N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, FIRST: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """FIRST: out[place] = gate(weight . x[token of place]). Or else out[pair of place] = its weight * (weight .
    x[place]). SPLIT: x is what `_split_kernel` makes of bfloat16, otherwise floats. PARTS: if more than 1, of a lone
    token, whose choices are `tiles`, one each: out[part, choice] = a part of the sums of weight . x, float32.
    """
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    HEIGHT: tl.constexpr = ROWS // 2 if GATED else ROWS  # of the result
    NUM_BLOCKS: tl.constexpr = (N + HEIGHT - 1) // HEIGHT
    NUM_ROWS: tl.constexpr = 2 * N if GATED else N
    COLUMN_BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    PADDED: tl.constexpr = COLUMN_BLOCKS * BLOCK
    ITEMS: tl.constexpr = NUM_BLOCKS * PARTS  # of a tile
    SPAN: tl.constexpr = (COLUMN_BLOCKS + PARTS - 1) // PARTS
    JOINT: tl.constexpr = SPLIT and TOKENS <= _SIDE_BY_SIDE
    ALONE: tl.constexpr = PARTS > 1
    index = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    word = tl.arange(0, WORDS)
    for item in range(tl.program_id(0), num_tiles * ITEMS, tl.num_programs(0)):
        tile = tiles + (item // ITEMS) * (1 if ALONE else 3)
        expert = tl.load(tile).to(tl.int64)
        if expert >= 0:
            begin = item // ITEMS if ALONE else tl.load(tile + 1)
            count = 1 if ALONE else tl.load(tile + 2)
            place = begin + tl.arange(0, TOKENS)
            known = tl.arange(0, TOKENS) < count
            pair = place if ALONE else tl.load(order + place, mask=known, other=0)
            source = pair // TOP_K if FIRST else place
            rows = item % NUM_BLOCKS * HEIGHT
            part = item // NUM_BLOCKS % PARTS
            row = rows + (index // 16 * 8 + index % 8 if GATED else index)
            row = tl.minimum(row, N - 1)  # what is beyond is not stored
            if GATED:
                row = 2 * row + index // 8 % 2 if INTERLEAVED else row + index // 8 % 2 * N
            of_row = expert * NUM_ROWS + row
            words_at = weight + expert * (COLUMN_BLOCKS * NUM_ROWS * WORDS) + row[:, None] * WORDS + word[None, :]
            exponents_at = exponents + expert * (COLUMN_BLOCKS * NUM_ROWS) + row
            tokens_at = x + (source.to(tl.int64) * x_stride)[:, None] + column[None, :]
            if JOINT:
                both = tl.arange(0, 2 * TOKENS)  # parts of a token are neighbours
                there = both // 2 < count
                of_both = begin + both // 2
                if FIRST and not ALONE:
                    of_both = tl.load(order + of_both, mask=there, other=0)
                if FIRST:
                    of_both = of_both // TOP_K
                both_at = x + (of_both.to(tl.int64) * x_stride + both % 2 * PADDED)[:, None] + column[None, :]
            total = tl.zeros([ROWS, TOKENS], tl.float32)
            for block in tl.range(part * SPAN, tl.minimum((part + 1) * SPAN, COLUMN_BLOCKS), num_stages=STAGES):
                w = tl.load(words_at + block * (NUM_ROWS * WORDS))
                s = tl.load(exponents_at + block * NUM_ROWS)
                numbers = numbers_of_words(w, s, x.dtype.element_ty, PACKED)
                if JOINT:
                    values = tl.load(both_at + block * BLOCK, mask=there[:, None], other=0.0)
                    sums = tl.reshape(tl.dot(numbers, tl.trans(values)), (ROWS, TOKENS, 2))
                    of_high, of_low = tl.split(sums)
                    total += of_high + of_low
                elif SPLIT:
                    high = tl.load(tokens_at + block * BLOCK, mask=known[:, None], other=0.0)
                    low = tl.load(tokens_at + (block * BLOCK + PADDED), mask=known[:, None], other=0.0)
                    total += tl.dot(numbers, tl.trans(low), tl.dot(numbers, tl.trans(high)))
                else:
                    inside = known[:, None] & (column + block * BLOCK < K)[None, :]
                    values = tl.load(tokens_at + block * BLOCK, mask=inside, other=0.0)
                    total = tl.dot(numbers, tl.trans(values), total, input_precision="ieee")
            total *= (tl.load(row_scale + of_row) * WORDS_REST)[:, None]
            if SPLIT:
                total *= tl.load(x_scales + source, mask=known, other=0.0)[None, :]
            if ALONE:
                fits = rows + (index // 16 * 8 + index % 8 if GATED else index) < N
                to = out + (part * TOP_K + place)[None, :] * NUM_ROWS + row[:, None]
                tl.store(to, total, mask=fits[:, None] & known[None, :])
            else:
                if BIAS:
                    total += tl.load(bias + of_row).to(tl.float32)[:, None]
                result, target = total, pair
                if FIRST:
                    gate, up, target = total, total, place
                    if GATED:
                        pairs = tl.permute(tl.reshape(total, (HEIGHT // 8, 2, 8, TOKENS)), (0, 2, 3, 1))
                        gate, up = tl.split(tl.reshape(pairs, (HEIGHT, TOKENS, 2)))
                    result = apply_gate(gate, up, GATED, ACTIVATION, LIMIT, ALPHA)
                else:
                    result = total * tl.load(pair_weights + pair, mask=known, other=0.0)[None, :]
                below = rows + tl.arange(0, HEIGHT)
                to = out + target.to(tl.int64)[None, :] * N + below[:, None]
                tl.store(to, result.to(out.dtype.element_ty), mask=(below < N)[:, None] & known[None, :])


@kernel
def _combine_parts_kernel(
    sums, bias, expert_ids, weights, residual,
    N: tl.constexpr, TOP_K: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """residual of a lone token += the weighted sum of its answers, each of them the sum of PARTS and a bias."""
    pdl_release(LAUNCH_PDL)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    pdl_wait(LAUNCH_PDL)
    total = tl.load(residual + column, mask=inside, other=0.0).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        answer = tl.zeros([COLUMNS], tl.float32)
        for part in tl.static_range(PARTS):
            answer += tl.load(sums + (part * TOP_K + choice) * N + column, mask=inside, other=0.0)
        if BIAS:
            expert = tl.load(expert_ids + choice).to(tl.int64)
            answer += tl.load(bias + expert * N + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weights + choice) * answer
    tl.store(residual + column, total.to(residual.dtype.element_ty), mask=inside)


Values = tuple[torch.Tensor, torch.Tensor]  # rows, and their scales


def empty_values(num_rows: int, size: int, device: torch.device) -> Values:
    """Room for what `split_rows` makes of so many rows of `size` numbers."""
    out = torch.empty(
        num_rows, 2, triton.cdiv(size, WORDS_BLOCK) * WORDS_BLOCK, dtype=torch.float8_e4m3fn, device=device
    )
    return out, torch.empty(num_rows, dtype=torch.float32, device=device)


def split_rows(x: torch.Tensor, *, launch_pdl: bool = False) -> Values:
    """x [T, K] of bfloat16, rows contiguous -> float8_e4m3fn [T, 2, K up to a multiple of 128] and float32 [T]: a row
    is the sum of both its parts times its scale, a power of two. A row with a number that is not finite has scale NaN.
    """
    constants = {"PARTS": 0, "BIAS": False, "TOP_K": 1, **gate_constants(Gate())}
    return _launch_split(x, x, x, *x.shape, constants, launch_pdl)


def _split_gated(sums: torch.Tensor, expert_ids: torch.Tensor, experts: Experts, *, launch_pdl: bool) -> Values:
    """As `split_rows`, of what the gate makes of a lone token's products with gate_up, of which `sums`, float32
    [parts, k, rows of gate_up], are the parts: k rows. expert_ids: int32 [k].
    """
    (parts, top_k, _), bias = sums.shape, experts.gate_up.bias
    constants = {"PARTS": parts, "BIAS": bias is not None, "TOP_K": top_k, **gate_constants(experts.gate)}
    bias = sums if bias is None else bias
    return _launch_split(sums, bias, expert_ids, top_k, experts.down.num_columns, constants, launch_pdl)


def _launch_split(
    x: torch.Tensor, bias: torch.Tensor, expert_ids: torch.Tensor, num_rows: int, size: int,
    constants: dict[str, object], launch_pdl: bool,
) -> Values:  # fmt: skip
    out, scales = empty_values(num_rows, size, x.device)
    if num_rows:
        padded = out.shape[2]
        columns = triton.next_power_of_2(padded)
        _split_kernel[(num_rows,)](
            x, bias, expert_ids, out, scales, x.stride(0), SIZE=size, PADDED=padded, COLUMNS=columns, **constants,
            LAUNCH_PDL=launch_pdl, num_warps=min(8, max(1, columns // 512)),
        )  # fmt: skip
    return out, scales


def add_experts_in_words(
    x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, experts: Experts, residual: torch.Tensor, *,
    shapes: tuple[WordsShape, WordsShape] | None = None, num_multiprocessors: int = 3, by_fp8: bool = True,
    launch_pdl: bool = False, halves: Values | None = None,
) -> torch.Tensor:  # fmt: skip
    """As expert_products.add_experts, of experts whose matrices are both in words. by_fp8: bfloat16 goes to 8-bit
    tensor cores, which the device has; everything else is multiplied as it is. shapes: of both products, with one
    number of tokens and of parts. halves: `split_rows` of x, if it is known and will be needed.

    Raises ValueError for shapes, dtypes and formats that do not fit.
    """
    num_tokens, top_k = expert_ids.shape
    check_call(x, expert_ids, experts, residual)
    if any(linear.format.order != "words" for linear in (experts.gate_up, experts.down)):
        raise ValueError("gate_up and down are not both in words")
    if num_tokens == 0:
        return residual
    pairs, size, hidden = num_tokens * top_k, experts.down.num_columns, x.shape[1]
    splits = by_fp8 and x.dtype == torch.bfloat16
    first, second = shapes or words_shapes(num_tokens, pairs / experts.num_experts, by_fp8=splits)
    parts = first.parts if num_tokens == 1 and splits else 1
    order = tiles = expert_ids.view(-1)
    if parts == 1:
        order, tiles = group(expert_ids, experts.num_experts, first.tokens, launch_pdl=launch_pdl)

    def multiply(
        values: Values, linear: ExpertLinear, num_rows: int, gate: Gate | None, shape: WordsShape
    ) -> torch.Tensor:
        if parts > 1:
            out = torch.empty(parts, pairs, linear.num_rows, dtype=torch.float32, device=x.device)
        else:
            out = torch.empty(pairs, num_rows, dtype=x.dtype, device=x.device)
        constants = gate_constants(gate or Gate(gated=False))
        height = shape.rows // (2 if constants["GATED"] else 1)
        items = len(tiles) * triton.cdiv(num_rows, height) * parts
        assert linear.scale is not None and linear.row_scale is not None
        _words_kernel[(min(items, num_multiprocessors * shape.programs),)](
            *values, linear.weight.view(torch.int32), linear.scale.view(torch.int32), linear.row_scale,
            x if linear.bias is None else linear.bias, order, tiles, weights, out, len(tiles), values[0].stride(0),
            N=num_rows, K=linear.num_columns, TOP_K=top_k, TOKENS=shape.tokens, ROWS=shape.rows, STAGES=shape.stages,
            FIRST=gate is not None, PARTS=parts, BIAS=linear.bias is not None, **constants, SPLIT=splits,
            PACKED=splits and x.is_cuda, LAUNCH_PDL=launch_pdl, num_warps=shape.num_warps,
            maxnreg=shape.max_registers,
        )  # fmt: skip
        return out

    def split(given: torch.Tensor) -> Values:
        return split_rows(given, launch_pdl=launch_pdl) if splits else (given, given)

    gated = multiply(split(x) if halves is None else halves, experts.gate_up, size, experts.gate, first)
    if parts == 1:
        answers = multiply(split(gated), experts.down, hidden, None, second)
        return combine(answers, residual, top_k, launch_pdl=launch_pdl)
    of_pairs = _split_gated(gated, tiles, experts, launch_pdl=launch_pdl)
    answers, bias = multiply(of_pairs, experts.down, hidden, None, second), experts.down.bias
    _combine_parts_kernel[(triton.cdiv(hidden, _COMBINED),)](
        answers, x if bias is None else bias, tiles, weights, residual,
        N=hidden, TOP_K=top_k, PARTS=parts, COLUMNS=_COMBINED, BIAS=bias is not None, LAUNCH_PDL=launch_pdl,
        num_warps=4,
    )  # fmt: skip
    return residual
