"""Attention over latents (MLA; DeepSeek-V2, 2024): norm, packed products of the hidden state, queries of their own
normed numbers, absorbed queries against latents in pages, output product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass
from paged_backend.models.blocks.residual import Residual, allocate_norm, norm_parameters
from paged_backend.models.layer_spec import LatentSpec, LayerSpec, NormSpec
from paged_backend.models.step import LayerPages
from paged_kernels.linear import Linear

# whatever rms_norm_eps is, as in the models' own code
_LATENT_NORM = NormSpec(eps=1e-6)


class LatentAttention:
    """The first block of a layer. Parameters are uninitialised until `parameters` are filled."""

    def __init__(self, layer: LayerSpec, spec: LatentSpec, hidden_size: int, empty: Allocate) -> None:
        self.spec = spec
        self.residual = Residual(layer.attention_branch, layer.norm, hidden_size, empty)
        first_site, *query_sites, out_site = spec.sites(hidden_size)
        self.first = empty.linear(first_site)  # queries, or what they come from, and the latent
        self.queries = tuple(empty.linear(site) for site in query_sites)  # one, or none
        self.query_norm = None if spec.q_rank is None else allocate_norm(_LATENT_NORM, spec.q_rank, empty)
        self.latent_norm = allocate_norm(_LATENT_NORM, spec.rank, empty)
        # each head's keys and values of a latent: no product reads them as they lie, so that they are floats always
        self.heads = empty(spec.num_heads * (spec.nope_dim + spec.value_dim), spec.rank)
        self.key_weight, self.value_weight = torch.split(
            self.heads.view(spec.num_heads, -1, spec.rank), [spec.nope_dim, spec.value_dim], dim=1
        )
        self.out = empty.linear(out_site, partial=spec.shard.size > 1)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.first, *self.queries, self.out

    def parameters(self) -> dict[str, Tensor]:
        """Name in the checkpoint, within the layer -> the tensor, or the rows of a packed one, that it fills."""
        spec = self.spec
        queries, latents = torch.split(self.first.weight, [self.first.num_rows - spec.head_dim, spec.head_dim])
        found = {
            f"self_attn.{'q_proj' if spec.q_rank is None else 'q_a_proj'}.weight": queries,
            "self_attn.kv_a_proj_with_mqa.weight": latents,
            "self_attn.kv_b_proj.weight": self.heads,
            "self_attn.o_proj.weight": self.out.weight,
        }
        if self.query_norm is not None:
            found["self_attn.q_b_proj.weight"] = self.queries[0].weight
            found |= norm_parameters("self_attn.q_a_layernorm", self.query_norm)
        return self.residual.parameters() | found | norm_parameters("self_attn.kv_a_layernorm", self.latent_norm)

    def forward(self, x: Tensor, pages: LayerPages, at: ForwardPass, normed: Tensor | None = None) -> Tensor:
        """[T, hidden] -> [T, hidden], the residual stream before and after; x may be written over. pages: where the
        layer's latents are. normed: the stream after the norm before, if it was computed already.
        """
        spec = self.spec
        before = (x, self.residual.before) if normed is None else (normed, None)
        first = at.products.norm_linear(*before, self.first)
        queries, latents = torch.split(first, [first.shape[1] - spec.head_dim, spec.head_dim], dim=1)
        for linear in self.queries:
            queries = at.products.norm_linear(queries, self.query_norm, linear)
        attended = self._attend(queries.view(len(x), spec.num_heads, -1), latents, pages, at)
        values = at.ops.multiply_heads(attended, self.value_weight)
        return self.residual.add_product(values.reshape(len(x), -1), self.out, x, at)

    def _attend(self, q: Tensor, latents: Tensor, pages: LayerPages, at: ForwardPass) -> Tensor:
        """[T, heads, nope_dim + rotary_dim] and [T, rank + rotary_dim] -> weighted sums of latents, [T, heads, rank];
        writes the latents into the pages first.
        """
        ops, step, spec = at.ops, at.step, self.spec
        group, rope = step.groups[pages.group], at.ropes[spec.rope]
        assert rope.table is not None
        where = step.positions, pages.tensor, group.slot_mapping
        q = ops.absorb_write_latents(
            q, latents, self.latent_norm, self.key_weight, rope.table, *where, spec.interleaved
        )
        n, end = step.shape.num_decodes, step.shape.num_outputs
        parts = []
        if n:
            parts.append(
                ops.latent_decode_attention(
                    q[:n], pages.tensor, group.page_table[:n], step.seq_lens[:n], spec.scale, spec.rank
                )
            )
        if step.shape.num_prefills:
            parts.append(
                ops.latent_prefill_attention(
                    q[n:], pages.tensor, group.page_table[n:end], step.prefill_lens, spec.scale, spec.rank
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)
