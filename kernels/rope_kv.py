"""What happens between the QKV product and attention, in one launch: split into heads, norm of queries and keys,
rotation, K and V into their pages.

A program has one token and HEADS of its heads, each as two halves, because number i of a head is rotated against number
i + head_dim / 2. If only ROTARY numbers of a head are rotated, the halves are those of these numbers and then those of
the rest, which have the angle 0; interleaved pairs are (2 i, 2 i + 1). Rounding is the reference's: the normalised
head, its product with the weight and the rotated head are rounded to the input's type.
Sources: rotary embedding, Su et al., 2021, paired as in Hugging Face checkpoints; norm of queries and keys, Henry et
    al., 2020, as in Qwen3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.norm_value import Norm

_HALF_HEAD_ELEMENTS = 1024  # of a program


@triton.jit
def _first_of(dim, HALF: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where the first numbers of a head's pairs lie, the pairs of what is not rotated last: [HALF_PAD]."""
    if INTERLEAVED:
        dim = 2 * dim
    elif ROTARY < 2 * HALF:
        dim = tl.where(dim < ROTARY // 2, dim, dim + ROTARY // 2)
    return dim


@triton.jit
def _second_of(dim, HALF: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where the second numbers of a head's pairs lie: [HALF_PAD]."""
    if INTERLEAVED:
        dim = 2 * dim + 1
    elif ROTARY < 2 * HALF:
        dim = tl.where(dim < ROTARY // 2, dim + ROTARY // 2, dim + HALF)
    else:
        dim = dim + HALF
    return dim


@triton.jit
def _norm_halves(
    first,
    second,
    first_at,
    second_at,
    q_weight,
    k_weight,
    is_query,
    inside,
    eps,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    PLUS_ONE: tl.constexpr,
):
    """Both halves of [HEADS, head_dim] float32, normed together, rounded to DTYPE twice (once with PLUS_ONE), float32
    again.
    """
    q_first = tl.load(q_weight + first_at, mask=inside, other=0.0).to(tl.float32)
    q_second = tl.load(q_weight + second_at, mask=inside, other=0.0).to(tl.float32)
    k_first = tl.load(k_weight + first_at, mask=inside, other=0.0).to(tl.float32)
    k_second = tl.load(k_weight + second_at, mask=inside, other=0.0).to(tl.float32)
    shrink = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / SIZE + eps)[:, None]
    first_scale = tl.where(is_query[:, None], q_first[None, :], k_first[None, :])
    second_scale = tl.where(is_query[:, None], q_second[None, :], k_second[None, :])
    if PLUS_ONE:
        first = (first * shrink) * (first_scale + 1.0)
        second = (second * shrink) * (second_scale + 1.0)
    else:
        first = (first * shrink).to(DTYPE).to(tl.float32) * first_scale
        second = (second * shrink).to(DTYPE).to(tl.float32) * second_scale
    return first.to(DTYPE).to(tl.float32), second.to(DTYPE).to(tl.float32)


@triton.jit
def _as_stored(x, STORED: tl.constexpr):
    """reference_layers.as_stored."""
    if STORED == tl.float8e4nv:  # noqa: SIM300 - no constant, a type
        x = tl.clamp(x.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(STORED)


@kernel(unaligned=["positions", "slot_mapping"])
def _rope_write_kv_kernel(
    qkv, out, q_weight, k_weight, rope_table, query_factors, positions, kv_pages, slot_mapping, eps,
    qkv_stride, out_stride, rope_stride, page_stride, value_stride, head_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, PLUS_ONE: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, FACTORS: tl.constexpr, LAUNCH_PDL: tl.constexpr, SLOTS_SETTLED: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL and not SLOTS_SETTLED)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dim = tl.arange(0, HALF_PAD)
    first_at = _first_of(dim, HALF, ROTARY, INTERLEAVED)
    second_at = _second_of(dim, HALF, ROTARY, INTERLEAVED)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (dim < HALF)[None, :]

    slot = tl.load(slot_mapping + token).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    if ROTARY > 0:
        angle = rope_table + position * rope_stride + dim
        cos = tl.load(angle, mask=dim < ROTARY // 2, other=0.0 if ROTARY == HEAD_DIM else 1.0)[None, :]
        sin = tl.load(angle + ROTARY // 2, mask=dim < ROTARY // 2, other=0.0)[None, :]
    pdl_wait(LAUNCH_PDL and SLOTS_SETTLED)
    cell = qkv + token * qkv_stride + head[:, None] * HEAD_DIM
    raw_first = tl.load(cell + first_at[None, :], mask=inside, other=0.0).to(tl.float32)
    raw_second = tl.load(cell + second_at[None, :], mask=inside, other=0.0).to(tl.float32)

    first, second = raw_first, raw_second
    if NORM:
        first, second = _norm_halves(
            first, second, first_at, second_at, q_weight, k_weight, is_query, dim < HALF, eps, DTYPE, HEAD_DIM, PLUS_ONE
        )
    if ROTARY > 0:
        turned_first = first * cos - second * sin
        turned_second = second * cos + first * sin
    else:
        turned_first, turned_second = first, second
    if FACTORS:
        factor = tl.where(is_query, tl.load(query_factors + position), 1.0)[:, None]
        turned_first = turned_first.to(DTYPE).to(tl.float32) * factor
        turned_second = turned_second.to(DTYPE).to(tl.float32) * factor
    rotated_first = tl.where(is_value[:, None], raw_first, turned_first).to(DTYPE)
    rotated_second = tl.where(is_value[:, None], raw_second, turned_second).to(DTYPE)

    to_query = inside & is_query[:, None]
    query = out + token * out_stride + head[:, None] * HEAD_DIM
    tl.store(query + first_at[None, :], rotated_first, mask=to_query)
    tl.store(query + second_at[None, :], rotated_second, mask=to_query)
    stored = tl.where(slot >= 0, NUM_HEADS + 2 * NUM_KV_HEADS, 0)
    to_store = inside & ((head >= NUM_HEADS) & (head < stored))[:, None]
    kv_head = (head - NUM_HEADS) % NUM_KV_HEADS
    place = (
        slot // PAGE_SIZE * page_stride
        + is_value.to(tl.int64) * value_stride
        + kv_head * head_stride
        + slot % PAGE_SIZE * HEAD_DIM
    )
    target = kv_pages + place[:, None]
    tl.store(target + first_at[None, :], _as_stored(rotated_first, kv_pages.dtype.element_ty), mask=to_store)
    tl.store(target + second_at[None, :], _as_stored(rotated_second, kv_pages.dtype.element_ty), mask=to_store)


def rope_write_kv(
    qkv: torch.Tensor, num_heads: int, qk_norm: tuple[Norm, Norm] | None, rope_table: torch.Tensor | None,
    positions: torch.Tensor, kv_pages: torch.Tensor, slot_mapping: torch.Tensor, *, interleaved: bool = False,
    query_factors: torch.Tensor | None = None, out: torch.Tensor | None = None, launch_pdl: bool = False,
    slots_settled: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Rotates the queries into out [T, num_heads, D], stores keys (rotated) and values at their slots; returns out.

    qkv: [T, (num_heads + 2 num_kv_heads) D], rows may be strided. qk_norm: RMS norms without bias of each query head
    and each key head, [D]; dtype of qkv.
    rope_table: [max_len, R] float32, cosines in the first half of a row, sines in the second; the first R numbers of a
    head are rotated, R even, in pairs (i, i + R / 2), or (2 i, 2 i + 1) if interleaved; None: no rotation.
    query_factors: [max_len] float32, by which a query is multiplied at its position.
    positions: [T] integers < max_len.
    kv_pages: [num_pages, 2, num_kv_heads, page_size, D], any floating dtype. slot_mapping: [T] integers, page_id *
    page_size + offset; -1 stores nothing (its query is computed all the same).
    launch_pdl: begin while the kernel before drains (programmatic dependent launch), but read nothing before that
    kernel is complete; with slots_settled, positions, slots and rope_table are read earlier: only for when none was
    written by the kernel before, nor by one it did not wait for. Raises ValueError for shapes, strides, dtypes or norms
    that do not fit.
    """
    num_tokens = qkv.shape[0]
    num_kv_heads, page_size, head_dim = kv_pages.shape[2:]
    out = qkv.new_empty(num_tokens, num_heads, head_dim) if out is None else out
    check_heads(qkv, num_heads, rope_table, positions, kv_pages, slot_mapping, out)
    q_norm, k_norm = (Norm(qkv, 0.0),) * 2 if qk_norm is None else qk_norm
    if qk_norm is not None:
        check_norms(q_norm, k_norm, head_dim)
    if num_tokens == 0:
        return out
    half_pad = triton.next_power_of_2(head_dim // 2)
    heads = min(max(1, _HALF_HEAD_ELEMENTS // half_pad), triton.next_power_of_2(num_heads + 2 * num_kv_heads))
    table, factors = (qkv if tensor is None else tensor for tensor in (rope_table, query_factors))
    _rope_write_kv_kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, heads))](
        qkv, out, q_norm.weight, k_norm.weight, table, factors, positions, kv_pages, slot_mapping, q_norm.eps,
        qkv.stride(0), out.stride(0), table.stride(0), kv_pages.stride(0), kv_pages.stride(1), kv_pages.stride(2),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, HALF_PAD=half_pad, PAGE_SIZE=page_size,
        HEADS=heads, NORM=qk_norm is not None, PLUS_ONE=q_norm.plus_one,
        ROTARY=0 if rope_table is None else rope_table.shape[1], INTERLEAVED=interleaved,
        FACTORS=query_factors is not None, LAUNCH_PDL=launch_pdl, SLOTS_SETTLED=slots_settled, num_warps=4,
    )  # fmt: skip
    return out


def check_norms(q_norm: Norm, k_norm: Norm, head_dim: int) -> None:
    """Raises ValueError for norms that are not of single heads, or not of one kind."""
    if q_norm.weight.shape != (head_dim,) or k_norm.weight.shape != (head_dim,):
        raise ValueError(
            f"norms of {tuple(q_norm.weight.shape)} and {tuple(k_norm.weight.shape)} numbers are not of heads of "
            f"{head_dim}"
        )
    if (q_norm.eps, q_norm.plus_one) != (k_norm.eps, k_norm.plus_one) or any(
        norm.centred or norm.bias is not None for norm in (q_norm, k_norm)
    ):
        raise ValueError("queries and keys must have RMS norms of one kind, without bias")


def check_heads(
    qkv: torch.Tensor, num_heads: int, rope_table: torch.Tensor | None, positions: torch.Tensor,
    kv_pages: torch.Tensor, slot_mapping: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    """Raises ValueError for shapes, strides or dtypes that do not fit; out: [T, num_heads, D]."""
    _, _, num_kv_heads, _, head_dim = kv_pages.shape
    if qkv.shape[1] != (num_heads + 2 * num_kv_heads) * head_dim or head_dim % 2:
        raise ValueError(f"qkv rows of {qkv.shape[1]} are not {num_heads} + 2 * {num_kv_heads} heads of {head_dim}")
    if out.shape != (len(qkv), num_heads, head_dim) or out.dtype != qkv.dtype:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit qkv {tuple(qkv.shape)} {qkv.dtype}")
    if rope_table is not None and (
        not 0 < rope_table.shape[1] <= head_dim or rope_table.shape[1] % 2 or rope_table.dtype != torch.float32
    ):
        raise ValueError(f"rope_table {tuple(rope_table.shape)} {rope_table.dtype} does not fit heads of {head_dim}")
    if rope_table is not None and rope_table.stride(1) != 1:
        raise ValueError("rows of rope_table must be contiguous")
    if positions.shape != (len(qkv),) or slot_mapping.shape != (len(qkv),):
        raise ValueError(
            f"{len(qkv)} tokens, but positions {tuple(positions.shape)} and slot_mapping {tuple(slot_mapping.shape)}"
        )
    if kv_pages.stride()[3:] != (head_dim, 1) or qkv.stride(1) != 1 or out.stride()[1:] != (head_dim, 1):
        raise ValueError("rows, heads and pages must be contiguous")
