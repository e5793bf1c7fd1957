"""Products of many tokens with the experts they chose: tokens are grouped by expert (kernels/grouping.py), and tiles of
weights multiply tiles of one expert's tokens on the tensor cores, the weights' rows on the long side, as in
`small_linear.narrow_linear`.

Two launches of one kernel, gate_up with the gate behind it and down with each token's weight of the expert, and one
that adds up a token's answers in the order of its choice, so that results do not depend on chance. Programs are as many
as fit the device and go through tiles × rows of weights, neighbours the same tokens; how many tiles there are the
device alone knows, the rest of the worst case is passed over. Sums are float32.

Weights of few bits (quant_tile.py) become the activations' type on their way to the tensor cores, in registers. A
scale of as many columns as are multiplied at once, or more, is applied to the sums of few tokens; others to the
numbers, which are then rounded. Scales are fetched a step of the loop ahead: they are too narrow for the pipeline that
fetches weights.
Sources: MegaBlocks (Gale et al., 2022); persistent programs over experts × tiles: the grouped products of CUTLASS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.expert_codes import (
    apply_gate,
    check_call,
    format_constants,
    gate_constants,
    load_scales,
    parameters,
)
from paged_kernels.expert_tiles import ProductShape, product_shape, tokens_of_tiles
from paged_kernels.experts import ExpertLinear, Experts, Gate
from paged_kernels.grouping import group_by_owner, max_tiles
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.quant_tile import (
    FP4,
    INT4,
    PLAIN,
    corrected,
    is_packed,
    load_zeros,
    numbers,
)

_FEW_TOKENS = tl.constexpr(32)  # of a tile, up to which sums are scaled instead of numbers, if they can be
_COMBINED = 1024  # numbers of a token that one program adds up


@triton.jit
def _load_of_groups(
    scale, zero, row, there, begin,
    K: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    CODES: tl.constexpr, GROUPED: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Scales and zeros of a tile of the weight from column `begin` on, float32 [ROWS, PARTS] each."""
    NUM_GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    part = begin + tl.arange(0, PARTS) * SHARED
    at = (row // BLOCK_ROWS * NUM_GROUPS)[:, None] + (part // GROUP)[None, :]
    known = there[:, None] & (part < K)[None, :]
    s, z = tl.full(at.shape, 1.0, tl.float32), tl.zeros(at.shape, tl.float32)
    if GROUPED:
        s = load_scales(scale + at, known)
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
    """total [ROWS, TOKENS] + a tile of the weight, BLOCK of K numbers or bytes of its rows @ values, those that low
    nibbles or whole numbers multiply, and those that high ones do, [BLOCK, TOKENS].
    """
    column = begin + tl.arange(0, BLOCK)
    w = tl.load(weight + row[:, None] * K + column[None, :], mask=there[:, None] & (column < K)[None, :], other=0.0)
    if CODES == PLAIN:
        total = tl.dot(w, low, total, input_precision=PRECISION)
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
    ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    LAUNCH_PDL: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """FIRST: out[place] = gate(weight . x[token of place]), of two products if GATED. Or else out[pair of place] = its
    weight * (weight . x[place]). K, BLOCK and GROUP are in bytes, or numbers of a plain weight.
    """
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
    num_blocks: tl.constexpr = (N + ROWS - 1) // ROWS
    num_rows: tl.constexpr = 2 * N if GATED else N
    num_scales: tl.constexpr = SCALE_ROWS * ((K + GROUP - 1) // GROUP)
    SHARED: tl.constexpr = GROUP if GROUPED and GROUP < BLOCK else BLOCK
    PARTS: tl.constexpr = BLOCK // SHARED
    HALVES: tl.constexpr = (CODES == INT4) | (CODES == FP4)
    EXACT: tl.constexpr = CODES == FP4 and scale.dtype.element_ty == tl.float8e4nv  # four bits times a scale of fp8
    for item in range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        tile = tiles + (item // num_blocks) * 3
        expert = tl.load(tile).to(tl.int64)
        if expert >= 0:
            place = tl.load(tile + 1) + tl.arange(0, TOKENS)
            known = tl.arange(0, TOKENS) < tl.load(tile + 2)
            pair = tl.load(order + place, mask=known, other=0)
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
                K, PARTS, SHARED, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS,
            )  # fmt: skip
            up_s, up_z = s, z
            if GATED:
                up_s, up_z = _load_of_groups(
                    of_scale, of_zero, of_up, there, 0,
                    K, PARTS, SHARED, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS,
                )  # fmt: skip
            for begin in tl.range(0, K, BLOCK, num_stages=STAGES):
                next_s, next_z = _load_of_groups(
                    of_scale, of_zero, of_row, there, begin + BLOCK,
                    K, PARTS, SHARED, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS,
                )  # fmt: skip
                column = begin + tl.arange(0, BLOCK)
                inside = known[None, :] & (column < K)[:, None]
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
                        K, PARTS, SHARED, GROUP, BLOCK_ROWS, CODES, GROUPED, ZEROS,
                    )  # fmt: skip
                    total_up = _add_product(
                        total_up, of_weight, of_up, there, up_s, up_z, low, high, begin,
                        K, BLOCK, CODES, GROUPED, ZEROS, EXACT, PACKED, PRECISION,
                    )  # fmt: skip
                    up_s, up_z = next_s, next_z
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
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL)
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
    check_call(x, expert_ids, experts, residual)
    if experts.has_words:
        raise ValueError("numbers in words are read by expert_words.py alone")
    if num_tokens == 0:
        return residual
    pairs = num_tokens * top_k
    in_tile = tokens_of_tiles(pairs, experts.gate_up, experts.down)
    first, second = (
        shape or product_shape(in_tile, linear, gated=gated, element_bytes=x.element_size())
        for linear, gated in ((experts.gate_up, experts.gate.gated), (experts.down, False))
    )
    order, tiles = group(expert_ids, experts.num_experts, first.tokens, launch_pdl=launch_pdl)
    gated = torch.empty(pairs, experts.down.num_columns, dtype=x.dtype, device=x.device)
    answers = torch.empty(pairs, x.shape[1], dtype=x.dtype, device=x.device)
    grouped = order, tiles, weights
    _multiply_tiles(
        x, experts.gate_up, gated, grouped, first, num_programs, top_k=top_k, gate=experts.gate, launch_pdl=launch_pdl
    )
    _multiply_tiles(
        gated, experts.down, answers, grouped, second, num_programs, top_k=top_k, gate=None, launch_pdl=launch_pdl
    )
    return combine(answers, residual, top_k, launch_pdl=launch_pdl)


def group(
    expert_ids: torch.Tensor, num_experts: int, tokens: int, *, launch_pdl: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [T, k], contiguous -> order and tiles of so many tokens, as `group_by_owner` has them."""
    owners = expert_ids.view(-1)
    order = torch.empty_like(owners)
    tiles = torch.empty(max_tiles(len(owners), num_experts, tokens), 3, dtype=torch.int32, device=owners.device)
    group_by_owner(owners, num_experts, order, tiles, tokens, launch_pdl=launch_pdl)
    return order, tiles


def combine(answers: torch.Tensor, residual: torch.Tensor, top_k: int, *, launch_pdl: bool) -> torch.Tensor:
    """residual [T, hidden] + the sums of each token's answers, [T * top_k, hidden]; it is written over."""
    num_tokens, hidden = residual.shape
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
        FIRST=gate is not None,
        **format_constants(linear), **constants, LAUNCH_PDL=launch_pdl, PACKED=is_packed(x, linear.format),
        PRECISION="ieee", num_warps=shape.num_warps,
    )  # fmt: skip
