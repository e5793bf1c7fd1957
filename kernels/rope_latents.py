"""What happens between the products and attention over latents, in one launch: the norm of what a token keeps, the
rotation of the key that all heads share and of the queries' part that meets it, and the latent into its page.

A program has one token: the first its latent, the others HEADS heads of its queries each. Rounding is the reference's.
Source: decoupled rotary positions, DeepSeek-V2 (2024), section 2.1.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paged_kernels.jit import kernel, pdl_release, pdl_wait
from paged_kernels.norm_value import Norm

_HEADS = 16  # of a program


@kernel
def _rope_latents_kernel(
    q, queries, latents, norm_weight, rope_table, positions, latent_pages, slot_mapping, eps, q_stride, q_head_stride,
    queries_stride, queries_head_stride, latents_stride, table_stride,
    NUM_HEADS: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, INTERLEAVED: tl.constexpr,
    LAUNCH_PDL: tl.constexpr, SLOTS_SETTLED: tl.constexpr,
):  # fmt: skip
    pdl_release(LAUNCH_PDL)
    pdl_wait(LAUNCH_PDL and not SLOTS_SETTLED)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pair = tl.arange(0, HALF)
    first_at = 2 * pair if INTERLEAVED else pair
    second_at = first_at + (1 if INTERLEAVED else HALF)
    angles = rope_table + tl.load(positions + token).to(tl.int64) * table_stride + pair
    cos, sin = tl.load(angles), tl.load(angles + HALF)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    dim = tl.arange(0, RANK)
    weight = tl.load(norm_weight + dim).to(tl.float32)
    pdl_wait(LAUNCH_PDL and SLOTS_SETTLED)
    if part == 0:
        source = latents + token * latents_stride
        wide = tl.load(source + dim).to(tl.float32)
        rounded: tl.constexpr = latents.dtype.element_ty
        # rounded as the reference rounds
        shrunk = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / RANK + eps)).to(rounded)
        normed = (weight * shrunk.to(tl.float32)).to(rounded)
        first = tl.load(source + RANK + first_at).to(tl.float32)
        second = tl.load(source + RANK + second_at).to(tl.float32)
        target = latent_pages + slot * (RANK + 2 * HALF)
        stored: tl.constexpr = latent_pages.dtype.element_ty
        to_store = pair < tl.where(slot >= 0, HALF, 0)
        tl.store(target + dim, normed.to(stored), mask=dim < tl.where(slot >= 0, RANK, 0))
        tl.store(target + RANK + first_at, (first * cos - second * sin).to(rounded).to(stored), mask=to_store)
        tl.store(target + RANK + second_at, (second * cos + first * sin).to(rounded).to(stored), mask=to_store)
    else:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)
        inside = (head < NUM_HEADS)[:, None] & (pair < HALF)[None, :]
        asked = q + token * q_stride + (head * q_head_stride)[:, None]
        turned = queries + token * queries_stride + (head * queries_head_stride)[:, None]
        x = tl.load(asked + first_at[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(asked + second_at[None, :], mask=inside, other=0.0).to(tl.float32)
        of_first = x * cos[None, :] - y * sin[None, :]
        of_second = y * cos[None, :] + x * sin[None, :]
        tl.store(turned + first_at[None, :], of_first.to(queries.dtype.element_ty), mask=inside)
        tl.store(turned + second_at[None, :], of_second.to(queries.dtype.element_ty), mask=inside)


def rope_write_latents(
    q: torch.Tensor, queries: torch.Tensor, latents: torch.Tensor, norm: Norm, rope_table: torch.Tensor,
    positions: torch.Tensor, latent_pages: torch.Tensor, slot_mapping: torch.Tensor, *, interleaved: bool = False,
    launch_pdl: bool = False, slots_settled: bool = False,
) -> None:  # fmt: skip
    """Rotates q [T, heads, R] into queries, of the same shape; norms the first numbers of latents [T, rank + R],
    rotates the last R and stores both at their slots.

    q, queries, latents: of one dtype, rows may be strided, the last dimension is contiguous. norm: an RMS norm of
    [rank] without bias. rope_table: [max_len, R] float32, cosines in the first half of a row, sines in the second;
    pairs are (i, i + R / 2), or (2 i, 2 i + 1) if interleaved. positions: [T] integers < max_len. latent_pages:
    [num_pages, page_size, rank + R], contiguous, any floating dtype. slot_mapping: [T] integers, page_id * page_size +
    offset; -1 stores nothing. launch_pdl, slots_settled: as of rope_kv.rope_write_kv. Raises ValueError for shapes,
    strides, dtypes or norms that do not fit.
    """
    rotary = q.shape[2]
    _check(q, queries, latents, norm, rope_table, positions, latent_pages, slot_mapping)
    num_tokens, num_heads = q.shape[:2]
    if num_tokens == 0:
        return
    _rope_latents_kernel[(num_tokens, 1 + triton.cdiv(num_heads, _HEADS))](
        q, queries, latents, norm.weight, rope_table, positions, latent_pages, slot_mapping, norm.eps, q.stride(0),
        q.stride(1), queries.stride(0), queries.stride(1), latents.stride(0), rope_table.stride(0),
        NUM_HEADS=num_heads, RANK=latents.shape[1] - rotary, HALF=rotary // 2, HEADS=_HEADS, INTERLEAVED=interleaved,
        LAUNCH_PDL=launch_pdl, SLOTS_SETTLED=slots_settled, num_warps=4,
    )  # fmt: skip


def _check(
    q: torch.Tensor, queries: torch.Tensor, latents: torch.Tensor, norm: Norm, rope_table: torch.Tensor,
    positions: torch.Tensor, latent_pages: torch.Tensor, slot_mapping: torch.Tensor,
) -> None:  # fmt: skip
    num_tokens, _, rotary = q.shape
    rank = latents.shape[1] - rotary
    if any(size < 2 or size & (size - 1) for size in (rank, rotary)):
        raise ValueError(f"latents of {rank} + {rotary} numbers are not of powers of two")
    if queries.shape != q.shape or len(latents) != num_tokens or not q.dtype == queries.dtype == latents.dtype:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, queries {tuple(queries.shape)} {queries.dtype} and latents "
            f"{tuple(latents.shape)} {latents.dtype} do not fit each other"
        )
    if norm.weight.shape != (rank,) or norm.weight.dtype != latents.dtype or not norm.is_plain:
        raise ValueError(f"latents of {rank} numbers have a plain RMS norm of as many, in {latents.dtype}")
    if rope_table.shape[1] != rotary or rope_table.dtype != torch.float32 or rope_table.stride(1) != 1:
        raise ValueError(f"rope_table {tuple(rope_table.shape)} {rope_table.dtype} does not fit {rotary} numbers")
    if positions.shape != (num_tokens,) or slot_mapping.shape != (num_tokens,):
        raise ValueError(
            f"{num_tokens} tokens, but positions {tuple(positions.shape)} and slot_mapping {tuple(slot_mapping.shape)}"
        )
    if latent_pages.shape[2] != rank + rotary or not latent_pages.is_contiguous():
        raise ValueError(f"latent_pages {tuple(latent_pages.shape)} are not contiguous latents of {rank} + {rotary}")
    if q.stride(2) != 1 or queries.stride(2) != 1 or latents.stride(1) != 1:
        raise ValueError("heads and latents must be contiguous")
