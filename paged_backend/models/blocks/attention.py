"""Attention over pages: norm, packed q, k and v, rotary positions, decodes and prefills, output product."""

from __future__ import annotations

import torch
from torch import Tensor

from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass
from paged_backend.models.layer_spec import AttentionSpec
from paged_kernels.linear import Linear


class Attention:
    """The first block of a layer. Parameters are uninitialised until `parameters` are filled."""

    def __init__(self, spec: AttentionSpec, hidden_size: int, norm_eps: float, empty: Allocate) -> None:
        self.spec = spec
        self._eps = norm_eps
        qkv_site, out_site = spec.sites(hidden_size)
        self.norm = empty(hidden_size)
        self.qkv = empty.linear(qkv_site, spec.qkv_bias)
        self.q_norm = empty(spec.head_dim) if spec.qk_norm else None
        self.k_norm = empty(spec.head_dim) if spec.qk_norm else None
        self.out = empty.linear(out_site, spec.out_bias and spec.shard.first, partial=spec.shard.size > 1)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out

    def parameters(self) -> dict[str, Tensor]:
        """Name in the checkpoint, within the layer -> the tensor, or the rows of a packed one, that it fills."""
        found: dict[str, Tensor | None] = {
            "input_layernorm.weight": self.norm,
            "self_attn.q_norm.weight": self.q_norm,
            "self_attn.k_norm.weight": self.k_norm,
            "self_attn.o_proj.weight": self.out.weight,
            "self_attn.o_proj.bias": self.out.bias,
        }
        for kind, packed in (("weight", self.qkv.weight), ("bias", self.qkv.bias)):
            if packed is not None:
                parts = torch.split(packed, [self.spec.q_size, self.spec.kv_size, self.spec.kv_size])
                found |= {f"self_attn.{letter}_proj.{kind}": part for letter, part in zip("qkv", parts, strict=True)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def forward(self, x: Tensor, pages: Tensor, at: ForwardPass) -> Tensor:
        """[T, hidden] -> [T, hidden], the residual stream before and after; x may be written over. pages: the layer's KV store."""
        qkv = at.products.norm_linear(x, self.norm, self._eps, self.qkv)
        return at.products.add_linear(self._attend(qkv, pages, at), self.out, x)

    def _attend(self, qkv: Tensor, pages: Tensor, at: ForwardPass) -> Tensor:
        """[T, q_size + 2 kv_size] -> [T, q_size]; writes K and V into the pages first."""
        ops, step, spec = at.ops, at.step, self.spec
        scale, window = spec.head_dim**-0.5, spec.sliding_window
        qk_norm = None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm, self._eps)
        q = ops.rope_write_kv(qkv, spec.num_heads, qk_norm, at.rope_table, step.positions, pages, step.slot_mapping)
        n, end = step.shape.num_decodes, step.shape.num_outputs
        parts = []
        if n:
            parts.append(ops.decode_attention(q[:n], pages, step.page_table[:n], step.seq_lens[:n], step.max_decode_len, scale, window))
        if step.shape.num_prefills:
            parts.append(ops.prefill_attention(q[n:], pages, step.page_table[n:end], step.prefill_lens, scale, window))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended.reshape(len(qkv), -1)
