"""A norm of a residual stream or of heads, as a value that ops take whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Norm:
    """x -> x / sqrt(mean(x²) + eps) * weight (RMSNorm, Zhang and Sennrich, 2019), unless a field says otherwise."""

    weight: Tensor  # [n], of the activations' type
    eps: float
    bias: Tensor | None = None  # [n], added last
    centred: bool = False  # the mean is subtracted first: LayerNorm (Ba et al., 2016)
    plus_one: bool = False  # times 1 + weight, in float32 (Gemma)
    partial: bool = False  # of this rank's part of a row, of which every rank has as many numbers (rank_ops.py)

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is an RMS norm with a weight and nothing else, which products can take in before them."""
        return self.bias is None and not self.centred and not self.plus_one
