"""The four products of a layer: plain, or with the adapters of a step's sequences added to them."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from paged_backend.models.adapter_layout import AdapterLayout, Site
from paged_backend.models.step import StepTensors
from paged_backend.models.weights import LayerWeights
from paged_kernels.reference import Ops


class Linears(Protocol):
    """T tokens; `index` is the layer's."""

    def begin(self, step: StepTensors) -> None:
        """Before the first layer of a step."""

    def qkv(self, index: int, layer: LayerWeights, x: Tensor) -> Tensor:
        """[T, hidden], before its norm -> [T, (num_heads + 2 num_kv_heads) head_dim]."""

    def out(self, index: int, layer: LayerWeights, attended: Tensor, residual: Tensor) -> Tensor:
        """[T, num_heads head_dim], added to the residual [T, hidden], which may be written over."""

    def gated(self, index: int, layer: LayerWeights, x: Tensor) -> Tensor:
        """[T, hidden], before its norm -> [T, intermediate]."""

    def down(self, index: int, layer: LayerWeights, gated: Tensor, residual: Tensor) -> Tensor:
        """[T, intermediate], added to the residual."""


class PlainLinears:
    def __init__(self, ops: Ops, eps: float) -> None:
        self._ops, self._eps = ops, eps

    def begin(self, step: StepTensors) -> None:
        pass

    def qkv(self, index: int, layer: LayerWeights, x: Tensor) -> Tensor:
        return self._ops.norm_linear(x, layer.input_norm, self._eps, layer.qkv, layer.qkv_bias)

    def out(self, index: int, layer: LayerWeights, attended: Tensor, residual: Tensor) -> Tensor:
        return self._ops.add_linear(attended, layer.out, layer.out_bias, residual)

    def gated(self, index: int, layer: LayerWeights, x: Tensor) -> Tensor:
        return self._ops.norm_gated_linear(x, layer.post_norm, self._eps, layer.gate_up, layer.gate_up_bias)

    def down(self, index: int, layer: LayerWeights, gated: Tensor, residual: Tensor) -> Tensor:
        return self._ops.add_linear(gated, layer.down, layer.down_bias, residual)


class AdaptedLinears:
    """Products and, where a sequence has an adapter, its adapter's. The norm before and the gate behind stand alone: adapters come in between.

    Scratch memory is shared by the steps, which run one after another.
    """

    def __init__(self, ops: Ops, eps: float, layout: AdapterLayout, weights: Tensor, ranks: Tensor, row_berths: Tensor, max_tokens: int) -> None:
        """weights [berths, elements] and ranks int32 [berths]: kernels/lora.py. row_berths: int32 [rows], -1: no adapter. max_tokens of a step."""
        self._ops, self._eps, self._layout, self._weights, self._ranks, self._row_berths = ops, eps, layout, weights, ranks, row_berths
        self._max_rank = weights.shape[1] // layout.size
        num_berths = len(weights)

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=weights.device)

        self._token_berths, self._order = empty(max_tokens), empty(max_tokens)
        sizes, layer = range(1, max_tokens + 1), layout.layers[0]
        self._tiles = empty(max(ops.num_tiles(num_tokens, num_berths) for num_tokens in sizes), 3)
        self._grouped = self._order, self._tiles  # of the step at hand
        largest = max(math.prod(self._hidden_shape(site, num_tokens)) for site in (layer.qkv, layer.out, layer.gate_up, layer.down) for num_tokens in sizes)
        self._hidden = empty(largest).view(torch.float32)

    def begin(self, step: StepTensors) -> None:
        num_tokens, num_berths = step.shape.num_tokens, len(self._weights)
        token_berths = self._token_berths[:num_tokens]
        self._ops.assign_adapters(step.plan["rows"], step.query_starts, self._row_berths, token_berths)
        self._grouped = self._order[:num_tokens], self._tiles[: self._ops.num_tiles(num_tokens, num_berths)]
        self._ops.group_tokens(token_berths, num_berths, *self._grouped)

    def qkv(self, index: int, layer: LayerWeights, x: Tensor) -> Tensor:
        normed = self._ops.rms_norm(x, layer.input_norm, self._eps)
        return self._adapt(self._layout.layers[index].qkv, normed, self._ops.linear(normed, layer.qkv, layer.qkv_bias))

    def out(self, index: int, layer: LayerWeights, attended: Tensor, residual: Tensor) -> Tensor:
        return self._adapt(self._layout.layers[index].out, attended, self._ops.add_linear(attended, layer.out, layer.out_bias, residual))

    def gated(self, index: int, layer: LayerWeights, x: Tensor) -> Tensor:
        normed = self._ops.rms_norm(x, layer.post_norm, self._eps)
        return self._ops.silu_mul(self._adapt(self._layout.layers[index].gate_up, normed, self._ops.linear(normed, layer.gate_up, layer.gate_up_bias)))

    def down(self, index: int, layer: LayerWeights, gated: Tensor, residual: Tensor) -> Tensor:
        return self._adapt(self._layout.layers[index].down, gated, self._ops.add_linear(gated, layer.down, layer.down_bias, residual))

    def _adapt(self, site: Site, x: Tensor, out: Tensor) -> Tensor:
        """out, which is written over."""
        shape = self._hidden_shape(site, len(x))
        hidden = self._hidden[: math.prod(shape)].view(shape)
        self._ops.adapter_shrink(x, self._weights, self._ranks, *self._grouped, site.offset, len(site.modules), hidden)
        self._ops.adapter_expand(hidden, self._weights, self._ranks, *self._grouped, site.b_offset, site.out_sizes, out)
        return out

    def _hidden_shape(self, site: Site, num_tokens: int) -> tuple[int, int, int]:
        return self._ops.num_splits(num_tokens, site.in_size), num_tokens, len(site.modules) * self._max_rank
