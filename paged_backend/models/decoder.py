"""The forward pass: one decoder for every supported architecture, from a step's tensors to the logits of its sampled
rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paged_backend.models.blocks.forward_pass import ForwardPass, RopeTensors
from paged_backend.models.blocks.products import AdaptedProducts
from paged_backend.models.step import LayerPages, StepTensors
from paged_backend.models.weights import Weights
from paged_kernels.reference import Ops


class Decoder:
    """Weights, position tables and ops. Keeps no state between steps: K and V are in the pages it is given."""

    def __init__(
        self, weights: Weights, ropes: Mapping[str, RopeTensors], ops: Ops, adapted: AdaptedProducts | None = None
    ) -> None:
        """ropes: by their names in AttentionSpec.rope. adapted: the products of steps whose sequences have adapters;
        without any there is no such step.
        """
        self._weights = weights
        self._ropes = ropes
        self._ops = ops
        self._adapted = adapted
        # rounded, as transformers does it
        self._embedding_multiplier = torch.tensor(weights.ends.embedding_multiplier, dtype=self.dtype).item()

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and logits."""
        return self._weights.embedding.dtype

    def forward(self, step: StepTensors, kv_pages: Sequence[LayerPages], out: Tensor | None = None) -> Tensor:
        """Computes a step's tokens, writes their K and V into kv_pages (of each layer) and returns the logits of
        step.logit_indices, [M, vocab] in the weights' type, in `out` if given.
        """
        x = self.hidden(step, kv_pages)
        return self.logits(x if step.logit_indices is None else x.index_select(0, step.logit_indices), out)

    def hidden(self, step: StepTensors, kv_pages: Sequence[LayerPages]) -> Tensor:
        """As `forward`, but returns what the last layer makes of all the step's tokens, [T, hidden], which the next
        step may write over.
        """
        shape = step.shape
        self._ops.plan_attention(
            step.seq_lens[: shape.num_outputs],
            step.query_starts[: shape.num_sequences],
            shape.num_decodes,
            step.max_query_len,
        )
        adapted = self._adapted if shape.adapted else None
        if adapted is not None:
            adapted.begin(step)
        at = ForwardPass(self._ops, adapted or self._ops, step, self._ropes)
        x = self._ops.embedding(step.input_ids, self._weights.embedding, self._embedding_multiplier)
        for layer, pages in zip(self._weights.layers, kv_pages, strict=True):
            x = layer.forward(x, pages, at)
        return x

    def logits(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[k, hidden] of `hidden` -> [k, vocab]; of several ranks each has its part of the vocabulary
        (Ops.gather_logits).
        """
        weights = self._weights
        logits = self._ops.norm_linear(x, weights.final_norm, weights.head, out=out)
        if weights.ends.logit_multiplier == 1 and weights.ends.logit_soft_cap is None:
            return logits
        return self._ops.scale_logits(logits, weights.ends.logit_multiplier, weights.ends.logit_soft_cap)

    def normed(self, x: Tensor) -> Tensor:
        """[k, hidden] of `hidden` -> the same after the final norm: what transformers calls the last hidden state."""
        return self._ops.norm(x, self._weights.final_norm)
