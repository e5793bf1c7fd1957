"""The forward pass: one decoder for every supported architecture, from a step's tensors to the logits of its sampled rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from paged_backend.models.architecture import Architecture
from paged_backend.models.weights import LayerWeights, Weights
from paged_backend.step_tensors import StepTensors


class DecoderOps(Protocol):
    """What the decoder computes with: `paged_kernels.reference`, which documents each op, or kernels of the same names."""

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor: ...
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...
    def silu_mul(self, gate_up: Tensor) -> Tensor: ...
    def rope_write_kv(
        self,
        qkv: Tensor,
        num_heads: int,
        qk_norm: tuple[Tensor, Tensor, float] | None,
        rope_table: Tensor,
        positions: Tensor,
        kv_pages: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor: ...
    def plan_attention(self, seq_lens: Tensor, query_starts: Tensor, num_decodes: int, max_query_len: int) -> None: ...
    def decode_attention(
        self, q: Tensor, kv_pages: Tensor, page_table: Tensor, seq_lens: Tensor, max_seq_len: int, scale: float, sliding_window: int | None = None
    ) -> Tensor: ...
    def prefill_attention(
        self, q: Tensor, kv_pages: Tensor, page_table: Tensor, lens: Sequence[tuple[int, int]], scale: float, sliding_window: int | None = None
    ) -> Tensor: ...


class Decoder:
    """Weights, position table and ops, bound to an architecture. Keeps no state between steps: K and V are in the pages it is given."""

    def __init__(self, architecture: Architecture, weights: Weights, rope_table: Tensor, ops: DecoderOps) -> None:
        self._architecture = architecture
        self._weights = weights
        self._rope_table = rope_table
        self._ops = ops
        self._scale = architecture.head_dim**-0.5

    def forward(self, step: StepTensors, kv_pages: Sequence[Tensor]) -> Tensor:
        """Computes a step's tokens, writes their K and V into kv_pages (one tensor a layer) and returns the logits of step.logit_indices,
        [M, vocab] float32."""
        ops, eps = self._ops, self._architecture.rms_norm_eps
        longest = max((query_len for query_len, _ in step.prefill_lens), default=0)
        ops.plan_attention(step.seq_lens, step.query_starts, step.num_decodes, longest)
        residual = ops.embedding(step.input_ids, self._weights.embedding)
        x = ops.rms_norm(residual, self._weights.layers[0].input_norm, eps)
        next_norms = [layer.input_norm for layer in self._weights.layers[1:]] + [self._weights.final_norm]
        windows = self._architecture.sliding_windows
        for layer, window, pages, next_norm in zip(self._weights.layers, windows, kv_pages, next_norms, strict=True):
            x = self._attention(layer, window, x, step, pages)
            x, residual = ops.add_rms_norm(x, residual, layer.post_norm, eps)
            x = ops.linear(ops.silu_mul(ops.linear(x, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)
            x, residual = ops.add_rms_norm(x, residual, next_norm, eps)
        wanted = x if step.logit_indices is None else x[step.logit_indices]
        return ops.linear(wanted, self._weights.head).float()

    def _attention(self, layer: LayerWeights, window: int | None, x: Tensor, step: StepTensors, pages: Tensor) -> Tensor:
        ops, a = self._ops, self._architecture
        qkv = ops.linear(x, layer.qkv, layer.qkv_bias)
        qk_norm = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm, a.rms_norm_eps)
        q = ops.rope_write_kv(qkv, a.num_heads, qk_norm, self._rope_table, step.positions, pages, step.slot_mapping)
        n = step.num_decodes
        parts = []
        if n:
            parts.append(ops.decode_attention(q[:n], pages, step.page_table[:n], step.seq_lens[:n], step.max_decode_len, self._scale, window))
        if step.prefill_lens:
            parts.append(ops.prefill_attention(q[n:], pages, step.page_table[n:], step.prefill_lens, self._scale, window))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return ops.linear(attended.reshape(len(x), -1), layer.out, layer.out_bias)
