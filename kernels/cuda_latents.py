"""The ops of `reference_latents.py` by kernels: a part of CudaOps, which plans attention and keeps the scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paged_kernels.decode_plan import DecodePlan
from paged_kernels.latent_decode import latent_decode_attention
from paged_kernels.latent_prefill import latent_prefill_attention
from paged_kernels.norm_value import Norm
from paged_kernels.reference import Ops
from paged_kernels.rope_latents import rope_write_latents


class CudaLatents(Ops):
    """Matrices of heads are multiplied by cuBLAS, all heads in one launch."""

    _pdl: bool
    _plans: Mapping[int | None, DecodePlan]  # of the step at hand
    _prefill: tuple[Tensor, Tensor, int] | None  # query_starts, seq_lens, max_query_len of the step at hand

    def absorb_write_latents(
        self,
        q: Tensor,
        latents: Tensor,
        norm: Norm,
        key_weight: Tensor,
        rope_table: Tensor,
        positions: Tensor,
        latent_pages: Tensor,
        slot_mapping: Tensor,
        interleaved: bool,
    ) -> Tensor:
        rank, rotary = key_weight.shape[2], rope_table.shape[1]
        queries = q.new_empty(*q.shape[:2], rank + rotary)
        of_latent, rotated = q.split([q.shape[2] - rotary, rotary], dim=2)
        torch.bmm(of_latent.transpose(0, 1), key_weight, out=queries[..., :rank].transpose(0, 1))
        rope_write_latents(
            rotated,
            queries[..., rank:],
            latents,
            norm,
            rope_table,
            positions,
            latent_pages,
            slot_mapping,
            interleaved=interleaved,
            launch_pdl=self._pdl,
            slots_settled=True,
        )
        return queries

    def multiply_heads(self, x: Tensor, weight: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:2], weight.shape[1])
        torch.bmm(x.transpose(0, 1), weight.transpose(1, 2), out=out.transpose(0, 1))
        return out

    def latent_decode_attention(
        self, q: Tensor, latent_pages: Tensor, page_table: Tensor, seq_lens: Tensor, scale: float, rank: int
    ) -> Tensor:
        """For the lengths that were planned; rows of length 0 stay undefined."""
        out = q.new_empty(*q.shape[:2], rank)
        plan, pdl = self._plans[None], self._pdl
        latent_decode_attention(q, latent_pages, page_table, out, plan, scale=scale, launch_pdl=pdl, plan_settled=pdl)
        return out

    def latent_prefill_attention(
        self,
        q: Tensor,
        latent_pages: Tensor,
        page_table: Tensor,
        lens: Sequence[tuple[int, int]],
        scale: float,
        rank: int,
    ) -> Tensor:
        """For the queries that were planned."""
        assert self._prefill is not None, "plan_attention was told of no prefill"
        query_starts, seq_lens, _ = self._prefill
        out = q.new_empty(*q.shape[:2], rank)
        latent_prefill_attention(q, latent_pages, page_table, query_starts, seq_lens, out, scale=scale)
        return out
