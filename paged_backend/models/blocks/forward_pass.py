"""What blocks are given: memory while they are made, and the step at hand while they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paged_backend.errors import EngineError
from paged_backend.models.blocks.products import Products
from paged_backend.models.layer_spec import AdapterSite
from paged_backend.models.quantization.quantization import MXFP4, Quantization
from paged_backend.models.step import StepTensors
from paged_kernels.experts import MXFP4 as MXFP4_FORMAT
from paged_kernels.experts import ExpertLinear, empty_experts
from paged_kernels.linear import PLAIN, Linear, empty_linear
from paged_kernels.reference import Ops


@dataclass(frozen=True)
class Allocate:
    """Gives a layer's blocks the memory of their parameters, uninitialised."""

    dtype: torch.dtype  # of the weights, unless they are quantised
    device: torch.device
    quantization: Quantization | None = None
    prefix: str = ""  # of the layer's modules in the checkpoint, such as model.layers.0.

    def __call__(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the weights' type, or of another, on their device."""
        return torch.empty(sizes, dtype=dtype or self.dtype, device=self.device)

    def linear(self, site: AdapterSite, bias: bool = False, *, partial: bool = False) -> Linear:
        """The packed product of a site, in the format that the checkpoint has its modules in. partial: as in Linear.

        Raises:
            EngineError: its modules are quantised in different ways, or in a way that their sizes do not allow.
        """
        if self.quantization is None:
            rows = sum(site.out_sizes)
            return Linear(self(rows, site.in_size), self(rows) if bias else None, partial=partial)
        format = self.quantization.format_of(
            [self.prefix + module for module in site.modules], site.out_sizes, site.in_size
        )
        return replace(
            empty_linear(sum(site.out_sizes), site.in_size, format, self.dtype, self.device, bias=bias), partial=partial
        )

    def experts(
        self, modules: Sequence[Sequence[str]], out_sizes: Sequence[int], in_size: int, *, bias: bool
    ) -> ExpertLinear:
        """A matrix of each expert, in the format that the checkpoint has it in. modules: of each expert, those that its
        matrix is packed from, within the layer, with so many rows each.

        Raises:
            EngineError: the sizes do not allow that format.
        """
        format = PLAIN
        if self.quantization is not None and self.quantization.name == MXFP4:
            format = MXFP4_FORMAT
            if in_size % format.block[1]:
                raise EngineError(
                    f"quantization_config: mxfp4 has groups of {format.block[1]} numbers, and rows of experts are of "
                    f"{in_size}"
                )
        elif self.quantization is not None:
            names = [[self.prefix + module for module in of_expert] for of_expert in modules]
            format = self.quantization.format_of_experts(names, out_sizes, in_size)
        return empty_experts(len(modules), sum(out_sizes), in_size, format, self.dtype, self.device, bias=bias)


@dataclass(frozen=True)
class RopeTensors:
    """Rotary positions as attention reads them (models/rope.py)."""

    table: Tensor | None = None  # [max_len, rotated numbers of a head] float32; None: nothing is rotated
    query_factors: Tensor | None = None  # [max_len] float32, by which queries are multiplied; None: by nothing


@dataclass(frozen=True)
class ForwardPass:
    """One step on its way through the blocks."""

    ops: Ops
    products: Products
    step: StepTensors
    ropes: Mapping[str | None, RopeTensors]  # by their names in AttentionSpec.rope
