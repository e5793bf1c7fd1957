"""The forward pass: one decoder for every supported architecture, from a step's tensors to the logits of its sampled
rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paged_backend.models.blocks.attention import Attention, plan_attention
from paged_backend.models.blocks.forward_pass import Allocate, ForwardPass, RopeTensors
from paged_backend.models.blocks.mla import LatentAttention
from paged_backend.models.blocks.mlp import Mlp
from paged_backend.models.blocks.moe import NOTHING, MoeMlp, Shapes
from paged_backend.models.blocks.products import AdaptedProducts
from paged_backend.models.layer_spec import AttentionSpec, EndsSpec, LayerSpec, MlpSpec
from paged_backend.models.step import LayerPages, StepTensors
from paged_backend.models.tapped import Tapped
from paged_kernels.experts import ExpertLinear
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm
from paged_kernels.reference import Ops


class Layer:
    """Attention and perceptron, one after the other or side by side, as a LayerSpec says: fill its `parameters`."""

    def __init__(self, spec: LayerSpec, hidden_size: int, empty: Allocate) -> None:
        self._parallel = spec.parallel
        self.attention = (
            Attention(spec, spec.attention, hidden_size, empty)
            if isinstance(spec.attention, AttentionSpec)
            else LatentAttention(spec, spec.attention, hidden_size, empty)
        )
        self.mlp = (
            Mlp(spec, spec.mlp, hidden_size, empty)
            if isinstance(spec.mlp, MlpSpec)
            else MoeMlp(spec, spec.mlp, hidden_size, empty)
        )

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order of AdapterLayout.sites."""
        return *self.attention.linears, *self.mlp.linears

    @property
    def packed_experts(self) -> tuple[ExpertLinear, ...]:
        """The experts' matrices, if they are stored in few bits: those are no parameters, but filled by modules."""
        return self.mlp.packed if isinstance(self.mlp, MoeMlp) else ()

    def parameters(self, stored: Shapes = NOTHING) -> dict[str, Tensor]:
        """Name in the checkpoint, within the layer -> the tensor, or the part of a packed one, that it fills. stored:
        shapes that the checkpoint has, by the names within the layer.
        """
        mlp = self.mlp.parameters(stored) if isinstance(self.mlp, MoeMlp) else self.mlp.parameters()
        return self.attention.parameters() | mlp

    def forward(self, x: Tensor, pages: LayerPages, at: ForwardPass) -> Tensor:
        """[T, hidden] -> [T, hidden], the residual stream before and after; x may be written over. pages: where its K
        and V are.
        """
        if not self._parallel:
            return self.mlp.forward(self.attention.forward(x, pages, at), at)
        norm = self.attention.residual.before
        assert norm is not None and isinstance(self.mlp, Mlp), "blocks side by side read the stream through one norm"
        normed = at.ops.norm(x, norm)
        return self.mlp.forward(self.attention.forward(x, pages, at, normed), at, normed)


@dataclass(frozen=True)
class Parameters:
    """What a decoder computes with."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear  # [vocab, hidden]; its weight is the embedding itself if tied
    ends: EndsSpec


class Decoder:
    """Parameters, position tables and ops. Keeps no state between steps: K and V are in the pages it is given."""

    def __init__(
        self,
        weights: Parameters,
        ropes: Mapping[str | None, RopeTensors],
        ops: Ops,
        adapted: AdaptedProducts | None = None,
    ) -> None:
        """ropes: by their names in AttentionSpec.rope. adapted: the products of steps whose sequences have adapters;
        without any there is no such step.
        """
        self._weights = weights
        self._ropes = ropes
        self._ops = ops
        self._adapted = adapted
        self._layers: list[Layer | Tapped] = list(weights.layers)
        # rounded, as transformers does it
        self._embedding_multiplier = torch.tensor(weights.ends.embedding_multiplier, dtype=self.dtype).item()

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and logits."""
        return self._weights.embedding.dtype

    def tap(self, after: Sequence[int], max_tokens: int) -> Tensor:
        """From now on a step leaves what its tokens are after so many layers, one beside the other: [max_tokens,
        len(after) * hidden]. To be called once.
        """
        hidden_size = self._weights.embedding.shape[1]
        found = self._weights.embedding.new_zeros(max_tokens, len(after) * hidden_size)
        for number, columns in zip(after, torch.split(found, hidden_size, dim=1), strict=True):
            self._layers[number - 1] = Tapped(self._layers[number - 1], columns)
        return found

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
        plan_attention(self._ops, step)
        adapted = self._adapted if step.shape.adapted else None
        if adapted is not None:
            adapted.begin(step)
        at = ForwardPass(self._ops, adapted or self._ops, step, self._ropes)
        x = self._ops.embedding(step.input_ids, self._weights.embedding, self._embedding_multiplier)
        for layer, pages in zip(self._layers, kv_pages, strict=True):
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
