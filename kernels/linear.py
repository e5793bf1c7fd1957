"""A matrix that activations are multiplied with, as a value that ops take whole: how it is stored is a matter of this file, the reference and products.py."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Linear:
    """x -> x @ weight.T + bias. Two are the same only if they are one object."""

    weight: Tensor  # [out, in], of the activations' type, rows contiguous
    bias: Tensor | None = None  # [out], of the weight's type
    partial: bool = False  # the product is this rank's part of a sum over ranks (rank_ops.py)
