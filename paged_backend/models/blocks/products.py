"""How blocks multiply: by the ops, or in steps with adapters by `AdaptedProducts`, which adds those of the sequences to
the products.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from paged_backend.models.adapter_layout import AdapterLayout, PlacedSite
from paged_backend.models.step import StepTensors
from paged_kernels.linear import Linear
from paged_kernels.norm_value import Norm
from paged_kernels.reference import Ops


class AdaptedProducts:
    """The ops' products, under their names, and where a sequence has an adapter, its adapter's. The norm before and the
    gate behind stand alone: adapters come in between.

    Scratch memory is shared by the steps, which run one after another.
    """

    def __init__(
        self,
        ops: Ops,
        sites: Mapping[Linear, PlacedSite],
        layout: AdapterLayout,
        weights: Tensor,
        ranks: Tensor,
        row_adapters: Tensor,
        max_tokens: int,
    ) -> None:
        """sites: of every linear of the model's blocks. weights [adapters, elements] and ranks int32 [adapters]:
        kernels/lora.py.
        row_adapters: int32 [rows], -1: no adapter. max_tokens of a step."""
        self._ops = ops
        self._sites, self._weights, self._ranks, self._row_adapters = sites, weights, ranks, row_adapters
        self._max_rank = weights.shape[1] // layout.size
        num_adapters = len(weights)

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=weights.device)

        self._token_adapters, self._order = empty(max_tokens), empty(max_tokens)
        sizes = range(1, max_tokens + 1)
        self._tiles = empty(max(ops.num_tiles(num_tokens, num_adapters) for num_tokens in sizes), 3)
        self._grouped = self._order, self._tiles  # of the step at hand
        widths = {(site.in_size, len(site.modules)): site for site in layout.sites}
        largest = max(
            math.prod(self._hidden_shape(site, num_tokens)) for site in widths.values() for num_tokens in sizes
        )
        self._hidden = empty(largest).view(torch.float32)

    def begin(self, step: StepTensors) -> None:
        """Before the first layer of a step."""
        num_tokens, num_adapters = step.shape.num_tokens, len(self._weights)
        token_adapters = self._token_adapters[:num_tokens]
        self._ops.assign_adapters(step.plan["rows"], step.query_starts, self._row_adapters, token_adapters)
        self._grouped = self._order[:num_tokens], self._tiles[: self._ops.num_tiles(num_tokens, num_adapters)]
        self._ops.group_tokens(token_adapters, num_adapters, *self._grouped)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        if linear.partial:  # the adapter's products are parts of the same sum
            return self._ops.sum_shares(self._adapt(linear, x, self._ops.share_of_linear(x, linear)))
        return self._adapt(linear, x, self._ops.linear(x, linear))

    def norm_linear(self, x: Tensor, norm: Norm | None, linear: Linear) -> Tensor:
        return self.linear(x if norm is None else self._ops.norm(x, norm), linear)

    def norm_gated_linear(self, x: Tensor, norm: Norm | None, linear: Linear, activation: str = "silu") -> Tensor:
        return self._ops.gate(self.norm_linear(x, norm, linear), activation)

    def norm_active_linear(self, x: Tensor, norm: Norm | None, linear: Linear, activation: str) -> Tensor:
        return self._ops.activate(self.norm_linear(x, norm, linear), activation)

    def add_linear(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        if linear.partial:
            return self._ops.add_shares(self._adapt(linear, x, self._ops.share_of_linear(x, linear)), residual)
        return self._adapt(linear, x, self._ops.add_linear(x, linear, residual))

    def _adapt(self, linear: Linear, x: Tensor, out: Tensor) -> Tensor:
        """out, which is written over."""
        site = self._sites[linear]
        shape = self._hidden_shape(site, len(x))
        hidden = self._hidden[: math.prod(shape)].view(shape)
        self._ops.adapter_shrink(x, self._weights, self._ranks, *self._grouped, site.offset, len(site.modules), hidden)
        self._ops.adapter_expand(hidden, self._weights, self._ranks, *self._grouped, site.b_offset, site.out_sizes, out)
        return out

    def _hidden_shape(self, site: PlacedSite, num_tokens: int) -> tuple[int, int, int]:
        return self._ops.num_splits(num_tokens, site.in_size), num_tokens, len(site.modules) * self._max_rank


Products = Ops | AdaptedProducts
