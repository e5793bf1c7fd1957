"""The forward pass: one decoder for every supported architecture, from a step's tensors to the logits of its sampled rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paged_backend.models.architecture import Architecture
from paged_backend.models.linears import Linears, PlainLinears
from paged_backend.models.step import StepTensors
from paged_backend.models.weights import LayerWeights, Weights
from paged_kernels.reference import Ops


class Decoder:
    """Weights, position table and ops, bound to an architecture. Keeps no state between steps: K and V are in the pages it is given."""

    def __init__(self, architecture: Architecture, weights: Weights, rope_table: Tensor, ops: Ops, adapted: Linears | None = None) -> None:
        """adapted: the products of steps whose sequences have adapters; without any there is no such step."""
        self._architecture = architecture
        self._weights = weights
        self._rope_table = rope_table
        self._ops = ops
        plain = PlainLinears(ops, architecture.rms_norm_eps)
        self._linears: Mapping[bool, Linears] = {False: plain, True: adapted or plain}  # by StepShape.adapted
        self._scale = architecture.head_dim**-0.5

    def forward(self, step: StepTensors, kv_pages: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """Computes a step's tokens, writes their K and V into kv_pages (one tensor a layer) and returns the logits of step.logit_indices,
        [M, vocab] in the weights' type, in `out` if given."""
        x = self.hidden(step, kv_pages)
        return self.logits(x if step.logit_indices is None else x.index_select(0, step.logit_indices), out)

    def hidden(self, step: StepTensors, kv_pages: Sequence[Tensor]) -> Tensor:
        """As `forward`, but returns what the last layer makes of all the step's tokens, [T, hidden], which the next step may write over."""
        ops, shape, linears = self._ops, step.shape, self._linears[step.shape.adapted]
        ops.plan_attention(step.seq_lens[: shape.num_outputs], step.query_starts[: shape.num_sequences], shape.num_decodes, step.max_query_len)
        linears.begin(step)
        x = ops.embedding(step.input_ids, self._weights.embedding)
        for index, (layer, window, pages) in enumerate(zip(self._weights.layers, self._architecture.sliding_windows, kv_pages, strict=True)):
            qkv = linears.qkv(index, layer, x)
            attended = self._attention(layer, window, qkv, step, pages)
            x = linears.out(index, layer, attended, x)
            x = linears.down(index, layer, linears.gated(index, layer, x), x)
        return x

    def logits(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[k, hidden] of `hidden` -> [k, vocab]."""
        return self._ops.norm_linear(x, self._weights.final_norm, self._architecture.rms_norm_eps, self._weights.head, out=out)

    def _attention(self, layer: LayerWeights, window: int | None, qkv: Tensor, step: StepTensors, pages: Tensor) -> Tensor:
        """[T, num_heads head_dim]."""
        ops, a = self._ops, self._architecture
        qk_norm = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm, a.rms_norm_eps)
        q = ops.rope_write_kv(qkv, a.num_heads, qk_norm, self._rope_table, step.positions, pages, step.slot_mapping)
        n, end = step.shape.num_decodes, step.shape.num_outputs
        parts = []
        if n:
            parts.append(ops.decode_attention(q[:n], pages, step.page_table[:n], step.seq_lens[:n], step.max_decode_len, self._scale, window))
        if step.shape.num_prefills:
            parts.append(ops.prefill_attention(q[n:], pages, step.page_table[n:end], step.prefill_lens, self._scale, window))
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended.reshape(len(qkv), -1)
