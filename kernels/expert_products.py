"""Products of many tokens with the experts they chose: tokens are grouped by expert (kernels/grouping.py), and tiles of
weights multiply tiles of one expert's tokens on the tensor cores, the weights' rows on the long side, as in
`small_linear.narrow_linear`.

Two launches of one kernel, gate_up with the gate behind it and down with each token's weight of the expert, and one
that adds up a token's answers in the order of its choice, so that results do not depend on chance. Programs are as many
as fit the device and go through tiles × rows of weights, neighbours the same tokens; how many tiles there are the
device alone knows, the rest of the worst case is passed over. Sums are float32.

Weights of few bits (expert_codes.py) become the activations' type on their way to the tensor cores, in registers. A
scale of as many columns as are multiplied at once, or more, is applied to the sums of few tokens; others to the
numbers, which are then rounded. Scales are fetched a step of the loop ahead: they are too narrow for the pipeline that
fetches weights.
Sources: MegaBlocks (Gale et al., 2022); persistent programs over experts × tiles: the grouped products of CUTLASS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.expert_codes import (
    apply_gate,
    check_experts,
    format_constants,
    gate_constants,
    load_scales,
    parameters,
)
from paged_kernels.experts import ExpertLinear, Experts, Gate
from paged_kernels.grouping import group_by_owner, max_tiles
from paged_kernels.jit import kernel, pdl_begin, pdl_release, pdl_wait
from paged_kernels.quant_tile import (
    FP4,
    FP4_REST,
    INT4,
    PLAIN,
    WORDS,
    corrected,
    factors_of_words,
    is_packed,
    load_zeros,
    numbers,
    numbers_of_words,
    packs,
)

_ROWS = 64  # of the weight: what one instruction of the tensor cores takes
_SHARED_BYTES = 108 * 1024  # of a program: two of them share a multiprocessor
_FEW_TOKENS = tl.constexpr(32)  # of a tile, up to which sums are scaled instead of numbers, if they can be
_MAX_STAGES = 6
_WORDS = 16  # of a row at once, 128 numbers
_COMBINED = 1024  # numbers of a token that one program adds up


@triton.jit
def _load_of_groups(
    scale, zero, row, there, begin,
    K: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Scales and zeros of a tile of the weight from column `begin` on, float32 [ROWS, PARTS] each. JOINED: factors in
    the place of scales, as `numbers_of_words` takes them.
    """
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    part = begin + tl.arange(0, PARTS) * SHARED
    at = (row // BLOCK_ROWS * NUM_GROUPS)[:, None] + (part // GROUP)[None, :]
    known = there[:, None] & (part < K)[None, :]
    s, z = tl.full(at.shape, 1.0, tl.float32), tl.zeros(at.shape, tl.float32)
    if GROUPED:
        s = load_scales(scale + at, known)
    if JOINED:
        s = factors_of_words(s)
    if ZEROS:
        z = load_zeros(zero + at, known, CODES)
    return s, z


@triton.jit
def _of_columns(parts, BLOCK: tl.constexpr):
    """[ROWS, PARTS] -> what belongs to each of BLOCK columns, [ROWS, BLOCK] or, of one part, as it is."""
    if parts.shape[1] > 1:
        shape: tl.constexpr = (parts.shape[0], parts.shape[1], BLOCK // parts.shape[1])
        parts = tl.reshape(tl.broadcast_to(parts[:, :, None], shape), (parts.shape[0], BLOCK))
    return parts


@triton.jit
def _add_product(
    total, weight, row, there, s, z, low, high, begin,
    K: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr,
    EXACT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total [ROWS, TOKENS] + a tile of the weight, BLOCK of K numbers, bytes or words of its rows @ values, those that
    low nibbles or whole numbers multiply, and those that high ones do, [BLOCK, TOKENS]; of words all, [8 * BLOCK,
    TOKENS].
    """
    column = begin + tl.arange(0, BLOCK)
    w = tl.load(weight + row[:, None] * K + column[None, :], mask=there[:, None] & (column < K)[None, :], other=0.0)
    if CODES == PLAIN:
        total = tl.dot(w, low, total, input_precision=PRECISION)
    elif CODES == WORDS:
        total = tl.dot(
            numbers_of_words(w, _of_columns(s, BLOCK), low.dtype, PACKED), low, total, input_precision=PRECISION
        )
    else:
        later: tl.constexpr = GROUPED and s.shape[1] == 1 and total.shape[1] <= _FEW_TOKENS
        scaled: tl.constexpr = GROUPED and not later
        found = tl.zeros(total.shape, tl.float32) if later else total
        s_wide, z_wide = s, z
        if scaled:
            s_wide = _of_columns(s, BLOCK)
        if ZEROS:
            z_wide = _of_columns(z, BLOCK)
        low_w, high_w = numbers(w, CODES, PACKED)
        low_w = corrected(low_w, s_wide, z_wide, scaled, ZEROS, EXACT, low.dtype)
        found = tl.dot(low_w, low, found, input_precision=PRECISION)
        if CODES >= INT4:
            high_w = corrected(high_w, s_wide, z_wide, scaled, ZEROS, EXACT, low.dtype)
            found = tl.dot(high_w, high, found, input_precision=PRECISION)
        total = total + found * s if later else found
    return total


@triton.jit
def _finished(
    total, scale, row_scale, bias, row, there,
    CODES: tl.constexpr, GROUPED: tl.constexpr, ROW_SCALES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The sums [ROWS, TOKENS] with what belongs to whole rows."""
    if (CODES != PLAIN) and (not GROUPED):
        total *= load_scales(scale + row, there)[:, None]
    if ROW_SCALES:
        total *= tl.load(row_scale + row, mask=there, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + row, mask=there, other=0.0).to(tl.float32)[:, None]
    return total


@kernel(ints=["num_tiles"])
def _products_kernel(
    x, weight, scale, zero, row_scale, bias, order, tiles, pair_weights, out, num_tiles, x_stride, out_stride,
    N: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, FIRST: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    SCALE_ROWS: tl.constexpr, CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr,
    ROW_SCALES: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, ONE: tl.constexpr,
    LAUNCH_PDL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """FIRST: out[place] = gate(weight . x[token of place]), of two products if GATED. Or else out[pair of place] = its
    weight * (weight . x[place]). K, BLOCK and GROUP are in bytes, numbers of a plain weight, or
    words. ONE: of a lone token, whose choices are `tiles`, one each.
    """
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    num_blocks: tl.constexpr = (N + ROWS - 1) // ROWS
    num_rows: tl.constexpr = 2 * N if GATED else N
    num_scales: tl.constexpr = SCALE_ROWS * ((K + GROUP - 1) // GROUP)
    SHARED: tl.constexpr = GROUP if GROUPED and GROUP < BLOCK else BLOCK
    PARTS: tl.constexpr = BLOCK // SHARED
    TOGETHER: tl.constexpr = 8 if CODES == WORDS else 1  # columns of x for a column of the weight
    JOINED: tl.constexpr = CODES == WORDS and PACKED
    HALVES: tl.constexpr = (CODES == INT4) | (CODES == FP4)
    EXACT: tl.constexpr = CODES == FP4 and scale.dtype.element_ty == tl.float8e4nv  # four bits times a scale of fp8
    for item in range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        tile = tiles + (item // num_blocks) * (1 if ONE else 3)
        expert = tl.load(tile).to(tl.int64)
        if expert >= 0:
            place = (item // num_blocks if ONE else tl.load(tile + 1)) + tl.arange(0, TOKENS)
            known = tl.arange(0, TOKENS) < (1 if ONE else tl.load(tile + 2))
            pair = place if ONE else tl.load(order + place, mask=known, other=0)
            source = pair // TOP_K if FIRST else place
            row = (item % num_blocks) * ROWS + tl.arange(0, ROWS)
            there = row < N
            of_row = 2 * row if INTERLEAVED else row
            of_up = 2 * row + 1 if INTERLEAVED else N + row
            of_weight = weight + expert * (num_rows * K)
            of_scale, of_zero = scale + expert * num_scales, zero + expert * num_scales
            of_rows, of_bias = row_scale + expert * num_rows, bias + expert * num_rows
            tokens_at = x + (source.to(tl.int64) * x_stride)[None, :]
            total = tl.zeros([ROWS, TOKENS], tl.float32)
            total_up = tl.zeros([ROWS, TOKENS], tl.float32)
            s, z = _load_of_groups(
                of_scale, of_zero, of_row, there, 0,
                K, PARTS, SHARED, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS, JOINED,
            )  # fmt: skip
            up_s, up_z = s, z
            if GATED:
                up_s, up_z = _load_of_groups(
                    of_scale, of_zero, of_up, there, 0,
                    K, PARTS, SHARED, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS, JOINED,
                )  # fmt: skip
            for begin in tl.range(0, K, BLOCK, num_stages=STAGES):
                next_s, next_z = _load_of_groups(
                    of_scale, of_zero, of_row, there, begin + BLOCK,
                    K, PARTS, SHARED, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS, JOINED,
                )  # fmt: skip
                column = begin * TOGETHER + tl.arange(0, BLOCK * TOGETHER)
                inside = known[None, :] & (column < K * TOGETHER)[:, None]
                at = column // GROUP * (2 * GROUP) + column % GROUP if HALVES else column
                low = tl.load(tokens_at + at[:, None], mask=inside, other=0.0)
                high = low
                if HALVES:
                    high = tl.load(tokens_at + (at + GROUP)[:, None], mask=inside, other=0.0)
                total = _add_product(
                    total, of_weight, of_row, there, s, z, low, high, begin,
                    K, BLOCK, CODES, GROUPED, ZEROS, EXACT, PACKED, PRECISION,
                )  # fmt: skip
                s, z = next_s, next_z
                if GATED:
                    next_s, next_z = _load_of_groups(
                        of_scale, of_zero, of_up, there, begin + BLOCK,
                        K, PARTS, SHARED, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS, JOINED,
                    )  # fmt: skip
                    total_up = _add_product(
                        total_up, of_weight, of_up, there, up_s, up_z, low, high, begin,
                        K, BLOCK, CODES, GROUPED, ZEROS, EXACT, PACKED, PRECISION,
                    )  # fmt: skip
                    up_s, up_z = next_s, next_z
            if JOINED:
                total, total_up = total * FP4_REST, total_up * FP4_REST
            total = _finished(total, of_scale, of_rows, of_bias, of_row, there, CODES, GROUPED, ROW_SCALES, BIAS)
            if GATED:
                total_up = _finished(
                    total_up, of_scale, of_rows, of_bias, of_up, there, CODES, GROUPED, ROW_SCALES, BIAS
                )
            if FIRST:
                total = apply_gate(total, total_up, GATED, ACTIVATION, LIMIT, ALPHA)
                target = place
            else:
                total *= tl.load(pair_weights + pair, mask=known, other=0.0)[None, :]
                target = pair
            to = out + (target.to(tl.int64) * out_stride)[None, :] + row[:, None]
            tl.store(to, total.to(out.dtype.element_ty), mask=there[:, None] & known[None, :])


@kernel
def _combine_kernel(
    answers,
    residual,
    residual_stride,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):
    """residual[t] += the sum of answers[t * TOP_K …]."""
    pdl_begin(LAUNCH_PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(TOP_K):
        total += tl.load(answers + (token * TOP_K + choice) * N + column, mask=inside, other=0.0).to(tl.float32)
    at = residual + token * residual_stride + column
    tl.store(
        at, (tl.load(at, mask=inside, other=0.0).to(tl.float32) + total).to(residual.dtype.element_ty), mask=inside
    )


@dataclass(frozen=True)
class ProductShape:
    """How a grouped product divides its work: tokens of a tile, rows and columns of the weight at once, stages of the
    pipeline, warps; and how many of its programs have room where one of four warps and all stages has.
    """

    tokens: int
    rows: int
    block: int
    stages: int
    num_warps: int
    in_place_of_one: int = 1


def tokens_of_tiles(num_pairs: int, *linears: ExpertLinear) -> int:
    """Of the tiles that matrices of the same experts share. num_pairs: tokens times the experts of each.

    As many as an expert gets on the average, from 16 on: weights are read fast while there are few, and multiplied fast
    when there are many.
    """
    share, formats = num_pairs / len(linears[0].weight), [linear.format for linear in linears]
    whole_bytes = any(format.codes in ("fp8", "int8") for format in formats)
    if share <= (16 if whole_bytes else 8):
        return 16
    if share <= 64:
        return 32 if share <= 32 else 64
    # more tokens beside other numbers on their way would not fit registers
    return 128 if all(format.codes == "plain" or format.order == "words" for format in formats) else 64


def product_shape(tokens: int, linear: ExpertLinear, *, gated: bool, element_bytes: int = 2) -> ProductShape:
    """tokens: of a tile, 16 to 128; element_bytes: of an activation.

    What measured best on an H200 with the experts of Qwen3-30B-A3B and gpt-oss-20b and 16 to 2,048 tokens at once
    (tests/bench/bench_moe.py); int8 and float32 were only compiled.
    """
    format = linear.format
    if format.order == "words":
        return ProductShape(tokens, _ROWS, _WORDS, 3, 4, in_place_of_one=2 if tokens <= 32 else 1)
    if packs(format) and element_bytes == 2 and tokens <= 32:
        block = 64 if format.nibbles else 128
        if tokens == 16:
            return ProductShape(tokens, _ROWS // 2, block, 3, 2, in_place_of_one=4)  # no warp makes another's numbers
        return ProductShape(tokens, _ROWS, block, 3, 2, in_place_of_one=2)
    if format.codes == "plain" and element_bytes == 2 and tokens == 32:
        return ProductShape(tokens, 2 * _ROWS, 64, 3, 8)
    block = 64 if tokens >= 64 or element_bytes == 4 or format.nibbles else 128
    values = tokens * block * element_bytes * (2 if format.nibbles else 1)
    weight_bytes = _ROWS * block * (2 if gated else 1) * linear.weight.element_size()
    stages = int(_SHARED_BYTES // (weight_bytes + values))  # so deep that two programs share a multiprocessor
    return ProductShape(tokens, _ROWS, block, max(2, min(_MAX_STAGES, stages)), 8 if tokens == 128 else 4)


def add_experts(
    x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, experts: Experts, residual: torch.Tensor, *,
    shape: ProductShape | None = None, num_programs: int = 8, launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """reference.add_experts: residual, which is written over.

    x, residual: [T, hidden], of one dtype (bfloat16, float16, float32), rows contiguous; expert_ids: int32 [T, k],
    contiguous; weights: float32 [T, k], contiguous. num_programs: as many as run at once. launch_pdl: begin while the
    kernel before drains (programmatic dependent launch); reads nothing before that kernel is complete. Raises
    ValueError for shapes, dtypes and formats that do not fit.
    """
    num_tokens, top_k = expert_ids.shape
    if (
        x.shape != residual.shape
        or x.dtype != residual.dtype
        or x.stride(1) != 1
        or residual.stride(1) != 1
        or num_tokens != len(x)
    ):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype}"
            f" do not fit {num_tokens} tokens' choice"
        )
    check_experts(x, experts)
    if num_tokens == 0:
        return residual
    pairs = num_tokens * top_k
    in_tile = tokens_of_tiles(pairs, experts.gate_up, experts.down)
    first, second = (
        shape or product_shape(in_tile, linear, gated=gated, element_bytes=x.element_size())
        for linear, gated in ((experts.gate_up, experts.gate.gated), (experts.down, False))
    )
    order = tiles = expert_ids.view(-1)
    if num_tokens > 1:
        order = torch.empty_like(tiles)
        tiles = torch.empty(max_tiles(pairs, experts.num_experts, first.tokens), 3, dtype=torch.int32, device=x.device)
        group_by_owner(expert_ids.view(-1), experts.num_experts, order, tiles, first.tokens, launch_pdl=launch_pdl)
    gated = torch.empty(pairs, experts.down.num_columns, dtype=x.dtype, device=x.device)
    answers = torch.empty(pairs, x.shape[1], dtype=x.dtype, device=x.device)
    grouped = order, tiles, weights
    _multiply_tiles(
        x, experts.gate_up, gated, grouped, first, num_programs, top_k=top_k, gate=experts.gate, launch_pdl=launch_pdl
    )
    _multiply_tiles(
        gated, experts.down, answers, grouped, second, num_programs, top_k=top_k, gate=None, launch_pdl=launch_pdl
    )
    hidden = x.shape[1]
    block = min(_COMBINED, triton.next_power_of_2(hidden))
    _combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
        answers, residual, residual.stride(0), N=hidden, TOP_K=top_k, BLOCK=block, LAUNCH_PDL=launch_pdl, num_warps=4
    )
    return residual


def _multiply_tiles(
    x: torch.Tensor, linear: ExpertLinear, out: torch.Tensor, grouped: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    shape: ProductShape,
    num_programs: int, *, top_k: int, gate: Gate | None, launch_pdl: bool,
) -> None:  # fmt: skip
    order, tiles, weights = grouped
    rows, constants = out.shape[1], gate_constants(gate or Gate(gated=False))
    items = len(tiles) * triton.cdiv(rows, shape.rows)
    _products_kernel[(min(items, num_programs * shape.in_place_of_one),)](
        x, *parameters(linear, x), order, tiles, weights, out, len(tiles), x.stride(0), out.stride(0),
        N=rows, TOP_K=top_k, TOKENS=shape.tokens, ROWS=shape.rows, BLOCK=shape.block, STAGES=shape.stages,
        FIRST=gate is not None, ONE=tiles.dim() == 1,
        **format_constants(linear), **constants, LAUNCH_PDL=launch_pdl, PACKED=is_packed(x, linear.format),
        PRECISION="ieee", num_warps=shape.num_warps,
    )  # fmt: skip
