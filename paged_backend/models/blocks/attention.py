"""Attention over pages: norm, packed q, k and v, rotary positions, decodes and prefills, output product."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass
from paged_backend.models.blocks.residual import Residual, allocate_norm, norm_parameters
from paged_backend.models.layer_spec import AttentionSpec, LayerSpec, NormSpec
from paged_backend.models.step import LayerPages, StepTensors
from paged_kernels.linear import Linear
from paged_kernels.lone_token import HeadRules, LoneToken
from paged_kernels.norm_value import Norm
from paged_kernels.reference import Ops


def plan_attention(ops: Ops, step: StepTensors) -> None:
    """To be called before the first layer: how a step's attention is shared out is the same in all."""
    shape = step.shape
    ops.plan_attention(
        step.seq_lens[: shape.num_outputs],
        step.query_starts[: shape.num_sequences],
        shape.num_decodes,
        step.max_query_len,
        step.plan["rows"][: shape.num_decodes] if shape.drafts else None,
    )


class Attention:
    """The first block of a layer. Parameters are uninitialised until `parameters` are filled."""

    def __init__(self, layer: LayerSpec, spec: AttentionSpec, hidden_size: int, empty: Allocate) -> None:
        self.spec = spec
        self.residual = Residual(layer.attention_branch, layer.norm, hidden_size, empty)
        qkv_site, out_site = spec.sites(hidden_size)
        self.qkv = empty.linear(qkv_site, spec.qkv_bias)
        self.qk_norm = _allocate_qk_norm(spec, layer.norm, empty)
        self.sinks = empty(spec.num_heads) if spec.sinks else None
        self._score_options = spec.scale, spec.sliding_window, spec.soft_cap, self.sinks
        self.out = empty.linear(out_site, spec.out_bias and spec.shard.first, partial=spec.shard.size > 1)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out

    def parameters(self) -> dict[str, Tensor]:
        """Name in the checkpoint, within the layer -> the tensor, or the rows of a packed one, that it fills."""
        spec = self.spec
        sizes = (
            [spec.q_size, spec.kv_size, spec.kv_size] if len(spec.qkv_names) > 1 else [spec.q_size + 2 * spec.kv_size]
        )
        found: dict[str, Tensor | None] = {
            "self_attn.o_proj.weight": self.out.weight,
            "self_attn.o_proj.bias": self.out.bias,
            "self_attn.sinks": self.sinks,
        }
        for kind, packed in (("weight", self.qkv.weight), ("bias", self.qkv.bias)):
            if packed is not None:
                found |= {
                    f"self_attn.{name}.{kind}": part
                    for name, part in zip(spec.qkv_names, torch.split(packed, sizes), strict=True)
                }
        for letter, norm in zip("qk", self.qk_norm or (), strict=False):
            found |= norm_parameters(f"self_attn.{letter}_norm", norm)
        return self.residual.parameters() | {name: tensor for name, tensor in found.items() if tensor is not None}

    def forward(self, x: Tensor, pages: LayerPages, at: ForwardPass, normed: Tensor | None = None) -> Tensor:
        """[T, hidden] -> [T, hidden], the residual stream before and after; x may be written over. pages: where the
        layer's K and V are.
        normed: the stream after the norm before, if it was computed already."""
        before = (x, self.residual.before) if normed is None else (normed, None)
        qkv = at.products.norm_linear(*before, self.qkv)
        return self.residual.add_product(self._attend(qkv, pages, at), self.out, x, at)

    def _attend(self, qkv: Tensor, pages: LayerPages, at: ForwardPass) -> Tensor:
        """[T, q_size + 2 kv_size] -> [T, q_size]; writes K and V into the pages first."""
        ops, step, spec, options = at.ops, at.step, self.spec, self._score_options
        group, rope = step.groups[pages.group], at.ropes[spec.rope]
        if step.shape.is_lone:
            heads = HeadRules(spec.num_heads, self.qk_norm, rope.table, spec.interleaved, rope.query_factors)
            sequence = group.page_table[:1], step.seq_lens[:1], step.max_decode_len
            token = LoneToken(step.positions, group.slot_mapping, *sequence)
            return ops.lone_attention(qkv, heads, pages.tensor, token, *options).reshape(1, -1)
        where = step.positions, pages.tensor, group.slot_mapping
        q = ops.rope_write_kv(
            qkv, spec.num_heads, self.qk_norm, rope.table, *where, spec.interleaved, rope.query_factors
        )
        n, end = step.shape.num_decodes, step.shape.num_outputs
        parts = []
        if n:
            parts.append(
                ops.decode_attention(
                    q[:n], pages.tensor, group.page_table[:n], step.seq_lens[:n], step.max_decode_len, *options
                )
            )
        if step.shape.num_prefills:
            parts.append(
                ops.prefill_attention(q[n:], pages.tensor, group.page_table[n:end], step.prefill_lens, *options)
            )
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended.reshape(len(qkv), -1)


def _allocate_qk_norm(spec: AttentionSpec, norm: NormSpec, empty: Allocate) -> tuple[Norm, Norm] | None:
    if spec.qk_norm is None:
        return None
    sizes = (spec.head_dim, spec.head_dim) if spec.qk_norm == "head" else (spec.q_size, spec.kv_size)
    q_norm, k_norm = (allocate_norm(norm, size, empty) for size in sizes)
    if spec.qk_norm == "projection" and spec.shard.size > 1:
        return replace(q_norm, partial=True), replace(k_norm, partial=True)
    return q_norm, k_norm
