"""Products of few tokens with a weight matrix, as in decode steps: what counts is to read the weights without a pause.

`vector_linear` takes one token: rows of the weight are spread over programs, each multiplies and sums in registers.
`narrow_linear` takes up to 128 tokens: the tensor cores multiply tiles of the weight (their long side) with all tokens
(their short side), and a matrix with few rows is split along its columns too.

What a decoder layer does next to the product happens in the same launch: the norm of the token before it
(vector_linear), the bias, the gate, or the addition of the residual after it. And the launch overlaps the one before
(programmatic dependent launch): weights never change, so a program fetches its first ones while its input is still
being computed. That is the point: between two products the memory does not fall silent.

Sums are float32; the result is rounded once, after everything. Tuned shapes: `vector_shape`, `narrow_shape`; measured
by tests/bench/bench_linear.py.
Sources: split-K with the last program to arrive summing up in order: Stream-K (Osama et al., 2023); SwiGLU: Shazeer,
    2020; RMSNorm: Zhang and Sennrich, 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from paged_kernels.activation import activated
from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.narrow_rows import check_outputs
from paged_kernels.norm_value import Norm
from paged_kernels.sampling import arrive

MAX_TOKENS = 128
_SHARED_BYTES = 200 * 1024  # of a multiprocessor, for the pipeline
_MAX_SPLIT = 16
_MULTIPROCESSORS = 132  # of an H100 or H200
_MANY_ROWS = 2**14
_LANES = tl.constexpr(8)  # neighbours that a thread sums before anything else: 16 bytes of bfloat16


@kernel
def _vector_kernel(
    x, norm_weight, weight, bias, residual, out, eps,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, PLUS_ONE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr,
    ADD: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """N rows of the result, from N (GATED: 2 N) rows of the weight."""
    pdl_release(LAUNCH_PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    there = (row < N)[:, None]
    at = weight + (row.to(tl.int64) * K)[:, None] + column[None, :]
    mask = there & (column < K)[None, :]
    next_w = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    next_u = next_w
    if GATED:
        next_u = tl.load(at + N * K, mask=mask, other=0.0, eviction_policy="evict_first")
    pdl_wait(LAUNCH_PDL)

    total = tl.zeros([ROWS, BLOCK // _LANES], tl.float32)
    total_u = tl.zeros([ROWS, BLOCK // _LANES], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, K, BLOCK):
        w, u = next_w, next_u
        # The token before the weights of the next turn: loads return in order, and one behind those would come too
        # late.
        value = tl.load(x + begin + column, mask=begin + column < K, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            scale = tl.load(norm_weight + begin + column, mask=begin + column < K, other=0.0).to(tl.float32)
            value *= scale + 1.0 if PLUS_ONE else scale
        ahead = begin + BLOCK + column
        mask = there & (ahead < K)[None, :]
        next_w = tl.load(at + begin + BLOCK, mask=mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            next_u = tl.load(at + N * K + begin + BLOCK, mask=mask, other=0.0, eviction_policy="evict_first")
        total += tl.sum(tl.reshape(w.to(tl.float32) * value[None, :], (ROWS, BLOCK // _LANES, _LANES)), 2)
        if GATED:
            total_u += tl.sum(tl.reshape(u.to(tl.float32) * value[None, :], (ROWS, BLOCK // _LANES, _LANES)), 2)

    result = tl.sum(total, 1)
    shrink = 1.0
    if NORM:
        shrink = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        result *= shrink
    if BIAS:
        result += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(total_u, 1) * shrink
        if BIAS:
            up += tl.load(bias + N + row, mask=row < N, other=0.0).to(tl.float32)
        result = activated(result, ACTIVATION) * up
    if ADD:
        result += tl.load(residual + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < N)


@triton.jit
def fetch_lines(at, mask):
    """Brings cache lines to L2 and waits for nothing."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
        [at.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def leave_part(
    total, total_u, place, partials, arrivals, tile, part, SPLIT: tl.constexpr, SIZE: tl.constexpr, GATED: tl.constexpr
):
    """Leaves a tile's sums over one of SPLIT parts of a row, SIZE numbers each, for the last program to arrive; whether
    that is this one.
    """
    mine = partials + (tile.to(tl.int64) * SPLIT + part) * ((2 if GATED else 1) * SIZE)
    tl.store(mine + place, total)
    if GATED:
        tl.store(mine + SIZE + place, total_u)
    return arrive(arrivals + tile, SPLIT)


@triton.jit
def sum_of_parts(
    place, partials, arrivals, tile, ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, GATED: tl.constexpr
):
    """What leave_part's programs have left of a tile, summed in their order; the counter is zero again."""
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    total_u = tl.zeros([ROWS, TOKENS], tl.float32)
    for part in range(SPLIT):
        theirs = partials + (tile.to(tl.int64) * SPLIT + part) * ((2 if GATED else 1) * ROWS * TOKENS)
        total += tl.load(theirs + place, cache_modifier=".cg")
        if GATED:
            total_u += tl.load(theirs + ROWS * TOKENS + place, cache_modifier=".cg")
    tl.store(arrivals + tile, 0)
    return total, total_u


@kernel(ints=["num_tokens"])
def _narrow_kernel(
    x, weight, bias, residual, out, partials, arrivals, num_tokens, x_stride, residual_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, SPAN: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, FETCH: tl.constexpr, LAUNCH_PDL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the result for all tokens, or a part of their sums: SPAN columns of the weight, the part-th of
    SPLIT.
    """
    pdl_release(LAUNCH_PDL)
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    row = tile * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    column = part * SPAN + tl.arange(0, BLOCK)
    there = (row < N)[:, None]
    at = weight + (row.to(tl.int64) * K)[:, None]
    if FETCH > 0:
        line = part * SPAN + tl.arange(0, FETCH) * 64  # of two-byte elements
        fetched = there & (line < K)[None, :]
        fetch_lines(at + line[None, :], fetched)
        if GATED:
            fetch_lines(at + N * K + line[None, :], fetched)
    pdl_wait(LAUNCH_PDL)

    known = (token < num_tokens)[:, None]
    tokens_at = x + (token * x_stride)[:, None]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    total_u = tl.zeros([ROWS, TOKENS], tl.float32)
    for begin in tl.range(0, SPAN, BLOCK, num_stages=STAGES):
        inside = (begin + column < K)[None, :]
        values = tl.load(tokens_at + (begin + column)[None, :], mask=known & inside, other=0.0)
        w = tl.load(at + (begin + column)[None, :], mask=there & inside, other=0.0, eviction_policy="evict_first")
        total = tl.dot(w, tl.trans(values), total, input_precision=PRECISION)
        if GATED:
            u = tl.load(
                at + (begin + column)[None, :] + N * K, mask=there & inside, other=0.0, eviction_policy="evict_first"
            )
            total_u = tl.dot(u, tl.trans(values), total_u, input_precision=PRECISION)

    place = (row % ROWS)[:, None] * TOKENS + token[None, :]
    last = True
    if SPLIT > 1:
        last = leave_part(total, total_u, place, partials, arrivals, tile, part, SPLIT, ROWS * TOKENS, GATED)
    if last:
        if SPLIT > 1:
            total, total_u = sum_of_parts(place, partials, arrivals, tile, ROWS, TOKENS, SPLIT, GATED)
        result = total
        if BIAS:
            result += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        if GATED:
            if BIAS:
                total_u += tl.load(bias + N + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
            result = activated(result, ACTIVATION) * total_u
        wanted = there & (token < num_tokens)[None, :]
        if ADD:
            result += tl.load(residual + row[:, None] + (token * residual_stride)[None, :], mask=wanted, other=0.0).to(
                tl.float32
            )
        tl.store(out + row[:, None] + (token * out_stride)[None, :], result.to(out.dtype.element_ty), mask=wanted)


@dataclass(frozen=True)
class VectorShape:
    """How vector_linear divides its work: rows of the result per program, columns at once, warps."""

    rows: int
    block: int
    num_warps: int


@dataclass(frozen=True)
class NarrowShape:
    """How narrow_linear divides its work: a tile's rows, its columns, parts of a row, stages of the pipeline, warps,
    bytes of a row fetched ahead.
    """

    rows: int
    block: int
    split: int
    stages: int
    num_warps: int
    fetch: int


@dataclass(frozen=True)
class LinearWorkspace:
    """Scratch of narrow_linear, shared by launches that run one after another. partials: float32 [any]; arrivals: int32
    [tiles], zero between launches.
    """

    partials: torch.Tensor
    arrivals: torch.Tensor


def make_linear_workspace(device: torch.device) -> LinearWorkspace:
    """Allocate it: 8 MiB hold the parts of every split that `narrow_shape` chooses."""
    return LinearWorkspace(
        torch.empty(2**21, dtype=torch.float32, device=device), torch.zeros(4096, dtype=torch.int32, device=device)
    )


def vector_shape(num_rows: int, num_columns: int, gated: bool) -> VectorShape:
    """The shape that measured best on an H100, or nearly: tests/bench/bench_linear.py --tokens 1 --sweep."""
    block = min(2048, max(256, triton.next_power_of_2(num_columns)))
    if gated:
        return VectorShape(rows=1 if num_columns <= 2048 else 2, block=block, num_warps=4)
    if num_columns <= 2048 or num_rows > 2**16:  # one turn, or enough rows to hide the second
        return VectorShape(rows=4, block=block, num_warps=4)
    return (
        VectorShape(rows=4, block=4096, num_warps=8)
        if num_rows >= 4096
        else VectorShape(rows=2, block=2048, num_warps=8)
    )


def narrow_shape(num_tokens: int, num_rows: int, num_columns: int, gated: bool) -> NarrowShape:
    """The shape that measured best on an H100, or nearly: tests/bench/bench_linear.py --tokens 32 --sweep; when to
    split, in steps of gpt-oss-20b on an H200. A pipeline so deep takes all of a multiprocessor, so columns are split
    only as far as no program has to wait for another's place.
    """
    tiles = triton.cdiv(num_rows, 64)
    split = 1
    while tiles * split * 2 <= _MULTIPROCESSORS and num_columns // (split * 2) >= 512 and split < _MAX_SPLIT:
        split *= 2
    stage_bytes = 128 * 2 * (64 * (2 if gated else 1) + max(16, triton.next_power_of_2(num_tokens)))
    return NarrowShape(
        rows=64,
        block=128,
        split=split,
        stages=min(4 if gated else 6, _SHARED_BYTES // stage_bytes),
        num_warps=4,
        fetch=8,
    )


def is_narrow(num_tokens: int, weight: torch.Tensor) -> bool:
    """Whether narrow_linear is at least as fast here as what else there is: for several tokens cuBLAS with separate
    kernels around it, as measured on an H100 by tests/bench/bench_linear.py; for one vector_linear, as measured in
    steps of Llama-3.1-8B (gate and up 5 us of 60 less, the head 20 us of 240, qkv, out and down 1 to 2 more) and of
    Llama-3.2-1B (of 2,048 columns, 2 to 5 us more each) on an H200.
    """
    if not weight.is_cuda or weight.itemsize != 2:
        return False
    if num_tokens == 1:
        return weight.shape[0] >= _MANY_ROWS and weight.shape[1] > 2048
    return num_tokens <= 32 or (num_tokens <= 64 and weight.numel() >= 2**24)


def vector_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, norm: Norm | None = None,
    gated: bool = False, activation: str = "silu", residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None, shape: VectorShape | None = None, launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out = residual + gate(weight . norm(x) + bias) for one token; each of norm, gate, bias and residual only if asked
    for.

    x: [1, K]; weight: [N, K], contiguous, or [2 N, K] if gated (rows of the gate, then of what it lets through:
    activation(first) * second);
    bias: [N] or [2 N]; norm: an RMS norm of [K] without bias;
    residual, out: [1, N], out may be residual. One floating dtype; sums in float32, rounded at the end.
    launch_pdl: begin while the kernel before drains (programmatic dependent launch); reads nothing but weight before
    that kernel is complete. Raises ValueError for shapes, strides or dtypes that do not fit.
    """
    num_rows = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(1, num_rows) if out is None else out
    _check(x, weight, bias, residual, out, num_rows, 1)
    shape = shape or vector_shape(num_rows, weight.shape[1], gated)
    if norm is not None and (norm.centred or norm.bias is not None):
        raise ValueError("only an RMS norm without bias can be taken in before a product")
    _vector_kernel[(triton.cdiv(num_rows, shape.rows),)](
        x, x if norm is None else norm.weight, weight, x if bias is None else bias, x if residual is None else residual,
        out, 0.0 if norm is None else norm.eps,
        N=num_rows, K=weight.shape[1], ROWS=shape.rows, BLOCK=shape.block,
        NORM=norm is not None, PLUS_ONE=norm is not None and norm.plus_one, GATED=gated, ACTIVATION=activation,
        BIAS=bias is not None, ADD=residual is not None, LAUNCH_PDL=launch_pdl,
        num_warps=shape.num_warps, num_stages=1,
    )  # fmt: skip
    return out


def narrow_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, workspace: LinearWorkspace,
    gated: bool = False, activation: str = "silu", residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None, shape: NarrowShape | None = None, launch_pdl: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out = residual + gate(x . weight + bias) for M tokens, 1 <= M <= 128; gate, bias and residual only if asked for.

    x: [M, K], residual and out: [M, N], rows contiguous, may be strided; out may be residual. Otherwise as
        `vector_linear`.
    """
    num_tokens, num_columns = x.shape
    num_rows = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(num_tokens, num_rows) if out is None else out
    _check(x, weight, bias, residual, out, num_rows, MAX_TOKENS)
    shape = shape or narrow_shape(num_tokens, num_rows, num_columns, gated)
    tiles, tokens = triton.cdiv(num_rows, shape.rows), max(16, triton.next_power_of_2(num_tokens))
    span = triton.cdiv(triton.cdiv(num_columns, shape.split), shape.block) * shape.block
    if shape.split > 1 and (
        tiles > len(workspace.arrivals)
        or tiles * shape.split * (2 if gated else 1) * shape.rows * tokens > len(workspace.partials)
    ):
        raise ValueError(f"{tiles} tiles of {shape.rows} x {tokens} in {shape.split} parts do not fit the workspace")
    _narrow_kernel[(tiles * shape.split,)](
        x, weight, x if bias is None else bias, x if residual is None else residual, out, workspace.partials,
        workspace.arrivals, num_tokens, x.stride(0), 0 if residual is None else residual.stride(0), out.stride(0),
        N=num_rows, K=num_columns, TOKENS=tokens, ROWS=shape.rows, BLOCK=shape.block, SPLIT=shape.split, SPAN=span,
        STAGES=shape.stages, GATED=gated, ACTIVATION=activation, BIAS=bias is not None, ADD=residual is not None,
        FETCH=shape.fetch if launch_pdl else 0, LAUNCH_PDL=launch_pdl, PRECISION="ieee",
        num_warps=shape.num_warps,
    )  # fmt: skip
    return out


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    num_rows: int,
    max_tokens: int,
) -> None:
    num_tokens, num_columns = x.shape
    if (
        not 1 <= num_tokens <= max_tokens
        or weight.shape[1] != num_columns
        or not weight.is_contiguous()
        or len(weight) % num_rows
    ):
        raise ValueError(
            f"x {tuple(x.shape)} (1 to {max_tokens} tokens) and weight {tuple(weight.shape)}, which must be "
            "contiguous, do not fit each other"
        )
    check_outputs(x, residual, out, num_rows)
    if (
        weight.dtype != x.dtype
        or x.stride(1) != 1
        or (bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype))
    ):
        raise ValueError(
            f"x {x.dtype}, weight {weight.dtype} and bias must have one dtype, rows of x must be contiguous, "
            "bias one entry per row of weight"
        )
